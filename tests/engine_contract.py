"""What every rollout engine must do; a test class per engine derives from `EngineContract`. Tests import this module.

Samples themselves are compared by the in-process engine's own tests only: another engine draws other numbers.
"""

import contextlib
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

from kdrl_pl.models.language_model import LanguageModel
from kdrl_pl.rollout.engine import Completions, RolloutEngine, RolloutInterrupted
from kdrl_pl.rollout.sampling import Sampling
from kdrl_pl.rollout.streams import group_keys

VOCABULARY, ROWS, STOP = 70, 80, 2
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [3], [20, 21, 22, 23], [69, 0, 42, 17, 8]]
LONG = [(7 * number) % VOCABULARY for number in range(300)]  # more than one block of any engine's prompt cache


def contract_student(tied: bool = False) -> LanguageModel:
    """A Qwen2 with heads of 32, the smallest that vLLM's CPU attention has, and ten rows of padding.

    Were they allowed, the padding's ids would be the likeliest by far; its `eos_token_id` is STOP.
    """
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=ROWS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        pad_token_id=75,
        bos_token_id=1,
        eos_token_id=STOP,
        tie_word_embeddings=tied,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)  # so that log-probs differ from token to token
        head = model.get_output_embeddings().weight
        head[VOCABULARY:] = 5 * head[: ROWS - VOCABULARY]
    return LanguageModel(model.eval(), VOCABULARY)


def logits_of(student, prompt, tokens):
    """(T, V*) logits of a row's response by one plain forward over it."""
    ids = torch.tensor([[*prompt, *tokens]], device=student.device)
    with torch.no_grad():
        return student.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1, :VOCABULARY].float().cpu()


def trainer_logprobs(student, prompt, tokens, temperature=1.0):
    """(T,) log-probs of a row by the function that trains on it."""
    ids = torch.tensor([[*prompt, *tokens]], device=student.device)
    mask = torch.arange(ids.shape[1], device=student.device)[None] >= len(prompt)
    with torch.no_grad():
        return student.token_logprobs(ids, mask, temperature).logprobs[0, len(prompt) :].cpu()


class EngineContract:
    """A subclass has the fixture `engine`, one for all of its tests; each test starts with it synced to the student."""

    mean, largest = 1e-5, 1e-4  # nats between engine and trainer

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls):
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def student(cls):
        return contract_student()

    @pytest.fixture(autouse=True)
    def _synced(self, engine, student):
        engine.sync(student, [STOP])

    def roll(self, engine, prompts=PROMPTS, group_size=3, seed=0, should_stop=None, **settings) -> Completions:
        uids = [str(number) for number in range(len(prompts))]
        keys = group_keys(seed, 0, uids, [0] * len(prompts), group_size)
        return engine.generate(prompts, group_size, Sampling(**{"max_tokens": 20, **settings}), keys, should_stop)

    def check(self, student, done, prompts=PROMPTS, temperature=1.0):
        """The engine's log-probs are the trainer's."""
        group = len(done) // len(prompts)
        differences = [
            torch.tensor(logprobs) - trainer_logprobs(student, prompts[row // group], tokens, temperature)
            for row, (tokens, logprobs) in enumerate(zip(done.token_ids, done.logprobs, strict=True))
        ]
        difference = torch.cat(differences).abs()
        assert difference.mean() < self.mean and difference.max() < self.largest
        assert max(max(tokens) for tokens in done.token_ids) < VOCABULARY

    def test_satisfies_the_protocol(self, engine):
        assert isinstance(engine, RolloutEngine)

    @pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
    def test_logprobs_are_those_of_the_trainer(self, engine, student, temperature):
        # Red: another temperature, padding in the normaliser, another order than prompt-major, a shift by one.
        done = self.roll(engine, group_size=8, temperature=temperature)
        assert len(done) == 32 and {len(tokens) for tokens in done.token_ids} != {20}
        self.check(student, done, temperature=temperature)

    def test_new_weights_are_sampled_from_after_sync(self, engine, student):
        # Red: weights that stay, and keys and values of the prompt that the old weights made.
        prompts = [LONG, LONG, [5, 6]]
        self.check(student, self.roll(engine, prompts), prompts)
        old = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
        try:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in student.parameters():
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
            engine.sync(student, [STOP])
            done = self.roll(engine, prompts)
            self.check(student, done, prompts)
        finally:
            with torch.no_grad():
                for name, parameter in student.named_parameters():
                    parameter.copy_(old[name])
        with pytest.raises(AssertionError):
            self.check(student, done, prompts)

    def test_rows_end_at_the_first_stop_token_and_keep_it(self, engine, student):
        done = self.roll(engine, group_size=8, max_tokens=40, stop_token_ids=[33])
        for tokens, logprobs, finished in zip(done.token_ids, done.logprobs, done.finished, strict=True):
            stops = [position for position, token in enumerate(tokens) if token in (STOP, 33)]
            assert len(logprobs) == len(tokens)
            assert stops == ([len(tokens) - 1] if finished else [])
            assert finished or len(tokens) == 40
        assert {tokens[-1] for tokens, ended in zip(done.token_ids, done.finished, strict=True) if ended} == {STOP, 33}
        assert not all(done.finished)
        self.check(student, done)

    def test_only_named_ids_end_a_row(self, engine, student):
        engine.sync(student, [50256])  # an end token that this vocabulary does not have; the config names STOP
        done = self.roll(engine, group_size=8, max_tokens=40)
        assert [len(tokens) for tokens in done.token_ids] == [40] * 32 and not any(done.finished)
        assert any(STOP in tokens[:-1] for tokens in done.token_ids)

    def test_every_row_may_end_with_its_first_token(self, engine, student):
        engine.sync(student, range(VOCABULARY))
        done = self.roll(engine)
        assert [len(tokens) for tokens in done.token_ids] == [1] * 12 and all(done.finished)

    def test_a_budget_of_one_token(self, engine, student):
        done = self.roll(engine, max_tokens=1, group_size=1)
        assert [len(tokens) for tokens in done.token_ids] == [1] * 4
        self.check(student, done)

    def test_the_same_keys_draw_the_same_rows(self, engine):
        one, two, other = self.roll(engine), self.roll(engine), self.roll(engine, seed=1)
        assert one.token_ids == two.token_ids and one.finished == two.finished
        assert one.token_ids != other.token_ids
        assert len({tuple(tokens) for tokens in one.token_ids}) > 9  # rows of a group differ

    def test_equal_prompts_do_not_share_their_numbers(self, engine):
        done = self.roll(engine, [[5, 6], [5, 6]], group_size=1)
        assert done.token_ids[0] != done.token_ids[1]

    @pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.3}])
    def test_tokens_are_drawn_from_the_distribution_they_are_told_of(self, engine, student, settings):
        count = 1500
        done = self.roll(engine, [PROMPTS[0]], group_size=count, max_tokens=1, **settings)
        weights = (logits_of(student, PROMPTS[0], [0])[0].double() / settings.get("temperature", 1.0)).softmax(-1)
        order = weights.argsort(descending=True)
        kept = order[: settings.get("top_k") or VOCABULARY]
        kept = kept[: int((weights[kept].cumsum(0) < settings.get("top_p", 1.0) - 1e-12).sum()) + 1]
        kept = kept[weights[kept] >= settings.get("min_p", 0.0) * weights.max()]
        expected = torch.zeros(VOCABULARY, dtype=torch.float64)
        expected[kept] = weights[kept] / weights[kept].sum()
        drawn = torch.tensor([tokens[0] for tokens in done.token_ids])
        told = torch.tensor([logprobs[0] for logprobs in done.logprobs])
        assert (told - expected[drawn].log()).abs().max() < max(self.largest, 2e-5)
        observed = torch.bincount(drawn, minlength=VOCABULARY)
        common = expected * count >= 5
        wanted = torch.cat([expected[common], expected[~common].sum()[None]]) * count
        found = torch.cat([observed[common], observed[~common].sum()[None]])
        statistic = float(((found - wanted).square() / wanted.clamp(min=1)).sum())
        freedom = int(common.sum())
        assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 8  # beyond the 0.1 % point of chi-square

    def test_greedy_takes_the_likeliest_token(self, engine, student):
        done = self.roll(engine, group_size=1, temperature=0.0)
        for prompt, tokens in zip(PROMPTS, done.token_ids, strict=True):
            logits = logits_of(student, prompt, tokens)
            lost = logits.amax(-1) - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            assert lost.max() < self.largest
        self.check(student, done)

    @pytest.mark.parametrize("calls", [0, 5])
    def test_it_can_be_stopped_and_works_afterwards(self, engine, student, calls):
        polled = []

        def should_stop():
            polled.append(1)
            return len(polled) > calls

        with pytest.raises(RolloutInterrupted):
            self.roll(engine, max_tokens=200, should_stop=should_stop)
        engine.sync(student, [STOP])
        polled.clear()
        done = self.roll(engine, [PROMPTS[0]], max_tokens=6, should_stop=lambda: bool(polled.append(1)))
        assert len(done) == 3 and polled
        self.check(student, done, [PROMPTS[0]])

    def test_no_prompts_no_rows(self, engine):
        assert self.roll(engine, []) == Completions([], [], [])

    def test_nan_weights_are_reported(self, engine, student):
        # One token, and an id that no prompt holds: vLLM's cache would keep a NaN, and hand it to the rows after.
        head = student.model.get_output_embeddings().weight
        kept = head[68].clone()
        try:
            with torch.no_grad():
                head[68] = float("nan")
            engine.sync(student, [STOP])
            with pytest.raises(FloatingPointError, match="NaN"):
                self.roll(engine, max_tokens=1)
        finally:
            with torch.no_grad():
                head[68] = kept
        engine.sync(student, [STOP])
        self.check(student, self.roll(engine))

    def test_leaves_no_trace(self, engine, student):
        student.train()
        with contextlib.ExitStack() as stack:
            stack.callback(student.eval)
            before = _state()
            engine.sync(student, [STOP])
            done = self.roll(engine)
            assert _state() == before
            assert all(module.training for module in student.modules())
            assert isinstance(done.token_ids[0][0], int) and isinstance(done.logprobs[0][0], float)
            student.model(input_ids=torch.tensor([[3, 4]], device=student.device)).logits.sum().backward()
            student.zero_grad(set_to_none=True)

    def test_bad_requests_are_refused_with_the_cure(self, engine):
        with pytest.raises(ValueError, match="prompt 1 has no tokens"):
            self.roll(engine, [[3], []])
        with pytest.raises(ValueError, match="prompt 0 has ids from 3 to 80; the model knows 0 to"):
            self.roll(engine, [[3, 80]])
        with pytest.raises(ValueError, match="5 keys for 4 prompts with group_size 3"):
            engine.generate(PROMPTS, 3, Sampling(), [1] * 5)
        with pytest.raises(ValueError, match="stop_token_ids names 70"):
            self.roll(engine, stop_token_ids=[70])


def _state():
    """All that an engine could change in this process."""
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_num_threads(),
        torch.set_num_threads,
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.is_grad_enabled(),
        dict(os.environ),
    )


TWO_RANKS = """
import os, sys
import torch
sys.path.insert(0, {tests!r})
from engine_contract import PROMPTS, STOP, contract_student, trainer_logprobs
from kdrl_pl.rollout.sampling import Sampling
from kdrl_pl.rollout.vllm_engine import VLLMEngine
from kdrl_pl.rollout.vllm_server import VLLMServerEngine

torch.set_num_threads(1)
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
student = contract_student()
if {sharded}:
    from torch.distributed.fsdp import fully_shard

    for layer in student.model.model.layers:
        fully_shard(layer)
    fully_shard(student)
engine = {engine}
for prompts in (PROMPTS[: 1 + 3 * rank], PROMPTS):  # one and four prompts: ranks take different numbers of steps
    engine.sync(student, [STOP])
    keys = [100 * rank + row for row in range(2 * len(prompts))]
    done = engine.generate(prompts, 2, Sampling(max_tokens=4 + 20 * rank), keys)
    torch.distributed.barrier()
    plain = contract_student()
    for row, (tokens, logprobs) in enumerate(zip(done.token_ids, done.logprobs)):
        expected = trainer_logprobs(plain, prompts[row // 2], tokens)
        assert (torch.tensor(logprobs) - expected).abs().max() < 1e-4
print("agreed")
torch.distributed.destroy_process_group()
"""


def run_two_ranks(script):
    """Both ranks of `TWO_RANKS` agree with a plain student on every log-prob."""
    command = [sys.executable, str(script)]
    store = str(script.with_name("store"))
    ranks = [
        subprocess.Popen([*command, str(rank), store], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert all(rank.returncode == 0 and "agreed" in text for rank, text in zip(ranks, said, strict=True)), said
