"""What the pages tell people to type works; files, commands and Python run as they stand, at a small size.

A block's first words say what becomes of it: a file name writes the block there, `bash` and `python` run it, and
`bash long` (or `bash gpu` and the like) is read by the command's own parser, no more. Every link, anchor, file and
setting that a page names is there, and docs/reference.md is what the code says of itself.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kdrl_pl.__main__ import COMMANDS, main
from kdrl_pl.cli.errors import Parser
from kdrl_pl.cli.lightning import RunCLI
from kdrl_pl.resources import find

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + DOCS
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    (kdrl (?:.*\\\n)*.*)", re.MULTILINE)
SMALL = """
data: {prompts_per_rollout: 4, val_batch_size: 16}
rollout: {group_size: 4, validation_samples: 2}
trainer: {limit_val_batches: 1, limit_predict_batches: 1}
"""


def blocks(page):
    """(language, the words after it, text) of every fenced block."""
    return [(language, rest.strip(), text) for language, rest, text in BLOCK.findall(page.read_text())]


def runs(language, words):
    """Whether a block is run as it stands."""
    return language in ("bash", "python") and not words


def commands(block):
    """The lines of a shell block, comments dropped and continued lines joined."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def smaller(arguments):
    """The arguments of a `kdrl` command with options that make it short."""
    command, *rest = arguments
    if command == "sft":
        return [*arguments, "--trainer.max_steps=2", "--data.batch_size=4"]
    if command == "fit" and "--resume" in rest:
        return [*arguments, "--run.max_rollouts=3"]
    if command in ("fit", "doctor"):
        return [*arguments, "--run.max_rollouts=2", "--config=small.yaml"]
    return [*arguments, "--config=small.yaml"] if command in ("validate", "test", "predict") else arguments


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


def has_blocks_that_run(page):
    return page.name not in ("CONTRIBUTING.md", "SECURITY.md") and any(runs(*block[:2]) for block in blocks(page))


@pytest.mark.parametrize("page", list(filter(has_blocks_that_run, PAGES)), ids=lambda page: page.name)
def test_the_blocks_of_a_page_work(page, folder, capsys):
    names = {"__name__": "__main__"}
    for language, words, block in blocks(page):
        if runs(language, words) and language == "bash":
            run_shell(block, folder)
        elif runs(language, words):
            exec(compile(block, page.name, "exec"), names)
        elif "." in words:
            (folder / words).write_text(block)


class _Read(BaseException):
    """The command's own parser has taken every word of it."""


@pytest.fixture
def only_read(monkeypatch):
    """`kdrl` commands end once their settings have been read: names, types and classes, without models and data."""
    read = Parser.parse_args

    def parse_args(self, *arguments):
        read(self, *arguments)
        raise _Read

    def before_instantiate_classes(self):
        raise _Read

    monkeypatch.setattr(Parser, "parse_args", parse_args)
    monkeypatch.setattr(RunCLI, "before_instantiate_classes", before_instantiate_classes)


def words_of(line):
    """A command line as its program gets it, with something in the place of what the shell would put there."""
    words = shlex.split(re.sub(r"\$\(.*?\)|\$\w+", "1", line), comments=True)
    if "--resume" in words:  # of a run that is not there
        at = words.index("--resume")
        words[at : at + 2] = ["--config", "configs/quickstart.yaml"]
    return words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_can_be_read(page, folder, only_read, capsys):
    lines = []
    for language, words, block in blocks(page):
        if "." in words:
            (folder / words).write_text(block)
        if language == "bash" and not (runs(language, words) and has_blocks_that_run(page)):
            lines += commands(block)
    text = re.sub(r"<!-- (\S+) -->.*?<!-- end -->", "", BLOCK.sub("", page.read_text()), flags=re.DOTALL)
    if page.name != "reference.md":
        lines += [line.replace("\\\n", " ") for line in INDENTED.findall(text)]
    for line in lines:
        words = words_of(line)
        if words[0] == "make":
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        if words[0] in ("python", "bash") and words[1].endswith((".py", ".sh")):
            assert (ROOT / words[1]).is_file(), line
        if words[0].endswith("kdrl"):
            with pytest.raises(_Read):
                main(words[1:])
                pytest.fail(f"{line}: {capsys.readouterr().err}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    """Files of the repository and commands, wherever they are written as code."""
    for code in re.findall(r"`([^`\n]+)`", BLOCK.sub("", page.read_text())):
        if match := re.match(r"kdrl ([a-z][a-z-]*)\b", code):
            assert match[1] in COMMANDS, code
        if re.fullmatch(r"(configs|kdrl_pl|tests|benchmarks|examples)/[\w./-]+\.\w+", code) and "NAME" not in code:
            assert Path(find(code)).is_file() or (ROOT / code).is_file(), code


def settings_of(reference):
    """Every setting that the reference has, `init_args` left out, and the sections that hold them."""
    known, places = set(), {}
    for line in reference.splitlines():
        if heading := re.match(r"(#+) (.*)", line):
            level, title = len(heading[1]), heading[2]
            if level <= 4:
                places = {name for name in re.findall(r"`([\w.]+)`", title) if re.match(SECTIONS, name)}
                known |= places
        elif row := re.match(r"\| `(\w+)` \|", line):
            known |= {f"{place}.{row[1]}" for place in places}
    return known


SECTIONS = r"(?:model|data|rollout|run|checkpoint|view)(?:\.|$)"
SETTING = re.compile(r"`(?:--)?((?:model|data|rollout|run|checkpoint|view)\.[a-z_.0-9]*[a-z0-9])\b[^`\n/]*`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_a_page_names_are_there(page):
    known = settings_of((ROOT / "docs/reference.md").read_text())
    assert {"model.distillation.coef", "rollout.engine.max_rows", "data.template.few_shot"} <= known
    text = BLOCK.sub("", page.read_text())
    for name in SETTING.findall(text):
        plain = re.sub(r"\.(init_args|class_path)\b", "", name)
        in_a_set = re.sub(r"^data\.(train|val|test|predict)\.\w+", "data.train.NAME", plain)
        assert plain in known or in_a_set in known or in_a_set == "data.train.NAME", name


def test_every_command_is_shown():
    lines = [
        line for page in PAGES for language, _, block in blocks(page) if language == "bash" for line in commands(block)
    ]
    assert {line.split()[1] for line in lines if line.startswith("kdrl ")} >= set(COMMANDS)


def slug(title):
    """The anchor of a heading, as repository browsers name it."""
    title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).replace("`", "")
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


def anchors(page):
    return {slug(title) for title in re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_figures_of_the_advice_are_those_of_the_evidence():
    figures = re.findall(r"(\d+\.\d)(?=,| and|,? %| points)", (ROOT / "docs/choosing.md").read_text())
    assert len(figures) > 20
    assert set(figures) <= set(re.findall(r"\d+\.\d+", (ROOT / "docs/evidence.md").read_text()))


def test_every_page_is_in_the_navigation_once():
    def pages(entries):
        for entry in entries:
            ((_, value),) = entry.items()
            yield from pages(value) if isinstance(value, list) else [value]

    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(pages(settings["nav"])) == [page.name for page in DOCS]
    index = (ROOT / "docs/index.md").read_text()
    assert {page.name for page in DOCS} - set(re.findall(r"\]\(([a-z_]+\.md)", index)) <= {"index.md", "demo.md"}


def test_the_site_is_built_without_a_warning(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    subprocess.run(build, cwd=ROOT, check=True)
    page = (tmp_path / "site/tutorial.html").read_text()
    assert not re.findall(r'(?:src|href)="https?://[^"]*\.(?:js|css|woff2?)', page)  # nothing from the network


def test_the_reference_is_what_the_code_says():
    from kdrl_pl.cli.reference import markdown

    written = (ROOT / "docs/reference.md").read_text()
    assert written == markdown(), "python -m kdrl_pl.cli.reference > docs/reference.md"
