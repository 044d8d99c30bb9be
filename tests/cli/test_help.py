"""Every option of ours says what it is, on the parser that the command line builds."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from kdrl_pl.__main__ import COMMANDS, main
from kdrl_pl.cli.help import SETTINGS
from kdrl_pl.cli.lightning import RunCLI
from kdrl_pl.losses import Distillation


class _Built(BaseException):
    """The parser is there; nothing needs to be parsed."""


@pytest.mark.parametrize("command", ["fit", "predict", "sft"])
def test_every_option_has_help(command, monkeypatch):
    parsers = []

    def stop(self, parser, args):
        parsers.append(self._parser(self.command))
        raise _Built

    monkeypatch.setattr(RunCLI, "parse_arguments", stop)
    with pytest.raises(_Built):
        main([command])
    ours = [
        a
        for a in parsers[0]._actions
        if a.dest.startswith(("model.", "data.", "rollout.", "run.", "checkpoint.", "view."))
    ]
    assert len(ours) > 20
    assert not [a.dest for a in ours if not a.help]


@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
def test_the_short_help_tells_the_truth(command, monkeypatch, capsys):
    """Its options are there, and their defaults are those of the parser."""
    parsers = []

    def stop(self, parser, args):
        parsers.append(self._parser(self.command))
        raise _Built

    monkeypatch.setattr(RunCLI, "parse_arguments", stop)
    with pytest.raises(_Built):
        main([command])
    known = {option: action for action in parsers[0]._actions for option in action.option_strings}
    ours = {"--dry-run", "--resume", "--resume-anyway", "--allow-import", "--help-all"}  # taken before the parser
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    shown = {line.split()[0] for line in text.splitlines() if line.startswith("  --")}
    assert len(shown) > 8
    inside = {option for option in shown - ours if option not in known}  # of a class that is given by its name
    assert inside <= {"--model.teacher.path", "--model.distillation.coef", "--model.optimizer.init_args.lr"}
    for option, (_, default) in SETTINGS.items():
        action = known.get(option.split()[0])
        if action is not None and default is not None:
            assert str(action.default if action.default is not None else "null") == default, option
    assert inspect.signature(Distillation).parameters["coef"].default == float(
        SETTINGS["--model.distillation.coef X"][1]
    )


def test_the_short_help_loads_no_torch_and_the_long_one_is_there(capsys):
    code = "import sys; from kdrl_pl.__main__ import main; main(['fit', '--help']); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.endswith("False\n") and "--help-all" in out and len(out.splitlines()) < 40
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--help-all"])
    assert not ended.value.code
    assert "--model.max_skipped_steps" in capsys.readouterr().out


def test_config_may_come_before_the_command(capsys):
    assert main(["--config", "configs/debug.yaml", "-c=configs/arms/grpo.yaml", "validate", "--dry-run"]) == 1
    assert "--dry-run is for kdrl fit" in capsys.readouterr().err  # so it was validate that ran
    assert main(["--run.name", "x", "fit"]) == 2
    assert "kdrl fit --run.name x" in capsys.readouterr().err


def test_the_front_answers_without_loading_torch():
    code = "import sys; from kdrl_pl.__main__ import main; main(['--help']); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.endswith("False\n")
    assert all(name in out for name in COMMANDS)


def test_settings_are_parsed_without_loading_data_sets():
    """The parser runs the imports under TYPE_CHECKING too; `datasets` alone would add a fifth to the start."""
    slow = "{'bitsandbytes', 'datasets', 'math_verify'}"
    code = (
        f"import atexit, sys; atexit.register(lambda: print({slow} & sys.modules.keys(), file=sys.stderr)); "
        "from kdrl_pl.__main__ import main; main(['fit', '--config', 'configs/quickstart.yaml', '--print_config'])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "max_rollouts: 120" in ran.stdout
    assert ran.stderr.endswith("set()\n")
