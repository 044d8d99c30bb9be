"""`import kdrl_pl` is light, its names are those of their homes, and docs/api.md tells of each."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kdrl_pl

ROOT = Path(__file__).parents[1]


def test_importing_it_loads_nothing():
    code = "import sys, kdrl_pl; dir(kdrl_pl); print(sorted({'torch', 'lightning', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_name_is_what_its_home_calls_so():
    for name in kdrl_pl.__all__:
        assert getattr(kdrl_pl, name) is getattr(importlib.import_module(kdrl_pl._HOME[name]), name)
    assert kdrl_pl.__all__ == list(kdrl_pl._HOME) and set(kdrl_pl.__all__) <= set(dir(kdrl_pl))
    with pytest.raises(AttributeError, match="no attribute 'GRPO'"):
        _ = kdrl_pl.GRPO


def test_type_checkers_see_the_same_names():
    """What they read is the block under TYPE_CHECKING, which never runs."""
    tree = ast.parse((ROOT / "kdrl_pl/__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == kdrl_pl._HOME
    assert (ROOT / "kdrl_pl/py.typed").is_file()


def test_the_page_tells_of_every_name():
    page = (ROOT / "docs/api.md").read_text()
    (table,) = re.findall(r"^\| name \|.*\n\|---.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert set(kdrl_pl.__all__) <= set(re.findall(r"`(\w+)`", table))
