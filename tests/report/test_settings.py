"""Which settings a person chose."""

from __future__ import annotations

from run_folders import config

from kdrl_pl.report.settings import flat, settings_of


def changed(settings):
    return {s.name: (s.value, s.default) for s in settings_of(settings) if s.changed}


def test_changed_settings():
    assert changed(config()) == {
        "trainer.accelerator": ("cpu", "auto"),
        "model.student": ("checkpoints/testbeds/arithmetic/student", None),
        "model.teacher": ("kdrl_pl.FrozenTeacher", None),
        "model.teacher.path": ("teacher", None),
        "model.distillation.coef": (0.5, 0.002),
        "model.normaliser": ("token", "group"),
        "data.train.sums.source": ("addition", None),
        "data.train.sums.size": (8, None),
        "data.prompts_per_rollout": (2, 128),
        "run.name": ("made", "kdrl"),
        "run.keep_rollouts": (5, 20),
        "run.max_rollouts": (4, None),
        "rollout.group_size": (2, 8),
        "rollout.sampling.max_tokens": (8, 8192),
    }


def test_the_code_of_others_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "foreign_reward.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings = config()
    settings["rollout"]["reward"] = {"class_path": "foreign_reward.Reward", "init_args": {"a": 1}}
    found = changed(settings)
    assert found["rollout.reward"] == ("foreign_reward.Reward", None) and found["rollout.reward.a"] == (1, None)


def test_sections_that_are_not_known():
    settings = {**config(), "new": {"a": 1}, "seed_everything": 3, "empty": {}, "none": None}
    found = changed(settings)
    assert found["new.a"] == (1, None) and found["seed_everything"] == (3, 0) and found["none"] == (None, None)


def test_flat():
    settings = {
        "a": {"class_path": "x.Y", "init_args": {"b": 1, "c": {}}},
        "d": [1],
        "trainer": {"default_root_dir": "/"},
    }
    assert flat(settings) == {"a": "x.Y", "a.b": 1, "a.c": {}, "d": [1]}
