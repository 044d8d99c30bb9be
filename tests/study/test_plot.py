import re
import sys

import pytest

from kdrl_pl.study.plot import NoPlotError, draw


def entry(*curves):
    return {"curve": [{"rollouts": r, "seconds": s, "pass@1": p} for r, s, p in curves]}


KDRL = entry(([0, 20, 40], [0, 5, 10], [0.1, 0.3, 0.5]), ([0, 20, 40], [0, 6, 12], [0.1, 0.2, 0.4]))
CUT = entry(([0, 20, 40], [0, 5, 10], [0.1, 0.3, 0.5]), ([0, 40], [0, 6], [0.1, 0.4]))


def test_curves_are_drawn_and_again_give_the_same_file(tmp_path):
    testbeds = {"near": {"kdrl": KDRL, "grpo": CUT}, "far": {"grpo": KDRL}}
    draw(testbeds, tmp_path / "new/a.svg")
    draw(testbeds, tmp_path / "b.svg")
    text = (tmp_path / "new/a.svg").read_text()
    assert (tmp_path / "b.svg").read_text() == text
    lines = re.findall(r'<path d="M[^"]*"[^>]*style="fill: none; stroke: (#\w+); stroke-width: 1\.5', text)
    assert [lines.count(colour) for colour in ("#0072b2", "#d55e00")] == [2 + 1, 4 + 1]  # and one of each in the legend
    draw({"near": {str(i): KDRL for i in range(11)}}, tmp_path / "many.png")
    assert (tmp_path / "many.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(NoPlotError, match=r"pip install 'kdrl_pl\[study\]'"):
        draw({"near": {"kdrl": KDRL}}, tmp_path / "a.svg")
    assert not (tmp_path / "a.svg").exists()
