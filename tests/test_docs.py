"""What README and tutorial tell people to type works; files, commands and Python run as they stand, at a small size.

A block's first words say what becomes of it: a file name writes the block there, `bash` runs it, `python` runs it, and
`bash long` only checks that its commands and files exist.
"""

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kdrl_pl.__main__ import COMMANDS, main
from kdrl_pl.resources import find

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALL = """
data: {prompts_per_rollout: 4, val_batch_size: 16}
rollout: {group_size: 4, validation_samples: 2}
trainer: {limit_val_batches: 1, limit_predict_batches: 1, logger: false}
"""


def commands(block):
    """The lines of a shell block, comments dropped and continued lines joined."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def smaller(arguments):
    """The arguments of a `kdrl` command with options that make it short."""
    command, *rest = arguments
    if command == "sft":
        return [*arguments, "--trainer.max_steps=2", "--data.batch_size=4"]
    if command == "fit" and "--resume" in rest:
        return [*arguments, "--run.max_rollouts=3"]
    size = ["--run.max_rollouts=2"] if command == "fit" else []
    return [*arguments, *size, "--config=small.yaml"] if command != "export" else arguments


def run_shell(block, folder):
    """Each line by bash, `kdrl` lines in this process: starting it anew would take five seconds each."""
    assignments = []
    for line in commands(block):
        if line.startswith("kdrl "):
            script = [*assignments, line.replace("kdrl ", "printf '%s\\0' ", 1)]
            expanded = subprocess.run(["bash", "-ec", "\n".join(script)], cwd=folder, capture_output=True, check=True)
            arguments = expanded.stdout.decode().split("\0")[:-1]
            assert main(smaller(arguments)) == 0, line
        elif re.match(r"\w+=", line):
            assignments.append(line)
        else:
            subprocess.run(["bash", "-ec", line], cwd=folder, check=True)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory; what documents import from it is forgotten afterwards."""
    (tmp_path / "small.yaml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if (tmp_path / f"{name}.py").exists():
            del sys.modules[name]


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md", "docs/adapters.md"])
def test_the_blocks_of_a_page_work(page, folder, capsys):
    ran = 0
    for language, rest, block in BLOCK.findall((ROOT / page).read_text()):
        name = rest.strip()
        if language == "bash" and not name:
            run_shell(block, folder)
        elif language == "python" and not name:
            exec(compile(block, page, "exec"), {"__name__": "__main__"})
        elif "." in name:
            (folder / name).write_text(block)
        else:
            continue
        ran += 1
    assert ran


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_exist(page):
    text = page.read_text()
    written = {rest.strip() for _, rest, _ in BLOCK.findall(text)}
    for language, _, block in BLOCK.findall(text):
        for line in commands(block) if language == "bash" else []:
            words = shlex.split(line, comments=True)
            if words[0] == "make":
                subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
            if words[0].endswith("kdrl"):
                assert words[1] in COMMANDS or words[1].startswith("--"), line
                for option, value in itertools.pairwise(words):
                    if option == "--config" and value not in written:
                        assert Path(find(value)).is_file(), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target
