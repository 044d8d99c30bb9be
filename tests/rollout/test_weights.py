"""Sampling with bfloat16 copies of the weights: what the sampler sees, how far that is, and what stays untouched."""

import copy

import pytest
import torch
from engine_models import STOP, VOCABULARY, build
from tiny_run import fit, make_module, make_rollouts, metrics_rows
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdrl_pl.rollout.in_process import InProcessEngine
from kdrl_pl.rollout.sampling import Sampling
from kdrl_pl.rollout.streams import group_keys
from kdrl_pl.rollout.weights import weights_in
from kdrl_pl.sampler_check import LIMITS

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3, 4], [20, 21, 22, 23]]


def roll(student, dtype, group_size=16, max_tokens=24, **settings):
    engine = InProcessEngine(dtype=dtype, **settings)
    engine.sync(student, [STOP])
    keys = group_keys(0, 0, ["a", "b", "c"], [0] * 3, group_size)
    return engine.generate(PROMPTS, group_size, Sampling(max_tokens=max_tokens), keys)


def drifts(model, done, group_size=16):
    """|log-prob of the sampler - that of a plain forward of `model`| of every token."""
    for row, (tokens, logprobs) in enumerate(zip(done.token_ids, done.logprobs, strict=True)):
        prompt = PROMPTS[row // group_size]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, :, :VOCABULARY]
        expected = logits[len(prompt) - 1 : -1].float().log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        yield (expected - torch.tensor(logprobs)).abs()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_the_sampler_is_the_model_in_bfloat16(name):
    # Red: log-probs of the masters, or a copy that misses some weights or casts rotary tables.
    student = build(name)
    done = roll(student, "bfloat16")
    in_bfloat16 = copy.deepcopy(student.model)
    for parameter in in_bfloat16.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    own, masters = torch.cat(list(drifts(in_bfloat16, done))), torch.cat(list(drifts(student.model, done)))
    # A cache and a padded batch round the sums of attention in another order: the same policy to one bfloat16 rounding.
    assert own.mean() < 0.75 * masters.mean()
    # The bound that the sampler check holds training to; a rounding of 2^-9 on logits of up to 10.
    mean_limit, max_limit = LIMITS["bfloat16"]
    assert 1e-3 < masters.mean() < mean_limit and masters.max() < max_limit


def test_refill_and_batches_change_little():
    # In bfloat16 logits depend on the shape of the batch, so samples may part; the policy is the same.
    student = build()
    together, apart = roll(student, "bfloat16"), roll(student, "bfloat16", max_rows=5)
    same = [one[0] == two[0] for one, two in zip(together.token_ids, apart.token_ids, strict=True)]
    assert sum(same) >= 0.9 * len(same)
    for done in (together, apart):
        assert torch.cat(list(drifts(student.model, done))).mean() < LIMITS["bfloat16"][0]


def test_the_masters_are_never_touched():
    student = build()
    before = {name: (id(parameter), parameter.clone()) for name, parameter in student.named_parameters()}
    roll(student, "bfloat16", max_tokens=4)
    after = dict(student.named_parameters())
    assert after.keys() == before.keys()
    for name, (identity, value) in before.items():
        assert id(after[name]) == identity and torch.equal(after[name], value) and after[name].requires_grad


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.arange(4), requires_grad=False)
        self.register_buffer("table", torch.tensor([1 / 3]))


def test_shared_weights_stay_shared_and_hooks_stay():
    model = Tied()
    seen = []
    model.embed.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.dtype))
    (model.embed.weight.sum() * 2).backward()
    with pytest.raises(KeyError), weights_in(model, torch.bfloat16):
        assert model.head.weight is model.embed.weight and model.head.weight.dtype == torch.bfloat16
        assert model.table.dtype == torch.float32 and model.frozen.dtype == torch.int64
        assert not model.head.weight.requires_grad
        raise KeyError  # an interrupted rollout
    assert model.head.weight is model.embed.weight and model.head.weight.dtype == torch.float32
    model.embed.weight.sum().backward()  # DistributedDataParallel's hooks hang on the same place
    assert seen == [torch.float32] * 2
    with weights_in(model, None):
        assert model.head.weight.dtype == torch.float32


def test_bad_dtypes_are_refused():
    with pytest.raises(ValueError, match="dtype is 'float16'; expected bfloat16, or null"):
        InProcessEngine(dtype="float16")


def test_training_with_it(tiny_models, tmp_path):
    # Red: no importance weights, a drift that is zero (the masters sampled) or above the limits for bfloat16, which
    # stop the run, or a check against those for float32, which does so too.
    rollouts = make_rollouts(engine=InProcessEngine(dtype="bfloat16"))
    module = make_module(*tiny_models, importance_cap=2.0)
    fit(tmp_path, module, rollouts=rollouts, max_rollouts=3)
    rows = [row for row in metrics_rows(tmp_path) if "train/loss" in row]
    assert len(rows) == 3
    for row in rows:
        assert 1e-4 < row["rollout/sampler_drift_mean"] < LIMITS["bfloat16"][0]
        assert 0.9 < row["train/importance_weight"] < 1.1 and row["train/importance_weight"] != 1.0
    assert all(parameter.dtype == torch.float32 for parameter in module.student.parameters())


def test_training_without_importance_weights_is_refused(tiny_models, tmp_path):
    rollouts = make_rollouts(engine=InProcessEngine(dtype="bfloat16"))
    with pytest.raises(
        ValueError, match=r"set model\.importance_cap: 2\.0, or rollout\.engine\.init_args\.dtype: null"
    ):
        fit(tmp_path, make_module(*tiny_models), rollouts=rollouts, max_rollouts=1)


class Casts(TorchDispatchMode):
    """Counts the casts of a matrix of one shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_under_autocast_every_weight_is_cast_once():
    # Red: once per token, which is what Lightning's autocast without a cache makes of it.
    student = build()
    head = student.model.get_output_embeddings().weight
    assert head.requires_grad
    for tokens in (2, 12):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), Casts(head.shape) as casts:
            roll(student, None, max_tokens=tokens)
        assert casts.count == 1
    assert not torch.is_autocast_enabled("cpu")
