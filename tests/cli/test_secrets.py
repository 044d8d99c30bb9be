"""Secrets of a config reach the run, not its record."""

import sys
from collections.abc import Sequence

import pytest
from jsonargparse import Namespace

from kdrl_pl.cli.run import run
from kdrl_pl.cli.secrets import MASK, masked, refuse_masked
from kdrl_pl.rewards.base import Completion, RewardOutput


@pytest.mark.parametrize(
    "name", ["token", "hf_token", "password", "db_password", "api_key", "apikey", "secret", "client_secret", "API_KEY"]
)
def test_secrets_are_masked(name):
    assert masked({name: "hunter2"}) == {name: MASK}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 256),
        ("stop_token_ids", [3]),
        ("pad_token", "<pad>"),
        ("normaliser", "token"),
        ("token", None),
        ("password", ""),
        ("tokenizer", "path"),
        ("secretary", "Ann"),
        ("url", "https://host:8000/v1"),
    ],
)
def test_other_settings_stay(name, value):
    assert masked({name: value}) == {name: value}


def test_nested_settings_are_masked_and_the_given_ones_kept():
    given = Namespace(
        model=Namespace(teacher={"class_path": "Remote", "init_args": {"token": "t", "url": "http://me:pw@host/v1"}}),
        loggers=[Namespace(init_args=Namespace(api_key="k", name="n"))],
        tokens={"token": ["a", "b"]},
    )
    saved = masked(given)
    assert saved.model.teacher["init_args"] == {"token": MASK, "url": f"http://{MASK}@host/v1"}
    assert vars(saved.loggers[0].init_args) == {"api_key": MASK, "name": "n"}
    assert saved.tokens == {"token": [MASK, MASK]}
    assert given.model.teacher["init_args"]["token"] == "t"


def test_a_masked_setting_is_asked_for_again():
    settings = Namespace(model={"teacher": {"token": MASK, "url": f"http://{MASK}@host"}}, run=Namespace(name="a"))
    with pytest.raises(ValueError, match=r"^--model.teacher.token, --model.teacher.url: saved configs do not hold"):
        refuse_masked(settings)
    refuse_masked(Namespace(model={"teacher": {"token": "t"}}))


class KeyedReward:
    """Asks nobody, but has a key to ask with.

    Args:
        api_key: the key.
    """

    def __init__(self, api_key: str) -> None:
        self.api_key = api_key

    def __call__(self, completions: Sequence[Completion]) -> RewardOutput:
        assert self.api_key == "hunter2"
        return RewardOutput([0.0] * len(completions))


def test_a_resumed_run_asks_for_its_secret_and_for_its_data(tmp_path, monkeypatch, capsys):
    """The whole way: config on disk without the key, refused without it, refused with other data, and insisted on."""
    monkeypatch.setitem(sys.modules, "keyed", sys.modules[__name__])
    monkeypatch.setattr(KeyedReward, "__module__", "keyed")
    reward = ["--rollout.reward", "keyed.KeyedReward", "--rollout.reward.api_key", "hunter2"]
    fit = ["--config", "configs/debug.yaml", "--allow-import", "keyed", "--run.root", str(tmp_path)]
    assert run("fit", [*fit, *reward, "--run.max_rollouts", "1"]) == 0
    (folder,) = (tmp_path / "debug").iterdir()
    assert "hunter2" not in (folder / "config.yaml").read_text()
    assert f"api_key: {MASK}" in (folder / "config.yaml").read_text()

    before = (folder / "config.yaml").read_text()
    resume = ["--resume", str(folder), "--allow-import", "keyed"]
    assert run("fit", resume) == 1
    assert "kdrl fit: --rollout.reward.init_args.api_key: saved configs do not" in capsys.readouterr().err
    other = [*resume, "--rollout.reward.init_args.api_key", "hunter2", "--data.train.addition.size", "32"]
    assert run("fit", other) == 1
    assert "was trained on data set" in capsys.readouterr().err
    assert (folder / "config.yaml").read_text() == before  # nothing that was refused
    assert run("fit", [*other, "--resume-anyway", "--run.max_rollouts", "2"]) == 0
    assert (folder / "config.yaml").read_text() != before
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4
