"""Every estimator on stored rows: by exact enumeration of what may be sampled, and against plain float64 autograd."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_run import make_module
from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.losses import Distillation
from kdrl_pl.losses.competence import Competence
from kdrl_pl.replay.gradients import OWN, all_variants, replay

PROMPTS = [[5, 6], [7], [9, 8, 4], [3, 10]]


@pytest.fixture
def module(tiny_models):
    """In float64, with a bounded k2 that is the run's own."""
    own = Distillation(coef=0.3, mask="response", transform="clip", transform_bound=0.1, top_k=3)
    module = make_module(*tiny_models, distillation=own, gradient_clip=None).load()
    module.student.double()
    module.teacher.model.double()
    return module


def logits(model, row: list[int]) -> Tensor:
    """(T, V) log-probs of the next word after each word."""
    return model.model(input_ids=torch.tensor([row])).logits[0, :, : model.vocab_size].log_softmax(-1)


def test_where_everything_that_can_be_sampled_is_there_k2_and_top_k_are_exact(module) -> None:
    # One-word responses, every word once per group, each sampled with chance 1 / V: the mean under the ratio is the
    # expectation. Red: no ratio, weights of another mask, the full form at other positions.
    words = module.student.vocab_size
    experience = Experience.from_rows(
        [prompt for prompt in PROMPTS for _ in range(words)],
        [[word] for _ in PROMPTS for word in range(words)],
        [float(word % 2) for _ in PROMPTS for word in range(words)],
        [group for group in range(len(PROMPTS)) for _ in range(words)],
        behavior_logprobs=[[-math.log(words)]] * (words * len(PROMPTS)),
        correct=[word % 2 == 1 for _ in PROMPTS for word in range(words)],
    )
    rows = replay(module, experience, 0, all_variants(module.distillation)).table()
    alone = {(row["estimator"], row["mask"]): row for row in rows}
    for estimator in ("k2", "top_k", "full"):
        row = alone[estimator, "none"]
        assert row["bias"] < 1e-6
        assert row["noise"] < 1e-6
        assert row["cosine"] == pytest.approx(1.0)
        assert row["variance"] == pytest.approx(alone["full", "none"]["variance"])
    # The forward KL is another objective, and so is a bounded one: no number of samples brings them nearer.
    assert alone["forward_kl", "none"]["bias"] > 0.1
    assert alone[OWN, OWN]["bias"] > 0.1


def sampled(module, groups: int, generator: torch.Generator, asked: list[list[int]] = PROMPTS) -> Experience:
    """Groups of four responses of two words that the student samples."""
    prompts, responses, behavior = [], [], []
    says: dict[tuple[int, ...], Tensor] = {}
    with torch.no_grad():
        for number in range(groups):
            for _ in range(4):
                row, said = list(asked[number % len(asked)]), []
                prompts.append(list(row))
                for _ in range(2):
                    if tuple(row) not in says:
                        says[tuple(row)] = logits(module.student, row)[-1]
                    chances = says[tuple(row)]
                    row.append(int(torch.multinomial(chances.exp(), 1, generator=generator)))
                    said.append(float(chances[row[-1]]))
                responses.append(row[-2:])
                behavior.append(said)
    group = [number for number in range(groups) for _ in range(4)]
    correct = [sum(response) % 2 == 0 for response in responses]
    rewards = [float(c) for c in correct]
    return Experience.from_rows(prompts, responses, rewards, group, behavior_logprobs=behavior, correct=correct)


def test_the_noise_is_the_size_of_the_bias_of_an_unbiased_estimator(module) -> None:
    # Red: the noise of one group instead of the mean's, or the variance of g instead of that of g - f.
    # One prompt, so that groups differ by what was sampled alone.
    experience = sampled(module, 100, torch.Generator().manual_seed(0), PROMPTS[:1])
    variants = all_variants(module.distillation, ["k2", "forward_kl"], ["none"])
    k2, forward_kl, _ = replay(module, experience, 0, variants).table()
    assert 0.6 < k2["bias"] / k2["noise"] < 1.5
    assert forward_kl["bias"] > 2 * forward_kl["noise"]


def reference(module, experience: Experience, estimator: str, keep: list[bool], coef: float) -> list[Tensor]:
    """Per group the gradient of `coef x` the term, token normaliser, from plain logits; row by row."""
    parameters, gradients = list(module.student.parameters()), []
    tokens = float(experience.response_mask.sum())
    for group in experience.group.unique().tolist():
        loss = torch.zeros((), dtype=torch.float64)
        for row in (experience.group == group).nonzero().flatten().tolist():
            ids = experience.input_ids[row][experience.attention_mask[row]].tolist()
            start = int(experience.prompt_lengths[row])
            p = logits(module.student, ids)
            with torch.no_grad():
                q = logits(module.teacher.model, ids)
            for place in range(start, len(ids)):
                own, theirs, word = p[place - 1], q[place - 1], ids[place]
                d, ratio = (theirs - own).detach(), (own[word] - experience.behavior_logprobs[row, place]).exp()
                kl = (own.exp() * (own - theirs)).sum()
                pull = {"k2": d[word], "forward_kl": d[word].exp() - 1}
                loss = loss + keep[row] * coef * (kl if estimator == "full" else -ratio * pull[estimator]) / tokens
        made = torch.autograd.grad(loss, parameters, allow_unused=True)
        zipped = zip(made, parameters, strict=True)
        gradients.append(torch.cat([torch.zeros_like(w).flatten() if g is None else g.flatten() for g, w in zipped]))
    return gradients


@pytest.mark.parametrize("budget", [10_000, 11])
@pytest.mark.parametrize(("mask", "estimator"), [("none", "k2"), ("response", "k2"), ("group", "forward_kl")])
def test_every_number_against_float64(mask: str, estimator: str, budget: int, module) -> None:
    # Rows of an earlier student: the sampler's log-probs stand off the current ones. Cut into passes, or not.
    experience = sampled(module, 5, torch.Generator().manual_seed(1))
    drift = torch.randn(experience.input_ids.shape, generator=torch.Generator().manual_seed(2)) * 0.2
    experience.behavior_logprobs = torch.where(experience.response_mask, experience.behavior_logprobs + drift, 0.0)
    right = experience.correct.view(5, 4)
    assert 0 < int(right.sum()) < 20
    right[0] = False  # one group without a right answer, for mask "group"
    keep = {
        "none": [True] * 20,
        "response": (~right).flatten().tolist(),
        "group": (~right.any(1, keepdim=True)).expand(5, 4).flatten().tolist(),
    }[mask]
    g, f = (torch.stack(reference(module, experience, name, keep, 1.0)) for name in (estimator, "full"))
    module.max_tokens_per_micro_batch = budget
    row = replay(module, experience, 0, all_variants(module.distillation, [estimator], [mask])).table()[0]
    mean, true = g.mean(0), f.mean(0).norm()
    gaps = g - f
    expected = {
        "grad_norm": g.sum(0).norm(),
        "cosine": mean @ f.mean(0) / (mean.norm() * true),
        "bias": gaps.mean(0).norm() / true,
        "noise": ((gaps - gaps.mean(0)).square().sum(1).mean() / 4).sqrt() / true,
        "variance": (g - mean).square().sum(1).mean() / true**2,
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(float(value), rel=2e-5), name


def test_a_coefficient_adds_the_policy_gradient_of_the_run(module) -> None:
    # Red: a coefficient that also scales the policy gradient, or one that the run's schedule multiplies once more.
    experience = sampled(module, 4, torch.Generator().manual_seed(3))
    assert 0 < int(experience.correct.sum()) < 16
    made = replay(module, experience, 0, all_variants(module.distillation, ["full"], ["none"]))
    joint = made.table([0.3])[-2]
    module.zero_grad()
    experience.kd_weights = experience.token_weights[:, None] * experience.response_mask
    module.distillation = Distillation(coef=0.3, estimator="full")
    module.objective.terms["kd"] = module.distillation
    module.teacher.score(experience, experience.response_mask, hidden=True)
    loss = module.loss(experience, 0).loss
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in module.student.parameters()]).norm()
    assert joint["coef"] == 0.3
    assert joint["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert joint["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_the_runs_own_term_keeps_its_gate(module, tmp_path) -> None:
    (tmp_path / "teacher.jsonl").write_text("".join(f'{{"uid": "{g}", "correct": {int(g == 1)}}}\n' for g in range(4)))
    own = Distillation(coef=0.0, competence=Competence(str(tmp_path / "teacher.jsonl")))
    experience = sampled(module, 4, torch.Generator().manual_seed(4))
    made = replay(module, experience, 0, all_variants(own, ["k2"], ["none"]))
    assert made.of[OWN, OWN].square < made.of["k2", "none"].square
    gated = replay(module, experience[experience.group == 1], 0, all_variants(Distillation(), ["k2"], ["none"]))
    assert made.of[OWN, OWN].gradient.norm() * 4 == pytest.approx(
        float(gated.of["k2", "none"].gradient.norm()), rel=1e-6
    )
