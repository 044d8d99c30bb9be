"""Every option of ours says what it is, on the parser that the command line builds."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kdrl_pl.__main__ import COMMANDS, main
from kdrl_pl.cli.lightning import RunCLI


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
    ours = [a for a in parsers[0]._actions if a.dest.startswith(("model.", "data.", "rollout.", "run.", "checkpoint."))]
    assert len(ours) > 20
    assert not [a.dest for a in ours if not a.help]


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
