"""Stop tokens of student and teacher as one word: exact gradients of the divergence of the cells, and whole models."""

from __future__ import annotations

import json
import logging
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from one_token import every_word, gradient
from tiny_run import fit, make_data, make_module, make_rollouts, metrics_rows
from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.logprobs import Vocabulary
from kdrl_pl.losses import Distillation, PolicyGradient, RewardShaping
from kdrl_pl.losses.modulation import RLSD, TRRD, DistilledRL
from kdrl_pl.module import KDRLModule
from kdrl_pl.rollout.in_process import InProcessEngine
from kdrl_pl.stop_cell import cell_logprobs, merged, stop_cell

STUDENT = torch.tensor([0.4, 1.9, -0.3, 0.1, -2.0, 1.2], dtype=torch.float64)
OLD = torch.tensor([0.1, 1.2, 0.3, 0.0, -1.0, 1.6], dtype=torch.float64)
TEACHER = torch.tensor([1.0, -1.5, 0.2, 2.2, -0.5, 1.3], dtype=torch.float64)
SWAPPED = STUDENT[[0, 2, 1, 3, 4, 5]]  # the student's distribution, but what it gives word 1 this one gives word 2
STOPS = (1, 2)
ESTIMATORS = {
    "k2": {},
    "forward_kl": {},
    "full": {},
    "top_k": {"top_k": 2},
    "top_k, all": {"top_k": 6},
}
BOUNDED = ["k2", "full", "top_k", "top_k, all"]  # forward_kl takes no transform


def term(name: str, **settings) -> dict:
    return {"kd": Distillation(1.0, name.partition(",")[0], **ESTIMATORS[name], **settings)}


def leaf() -> Tensor:
    return STUDENT.clone().requires_grad_()


def cells(logits: Tensor, stops: tuple[int, ...] = STOPS) -> Tensor:
    """(cells,) log-probs: the words that end nothing, then all stops together."""
    logprobs = logits.log_softmax(0)
    others = [word for word in range(len(logits)) if word not in stops]
    return torch.cat([logprobs[others], logprobs[list(stops)].exp().sum().log()[None]])


# ---- what is one cell ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ([1], [1], ()),  # one common end token: nothing to merge
        ([1], [2], (1, 2)),
        ([7, 5], [7, 5], (5, 7)),  # several, though the same
        ([5], [7, 5], (5, 7)),
        ([1, 50256], [1], ()),  # a config's default that is no id of this tokenizer
    ],
)
def test_which_ids_are_one_cell(student, teacher, expected, caplog) -> None:
    with caplog.at_level(logging.INFO, "kdrl_pl"):
        assert stop_cell(student, teacher, vocab_size=16) == expected
    assert ("as one word" in caplog.text) == bool(expected)


def test_the_cell_takes_the_mass_of_its_words() -> None:
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    both = merged(Vocabulary(p, torch.tensor([3]), p.flip(1)), (1, 3))
    assert both.logprobs.exp()[0].tolist() == pytest.approx([0.1, 0.6, 0.3, 0.0])
    assert both.teacher.exp()[0].tolist() == pytest.approx([0.4, 0.4, 0.2, 0.0])
    assert both.tokens.tolist() == [1]
    words = Vocabulary(p.expand(4, 4), torch.arange(4))
    assert cell_logprobs(words, (1, 3)).exp().tolist() == pytest.approx([0.1, 0.6, 0.3, 0.6])


# ---- by enumeration of one token -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "transform"), [("forward_kl", "none"), *product(BOUNDED, ["none", "clip", "tanh"])])
def test_models_that_differ_in_their_end_token_alone_do_not_pull(name: str, transform: str) -> None:
    # The student ends with 1 and gives it 0.5, the teacher with 2: d = 0 and no gradient, whichever word is sampled.
    # Without the cell every form pulls: full and top-K at every position, whatever was sampled there.
    logits = leaf()
    output = every_word(term(name, transform=transform), logits, SWAPPED, stops=STOPS)
    assert gradient(output, logits).norm() <= 1e-14
    for metric in ("teacher/reverse_kl", "teacher/reverse_kl_k3", "train/kd_to_rl"):
        assert abs(output.metrics[metric][0].item()) <= 1e-14
    apart = every_word(term(name, transform=transform), logits, SWAPPED)
    assert gradient(apart, logits).norm() > 0.1


@pytest.mark.parametrize("old", [None, OLD], ids=["one update", "reused"])
@pytest.mark.parametrize("stops", [(1, 2), (0, 3, 5)])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_expected_gradient_is_that_of_the_divergence_of_the_cells(name: str, stops: tuple, old) -> None:
    # Red: the student's side not merged, a ratio of the cell over the old token, mass counted twice.
    logits, again = leaf(), leaf()
    got = gradient(every_word(term(name), logits, TEACHER, old=old, stops=stops), logits)
    p, q = cells(again, stops), cells(TEACHER, stops)
    kl = q.exp() * (q - p) if name == "forward_kl" else p.exp() * (p - q)
    kl.sum().backward()
    assert (got - again.grad).norm() <= 1e-12 * again.grad.norm()


@pytest.mark.parametrize("name", ["k2", "top_k"])
def test_which_of_the_stop_tokens_was_sampled_makes_no_difference(name: str) -> None:
    # Words 1 and 2 alone in the sample, each in turn: the same direction. Red: the gradient of the token, which moves
    # mass from one stop token to the other.
    logits, directions = leaf(), []
    for word in STOPS:
        sampler = torch.full_like(STUDENT, -1e3)
        sampler[word] = 0.0
        directions.append(gradient(every_word(term(name), logits, TEACHER, sampler=sampler, stops=STOPS), logits))
    assert directions[0].norm() > 0.01
    assert (directions[0] - directions[1]).norm() <= 1e-12 * directions[0].norm()


def test_reinforcement_learning_keeps_the_token() -> None:
    # Gradient -E[A grad log p(token)], cell or not.
    advantages = torch.tensor([0.0, 1.0, -1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    gradients = []
    for stops in ((), STOPS):
        logits = leaf()
        output = every_word({"pg": PolicyGradient()}, logits, TEACHER, stops=stops, advantages=advantages)
        gradients.append(gradient(output, logits))
    assert torch.equal(*gradients)
    assert gradients[0][1] * gradients[0][2] < 0


# ---- through models --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twins(tiny_models, tmp_path_factory) -> tuple[str, str]:
    """A student that ends with id 1 and a teacher that is the same model but ends with id 2 (the character "0")."""
    from safetensors.torch import load_file, save_file

    student, teacher = Path(tiny_models[0]), tmp_path_factory.mktemp("twins") / "teacher"
    shutil.copytree(student, teacher)
    weights = load_file(teacher / "model.safetensors")
    weights["lm_head.weight"][[1, 2]] = weights["lm_head.weight"][[2, 1]]
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    for name, key, value in (
        ("tokenizer_config.json", "eos_token", "0"),
        ("generation_config.json", "eos_token_id", 2),
        ("config.json", "eos_token_id", 2),
    ):
        settings = json.loads((teacher / name).read_text())
        (teacher / name).write_text(json.dumps(settings | {key: value}))
    return str(student), str(teacher)


def rows() -> Experience:
    return Experience.from_rows(
        prompts=[[3, 4, 12], [3, 4, 12], [5, 6, 7, 12], [5, 6, 7, 12]],
        responses=[[8, 9, 1], [3, 4, 5, 6, 1], [6], [7, 7, 8, 1]],
        rewards=[1.0, 0.0, 0.0, 1.0],
        group=[0, 0, 1, 1],
        correct=[True, False, False, True],
        temperature=0.8,
    )


def kd_gradient(module: KDRLModule) -> tuple[Tensor, Experience]:
    experience = module.score(rows())
    module.zero_grad()
    module.loss(experience).loss.backward()
    return torch.cat([p.grad.flatten() for p in module.student.parameters()]), experience


@pytest.mark.parametrize("name", ESTIMATORS)
def test_twins_with_different_end_tokens_do_not_pull(name: str, twins) -> None:
    module = make_module(*twins, policy_gradient=None, distillation=term(name)["kd"]).load()
    assert module.stop_cell == (1, 2)
    pull, experience = kd_gradient(module)
    with torch.no_grad():
        ours = module.policy(experience, 0)
    mask = experience.response_mask
    assert torch.allclose(ours.cell_logprobs[mask], experience.teacher_logprobs[mask], atol=2e-6)
    assert (ours.cell_logprobs > ours.logprobs + 0.1).tolist() == (mask & (experience.input_ids == 1)).tolist()
    module.__dict__["stop_cell"] = ()  # as if nobody knew
    apart, _ = kd_gradient(module)
    assert pull.norm() < 1e-4 * apart.norm()


@pytest.mark.parametrize("settings", [{}, {"epochs_per_rollout": 2}], ids=["one update", "reused"])
@pytest.mark.parametrize("modulation", [TRRD(), DistilledRL(), RLSD()], ids=lambda m: type(m).__name__)
def test_twins_modulate_nothing(modulation, settings, twins) -> None:
    # d_old = 0, so the gradient is plain GRPO's; TRRD's ratio to the teacher has one of its own: value only.
    losses, gradients = [], []
    for own in (modulation, None):
        pg = PolicyGradient(modulation=own)
        module = make_module(*twins, policy_gradient=pg, distillation=None, **settings).load()
        experience = module.score(rows())
        output = module.loss(experience)
        module.zero_grad()
        output.loss.backward()
        losses.append(output.loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in module.student.parameters()]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    if not isinstance(modulation, TRRD):
        assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


def test_twins_shape_no_reward(twins) -> None:
    settings = {"distillation": None, "reward_shaping": RewardShaping(1.0), "advantage_scale": "none"}
    shaped = make_module(*twins, **settings).load().score(rows())
    assert shaped.advantages.tolist() == pytest.approx([0.5, -0.5, -0.5, 0.5], abs=1e-5)


class WatchedEngine(InProcessEngine):
    """Remembers what it was told to stop at, and how the rows of every rollout ended."""

    def __init__(self) -> None:
        super().__init__()
        self.stops, self.ends = set(), []

    def sync(self, student, stop_token_ids) -> None:
        self.stops.add(tuple(stop_token_ids))
        super().sync(student, stop_token_ids)

    def generate(self, *arguments, **more):
        done = super().generate(*arguments, **more)
        self.ends += [ids for ids, finished in zip(done.token_ids, done.finished, strict=True) if finished]
        return done


def test_a_run_stops_at_the_students_end_token_and_says_so_once(twins, tmp_path, caplog) -> None:
    engine, module = WatchedEngine(), make_module(*twins, distillation=Distillation(0.3, "full"))
    with caplog.at_level(logging.INFO, "kdrl_pl"):
        fit(tmp_path, module, make_data(), max_rollouts=2, rollouts=make_rollouts(engine=engine))
    assert caplog.text.count("responses end with [1] (student) and [2] (teacher)") == 1
    assert engine.stops == {(1,)}
    assert {ids[-1] for ids in engine.ends} == {1}
    assert any(2 in ids for ids in engine.ends)  # the teacher's end token is the student's character "0"
    first = next(row for row in metrics_rows(tmp_path) if "teacher/reverse_kl" in row)
    assert abs(first["teacher/reverse_kl"]) < 1e-5  # the student is still the teacher's twin
    for values in json.loads((tmp_path / "summary.json").read_text())["val"]["before"].values():
        assert abs(values["kl_teacher"]) < 1e-5


def test_models_with_one_common_end_token_read_nothing_more(tiny_models) -> None:
    module = make_module(*tiny_models).load()
    experience = module.score(rows())
    assert experience.stop_cell == module.stop_cell == ()
    assert module.policy(experience, 0).readings == {}
