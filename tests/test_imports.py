"""The floors of the package: imports point downwards only, and nothing heavy is imported before it is used."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "kdrl_pl"

# floor -> its modules; a name with a dot at the end stands for a whole folder, the longest matching name counts
FLOORS = {
    "pure": [
        "advantages",
        "alarms",
        "boundary",
        "data.prompts",
        "errors",
        "evaluation",
        "experience",
        "files",
        "identity",
        "listening",
        "chunked_head",
        "logprobs",
        "losses.",
        "metric_names",
        "metrics",
        "optim",
        "phases",
        "plain_tensors",
        "records",
        "replay.",
        "report.charts",
        "report.curves",
        "report.html",
        "report.style",
        "report.tokens",
        "resources",
        "rewards.",
        "sampler_check",
        "schedules",
        "sequences",
        "signals",
        "stop_cell",
        "summary",
        "text",
        "view.",
    ],
    "models": ["data.", "environment", "estimate.", "export", "models.", "parallel", "rollout.", "shards", "teacher."],
    "lightning": [
        "checkpoint",
        "data.base",
        "data.datamodule",
        "data.sft",
        "fsdp2",
        "module",
        "passes",
        "preemption",
        "progress",
        "rank_watch",
        "rollout.callback",
        "run_folder",
        "saved_state",
        "scoring",
        "soundness",
        "sft",
        "updates",
    ],
    "top": ["", "__main__", "cli.", "model_card", "report.", "doctor.", "study.", "teacher.server"],
}
ORDER = list(FLOORS)
# A neighbour of the lightning floor meets the others in the batch and on the Trainer; these are parts of one thing.
PARTS = {
    *(("module", part) for part in ("passes", "saved_state", "scoring", "soundness", "updates")),
    ("data.datamodule", "data.base"),
    ("data.sft", "data.base"),
}
# Inside functions only: tasks check their own answers, math-verify judges in a worker process.
LATER = {("rewards.task", "data.tasks"), ("rewards.math_worker", "math_verify"), ("rewards.math_worker", "sympy")}
# files that derive from a class of a heavy package: imported by others inside functions only
LATE_FILES = {"rollout.kv_cache"}
HEAVY = {
    "accelerate",
    "bitsandbytes",
    "datasets",
    "math_verify",
    "pandas",
    "peft",
    "pyarrow",
    "reasoning_gym",
    "tokenizers",
    "transformers",
    "vllm",
}
THIRD_PARTY = {
    "pure": {"torch", "torchmetrics", "rich"},
    "models": {"torch", "numpy", "safetensors", "jinja2"} | HEAVY,
    "lightning": {"torch", "lightning"} | HEAVY,
}


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def floor_of(name):
    found = {}
    for floor, patterns in FLOORS.items():
        for pattern in patterns:
            if name == pattern.rstrip(".") or (pattern.endswith(".") and name.startswith(pattern)):
                found[len(pattern)] = floor
    assert found, f"kdrl_pl/{name.replace('.', '/')}.py stands on no floor: add it to FLOORS"
    return found[max(found)]


def imports(path, inside_functions=True):
    """(module, whether inside a function) of every import that really runs."""
    found = []

    def visit(node, inside):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            # `from kdrl_pl.data import tasks` imports kdrl_pl.data.tasks
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            ours = [name for name in below if name.removeprefix("kdrl_pl.") in FILES]
            found.extend((name, inside) for name in (ours or [node.module]))
        for child in ast.iter_child_nodes(node):
            visit(child, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    visit(ast.parse(path.read_text()), False)
    return found


def ours(name):
    """Our module that an imported name is, None for other packages'."""
    return None if name.partition(".")[0] != "kdrl_pl" else name.removeprefix("kdrl_pl").removeprefix(".")


def test_the_reader_of_imports_reads_them(tmp_path):
    (tmp_path / "a.py").write_text(
        "import os.path\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers\n"
        "from kdrl_pl.data import tasks\nclass A:\n    def f(self):\n        import datasets\n"
    )
    expected = [("os.path", False), ("typing", False), ("kdrl_pl.data.tasks", False), ("datasets", True)]
    assert imports(tmp_path / "a.py") == expected
    assert floor_of("data.prompts") == "pure"
    assert floor_of("data.tasks.addition") == "models"
    assert floor_of("data.sft") == "lightning"


@pytest.mark.parametrize("name", FILES)
def test_imports_point_downwards(name):
    height = ORDER.index(floor_of(name))
    for imported, inside in imports(FILES[name]):
        target = ours(imported)
        if target is None or (inside and (name, target) in LATER):
            continue
        floor = floor_of(target)
        assert ORDER.index(floor) <= height, f"{name} ({ORDER[height]}) imports {target} ({floor})"
        if floor == "lightning" == floor_of(name):
            assert (name, target) in PARTS, f"{name} imports its neighbour {target}"


@pytest.mark.parametrize("name", [name for name in FILES if floor_of(name) != "top"])
def test_each_floor_uses_its_own_packages(name):
    for imported, inside in imports(FILES[name]):
        package = imported.partition(".")[0]
        if package in sys.stdlib_module_names or package == "kdrl_pl" or (inside and (name, package) in LATER):
            continue
        assert package in THIRD_PARTY[floor_of(name)], f"{name} ({floor_of(name)}) imports {package}"


@pytest.mark.parametrize("name", [name for name in FILES if name not in LATE_FILES])
def test_heavy_packages_are_imported_when_they_are_used(name):
    early = [imported for imported, inside in imports(FILES[name]) if not inside]
    heavy = [imported for imported in early if imported.partition(".")[0] in HEAVY or ours(imported) in LATE_FILES]
    assert not heavy, f"{name} imports {', '.join(heavy)} at once"


def test_every_floor_names_files_that_exist():
    for patterns in FLOORS.values():
        for pattern in patterns:
            assert any(n == pattern.rstrip(".") or n.startswith(pattern) for n in FILES), f"{pattern} is no file"
