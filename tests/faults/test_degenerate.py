"""Rollouts with nothing in them to learn from, through Trainer.fit: no crash, no NaN, no step where nothing pulls."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from injectors import run_script, this_rank
from lightning.pytorch import Callback
from tiny_run import EvenSum, fit, make_data, make_module, make_rollouts, metrics_rows, weights_of

from kdrl_pl.losses import Distillation
from kdrl_pl.losses.weights import KD_MASKS, NORMALISERS
from kdrl_pl.rewards.base import RewardOutput
from kdrl_pl.rollout.in_process import InProcessEngine

pytestmark = pytest.mark.faults


class Cut(InProcessEngine):
    """No response ends."""

    def generate(self, *arguments, **more):
        done = super().generate(*arguments, **more)
        done.finished = [False] * len(done)
        return done


class Empty(InProcessEngine):
    """The first token of every response is the end token.

    Its log-prob is what the student gives it, or the sampler check would object.
    """

    def generate(self, prompts, group_size, *arguments, **more):
        done = super().generate(prompts, group_size, *arguments, **more)
        end = self._stop_token_ids[0]
        for row in range(len(done)):
            prompt = torch.tensor([prompts[row // group_size]])
            logits = self._student.model(prompt).logits[0, -1, : self._student.vocab_size]
            done.token_ids[row], done.logprobs[row] = [end], [float(logits.log_softmax(0)[end])]
            done.finished[row] = True
        return done


class Constant:
    """All the same: right (1) or wrong (0)."""

    def __init__(self, value):
        self.value = value

    def __call__(self, completions):
        return RewardOutput([self.value] * len(completions), [bool(self.value)] * len(completions))


KINDS = {
    "all truncated": {"engine": Cut()},
    "all empty": {"engine": Empty()},
    "all right": {"reward": Constant(1.0)},
    "all wrong": {"reward": Constant(0.0)},
    "all empty and wrong": {"engine": Empty(), "reward": Constant(0.0)},
}
# Every pair of a kind with a normaliser, a mask and an estimator; all combinations are slow.
MASKS = list(KD_MASKS)
FORMS = [("k2", "all"), ("full", "kept"), ("k2", "kept")]
ALL = list(itertools.product(KINDS, NORMALISERS, MASKS, FORMS))
SOME = [
    (kind, normaliser, MASKS[(i + j) % len(MASKS)], FORMS[(i + 2 * j) % len(FORMS)])
    for i, kind in enumerate(KINDS)
    for j, normaliser in enumerate(NORMALISERS)
]


class Weights(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, module, *_):
        self.seen.append(weights_of(module))


def train(folder, models, kind, normaliser, mask, form):
    """Two rollouts; returns the module, weights before each and at the end, and the metrics of both."""
    overlong = kind == "all truncated" and mask != "negative_advantage"
    term = Distillation(coef=0.3, estimator=form[0], mask=mask, normaliser=form[1])
    module = make_module(*models, normaliser=normaliser, distillation=term, overlong_filter=overlong)
    weights = Weights()
    rollouts = make_rollouts(max_tokens=4, **{"reward": EvenSum(), **KINDS[kind]})
    fit(folder, module, make_data(val=0), max_rollouts=2, rollouts=rollouts, before=[weights])
    return module, [*weights.seen, weights_of(module)], metrics_rows(folder)


def check(folder, models, kind, normaliser, mask, form):
    module, weights, rows = train(folder, models, kind, normaliser, mask, form)
    assert all(bool(value.isfinite().all()) for value in weights[-1].values())
    wrong = [name for row in rows for name, value in row.items() if value is None or not math.isfinite(value)]
    assert not wrong, wrong
    if kind not in ("all right", "all wrong", "all empty and wrong"):
        return
    # All advantages are 0. What is left is distillation, where the mask, which looks at the verdict, lets it.
    if mask == "none" or (mask in ("response", "group") and "wrong" in kind):
        assert module.skipped_steps == 0
    else:
        assert module.skipped_steps == 2
        assert all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


@pytest.mark.parametrize(("kind", "normaliser", "mask", "form"), SOME)
def test_a_degenerate_rollout_is_no_accident(kind, normaliser, mask, form, tiny_models, tmp_path):
    check(tmp_path, tiny_models, kind, normaliser, mask, form)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_combination(kind, tiny_models, tmp_path):
    for number, (_, normaliser, mask, form) in enumerate(c for c in ALL if c[0] == kind):
        check(tmp_path / str(number), tiny_models, kind, normaliser, mask, form)


def test_a_group_of_one_is_refused_with_a_policy_gradient(tiny_models, tmp_path):
    with pytest.raises(ValueError, match=r"a group has one row, .*; set rollout.group_size to 2 or more"):
        fit(tmp_path, make_module(*tiny_models), rollouts=make_rollouts(group_size=1))


def test_a_group_of_one_is_enough_for_distillation(tiny_models, tmp_path):
    module = make_module(*tiny_models, policy_gradient=None)
    fit(tmp_path, module, make_data(val=0), max_rollouts=2, rollouts=make_rollouts(group_size=1))
    assert module.skipped_steps == 0


class NothingForRank1(EvenSum):
    """On rank 1 every response is right, so that there is no advantage and, under the mask, no distillation."""

    def __call__(self, completions):
        return Constant(1.0)(completions) if this_rank() else super().__call__(completions)


def run_two(models, folder):
    """One process of two: every normaliser while rank 1 has nothing to train on, then while neither has."""
    for normaliser, reward in [*((name, NothingForRank1()) for name in NORMALISERS), ("group", Constant(1.0))]:
        name = normaliser if isinstance(reward, NothingForRank1) else "nothing"
        term = Distillation(coef=0.3, mask="response", normaliser="kept")
        module = make_module(*models, normaliser=normaliser, distillation=term)
        rollouts, data = make_rollouts(max_tokens=4, reward=reward), make_data(val=0)
        fit(folder / name, module, data, max_rollouts=2, rollouts=rollouts, strategy="ddp", devices=2)
        torch.save({"skipped": module.skipped_steps, "weights": weights_of(module)}, folder / f"{name}-{this_rank()}")


@pytest.mark.distributed
def test_a_rank_with_nothing_to_train_on_follows_the_other(tiny_models, tmp_path):
    run_script(__file__, *tiny_models, tmp_path)
    for name in (*NORMALISERS, "nothing"):
        ends = [torch.load(tmp_path / f"{name}-{rank}", weights_only=True) for rank in (0, 1)]
        assert [end["skipped"] for end in ends] == ([2, 2] if name == "nothing" else [0, 0])
        for weight, value in ends[0]["weights"].items():
            assert bool(value.isfinite().all())
            assert torch.equal(value, ends[1]["weights"][weight])


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_two(sys.argv[1:3], Path(sys.argv[3]))
