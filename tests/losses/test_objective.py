"""Loss and gradient of the whole objective against a reference in plain float64 loops, in every setting.

The reference reads METHOD's equations token by token in Python floats and calls nothing of the library. Rows are
ragged, every ratio lies on a chosen side of every clip bound, and whatever no term may look at is garbage.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.losses.base import LossOutput, Objective, PolicyOutput
from kdrl_pl.losses.distillation import Distillation
from kdrl_pl.losses.policy_gradient import PolicyGradient
from kdrl_pl.losses.weights import experience_weights
from kdrl_pl.schedules import Linear, Switch

VOCABULARY, TEMPERATURE, BUDGET, BOUND = 5, 0.8, 6, 0.7
GROUPS = [4, 4, 4, 9, 9, 2, 2]
PROMPTS = [2, 1, 3, 1, 2, 1, 2]
RESPONSES = [3, 1, 4, 2, 5, 1, 2]
CORRECT = [True, False, False, True, True, False, False]  # group 4 mixed, 9 all right, 2 none right
ADVANTAGES = [1.5, -0.5, -1.0, 0.0, 0.0, -0.7, 0.7]
# log ratios of the response tokens: with the clip settings below, clipped and not, on either side, and under dual clip
LOG_RATIOS = [
    [0.35, -0.9, 0.05],
    [1.5],
    [-0.4, 0.6, 0.0, 1.3],
    [0.2, -0.2],
    [0.5, -0.5, 0.0, 1.2, -1.2],
    [-0.1],
    [0.22, 0.0],
]
ROLLOUT, RL_COEF, KD_COEF = 7, 1.3, 0.43
CLIPS = [(0.2, 0.2, None), (0.2, 0.28, 3.0), (0.1, 0.4, 4.0), (0.5, 0.05, None)]

ROWS, WIDTH = len(GROUPS), max(p + r for p, r in zip(PROMPTS, RESPONSES, strict=True))
IDS = [[(3 * i + 2 * t + t * t) % VOCABULARY for t in range(PROMPTS[i] + RESPONSES[i])] for i in range(ROWS)]
_noise = torch.Generator().manual_seed(0)
LOGITS = 1.5 * torch.randn(ROWS, WIDTH, VOCABULARY, generator=_noise, dtype=torch.float64)
TEACHER = 2.0 * torch.randn(ROWS, WIDTH, VOCABULARY, generator=_noise, dtype=torch.float64)


class Setting(NamedTuple):
    normaliser: str
    estimator: str
    mask: str
    kd_normaliser: str
    transform: str
    clip: tuple[float, float, float | None]
    reused: bool
    ratio_cap: float | None = None


# ---- the reference ---------------------------------------------------------------------------------------------------


def log_softmax(logits: list[float]) -> list[float]:
    scaled = [x / TEMPERATURE for x in logits]
    normaliser = math.log(sum(math.exp(x) for x in scaled))
    return [x - normaliser for x in scaled]


STUDENT_LOGPROBS = [[log_softmax(z) for z in row] for row in LOGITS.tolist()]
TEACHER_LOGPROBS = [[log_softmax(z) for z in row] for row in TEACHER.tolist()]


def reference_weights(normaliser: str, kept: list[bool]) -> list[float]:
    """METHOD §1: weight of each counted token of a row, counting only rows that are kept."""
    lengths = [n if k else 0 for n, k in zip(RESPONSES, kept, strict=True)]
    groups = {g for g, n in zip(GROUPS, lengths, strict=True) if n}
    weights = []
    for row in range(ROWS):
        of_group = sum(n for g, n in zip(GROUPS, lengths, strict=True) if g == GROUPS[row])
        weights.append(
            0.0
            if not lengths[row]
            else {
                "group": lambda: 1 / (len(groups) * of_group),  # noqa: B023 - called at once
                "token": lambda: 1 / sum(lengths),
                "sequence": lambda: 1 / (sum(n > 0 for n in lengths) * lengths[row]),  # noqa: B023
                "constant": lambda: 1 / (sum(n > 0 for n in lengths) * BUDGET),
            }[normaliser]()
        )
    return weights


def reference_rows(mask: str) -> list[bool]:
    """METHOD §3: rows that are distilled."""
    if mask == "response":
        return [not correct for correct in CORRECT]
    if mask == "group":
        solved = {g for g, correct in zip(GROUPS, CORRECT, strict=True) if correct}
        return [g not in solved for g in GROUPS]
    if mask == "negative_advantage":
        return [a < 0 for a in ADVANTAGES]
    return [True] * ROWS


def bounded(d: float, transform: str) -> float:
    """METHOD §4."""
    if transform == "clip":
        return max(-BOUND, min(BOUND, d))
    if transform == "soft_log":
        return math.copysign(math.log(1 + abs(d)), d)
    if transform == "tanh":
        return BOUND * math.tanh(d / BOUND)
    return d


def surrogate(ratio: float, advantage: float, clip: tuple[float, float, float | None]) -> tuple[float, float]:
    """METHOD §1, l_PG: its value, and its derivative in the log-prob of the token."""
    low, high, dual = clip
    if advantage > 0:
        return (-ratio * advantage, -ratio * advantage) if ratio < 1 + high else (-(1 + high) * advantage, 0.0)
    if dual is not None and ratio > dual:
        return -dual * advantage, 0.0
    return (-ratio * advantage, -ratio * advantage) if ratio > 1 - low else (-(1 - low) * advantage, 0.0)


def reference(setting: Setting) -> tuple[float, float, Tensor]:
    """Loss, the sum of the sizes of its addends, and the gradient in the logits (B, T, V)."""
    kept = reference_rows(setting.mask)
    weights = reference_weights(setting.normaliser, [True] * ROWS)
    kd_weights = reference_weights(setting.normaliser, kept) if setting.kd_normaliser == "kept" else weights
    loss, size = 0.0, 0.0
    gradient = [[[0.0] * VOCABULARY for _ in range(WIDTH)] for _ in range(ROWS)]
    for i in range(ROWS):
        for j in range(RESPONSES[i]):
            t = PROMPTS[i] + j
            word, log_p, log_q = IDS[i][t], STUDENT_LOGPROBS[i][t], TEACHER_LOGPROBS[i][t]
            p = [math.exp(x) for x in log_p]
            ratio = math.exp(LOG_RATIOS[i][j]) if setting.reused else 1.0
            value, slope = surrogate(ratio, ADVANTAGES[i], setting.clip)
            addends = [RL_COEF * weights[i] * value]
            slope *= RL_COEF * weights[i]
            whole = [0.0] * VOCABULARY  # gradient of the full-vocabulary form in log-probs of all words
            if kept[i]:
                scale = KD_COEF * kd_weights[i]
                if setting.estimator == "full":
                    pulls = [bounded(q - s, setting.transform) for s, q in zip(log_p, log_q, strict=True)]
                    whole = [-scale * x * f for x, f in zip(p, pulls, strict=True)]
                    addends.append(sum(whole))
                else:
                    d = log_q[word] - log_p[word]
                    pull = math.exp(d) - 1 if setting.estimator == "forward_kl" else bounded(d, setting.transform)
                    if setting.ratio_cap is not None:
                        ratio = min(ratio, setting.ratio_cap)
                    addends.append(-scale * ratio * pull)
                    slope -= scale * ratio * pull
            loss += sum(addends)
            size += sum(map(abs, addends))
            for v in range(VOCABULARY):
                of_token = slope * ((v == word) - p[v])
                gradient[i][t][v] = (of_token + whole[v] - p[v] * sum(whole)) / TEMPERATURE
    return loss, size, torch.tensor(gradient, dtype=torch.float64)


# ---- the code --------------------------------------------------------------------------------------------------------


def garbage() -> Tensor:
    """(B, T) of NaN, both infinities and huge numbers."""
    cycle = itertools.cycle([math.nan, math.inf, 1e30, -math.inf, -1e30])
    return torch.tensor([[next(cycle) for _ in range(WIDTH)] for _ in range(ROWS)], dtype=torch.float64)


def of_tokens(table: Tensor, experience: Experience) -> Tensor:
    """(B, T) log-prob of each token under logits whose position t speaks of token t."""
    return (table / TEMPERATURE).log_softmax(-1).gather(2, experience.input_ids[..., None])[..., 0]


def make_experience(setting: Setting) -> Experience:
    e = Experience.from_rows(
        [ids[:p] for ids, p in zip(IDS, PROMPTS, strict=True)],
        [ids[p:] for ids, p in zip(IDS, PROMPTS, strict=True)],
        [0.5 - a for a in ADVANTAGES],  # shaped rewards: nothing may read correctness or signs off them
        GROUPS,
        correct=CORRECT,
        pad_token_id=VOCABULARY - 1,
        advantages=torch.tensor(ADVANTAGES, dtype=torch.float64),
        temperature=TEMPERATURE,
        max_response_tokens=BUDGET,
    )
    distillation = Distillation(mask=setting.mask, normaliser=setting.kd_normaliser)
    experience_weights(e, [torch.arange(ROWS)], setting.normaliser, distillation, lambda totals: totals)
    e.behavior_logprobs = garbage()
    e.teacher_logprobs = torch.where(e.kd_weights != 0, of_tokens(TEACHER, e), garbage())
    if setting.reused:
        log_ratios = garbage()
        for i, row in enumerate(LOG_RATIOS):
            log_ratios[i, PROMPTS[i] : PROMPTS[i] + RESPONSES[i]] = torch.tensor(row, dtype=torch.float64)
        e.old_logprobs = of_tokens(LOGITS, e) - log_ratios
    return e


def make_objective(setting: Setting) -> Objective:
    low, high, dual = setting.clip
    return Objective(
        {
            "pg": PolicyGradient(Switch(0.0, RL_COEF, ROLLOUT), low, high, dual),
            "kd": Distillation(
                Linear(KD_COEF + 0.01 * ROLLOUT, 0.01, 0.0),
                setting.estimator,
                setting.mask,
                setting.kd_normaliser,
                setting.transform,
                BOUND,
                setting.ratio_cap,
            ),
        }
    )


def make_policy(setting: Setting, logits: Tensor, e: Experience) -> PolicyOutput:
    """Log-probs at every position, prompt and padding too; divergence garbage where it is not distilled."""
    objective = make_objective(setting)
    policy = PolicyOutput(of_tokens(logits, e))
    if setting.estimator == "full":
        distilled = e.kd_weights != 0
        student, teacher = ((x[distilled] / TEMPERATURE).log_softmax(-1) for x in (logits, TEACHER))
        divergence = objective.terms["kd"].divergence(student, teacher)
        policy.readings["divergence"] = garbage().index_put(distilled.nonzero(as_tuple=True), divergence)
    return policy


def run(setting: Setting, e: Experience) -> tuple[LossOutput, Tensor]:
    logits = LOGITS.clone().requires_grad_()
    output = make_objective(setting)(make_policy(setting, logits, e), e, ROLLOUT)
    output.loss.backward()
    return output, logits.grad


def check(setting: Setting) -> None:
    loss, size, gradient = reference(setting)
    e = make_experience(setting)
    output, got = run(setting, e)
    assert (got - gradient).norm() <= 1e-6 * gradient.norm(), setting
    if setting.estimator != "full" or setting.transform == "none":  # a bounded full form is defined by its gradient
        assert abs(output.loss.item() - loss) <= 1e-6 * size, setting
    # Rows that are skipped before the forward pass move nothing.
    active = make_objective(setting).active(e, ROLLOUT)
    assert not gradient[~active].any(), setting
    # Nothing that is logged is touched by garbage.
    logged = [*output.parts.values(), *itertools.chain(*output.metrics.values())]
    assert all(math.isfinite(x) for x in logged), (setting, output.metrics)
    assert sum(output.parts.values()) == pytest.approx(output.loss.item(), abs=1e-12)


@pytest.mark.parametrize("normaliser", ["group", "token", "sequence", "constant"])
@pytest.mark.parametrize(
    ("estimator", "transform"),
    [(e, t) for e in ("k2", "full") for t in ("none", "clip", "soft_log", "tanh")] + [("forward_kl", "none")],
)
def test_loss_and_gradient_in_every_setting(normaliser: str, estimator: str, transform: str) -> None:
    # Red: nearly every error in a sign, ratio, detach, mask, count, bound, coefficient, or a masked value multiplied
    # away instead of selected.
    for mask, kd_normaliser, clip, reused in itertools.product(
        ("none", "response", "group", "negative_advantage"), ("all", "kept"), CLIPS, (False, True)
    ):
        check(Setting(normaliser, estimator, mask, kd_normaliser, transform, clip, reused))


@pytest.mark.parametrize("estimator", ["k2", "forward_kl"])
@pytest.mark.parametrize("ratio_cap", [0.9, 2.0])
def test_loss_and_gradient_under_a_ratio_cap(estimator: str, ratio_cap: float) -> None:
    # Red: the cap put on the RL term too, or taking the gradient away where it binds.
    for reused in (False, True):
        check(Setting("group", estimator, "none", "all", "none", CLIPS[1], reused, ratio_cap))


def test_the_rows_reach_every_branch() -> None:
    # Red: inputs on which a clip bound, the dual clip or a transform never acts, so that the tests above show nothing.
    for low, high, dual in CLIPS:
        cases = set()
        for advantage, row in zip(ADVANTAGES, LOG_RATIOS, strict=True):
            for ratio in map(math.exp, row):
                if advantage and dual and advantage < 0 and ratio > dual:
                    cases.add("dual")
                elif advantage:
                    clipped = ratio > 1 + high if advantage > 0 else ratio < 1 - low
                    cases.add((advantage > 0, clipped))
        wanted = {(True, False), (True, True), (False, False)} | ({(False, True)} if low < 0.3 else set())
        assert cases == wanted | ({"dual"} if dual else set()), (low, high, dual)
    gaps = [
        TEACHER_LOGPROBS[i][t][word] - STUDENT_LOGPROBS[i][t][word]
        for i, ids in enumerate(IDS)
        for t, word in enumerate(ids)
        if t >= PROMPTS[i]
    ]
    assert min(gaps) < -BOUND
    assert max(gaps) > BOUND
    assert any(abs(gap) < BOUND for gap in gaps)


@pytest.mark.parametrize("estimator", ["k2", "full"])
def test_the_loss_is_a_sum_over_rows(estimator: str) -> None:
    # Red: a mean or a count inside the objective: gradients would depend on how the rows are cut into micro-batches.
    setting = Setting("group", estimator, "response", "kept", "none", CLIPS[1], reused=True)
    e = make_experience(setting)
    whole, gradient = run(setting, e)
    logits, loss, metrics = LOGITS.clone().requires_grad_(), 0.0, {}
    for part in ([5, 0], [2], [1, 3, 6, 4]):
        policy = make_policy(setting, logits, e)
        width = e[part].input_ids.shape[1]
        readings = {name: x[part, :width] for name, x in policy.readings.items()}
        cut = PolicyOutput(policy.logprobs[part, :width], readings)
        output = make_objective(setting)(cut, e[part], ROLLOUT)
        output.loss.backward()
        loss += output.loss.item()
        for name, pair in output.metrics.items():
            total, count = metrics.get(name, (0.0, 0.0))
            metrics[name] = (total + float(pair[0]), count + float(pair[1]))
    assert loss == pytest.approx(whole.loss.item(), abs=1e-14)
    assert (logits.grad - gradient).norm() <= 1e-12 * gradient.norm()
    for name, pair in whole.metrics.items():
        assert metrics[name] == pytest.approx([float(x) for x in pair], rel=1e-6), name


def test_a_coefficient_of_zero_switches_a_term_off() -> None:
    # Red: 0 x NaN. Before the switch there is no RL term, so rows of advantage 0 or garbage in it may not matter.
    setting = Setting("token", "k2", "response", "all", "none", CLIPS[0], reused=False)
    e = make_experience(setting)
    objective, logits = make_objective(setting), LOGITS.clone().requires_grad_()
    assert objective.active(e, ROLLOUT).tolist() == [True, True, True, False, False, True, True]
    assert objective.active(e, ROLLOUT - 1).tolist() == [False, True, True, False, False, True, True]
    e.advantages = torch.full((ROWS,), torch.nan, dtype=torch.float64)
    output = objective(make_policy(setting, logits, e), e, ROLLOUT - 1)
    output.loss.backward()
    assert output.parts["pg"] == 0.0
    assert logits.grad.isfinite().all()
    assert logits.grad.any()


def test_inactive_rows_are_those_without_advantage_and_distillation() -> None:
    # Red: a row of advantage 0 skipped although it is distilled (mask "none" distils them all).
    settings = [Setting("group", "k2", mask, "all", "none", CLIPS[0], False) for mask in ("none", "group")]
    active = [make_objective(s).active(make_experience(s), ROLLOUT).tolist() for s in settings]
    assert active == [[True] * 7, [True, True, True, False, False, True, True]]


def test_an_objective_without_terms_is_refused() -> None:
    with pytest.raises(ValueError, match="no term"):
        Objective({})


# ---- through a model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("estimator", "transform"), [("k2", "none"), ("full", "none"), ("full", "tanh")])
@pytest.mark.parametrize("reused", [False, True])
def test_gradient_in_the_parameters_of_a_model(estimator: str, transform: str, reused: bool) -> None:
    # Red: the shift by one, the temperature or the vocabulary's cut, anywhere between ids and loss. The reference knows
    # only the model's own logits.
    from transformers import LlamaConfig, LlamaForCausalLM

    from kdrl_pl.models.language_model import LanguageModel

    def model(seed: int, width: int) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY + 3,  # three rows of padding
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.4,
        )
        return LlamaForCausalLM(config).double().eval()

    setting = Setting("group", estimator, "response", "kept", transform, CLIPS[1], reused)
    student, teacher, e = model(0, 8), model(1, 12), make_experience(setting)

    def logits(of: LlamaForCausalLM) -> Tensor:
        """(B, T, V*) logits about token t at position t; position 0 is predicted by nothing."""
        return torch.nn.functional.pad(of(input_ids=e.input_ids).logits[:, :-1, :VOCABULARY], (0, 0, 1, 0))

    with torch.no_grad():
        e.teacher_logprobs = torch.where(e.kd_weights != 0, of_tokens(logits(teacher), e), garbage())
        if reused:
            e.old_logprobs = torch.where(e.response_mask, of_tokens(logits(student), e) - 0.1, garbage())
        ours_teacher = LanguageModel(teacher, VOCABULARY)
        hidden = ours_teacher.token_logprobs(e.input_ids, e.kd_weights != 0, TEMPERATURE, return_hidden=True).hidden

    # reference, by autograd over the model's own logits
    p_log = (logits(student) / TEMPERATURE).log_softmax(-1)
    q_log = (logits(teacher) / TEMPERATURE).log_softmax(-1).detach()
    kept, loss = reference_rows(setting.mask), 0.0
    weights = reference_weights(setting.normaliser, [True] * ROWS)
    kd_weights = reference_weights(setting.normaliser, kept)
    for i in range(ROWS):
        for t in range(PROMPTS[i], PROMPTS[i] + RESPONSES[i]):
            p, q, word = p_log[i, t], q_log[i, t], IDS[i][t]
            ratio = math.exp(0.1) if reused else 1.0  # inside every clip range
            loss = loss - RL_COEF * weights[i] * ratio * ADVANTAGES[i] * p[word]
            if kept[i] and estimator == "full":
                pull = torch.tensor([bounded(x, transform) for x in (q - p).tolist()], dtype=torch.float64)
                loss = loss - KD_COEF * kd_weights[i] * (p.exp().detach() * pull * p).sum()
            elif kept[i]:
                loss = loss - KD_COEF * kd_weights[i] * ratio * (q - p).detach()[word] * p[word]
    expected = torch.autograd.grad(loss, list(student.parameters()))

    ours, objective = LanguageModel(student, VOCABULARY), make_objective(setting)
    full = objective.reader(ROLLOUT, with_teacher=True)
    scores = ours.token_logprobs(
        e.input_ids,
        e.response_mask,
        TEMPERATURE,
        read=full,
        teacher_hidden=hidden if full else None,
        teacher_head=ours_teacher.head() if full else None,
    )
    student.zero_grad()
    objective(PolicyOutput(scores.logprobs, scores.readings), e, ROLLOUT).loss.backward()
    got = torch.cat([parameter.grad.flatten() for parameter in student.parameters()])
    expected = torch.cat([g.flatten() for g in expected])
    assert (got - expected).norm() <= 1e-6 * expected.norm()
