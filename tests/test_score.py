"""What `KDRLModule.score` fills in: whom it asks about which tokens, and what the options of RL make of advantages and
weights. Tiny random models, rows made by hand."""

from __future__ import annotations

import time

import pytest
import torch
from tiny_run import make_module
from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.losses import Distillation, PolicyGradient, RewardShaping
from kdrl_pl.losses.modulation import RLSD, TRRD, DistilledRL
from kdrl_pl.schedules import Switch
from kdrl_pl.teacher import FrozenTeacher

# Group 0: right, wrong; group 1: both right; group 2: both wrong, but of unequal reward.
REWARDS, CORRECT = [1.0, 0.0, 1.0, 1.0, 0.0, 0.3], [True, False, True, True, False, False]
LENGTHS = [3, 5, 2, 1, 4, 2]


def rows(**fields) -> Experience:
    generator = torch.Generator().manual_seed(0)
    words = [torch.randint(3, 13, (n,), generator=generator).tolist() for n in LENGTHS]
    return Experience.from_rows([[5, 6, 7], [8]] * 3, words, REWARDS, [0, 0, 1, 1, 2, 2], correct=CORRECT, **fields)


def modulated(modulation, **settings):
    settings = {"distillation": None, **settings}
    return {"policy_gradient": PolicyGradient(modulation=modulation), **settings}


def rows_asked(e: Experience) -> list[int]:
    """Numbers of the rows asked about; a row is asked about as a whole or not at all."""
    some = e.teacher_mask.any(1)
    assert torch.equal(e.teacher_mask, e.response_mask & some[:, None])
    return some.nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (modulated(TRRD()), [0, 1, 4, 5]),
        (modulated(RLSD()), [0, 1, 4, 5]),
        (modulated(DistilledRL()), [0, 5]),
        (modulated(None), []),
        # what distillation masks is masked for both, also while its own coefficient is 0
        (modulated(TRRD(), distillation=Distillation(0.1, mask="response")), [1, 4, 5]),
        (modulated(TRRD(), distillation=Distillation(0.0, mask="response")), [1, 4, 5]),
        (modulated(DistilledRL(), distillation=Distillation(0.1)), [0, 1, 2, 3, 4, 5]),
        ({"policy_gradient": PolicyGradient(0.0, modulation=TRRD()), "distillation": None}, []),
        ({"distillation": Distillation(Switch(0.1, 0.0, 0))}, []),
        ({"distillation": Distillation(0.1, mask="group")}, [4, 5]),
    ],
)
def test_the_teacher_is_asked_what_the_terms_read(settings, expected, tiny_models) -> None:
    # Red: nobody asked because nothing is distilled; rows without an advantage asked about; the mask left out.
    module, e, metrics = make_module(*tiny_models, **settings).load(), rows(), {}
    module.score(e, metrics=metrics)
    assert rows_asked(e) == expected
    answers = teacher_logprobs(module, e) if expected else torch.zeros_like(e.teacher_logprobs)
    assert torch.allclose(e.teacher_logprobs, torch.where(e.teacher_mask, answers, 0.0), atol=1e-5)
    distilled = float((e.kd_weights != 0).sum())
    assert metrics["teacher/kd_tokens"] == (distilled, 17.0)
    assert metrics["teacher/logprob"][1] == sum(LENGTHS[row] for row in expected)
    if module.objective.active(e, 0).any():
        module.loss(e).loss.backward()
    assert all(p.grad.isfinite().all() for p in module.student.parameters() if p.grad is not None)


def teacher_logprobs(module, e: Experience) -> Tensor:
    """(B, T) by the plain forward pass of transformers."""
    with torch.no_grad():
        logits = module.teacher.model.model(input_ids=e.input_ids, attention_mask=e.attention_mask.long()).logits
    logprobs = logits[:, :-1].float().log_softmax(-1).gather(2, e.input_ids[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(logprobs, (1, 0))


class SlowTeacher(FrozenTeacher):
    def score(self, experience, asked, *, hidden=False):
        time.sleep(0.3)
        super().score(experience, asked, hidden=hidden)


def test_a_teacher_that_shapes_rewards_is_asked_once_in_time_of_its_own(tiny_models) -> None:
    # Red: its seconds among the student's, and what it said thrown away.
    settings = {"distillation": None, "reward_shaping": RewardShaping(0.1)}
    module, e, metrics = make_module(*tiny_models, **settings), rows(), {}
    module.teacher = SlowTeacher(tiny_models[1])
    module.load()
    started = time.perf_counter()
    module.score(e, metrics=metrics)
    whole = time.perf_counter() - started
    assert metrics["time/teacher"][0] >= 0.3
    assert metrics["time/score"][0] + metrics["time/teacher"][0] < whole
    answers = torch.where(e.response_mask, teacher_logprobs(module, e), 0.0)
    assert torch.allclose(e.teacher_logprobs, answers, atol=1e-5)
    assert metrics["teacher/logprob"] == pytest.approx((float(answers.sum()), 17), abs=1e-3)
    assert rows_asked(e) == [0, 1, 2, 3, 4, 5]


def test_a_run_without_a_question_loads_no_teacher(tiny_models) -> None:
    assert not make_module(*tiny_models, distillation=None).needs_teacher
    module = make_module(*tiny_models, **modulated(TRRD()))
    assert module.needs_teacher
    assert module.load().teacher.model is not None


@pytest.mark.parametrize("modulation", [TRRD(), DistilledRL(), RLSD()], ids=lambda m: type(m).__name__)
def test_the_whole_vocabulary_and_a_modulation_go_together(modulation, tiny_models) -> None:
    module = make_module(*tiny_models, **modulated(modulation, distillation=Distillation(0.1, "full"))).load()
    parts = module.loss(module.score(rows())).parts
    alone = make_module(*tiny_models, **modulated(modulation)).load()
    assert parts["pg"].item() == pytest.approx(alone.loss(alone.score(rows())).parts["pg"].item(), rel=1e-4)
    only = make_module(*tiny_models, distillation=Distillation(0.1, "full")).load()
    assert parts["kd"].item() == pytest.approx(only.loss(only.score(rows())).parts["kd"].item(), rel=1e-4)


@pytest.mark.parametrize("modulation", [TRRD(), DistilledRL(), RLSD()], ids=lambda m: type(m).__name__)
def test_the_modulated_loss_does_not_depend_on_micro_batches(modulation, tiny_models) -> None:
    module = make_module(*tiny_models, **modulated(modulation)).load()
    e = module.score(rows())
    whole = module.loss(e).loss.item()
    parts = [module.loss(e[part]).loss.item() for part in ([4, 0], [1], [5, 2, 3])]
    assert sum(parts) == pytest.approx(whole, abs=1e-6)
    grpo = make_module(*tiny_models, distillation=None).load()
    assert whole != pytest.approx(grpo.loss(grpo.score(rows())).loss.item(), abs=1e-4)


def test_the_overlong_filter_is_for_the_policy_gradient_only(tiny_models) -> None:
    # Rows 1 and 5 ran out of budget: one row is left to groups 0 and 2, which then carry no signal.
    # Red: a truncated row that is not distilled or not counted, or its reward in the mean of its group.
    truncated = [False, True, False, False, False, True]
    module = make_module(*tiny_models, overlong_filter=True).load()
    e = module.score(rows(truncated=truncated))
    assert e.advantages.tolist() == [0.0] * 6
    assert e.token_weights.tolist() == pytest.approx([1 / 17] * 6)
    assert torch.equal(e.kd_weights, module.score(rows()).kd_weights)
    assert (e.kd_weights != 0).sum() == 17
    e = module.score(rows(truncated=[False] * 4 + [False, True]))
    assert e.advantages.tolist() == pytest.approx([0.707106, -0.707106, 0, 0, 0, 0], abs=1e-5)
    off = make_module(*tiny_models).load().score(rows(truncated=truncated))
    assert (off.advantages != 0).tolist() == [True, True, False, False, True, True]


def test_groups_without_signal_can_leave_the_normaliser(tiny_models) -> None:
    # Group 1 (2 + 1 of 17 tokens) has equal rewards. Red: its tokens still counted, or dropped from distillation too.
    e = make_module(*tiny_models, drop_groups_without_signal=True).load().score(rows())
    assert e.token_weights.tolist() == pytest.approx([1 / 14, 1 / 14, 0, 0, 1 / 14, 1 / 14])
    assert e.kd_weights[e.response_mask].tolist() == pytest.approx([1 / 17] * 17)


def test_truncated_importance_reads_what_the_sampler_saw(tiny_models) -> None:
    # The sampler saw every token at half its chance: weights are min(2, cap).
    losses = {}
    for cap in (None, 1.5, 1e9):
        module = make_module(*tiny_models, importance_cap=cap).load()
        e = module.score(rows())
        e.behavior_logprobs = module.student_logprobs(e) - torch.tensor(2.0).log()
        losses[cap] = module.loss(e).loss.item()
    assert losses[1.5] == pytest.approx(1.5 * losses[None], rel=1e-4)
    assert losses[1e9] == pytest.approx(2.0 * losses[None], rel=1e-4)


@pytest.mark.parametrize(
    ("teacher", "settings", "message"),
    [
        (False, modulated(TRRD()), r"needs a teacher: set model\.teacher\.path.*policy_gradient\.modulation"),
        (True, modulated(TRRD(), reward_shaping=RewardShaping()), r"modulation both.*set one to null"),
        (
            True,
            {"overlong_filter": True, "distillation": Distillation(mask="negative_advantage")},
            r"mask: response, or model\.overlong_filter: false",
        ),
        (True, {"importance_cap": 0.0}, r"importance_cap is 0\.0"),
    ],
)
def test_unsound_pairs_are_refused(teacher, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_module("student", "teacher" if teacher else None, **settings)


def long_prompts(**fields) -> Experience:
    """Three groups of four, prompts of 120, 120 and 90 tokens, responses of 1 to 6."""
    words = torch.Generator().manual_seed(3)

    def draw(n: int) -> list[int]:
        return torch.randint(3, 13, (n,), generator=words).tolist()

    prompts = [prompt for prompt in (draw(120), draw(120), draw(90)) for _ in range(4)]
    responses = [draw(n) for n in (3, 6, 1, 2, 5, 5, 4, 6, 1, 2, 3, 4)]
    group = [row // 4 for row in range(12)]
    return Experience.from_rows(prompts, responses, [1.0, 0.0, 0.0, 1.0] * 3, group, correct=[True] * 12, **fields)


def flat_gradient(module, parts: list[Experience]) -> Tensor:
    module.zero_grad()
    for part in parts:
        module.loss(part).loss.backward()
    return torch.cat([p.grad.flatten() for p in module.student.parameters()])


@pytest.mark.parametrize("estimator", ["k2", "full"])
def test_prompts_of_a_group_are_read_once_and_nothing_changes(estimator, tiny_models) -> None:
    # Red: the share forgotten in the update or the teacher, rows returned in the order of the passes, one micro-batch
    # that cuts a group but not its prompt.
    module = make_module(*tiny_models, distillation=Distillation(0.1, estimator), epochs_per_rollout=2).load()
    shared = module.score(long_prompts())
    assert shared.share_prompts
    module.student._can_share_prompts = module.teacher.model._can_share_prompts = False
    whole = module.score(long_prompts())
    assert not whole.share_prompts
    for name in ("teacher_logprobs", "old_logprobs", "token_weights", "kd_weights"):
        assert torch.allclose(getattr(shared, name), getattr(whole, name), atol=2e-6), name
    expected = flat_gradient(module, [whole])
    for budget in (16384, 400, 140):
        module.max_tokens_per_micro_batch = budget
        parts = [shared[rows] for rows in module.micro_batch_rows(shared)]
        assert sorted(row for rows in module.micro_batch_rows(shared) for row in rows) == list(range(12))
        assert (flat_gradient(module, parts) - expected).norm() <= 1e-6 * expected.norm()


def test_short_prompts_are_read_with_their_rows(tiny_models) -> None:
    assert not make_module(*tiny_models).load().score(rows()).share_prompts
