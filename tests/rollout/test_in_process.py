import random

import numpy as np
import pytest
import torch
import transformers
from engine_models import CONFIGS, STOP, VOCABULARY, build

from kdrl_pl.models.language_model import LanguageModel
from kdrl_pl.rollout.engine import Completions, RolloutEngine, RolloutInterrupted
from kdrl_pl.rollout.in_process import InProcessEngine
from kdrl_pl.rollout.sampling import Sampling
from kdrl_pl.rollout.streams import group_keys, uniforms

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [3], [20, 21, 22, 23], [69, 0, 42, 17, 8]]


@pytest.fixture(scope="module")
def student():
    return build()


def roll(student, prompts=PROMPTS, group_size=3, stops=(STOP,), uids=None, keys=None, should_stop=None, **settings):
    engine = InProcessEngine(**{name: settings.pop(name) for name in ("max_rows", "compact_at") if name in settings})
    engine.sync(student, stops)
    if keys is None:
        keys = group_keys(0, 0, uids or [str(number) for number in range(len(prompts))], [0] * len(prompts), group_size)
    sampling = Sampling(**{"max_tokens": 20, **settings})
    return engine.generate(prompts, group_size, sampling, keys, should_stop)


def plain_logprobs(student, prompt, tokens, temperature=1.0):
    """Log-probs of one row by a forward over the whole row, no cache, no padding, in eval mode."""
    ids = torch.tensor([[*prompt, *tokens]], device=student.model.device)
    was_training = student.training
    student.eval()
    with torch.no_grad():
        logits = student.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1, :VOCABULARY]
    student.train(was_training)
    return (logits.float().cpu() / temperature).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_plain_forward_of_each_row(name, temperature):
    student = build(name)
    student.train()  # GPT-2's dropout of 0.1 must not act
    done = roll(student, temperature=temperature)
    lengths = [len(tokens) for tokens in done.token_ids]
    assert len(done) == 12 and max(lengths) == 20 and min(lengths) < 20
    for row, (tokens, logprobs) in enumerate(zip(done.token_ids, done.logprobs, strict=True)):
        expected = plain_logprobs(student, PROMPTS[row // 3], tokens, temperature)
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_a_row_depends_on_its_key_and_prompt_only(name):
    student = build(name)
    whole = roll(student, group_size=4)
    assert len({tuple(tokens) for tokens in whole.token_ids}) == 16

    # One at a time: no padding, no compaction, no group.
    keys = group_keys(0, 0, [str(number) for number in range(4)], [0] * 4, 4)
    for row in range(16):
        alone = roll(student, prompts=[PROMPTS[row // 4]], group_size=1, keys=[keys[row]])
        assert alone.token_ids == [whole.token_ids[row]]
        assert alone.logprobs[0] == pytest.approx(whole.logprobs[row], abs=1e-5)
        assert alone.finished == [whole.finished[row]]

    # Smaller groups are the first samples of larger ones; the order of prompts does not matter.
    two = roll(student, group_size=2)
    assert two.token_ids == [whole.token_ids[4 * prompt + sample] for prompt in range(4) for sample in range(2)]
    turned = roll(student, prompts=PROMPTS[::-1], group_size=2, uids=["3", "2", "1", "0"])
    assert [turned.token_ids[2 * p : 2 * p + 2] for p in (3, 2, 1, 0)] == [
        two.token_ids[2 * p : 2 * p + 2] for p in range(4)
    ]


@pytest.mark.parametrize("settings", [{"compact_at": 1.0}, {"compact_at": 1e-6}, {"compact_at": 0.5}])
@pytest.mark.parametrize("max_rows", [None, 1, 2, 3, 5, 100])  # 2 and 5 cut through groups of 3
def test_samples_do_not_depend_on_compaction_and_batch_size(student, settings, max_rows):
    whole = roll(student)
    other = roll(student, max_rows=max_rows, **settings)
    assert other.token_ids == whole.token_ids
    assert other.finished == whole.finished
    for one, two in zip(other.logprobs, whole.logprobs, strict=True):
        assert one == pytest.approx(two, abs=1e-5)


def test_prompts_are_prefilled_once_and_finished_rows_leave(student):
    shapes = []
    hook = student.model.register_forward_pre_hook(
        lambda _, __, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    try:
        done = roll(student, group_size=8, max_tokens=30)
        assert shapes[0] == (4, 9)  # four prompts, the longest of nine tokens; not 32
        assert shapes[1] == (32, 1)
        unfinished = [sum(len(tokens) > step for tokens in done.token_ids) for step in range(1, len(shapes))]
        assert all(live <= rows <= live / (1 - 0.125) for (rows, _), live in zip(shapes[1:], unfinished, strict=True))
        shapes.clear()
        roll(student, group_size=8, max_tokens=30, compact_at=1.0)
        assert shapes[1:] == [(32, 1)] * (len(shapes) - 1)
    finally:
        hook.remove()


def test_token_t_is_the_inverse_cdf_at_number_t_of_the_row(student):
    keys = group_keys(3, 1, ["train/9"], [0], 2)
    done = roll(
        student, prompts=[[5, 6, 7]], group_size=2, keys=keys, stops=(), max_tokens=100
    )  # two blocks of numbers
    for key, tokens in zip(keys, done.token_ids, strict=True):
        with torch.no_grad():
            logits = student.eval().model(input_ids=torch.tensor([[5, 6, 7, *tokens]])).logits[0, 2:-1, :VOCABULARY]
        running = logits.double().softmax(-1).cumsum(-1).numpy()
        numbers = uniforms([key], 0, 100)[0]
        assert tokens == [int(np.searchsorted(row, number)) for row, number in zip(running, numbers, strict=True)]


def test_more_tokens_than_one_block_of_random_numbers(student):
    whole = roll(student, prompts=[[5, 6, 7]], stops=(), max_tokens=120)
    assert [len(tokens) for tokens in whole.token_ids] == [120] * 3
    short = roll(student, prompts=[[5, 6, 7]], stops=(), max_tokens=65)
    assert [tokens[:65] for tokens in whole.token_ids] == short.token_ids
    # Rows that leave the batch in the first block must not shift the numbers of the others in the second.
    stopped = roll(student, prompts=[[5, 6, 7]], group_size=8, max_tokens=120)
    free = roll(student, prompts=[[5, 6, 7]], group_size=8, max_tokens=120, stops=())
    lengths = [len(tokens) for tokens in stopped.token_ids]
    assert min(lengths) < 64 < max(lengths)
    for one, two in zip(stopped.token_ids, free.token_ids, strict=True):
        assert one == two[: len(one)]


def test_rows_end_at_the_first_stop_token_and_keep_it(student):
    free = roll(student, stops=(), max_tokens=40)
    done = roll(student, stops=(STOP, 9), max_tokens=40, stop_token_ids=[33])
    for whole, tokens, logprobs, finished in zip(
        free.token_ids, done.token_ids, done.logprobs, done.finished, strict=True
    ):
        ends = [position for position, token in enumerate(whole) if token in (STOP, 9, 33)]
        assert tokens == whole[: ends[0] + 1 if ends else 40]
        assert finished == bool(ends)
        assert len(logprobs) == len(tokens)
    assert {tokens[-1] for tokens, end in zip(done.token_ids, done.finished, strict=True) if end} == {STOP, 9, 33}
    assert not any(free.finished)


def test_every_row_may_end_with_its_first_token(student):
    done = roll(student, stops=range(VOCABULARY))
    assert [len(tokens) for tokens in done.token_ids] == [1] * 12
    assert all(done.finished)


def test_budget_of_one_token(student):
    done = roll(student, stops=(), max_tokens=1)
    assert [len(tokens) for tokens in done.token_ids] == [1] * 12
    assert not any(done.finished)


def test_padded_vocabulary_rows_are_never_sampled():
    student = build()
    with torch.no_grad():
        head = student.model.get_output_embeddings().weight
        head[VOCABULARY:] = head[:10] * 5  # the likeliest ids by far, were they allowed
    for temperature in (0.0, 2.0):
        done = roll(student, stops=(50256,), temperature=temperature)  # an end token this vocabulary does not have
        assert max(max(tokens) for tokens in done.token_ids) < VOCABULARY
        expected = plain_logprobs(student, PROMPTS[0], done.token_ids[0], temperature or 1.0)
        assert done.logprobs[0] == pytest.approx(expected.tolist(), abs=1e-5)


def test_greedy_takes_the_likeliest_token(student):
    done = roll(student, group_size=2, temperature=0.0)
    student.eval()
    for row, tokens in enumerate(done.token_ids):
        prompt = PROMPTS[row // 2]
        logits = student.model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, :, :VOCABULARY]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
        assert done.logprobs[row] == pytest.approx(plain_logprobs(student, prompt, tokens).tolist(), abs=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.5}, {"top_p": 0.6}, {"top_k": 4}, {"min_p": 0.3}, {"top_k": 6, "top_p": 0.8}]
)
def test_frequencies_match_the_distribution(student, settings):
    count = 4000
    done = roll(student, prompts=[PROMPTS[0]], group_size=count, stops=(), max_tokens=1, **settings)
    with torch.no_grad():
        logits = student.eval().model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1, :VOCABULARY].double()
    # An independent reference: sort, cut, normalise.
    weights = np.exp(logits.numpy() / settings.get("temperature", 1.0))
    order = np.argsort(-weights)
    kept = order[: settings.get("top_k") or None]
    shares = weights[kept] / weights[kept].sum()
    kept = kept[: int((np.cumsum(shares) < settings.get("top_p", 1.0) - 1e-12).sum()) + 1]
    kept = kept[weights[kept] >= settings.get("min_p", 0.0) * weights[kept].max()]
    expected = np.zeros(VOCABULARY)
    expected[kept] = weights[kept] / weights[kept].sum()

    drawn = [tokens[0] for tokens in done.token_ids]
    observed = np.bincount(drawn, minlength=VOCABULARY)
    assert observed[expected == 0].sum() == 0
    common = expected * count >= 5
    cells = np.append(observed[common], observed[~common].sum()), np.append(expected[common], expected[~common].sum())
    cells = [cell[cells[1] > 0] for cell in cells]
    statistic = ((cells[0] - cells[1] * count) ** 2 / (cells[1] * count)).sum()
    freedom = len(cells[0]) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 8  # beyond the 0.1 % point of chi-square for every freedom
    assert [row[0] for row in done.logprobs] == pytest.approx(np.log(expected[drawn]).tolist(), abs=1e-5)


def test_leaves_no_trace(student):
    student.train()
    student.model.model.layers[1].eval()  # a module its owner put in eval mode stays there
    modes = [module.training for module in student.modules()]
    state, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    done = roll(student)
    assert [module.training for module in student.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == (python, numpy)
    assert all(parameter.grad is None for parameter in student.parameters())
    assert isinstance(done.token_ids[0][0], int) and isinstance(done.logprobs[0][0], float)
    # The next training forward works: nothing was left in inference mode.
    student.model(input_ids=torch.tensor([[3, 4]])).logits.sum().backward()
    student.zero_grad(set_to_none=True)
    student.eval()


@pytest.mark.parametrize("calls", [0, 1, 7])
def test_stops_within_one_token_step(student, calls):
    student.train()
    polled = []

    def should_stop():
        polled.append(1)
        return len(polled) > calls

    with pytest.raises(RolloutInterrupted):
        roll(student, should_stop=should_stop, stops=())
    assert len(polled) == calls + 1
    assert student.training
    polled = []
    assert len(roll(student, should_stop=lambda: bool(polled.append(1)), max_tokens=6, stops=())) == 12
    assert len(polled) == 6  # once per forward: the prefill and five tokens


def test_autocast_of_the_caller_is_used(student):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = roll(student, stops=(), max_tokens=4)
    exact = roll(student, stops=(), max_tokens=4)
    pairs = zip(coarse.token_ids, exact.token_ids, coarse.logprobs, exact.logprobs, strict=True)
    differences = [abs(one[0] - two[0]) for a, b, one, two in pairs if a[0] == b[0]]
    assert len(differences) >= 8 and 1e-4 < max(differences) < 0.2


def test_no_prompts_no_rows(student):
    assert roll(student, prompts=[]) == Completions([], [], [])


def test_equal_prompts_share_a_distribution_and_not_a_stream(student):
    done = roll(student, prompts=[[5, 6], [5, 6]], uids=["a", "b"], group_size=1, stops=())
    assert done.token_ids[0] != done.token_ids[1]


def test_satisfies_the_protocol():
    assert isinstance(InProcessEngine(), RolloutEngine)


def test_nan_weights_are_reported():
    student = build()
    with torch.no_grad():
        student.model.get_output_embeddings().weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN"):
        roll(student)


def test_bad_requests_are_refused_with_the_cure(student):
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        roll(student, prompts=[[3], []])
    with pytest.raises(ValueError, match="prompt 0 has ids from 3 to 80; the model knows 0 to 79"):
        roll(student, prompts=[[3, 80]])
    with pytest.raises(ValueError, match="5 keys for 4 prompts with group_size 3"):
        roll(student, keys=[1] * 5)
    with pytest.raises(ValueError, match="stop_token_ids names 70"):
        roll(student, stop_token_ids=[70])
    with pytest.raises(ValueError, match="sync"):
        InProcessEngine().generate([[3]], 1, Sampling(), [1])
    with pytest.raises(ValueError, match="max_rows is 0"):
        InProcessEngine(max_rows=0)
    with pytest.raises(ValueError, match="compact_at is 0"):
        InProcessEngine(compact_at=0)


def test_learned_positions_end_rotary_ones_do_not(student):
    gpt2 = build("gpt2")  # 64 positions; the last token is never read
    assert len(roll(gpt2, prompts=[[3] * 5], group_size=1, stops=(), max_tokens=60).token_ids[0]) == 60
    with pytest.raises(ValueError, match="need 65 positions, but GPT2LMHeadModel has 64; lower"):
        roll(gpt2, prompts=[[3] * 5], group_size=1, max_tokens=61)
    assert len(roll(student, prompts=[[3]], group_size=1, stops=(), max_tokens=130).token_ids[0]) == 130


def test_models_without_a_cache_are_refused():
    config = transformers.MambaConfig(vocab_size=80, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = transformers.MambaForCausalLM(config)
    with pytest.raises(ValueError, match=r"MambaForCausalLM\.forward takes no past_key_values"):
        InProcessEngine().sync(LanguageModel(model, VOCABULARY), [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CONFIGS)
def test_on_a_gpu(name):
    student = build(name).to("cuda")
    done = roll(student, group_size=8, max_tokens=50, top_p=0.95)
    assert done.token_ids == roll(student, group_size=8, max_tokens=50, top_p=0.95, max_rows=5).token_ids
    done = roll(student, group_size=8, max_tokens=50)
    for row, (tokens, logprobs) in enumerate(zip(done.token_ids, done.logprobs, strict=True)):
        expected = plain_logprobs(student, PROMPTS[row // 8], tokens)
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-4, rtol=0)
