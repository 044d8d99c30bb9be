"""KDRLModule: what it computes without a Trainer, and what its updates do under one."""

import copy
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from tiny_run import (
    EvenSum,
    adamw,
    fit,
    make_data,
    make_module,
    make_rollouts,
    make_trainer,
    metrics_rows,
    weights_of,
)

from kdrl_pl.checkpoint import find_checkpoint
from kdrl_pl.data.loading import SetConfig
from kdrl_pl.errors import RunError
from kdrl_pl.experience import Experience
from kdrl_pl.losses import IBRO, Distillation, PolicyGradient, RewardShaping
from kdrl_pl.module import KDRLModule
from kdrl_pl.rewards.base import RewardOutput
from kdrl_pl.rollout.in_process import InProcessEngine
from kdrl_pl.rollout.sampling import Sampling
from kdrl_pl.schedules import Linear, Switch, Warmup
from kdrl_pl.teacher import FrozenTeacher

ROOT = Path(__file__).parents[1]


def rows(temperature=1.0):
    """Two groups of two ragged rows in the vocabulary of the tiny models (16 ids)."""
    return Experience.from_rows(
        prompts=[[3, 4, 12], [3, 4, 12], [5, 6, 7, 12], [5, 6, 7, 12]],
        responses=[[8, 9, 1], [2, 3, 4, 5, 1], [6], [7, 7, 8, 1]],
        rewards=[1.0, 0.0, 0.0, 1.0],
        group=[0, 0, 1, 1],
        correct=[True, False, False, True],
        temperature=temperature,
        max_response_tokens=6,
    )


def gradient(module, experience):
    """Score, loss, backward as a plain script does it; the gradient as one vector."""
    module.score(experience)
    output = module.loss(experience)
    module.zero_grad()
    output.loss.backward()
    return torch.cat([p.grad.flatten() for p in module.student.parameters()])


# ---- without a Trainer -----------------------------------------------------------------------------------------------

PLAIN_SCRIPT = """
import sys
from kdrl_pl.module import KDRLModule
loaded = [m for m in sys.modules if m.startswith(("kdrl_pl.rollout", "kdrl_pl.data", "kdrl_pl.cli", "datasets"))]
assert not loaded, loaded

import torch
from kdrl_pl.experience import Experience
from kdrl_pl.teacher import FrozenTeacher

module = KDRLModule(student=sys.argv[1], teacher=FrozenTeacher(sys.argv[2]))
module.load()
experience = Experience.from_rows([[3, 4], [3, 4]], [[5, 6, 1], [7, 1]], rewards=[1.0, 0.0], group=[0, 0])
optimizer = torch.optim.AdamW(module.student.parameters(), lr=1e-3)
before = [p.detach().clone() for p in module.student.parameters()]
module.score(experience)
output = module.loss(experience)
output.loss.backward()
optimizer.step()
assert any(not torch.equal(a, b) for a, b in zip(before, module.student.parameters()))
assert set(output.parts) == {"pg", "kd"}
loaded = [m for m in sys.modules if m.startswith(("kdrl_pl.rollout", "kdrl_pl.data", "kdrl_pl.cli"))]
assert not loaded, loaded
print("loss", float(output.loss))
"""


def test_a_plain_script_scores_and_trains(tiny_models):
    ran = subprocess.run([sys.executable, "-c", PLAIN_SCRIPT, *tiny_models], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("loss ")


def test_score_fills_in_what_the_loss_reads(tiny_models):
    module = make_module(*tiny_models, normaliser="token").load()
    experience = module.score(rows())
    root = 0.5**0.5  # of rewards 1 and 0: mean 0.5, standard deviation sqrt(0.5)
    assert experience.advantages.tolist() == pytest.approx([root, -root, -root, root], abs=2e-6)
    assert experience.token_weights.tolist() == pytest.approx([1 / 13] * 4)  # 3 + 5 + 1 + 4 tokens
    assert torch.equal(experience.kd_weights != 0, experience.response_mask)
    assert torch.equal(experience.teacher_logprobs != 0, experience.response_mask)
    assert experience.old_logprobs is None  # one update: the current student is the old one
    given = rows()
    given.advantages = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert module.score(given).advantages.tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("estimator", ["k2", "forward_kl", "full"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_a_teacher_equal_to_the_student_has_no_pull(estimator, temperature, tiny_models):
    """At every temperature: a teacher scored at another one than the student would pull."""
    student, teacher = tiny_models
    distillation = Distillation(coef=1.0, estimator=estimator)
    same = make_module(student, student, policy_gradient=None, distillation=distillation).load()
    experience = rows(temperature)
    zero = gradient(same, experience)
    other = gradient(
        make_module(student, teacher, policy_gradient=None, distillation=distillation).load(), rows(temperature)
    )
    assert zero.norm() < 1e-5 * other.norm()
    metrics = same.loss(experience).metrics
    assert abs(float(metrics["teacher/reverse_kl"][0])) < 1e-5
    assert abs(float(metrics["teacher/reverse_kl_k3"][0])) < 1e-5


def test_another_teacher_makes_another_gradient(tiny_models, tmp_path):
    from kdrl_pl.models.tiny import write_tiny

    write_tiny(tmp_path / "other", 128, 1)
    gradients = [
        gradient(make_module(tiny_models[0], t).load(), rows()) for t in (tiny_models[1], str(tmp_path / "other"))
    ]
    assert (gradients[0] - gradients[1]).norm() > 0.05 * gradients[0].norm()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normaliser": "mean"}, r"normaliser is 'mean'; expected group, token, sequence, constant"),
        ({"advantage_scale": "max"}, r"advantage_scale is 'max'; expected std, none"),
        ({"epochs_per_rollout": 0}, r"epochs_per_rollout is 0; expected at least 1"),
        ({"gradient_clip": 0.0}, r"gradient_clip is 0.0; expected a positive norm, or null"),
        ({"gradient_clip": -1.0}, r"gradient_clip is -1.0"),
        ({"teacher": None}, r"distillation needs a teacher: set model.teacher.path, or model.distillation: null"),
        ({"teacher": None, "distillation": None, "reward_shaping": RewardShaping()}, r"needs a teacher"),
        ({"reward_shaping": RewardShaping()}, r"both bring in the teacher; set model.distillation: null"),
        (
            {"policy_gradient": None, "distillation": None},
            r"the objective has no term; switch on model.policy_gradient or model.distillation",
        ),
        ({"terms": {"kd": IBRO(0.1)}}, r"model.terms names a term 'kd', as a part of its own is; rename it"),
        ({"terms": {"tgpo": None, "lr": IBRO(0.1)}}, r"model.terms names a term 'lr'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        KDRLModule("student", **{"teacher": FrozenTeacher("teacher"), **settings})


def test_constructors_load_nothing():
    module = KDRLModule("nowhere", FrozenTeacher("nowhere either"))
    assert module.student is None
    assert module.teacher.model is None
    assert not list(module.parameters())


def test_who_only_writes_down_responses_loads_no_teacher(tiny_models, tmp_path):
    # Red: the weights of the teacher in memory, or a run that waits for its server, though nothing asks it.
    module, sets = make_module(*tiny_models), {"a": SetConfig(source="addition", size=2, options={"digits": 2})}
    trainer = make_trainer(tmp_path)
    trainer.predict(module, datamodule=make_data(predict=sets), return_predictions=False)
    assert not module.teacher.is_loaded
    trainer.validate(module, datamodule=make_data(), verbose=False)
    assert module.teacher.is_loaded


def test_old_logprobs_are_those_before_the_first_update(tiny_models):
    for settings in ({"epochs_per_rollout": 2}, {"groups_per_update": 1}):
        module = make_module(*tiny_models, **settings).load()
        experience = module.score(rows())
        with torch.no_grad():
            now = module.student.token_logprobs(experience.input_ids, experience.response_mask, 1.0).logprobs
        assert torch.allclose(experience.old_logprobs, now, atol=1e-6)
        assert experience.old_logprobs[~experience.response_mask].eq(0).all()


def digest(model):
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in model.state_dict().values())).hexdigest()


# ---- under a Trainer -------------------------------------------------------------------------------------------------


def test_the_teacher_is_neither_saved_nor_changed(tiny_models, tmp_path):
    module = make_module(*tiny_models)
    module.load()
    before = digest(module.teacher.model)
    fit(tmp_path, module, max_rollouts=3)
    assert digest(module.teacher.model) == before
    assert not any(
        parameter.requires_grad or parameter.grad is not None for parameter in module.teacher.model.parameters()
    )
    assert not any(part.training for part in module.teacher.model.modules())
    (path,) = (tmp_path / "checkpoints").glob("last-*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["state_dict"]) == {f"student.{name}" for name, _ in module.student.named_parameters()}
    assert checkpoint["kdrl"]["teacher"] == module.teacher.fingerprint()
    size = sum(p.numel() * 4 for p in module.student.parameters())
    assert 3 * size < path.stat().st_size < 3.5 * size  # weights and AdamW's two moments


class OldLogprobs(KDRLModule):
    """Remembers old log-probs and ratio of every forward pass."""

    def loss(self, experience, rollout=None):
        output = super().loss(experience, rollout)
        self.__dict__.setdefault("seen", []).append((experience.old_logprobs, output.logprobs))
        return output


def test_several_updates_share_the_old_logprobs(tiny_models, tmp_path):
    module = make_module(*tiny_models, OldLogprobs, epochs_per_rollout=2)
    trainer = fit(tmp_path, module, max_rollouts=1)
    assert trainer.global_step == 2
    (old, first), (old_again, second) = module.seen
    assert torch.equal(old, old_again)
    assert torch.allclose(first, old, atol=1e-6)
    assert (second - old).abs().max() > 1e-3
    assert metrics_rows(tmp_path)[0]["train/importance_ratio"] != 1.0


def all_wrong(completions):
    return RewardOutput([0.0] * len(completions), [False] * len(completions))


def test_a_step_without_signal_is_not_taken(tiny_models, tmp_path):
    """AdamW with decay and momentum would move the weights even though the gradient is zero."""
    module = make_module(tiny_models[0], None)
    module.load()
    before = weights_of(module)
    trainer = fit(tmp_path, module, max_rollouts=2, rollouts=make_rollouts(reward=all_wrong))
    assert all(torch.equal(value, before[name]) for name, value in weights_of(module).items())
    assert not trainer.optimizers[0].state
    assert (trainer.global_step, module.skipped_steps) == (0, 2)
    train = [row for row in metrics_rows(tmp_path) if "validation" not in row]
    assert [row["train/skipped_steps"] for row in train] == [1, 2]
    assert [row["rollout/groups_no_signal"] for row in train] == [1, 1]
    assert "train/grad_norm" not in train[0]


class SometimesInfinite(KDRLModule):
    """The gradient of the named rollouts is not finite."""

    bad = ()

    def loss(self, experience, rollout=None):
        output = super().loss(experience, rollout)
        if rollout in self.bad:
            output.loss = output.loss * torch.inf
        return output


class Weights(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, *_):
        self.seen.append(weights_of(module))


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_gradient_that_is_not_finite_is_skipped(tiny_models, tmp_path):
    module, weights = make_module(*tiny_models, SometimesInfinite, max_skipped_steps=2), Weights()
    module.bad = (1, 3)
    fit(tmp_path, module, max_rollouts=5, after=[weights])
    assert [equal(a, b) for a, b in zip(weights.seen[1:], weights.seen, strict=False)] == [True, False, True, False]
    assert all(torch.isfinite(value).all() for value in weights.seen[-1].values())
    train = [row for row in metrics_rows(tmp_path) if "validation" not in row]
    assert [row["train/skipped_steps"] for row in train] == [0, 1, 1, 2, 2]
    assert train[1]["train/grad_norm"] is None  # JSON has no infinity


def test_too_many_of_them_in_a_row_stop_the_run(tiny_models, tmp_path):
    module, weights = make_module(*tiny_models, SometimesInfinite, max_skipped_steps=2), Weights()
    module.bad = (1, 3, 4, 5)
    with pytest.raises(RunError, match=r"2 steps in a row had a .* not finite \(last: rollout 4\)"):
        fit(tmp_path, module, max_rollouts=6, after=[weights])
    assert equal(weights_of(module), weights.seen[2])  # those of the last good step


def test_a_resumed_run_counts_on(tiny_models, tmp_path):
    first, second = (make_module(*tiny_models, SometimesInfinite, max_skipped_steps=2) for _ in range(2))
    first.bad = second.bad = (1, 2)
    fit(tmp_path, first, max_rollouts=2)
    with pytest.raises(RunError, match=r"2 steps in a row had a .* not finite \(last: rollout 2\)"):
        fit(tmp_path, second, max_rollouts=3, resume=find_checkpoint(tmp_path))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A tiny GPT-2 with its default dropout of 0.1 in three places."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from kdrl_pl.data.tasks.addition import ALPHABET
    from kdrl_pl.models.character_tokenizer import character_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("gpt2"), character_tokenizer(ALPHABET)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64)
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.1, 0.1, 0.1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Modes(KDRLModule):
    """Remembers in which mode the student was when it was trained on, and when it was scored."""

    def loss(self, experience, rollout=None):
        self.__dict__.setdefault("modes", []).append({part.training for part in self.student.modules()})
        return super().loss(experience, rollout)

    def student_logprobs(self, experience, *arguments, **more):
        self.__dict__.setdefault("scoring_modes", set()).update(part.training for part in self.student.modules())
        return super().student_logprobs(experience, *arguments, **more)


class WatchedEngine(InProcessEngine):
    """Remembers in which mode the student decoded."""

    def sync(self, student, stop_token_ids):
        super().sync(student, stop_token_ids)
        self.modes = getattr(self, "modes", [])
        if not self.modes:
            student.model.get_input_embeddings().register_forward_hook(lambda part, *_: self.note(part))

    def note(self, part):
        if self.decoding:
            self.modes.append(part.training)

    decoding = False

    def generate(self, *arguments, **more):
        self.decoding = True
        try:
            return super().generate(*arguments, **more)
        finally:
            self.decoding = False


def test_gpt2_trains_without_its_dropout_in_train_mode_and_decodes_in_eval_mode(gpt2, tmp_path):
    module, engine = make_module(gpt2, gpt2, Modes, epochs_per_rollout=2), WatchedEngine()
    fit(tmp_path, module, max_rollouts=2, rollouts=make_rollouts(engine=engine))
    dropouts = [part for part in module.student.modules() if isinstance(part, torch.nn.Dropout)]
    assert len(dropouts) == 7  # 1 after the embeddings, 3 per layer
    assert all(part.p == 0.0 for part in dropouts)
    assert module.modes == [{True}] * 4
    assert module.scoring_modes == {False}
    assert engine.modes
    assert not any(engine.modes)
    assert {part.training for part in module.student.modules()} == {True}  # after rollouts, scoring and validation
    train = [row for row in metrics_rows(tmp_path) if "validation" not in row]
    assert all(row["rollout/sampler_drift_max"] <= 1e-5 for row in train)


def test_gradient_checkpointing_recomputes_and_changes_nothing(tiny_models):
    gradients, calls = [], []
    for checkpointing in (False, True):
        module = make_module(*tiny_models, gradient_checkpointing=checkpointing).load()
        count = []
        module.student.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        gradients.append(gradient(module, rows()))
        calls.append(len(count))
    assert calls == [1, 2]
    assert torch.equal(gradients[0], gradients[1])


class WrongTemperature(InProcessEngine):
    """Samples at half the temperature it is asked for."""

    def generate(self, prompts, group_size, sampling, *arguments, **more):
        return super().generate(prompts, group_size, Sampling(0.5, max_tokens=sampling.max_tokens), *arguments, **more)


def test_a_sampler_that_is_another_policy_stops_the_run(tiny_models, tmp_path):
    with pytest.raises(RunError, match=r"sampler and trainer disagree .*limits for float32: 1e-05 and 0\.001"):
        fit(tmp_path, make_module(*tiny_models), max_rollouts=2, rollouts=make_rollouts(engine=WrongTemperature()))


class SwitchesTemperature(WrongTemperature):
    rollouts = 0

    def generate(self, prompts, group_size, sampling, *arguments, **more):
        self.rollouts += 1
        cls = InProcessEngine if self.rollouts == 1 else WrongTemperature
        return cls.generate(self, prompts, group_size, sampling, *arguments, **more)


def test_a_first_rollout_without_signal_does_not_use_up_the_check(tiny_models, tmp_path):
    rewards = iter([all_wrong, *[EvenSum()] * 9])
    rollouts = make_rollouts(engine=SwitchesTemperature(), reward=lambda completions: next(rewards)(completions))
    with pytest.raises(RunError, match="sampler and trainer disagree"):
        fit(tmp_path, make_module(tiny_models[0], None), make_data(val=0), max_rollouts=3, rollouts=rollouts)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_sampler_and_trainer_agree_at_every_temperature(temperature, tiny_models, tmp_path):
    rollouts = make_rollouts()
    rollouts.sampling = Sampling(temperature, max_tokens=12)
    fit(tmp_path, make_module(*tiny_models), make_data(val=0), max_rollouts=2, rollouts=rollouts)
    assert all(row["rollout/sampler_drift_max"] <= 1e-5 for row in metrics_rows(tmp_path))


def test_bf16_mixed_computes_in_bf16_on_fp32_weights(tiny_models, tmp_path):
    module = make_module(*tiny_models)
    trainer = fit(tmp_path, module, max_rollouts=2, precision="bf16-mixed")
    assert {p.dtype for p in module.student.parameters()} == {torch.float32}
    assert trainer.global_step == 2
    train = [row for row in metrics_rows(tmp_path) if "validation" not in row]
    assert all(1e-5 < row["rollout/sampler_drift_max"] < 0.5 for row in train)
    assert all(row["rollout/sampler_drift_mean"] < 0.05 for row in train)


def test_learning_rate_and_coefficients_follow_their_schedules(tiny_models, tmp_path):
    settings = {
        "lr_schedule": Warmup(2, Linear(1.0, 0.25, 0.5)),
        "distillation": Distillation(coef=Linear(0.3, 0.1, 0.05)),
        "policy_gradient": PolicyGradient(coef=Switch(0.5, 1.0, 2)),
    }
    trainer = fit(tmp_path, make_module(*tiny_models, **settings), make_data(val=0), max_rollouts=4)
    train = metrics_rows(tmp_path)
    assert [row["train/lr"] for row in train] == pytest.approx([1.5e-3, 2.25e-3, 1.5e-3, 1.5e-3])
    assert [row["train/kd_coef"] for row in train] == pytest.approx([0.3, 0.2, 0.1, 0.05])
    assert [row["train/pg_coef"] for row in train] == [0.5, 0.5, 1.0, 1.0]
    (group,) = trainer.optimizers[0].param_groups
    assert (group["betas"], group["weight_decay"], group["initial_lr"]) == ((0.9, 0.99), 0.01, 3e-3)


def test_one_update_is_one_adamw_step_on_the_clipped_gradient(tiny_models, tmp_path):
    """The whole loop against torch by hand: the same rows, the same loss, clip at 0.1, AdamW."""
    module = make_module(*tiny_models, gradient_clip=0.1)
    kept = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            kept.append(batch.experience)

    fit(tmp_path, module, make_data(val=0), max_rollouts=1, after=[Keep()])
    by_hand = make_module(*tiny_models).load()
    optimizer = adamw(by_hand.student.parameters())
    by_hand.loss(kept[0], 0).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(by_hand.student.parameters(), 0.1)
    optimizer.step()
    assert metrics_rows(tmp_path)[0]["train/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert float(norm) > 0.1
    for ours, theirs in zip(module.student.parameters(), by_hand.student.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_metric_that_a_rollout_does_not_have_is_absent(tiny_models, tmp_path):
    """Lightning keeps the last value of everything that was ever logged; our log says only what this rollout said."""
    settings = {
        "policy_gradient": PolicyGradient(coef=Switch(0.0, 1.0, 1)),
        "distillation": Distillation(coef=Switch(1.0, 0.0, 1)),
    }
    fit(tmp_path, make_module(*tiny_models, **settings), make_data(val=0), max_rollouts=2)
    first, second = metrics_rows(tmp_path)
    assert first["teacher/kd_tokens"] == 1
    assert "teacher/reverse_kl" in first
    assert second["teacher/kd_tokens"] == 0
    assert "teacher/reverse_kl" not in second


@pytest.mark.parametrize(
    "settings",
    [
        {"policy_gradient": None},
        {"distillation": None},
        {"distillation": None, "reward_shaping": RewardShaping(coef=0.1)},
        {"distillation": Distillation(estimator="full", transform="clip")},
        {"distillation": Distillation(mask="group", normaliser="kept"), "advantage_scale": "none"},
    ],
)
def test_arms_train(settings, tiny_models, tmp_path):
    module = make_module(*tiny_models, **settings)
    module.load()
    before = copy.deepcopy(weights_of(module))
    trainer = fit(tmp_path, module, max_rollouts=2)
    assert trainer.global_step == 2
    assert not equal(before, weights_of(module))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["rollouts"] == 2
    assert summary["val"]["before"].keys() == summary["val"]["after"].keys() == {"val"}
