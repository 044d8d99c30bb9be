import copy

import pytest
import yaml

from kdrl_pl.study.config import read_study

GOOD = {
    "name": "s",
    "seeds": [0, 1, 2],
    "testbeds": {"near": {"config": ["a.yaml", "b.yaml"]}, "far": {"config": "c.yaml"}},
    "arms": {
        "kdrl": None,
        "grpo": {"config": ["grpo.yaml"], "set": {"model.gradient_clip": 0.5}, "seeds": [0, 1, 2, 3, 4]},
        "bounded": {"testbeds": ["far"]},
    },
    "baseline": "grpo",
    "compare": [["kdrl", "grpo"], ["bounded", "kdrl"]],
}


def write(folder, content):
    (folder / "study.yaml").write_text(
        content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    )
    return str(folder / "study.yaml")


def test_what_a_file_leaves_out(tmp_path):
    study = read_study(write(tmp_path, GOOD))
    assert study.testbeds == {"near": ("a.yaml", "b.yaml"), "far": ("c.yaml",)}
    kdrl, grpo, bounded = study.arms.values()
    assert (kdrl.config, kdrl.set, kdrl.seeds, kdrl.testbeds) == ((), {}, (0, 1, 2), ("near", "far"))
    assert (grpo.config, grpo.set, grpo.seeds) == (("grpo.yaml",), {"model.gradient_clip": 0.5}, (0, 1, 2, 3, 4))
    assert bounded.testbeds == ("far",)
    assert study.pairs == (("kdrl", "grpo"), ("bounded", "grpo"), ("bounded", "kdrl"))  # each once
    assert study.plot == ("kdrl", "grpo", "bounded")
    assert (study.rollouts, study.jobs, study.threads) == (None, 1, None)


BAD = {
    "no mapping": (lambda s: [1], "a study: is [1]; expected a mapping"),
    "unknown key": (lambda s: s | {"seed": [1]}, "a study: there is no key 'seed'; did you mean seeds?"),
    "no arms": (lambda s: s | {"arms": {}}, "arms: is missing"),
    "arms as list": (lambda s: s | {"arms": ["kdrl"]}, "arms: is ['kdrl']; expected names"),
    "unknown key of an arm": (
        lambda s: s["arms"]["grpo"].update(overlay=1) or s,
        "arms.grpo: there is no key 'overlay'",
    ),
    "testbed without config": (lambda s: s["testbeds"].update(x={}) or s, "testbeds.x.config: names no file"),
    "unknown testbed": (lambda s: s["arms"]["bounded"].update(testbeds=["fat"]) or s, "did you mean far?"),
    "folder": (lambda s: s | {"name": "../up"}, "name: '../up' becomes a folder"),
    "seeds as number": (lambda s: s | {"seeds": 3}, "seeds: is 3; expected numbers like [0, 1, 2]"),
    "no seeds": (lambda s: s["arms"]["grpo"].update(seeds=[]) or s, "arms.grpo.seeds: is []"),
    "rollouts": (lambda s: s | {"rollouts": 0}, "rollouts: is 0; expected a whole number from 1 on"),
    "jobs": (lambda s: s | {"jobs": True}, "jobs: is True"),
    "baseline": (lambda s: s | {"baseline": "gpro"}, "baseline: there is no arm 'gpro'; did you mean grpo?"),
    "compare": (lambda s: s | {"compare": ["kdrl"]}, "compare: 'kdrl' is no pair"),
    "pair": (
        lambda s: s | {"compare": [["kdrl", "sft"]]},
        "compare: there is no arm 'sft'; there are kdrl, grpo, bounded",
    ),
    "plot": (lambda s: s | {"plot": ["kdlr"]}, "plot: there is no arm 'kdlr'; did you mean kdrl?"),
    "set": (lambda s: s["arms"]["grpo"].update(set=[1]) or s, "arms.grpo.set: is [1]"),
    "set of ours": (lambda s: s["arms"]["grpo"].update(set={"run.max_rollouts": 9}) or s, "run.max_rollouts is what"),
    "sft": (lambda s: s["arms"]["grpo"].update(sft=[1]) or s, "arms.grpo.sft: is [1]"),
    "sft and more": (
        lambda s: s["arms"]["grpo"].update(sft={}, set={"model.gradient_clip": 1.0}) or s,
        "arms.grpo.sft: stands alone",
    ),
    "no YAML": (lambda s: "a: [1", "not readable as YAML"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_study_is_one_message_with_the_file(case, tmp_path):
    change, message = BAD[case]
    with pytest.raises(ValueError) as error:
        read_study(write(tmp_path, change(copy.deepcopy(GOOD))))
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "study.yaml"))


def test_no_file():
    with pytest.raises(FileNotFoundError, match=r"no study 'nowhere\.yaml'"):
        read_study("nowhere.yaml")
