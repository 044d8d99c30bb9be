"""Attacks by files of others: configs that name foreign code, checkpoints and models that carry it, names like ../up.

Every attack would leave the file `owned` behind.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from yaml import safe_dump

from kdrl_pl.__main__ import main
from kdrl_pl.models.tiny import write_tiny
from kdrl_pl.study.config import read_study
from kdrl_pl.study.plan import plan

ROOT = Path(__file__).resolve().parents[2]
DEBUG = ["--config", "configs/debug.yaml", "--data.val", "null", "--trainer.logger", "false"]
TOUCH = {"class_path": "os.system", "init_args": {"command": "touch owned"}}
POPEN = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "owned"]}}


def class_of(path: str, **arguments) -> dict:
    return {"class_path": path, "init_args": arguments}


def function(path: str) -> dict:
    return {"rollout": {"reward": class_of("kdrl_pl.rewards.FunctionReward", function=path)}}


# an overlay over configs/debug.yaml -> what the message must hold
OVERLAYS = {
    "reward": ({"rollout": {"reward": TOUCH}}, "--allow-import os"),
    "engine": ({"rollout": {"engine": POPEN}}, "--allow-import subprocess"),
    "teacher": ({"model": {"teacher": POPEN}}, "--allow-import subprocess"),
    "optimizer": ({"model": {"optimizer": TOUCH}}, "--allow-import os"),
    "optimizer as text": ({"model": {"optimizer": "os.system"}}, "--allow-import os"),
    "schedule": ({"model": {"distillation": {"coef": TOUCH}}}, "--allow-import os"),
    "schedule in a schedule": (
        {"model": {"lr_schedule": class_of("kdrl_pl.schedules.Warmup", rollouts=2, coef=TOUCH)}},
        "--allow-import os",
    ),
    "modulation": ({"model": {"policy_gradient": {"modulation": TOUCH}}}, "--allow-import os"),
    "further term": ({"model": {"terms": {"mine": TOUCH}}}, "--allow-import os"),
    "reward in a sum": (
        {"rollout": {"reward": class_of("kdrl_pl.rewards.WeightedSum", rewards={"a": TOUCH})}},
        "--allow-import os",
    ),
    "reward under guard": (
        {"rollout": {"reward": class_of("kdrl_pl.rewards.GuardedReward", reward=POPEN)}},
        "--allow-import subprocess",
    ),
    "list of callbacks": ({"trainer": {"callbacks": [POPEN]}}, "--allow-import subprocess"),
    "one callback": ({"trainer": {"callbacks": POPEN}}, "--allow-import subprocess"),
    "callback of functions": (
        {"trainer": {"callbacks": [class_of("lightning.pytorch.callbacks.LambdaCallback", on_fit_start="os.system")]}},
        "--allow-import os",
    ),
    "strategy": ({"trainer": {"strategy": POPEN}}, "--allow-import subprocess"),
    "plugins": ({"trainer": {"plugins": [POPEN]}}, "--allow-import subprocess"),
    "logger": ({"trainer": {"logger": POPEN}}, "--allow-import subprocess"),
    "profiler": ({"trainer": {"profiler": POPEN}}, "--allow-import subprocess"),
    "curriculum": ({"data": {"curriculum": POPEN}}, "--allow-import subprocess"),
    "set": ({"data": {"train": {"addition": POPEN}}}, "--allow-import subprocess"),
    "built-in": ({"rollout": {"reward": class_of("builtins.eval", source="open('owned', 'w')")}}, "builtins"),
    "importer": ({"rollout": {"reward": class_of("importlib.import_module", name="antigravity")}}, "importlib"),
    "pickle": (
        {"rollout": {"reward": class_of("torch.load", f="evil.pt", weights_only=False)}},
        "--allow-import torch",
    ),
    "unpickler": ({"rollout": {"reward": class_of("pickle.Unpickler", file="evil.pt")}}, "--allow-import pickle"),
    # foreign things under our name and under names that are allowed
    "our os": ({"rollout": {"reward": class_of("kdrl_pl.cli.run.os.system", command="touch owned")}}, "os"),
    "our importer": ({"rollout": {"reward": class_of("kdrl_pl.cli.errors.import_module", name="x")}}, "importlib"),
    "our torch": ({"rollout": {"reward": class_of("kdrl_pl.experience.torch.load", f="evil.pt")}}, "torch"),
    "torch's os": ({"model": {"optimizer": class_of("torch.optim.optimizer.functools.partial")}}, "functools"),
    "a name that begins alike": ({"rollout": {"reward": class_of("kdrl_plus.Reward")}}, "--allow-import kdrl_plus"),
    "relative": ({"rollout": {"reward": class_of("kdrl_pl..os.system")}}, "kdrl_pl..os.system"),
    "function": (function("os.system"), "--allow-import os"),
    "function of ours": (function("kdrl_pl.files.write_json_atomic"), "write_json_atomic is not among"),
    "importer as function": (function("kdrl_pl.cli.errors.import_module"), "import_module is not among"),
    "function of Lightning": (function("lightning.pytorch.utilities.seed.isolate_rng"), "isolate_rng is not among"),
    "free options": ({"data": {"train": {"addition": {"options": TOUCH}}}}, "--allow-import os"),
    # what only the command line may say
    "allow-import in a config": ({"allow_import": "os"}, "no setting --allow_import"),
    "allow-import as it is typed": ({"allow-import": "os"}, "no setting --allow-import"),
    "remote code": ({"model": {"trust_remote_code": True}}, "no setting --model.trust_remote_code"),
    "remote code of the tokenizer": ({"data": {"trust_remote_code": True}}, "no setting --data.trust_remote_code"),
    # names that lead out of the run folder
    "name upwards": ({"run": {"name": "../up"}}, "run.name is '../up'"),
    "name from the root": ({"run": {"name": "/owned"}}, "run.name is '/owned'"),
    "name in the middle": ({"run": {"name": "a/../../up"}}, "plain folder name"),
    "name of a parent": ({"run": {"name": ".."}}, "plain folder name"),
    "name with a back-slash": ({"run": {"name": "..\\up"}}, "plain folder name"),
    "name with a control character": ({"run": {"name": "a\nb"}}, "plain folder name"),
    "set upwards": ({"data": {"train": {"../up": {"source": "addition", "size": 8}}}}, "without '/'"),
    "output": ({"output": "owned"}, "output is for the command line only"),
}
TAGS = ["!!python/object/apply:os.system ['touch owned']", "!!python/name:os.system", "!!python/module:os"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder, in which nothing may be left behind."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "owned").exists() and not (tmp_path.parent / "up").exists()


def refused(capsys, arguments: list[str]) -> str:
    """The message with which a command ends."""
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize("attack", OVERLAYS)
def test_an_overlay_runs_nothing(attack, folder, capsys):
    overlay, words = OVERLAYS[attack]
    (folder / "overlay.yaml").write_text(safe_dump(overlay))
    assert words in refused(capsys, ["fit", *DEBUG, "--config", "overlay.yaml"])


@pytest.mark.parametrize("attack", ["reward", "optimizer", "list of callbacks", "our os", "importer as function"])
def test_nor_does_the_config_of_a_run_that_is_resumed(attack, folder, capsys):
    overlay, words = OVERLAYS[attack]
    save(folder / "run", {"state_dict": {}})
    config = (ROOT / "configs/debug.yaml").read_text()
    (folder / "run/config.yaml").write_text(config)
    (folder / "overlay.yaml").write_text(safe_dump(overlay))
    from kdrl_pl.cli.configs import read_configs

    (folder / "run/config.yaml").write_text(safe_dump(read_configs(["run/config.yaml", "overlay.yaml"])))
    assert words in refused(capsys, ["fit", "--resume", "run"])


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("command", ["overlay", "section", "value", "study"])
def test_yaml_makes_no_objects(tag, command, folder, capsys):
    (folder / "evil.yaml").write_text(f"student: {tag}\n" if command == "section" else f"model: {{student: {tag}}}\n")
    arguments = {
        "overlay": ["fit", *DEBUG, "--config", "evil.yaml"],
        "section": ["fit", *DEBUG, "--model", "evil.yaml"],
        "value": ["fit", *DEBUG, "--rollout.reward", tag],
        "study": ["study", "--dry-run", "--config", "evil.yaml"],
    }
    refused(capsys, arguments[command])


def test_a_study_cannot_allow_imports(folder):
    text = "name: s\nrollouts: 1\ntestbeds: {t: {config: configs/debug.yaml}}\narms: {a: {set: {%s}}}\n"
    for setting in ("allow-import: os", "allow-import=os: 1", "'resume': x", "'-c': x"):
        (folder / "study.yaml").write_text(text % setting)
        with pytest.raises(ValueError, match="is no setting; expected one like model"):
            read_study("study.yaml")
    (folder / "study.yaml").write_text(text % "model.student: --allow-import=os")
    words = plan(read_study("study.yaml"))[0].command(Path("runs"))
    assert "--model.student=--allow-import=os" in words
    assert not any(word.startswith("--allow-import") for word in words)


def test_an_allowed_module_does_not_open_what_it_imports(folder, capsys, monkeypatch):
    (folder / "my_rewards_here.py").write_text(
        "from os import system\nimport os\n\ndef exact(completion): return 1.0\n"
    )
    monkeypatch.syspath_prepend(folder)
    for path in ("my_rewards_here.system", "my_rewards_here.os.system"):
        for overlay in ({"rollout": {"reward": class_of(path, command="touch owned")}}, function(path)):
            (folder / "overlay.yaml").write_text(safe_dump(overlay))
            arguments = ["fit", *DEBUG, "--config", "overlay.yaml", "--allow-import", "my_rewards_here"]
            assert "my_rewards_here.exact" not in refused(capsys, arguments)


class Evil:
    """Unpickled, it makes the file `owned`."""

    def __reduce__(self):
        return (exec, ("open('owned', 'w').close()",))


def save(run: Path, content: object) -> Path:
    """A run folder with one checkpoint, and the checksum that vouches for it."""
    checkpoint = run / "checkpoints/last-000002.ckpt"
    checkpoint.parent.mkdir(parents=True)
    torch.save(content, checkpoint)
    checksum = hashlib.blake2b(checkpoint.read_bytes(), digest_size=16).hexdigest()
    checkpoint.with_name("last-000002.ckpt.blake2b").write_text(checksum)
    shutil.copy(ROOT / "configs/debug.yaml", run / "config.yaml")
    return checkpoint


@pytest.mark.parametrize(
    "content", [Evil(), {"state_dict": Evil()}, {"state_dict": {"w": torch.zeros(2)}, "x": Evil()}]
)
def test_a_checkpoint_runs_nothing(content, folder, capsys):
    checkpoint = save(folder / "run", content)
    torch.save({"x": content}, folder / "rollout-000001.pt")
    for arguments in (
        ["fit", "--resume", "run", "--trainer.logger", "false"],
        ["validate", "--config", "configs/debug.yaml", "--ckpt_path", str(checkpoint)],
        ["export", "run", "--output", "exported"],
        ["replay", "rollout-000001.pt", "--config", "configs/debug.yaml"],
    ):
        assert "not loaded" in refused(capsys, arguments)
    torch.load(checkpoint, weights_only=False)
    (folder / "owned").unlink()  # so the payload works


@pytest.fixture
def model(folder) -> Path:
    """A good model folder, to be spoilt; `evil.py` stands beside its weights."""
    write_tiny(folder / "model", 16, 1)
    code = "open('owned', 'w').close()\nfrom transformers import *\nclass Evil(PretrainedConfig): pass\n"
    (folder / "model/evil.py").write_text(code)
    return folder / "model"


def change(file: Path, **settings) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_pickled_weights_are_not_read(model, folder, capsys):
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil()}, model / "pytorch_model.bin")
    message = refused(capsys, ["fit", *DEBUG, "--model.student", "model"])
    assert "holds no *.safetensors" in message and "save_pretrained" in message


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_a_model_with_code_of_its_own_is_refused(part, model, folder, capsys):
    if part == "config":
        change(model / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    else:
        change(model / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    message = refused(capsys, ["fit", *DEBUG, "--model.student", "model"])
    assert f"the {part} of model needs code of its own (auto_map in its config), which is never run" in message


def test_code_beside_a_known_model_is_not_run(model, folder):
    change(model / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    short = ["--run.max_rollouts", "1", "--model.teacher", "null", "--model.distillation", "null"]
    assert main(["fit", *DEBUG, "--model.student", "model", *short]) == 0


def test_what_is_no_setting_of_a_class_stays_data(folder):
    (folder / "overlay.yaml").write_text(safe_dump({"data": {"template": {"chat_template_kwargs": POPEN}}}))
    short = ["--run.max_rollouts", "1", "--model.teacher", "null", "--model.distillation", "null"]
    assert main(["fit", *DEBUG, "--config", "overlay.yaml", *short]) == 0


def test_a_chat_template_sees_no_python(model, folder, capsys):
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    change(model / "tokenizer_config.json", chat_template=template)
    message = refused(capsys, ["fit", *DEBUG, "--model.student", "model"])
    assert "the chat template refuses the messages" in message


@pytest.mark.parametrize("name", ["../up", "/owned", "..", ""])
def test_an_export_stays_where_exports_go(name, folder, capsys):
    save(folder / "run", {"state_dict": {}})
    config = (folder / "run/config.yaml").read_text().replace("name: debug", f"name: '{name}'")
    (folder / "run/config.yaml").write_text(config)
    assert "plain folder name" in refused(capsys, ["export", "run"])
