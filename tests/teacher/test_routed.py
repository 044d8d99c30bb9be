"""Several teachers: every row is scored by its own, in every form, and what cannot be is refused by name."""

import json
import shutil

import pytest
import torch
from contract import sure_model
from tiny_run import fit, make_data, make_module, make_rollouts, metrics_rows

from kdrl_pl.data.loading import SetConfig, load_prompts
from kdrl_pl.errors import TeacherLost
from kdrl_pl.experience import Experience
from kdrl_pl.losses import Distillation
from kdrl_pl.models.loading import load_tokenizer
from kdrl_pl.module import KDRLModule
from kdrl_pl.replay.stored import load_rollout
from kdrl_pl.teacher import FrozenTeacher, RoutedTeacher, TeacherCache


def rows(teachers=(None, None, "small", "small", "big", "big")):
    return Experience.from_rows(
        prompts=[[3, 4, 12], [3, 4, 12], [5, 6, 7, 12], [5, 6, 7, 12], [8, 12], [8, 12]],
        responses=[[8, 9, 1], [2, 3, 4, 5, 9, 11, 1], [6], [7, 7, 8, 1], [3, 3], [9]],
        rewards=[1.0, 0.0, 0.0, 1.0, 0.0, 1.0],
        group=[0, 0, 1, 1, 2, 2],
        temperature=0.7,
        teachers=teachers,
        uids=["a/1", "a/1", "a/2", "a/2", "b/1", "b/1"],
    )


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A second teacher, wider than the first, with a head eight times as sure."""
    return str(sure_model(tmp_path_factory.mktemp("other"), layers=1))


@pytest.fixture
def teachers(tiny_models, other):
    return {"big": FrozenTeacher(other), "small": FrozenTeacher(tiny_models[1])}


def loaded(teacher):
    teacher.load("cpu")
    return teacher


def test_every_row_is_scored_by_the_teacher_it_names(teachers):
    routed = loaded(RoutedTeacher(teachers, default="big"))
    alone = {}
    for name, teacher in teachers.items():
        alone[name] = rows()
        teacher.score(alone[name], alone[name].response_mask)
    experience = rows()
    routed.score(experience, experience.response_mask)
    for row, name in enumerate(["big", "big", "small", "small", "big", "big"]):
        assert torch.allclose(experience.teacher_logprobs[row], alone[name].teacher_logprobs[row], atol=1e-6)
    assert (alone["big"].teacher_logprobs - alone["small"].teacher_logprobs).abs().max() > 0.5


def test_only_what_is_asked_for_is_told(teachers):
    routed, experience = loaded(RoutedTeacher(teachers, default="big")), rows()
    asked = torch.zeros_like(experience.response_mask)
    asked[1, 4:6] = True
    asked[2, 4] = True
    routed.score(experience, asked)
    assert experience.teacher_logprobs.nonzero().tolist() == [[1, 4], [1, 5], [2, 4]]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "8bit", "with a bias", "scaled", "padded"])
def test_the_full_vocabulary_has_each_rows_own_teacher(kind, teachers, other, tiny_models):
    """The gradient of the full form over all rows is the sum of those of each teacher over its rows."""
    if kind == "8bit":
        teachers["big"] = FrozenTeacher(other, quantization="8bit")
    elif kind != "float32":
        teachers["big"] = FrozenTeacher(other, dtype="bfloat16" if kind == "bfloat16" else "float32")
    model = loaded(teachers["big"]).model.model
    if kind == "with a bias":
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-2, 2, 16), requires_grad=False)
    elif kind == "scaled":
        model.config.logit_scale = 0.5
    elif kind == "padded":  # rows of the head that are no words
        weight = model.lm_head.weight
        padding = torch.full((3, weight.shape[1]), 4.0)
        model.lm_head.weight = torch.nn.Parameter(torch.cat([weight, padding]), requires_grad=False)

    def gradient(teacher, subset):
        settings = {"policy_gradient": None, "distillation": Distillation(1.0, "full")}
        module = make_module(tiny_models[0], other, **settings)
        module.teacher = teacher
        experience = module.load().score(rows())
        module.loss(experience[subset]).loss.backward()
        return torch.cat([p.grad.flatten() for p in module.student.parameters()])

    routed = RoutedTeacher(teachers, default="big")
    together = gradient(routed, [0, 1, 2, 3, 4, 5])
    parts = [gradient(teachers["big"], [0, 1, 4, 5]), gradient(teachers["small"], [2, 3])]
    tolerance = 1e-2 if kind == "bfloat16" else 1e-6  # beside a float32 head a bfloat16 one is computed in float32
    assert (together - sum(parts)).norm() < tolerance * together.norm()
    assert all(part.norm() > 0.05 for part in parts)


def test_a_run_with_two_teachers_and_its_stored_rollouts(teachers, tiny_models, tmp_path):
    data = make_data()
    data.configs["train"]["three"].teacher = "big"
    module = make_module(*tiny_models)
    module.teacher = RoutedTeacher(teachers, default="small")
    fit(tmp_path, module, data, max_rollouts=2, rollouts=make_rollouts())
    stored = [json.loads(line) for line in (tmp_path / "rollouts/000001.jsonl").read_text().splitlines()]
    assert {(row["uid"].split("/")[0], row.get("teacher")) for row in stored} == {("two", None), ("three", "big")}
    _, experience = load_rollout([tmp_path / "rollouts/000001.jsonl"])
    module.teacher.score(experience, experience.response_mask)
    said = [[float(f"{x:.4g}") for x in row["teacher_logprobs"]] for row in stored]
    again = [
        [float(f"{x:.4g}") for x in experience.teacher_logprobs[i][experience.response_mask[i]].tolist()]
        for i in range(len(stored))
    ]
    assert all(a == pytest.approx(b, abs=2e-3) for a, b in zip(said, again, strict=True))
    assert all(row["val/val/kl_teacher"] > 0 for row in metrics_rows(tmp_path) if "validation" in row)


def test_an_unknown_name_is_refused_before_anything_is_sampled(teachers, tiny_models, tmp_path):
    data = make_data()
    data.configs["train"]["two"].teacher = "bug"
    module = make_module(*tiny_models)
    module.teacher = RoutedTeacher(teachers, default="small")
    with pytest.raises(ValueError) as error:
        fit(tmp_path, module, data, max_rollouts=1)
    assert str(error.value) == (
        "row two/1 names the teacher 'bug'; expected one of big, small: correct the row, or add that teacher to "
        "model.teacher.teachers"
    )
    module.teacher = RoutedTeacher(teachers)
    with pytest.raises(
        ValueError, match=r"row two/1 names no teacher, and there is no default; set model\.teacher\.def"
    ):
        fit(tmp_path, module, make_data(), max_rollouts=1)
    with pytest.raises(ValueError, match="row a/1 names no teacher"):
        loaded(module.teacher).score(rows(), rows().response_mask)


def test_a_single_teacher_answers_to_any_name(tiny_models, tmp_path):
    data = make_data()
    data.configs["train"]["two"].teacher = "math"
    fit(tmp_path, make_module(*tiny_models), data, max_rollouts=1)


def test_other_stop_ids_are_refused_with_the_reason(teachers, other, tmp_path):
    folder = shutil.copytree(other, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 14]}))
    routed = RoutedTeacher({"a": FrozenTeacher(other), "b": FrozenTeacher(str(folder))})
    with pytest.raises(
        ValueError, match=r"different tokens: \{'a': \[1\], 'b': \[1, 14\]\}.* set eos_token_id in their"
    ):
        routed.load("cpu")
    assert not routed.is_loaded
    assert RoutedTeacher(teachers).stop_ids() == [1]


class Away(FrozenTeacher):
    def score(self, experience, asked, *, hidden=False):
        raise TeacherLost("gone")


def test_where_one_is_lost_the_others_answer_first(teachers, other):
    # Red: a sharded one behind it waits for the other ranks, which wait in another collective.
    routed, experience = loaded(RoutedTeacher({"big": Away(other), "small": teachers["small"]}, default="big")), rows()
    read = []
    embeddings = teachers["small"].model.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda part, inputs, _: read.append(len(inputs[0])))
    with pytest.raises(TeacherLost, match="gone"):
        routed.score(experience, experience.response_mask)
    assert sum(read) == 2  # its two rows


def test_settings_that_cannot_be_are_refused(teachers, tiny_models, tmp_path):
    with pytest.raises(ValueError, match=r"teacher\.teachers is empty"):
        RoutedTeacher({"gone": None})
    with pytest.raises(ValueError, match=r"teacher\.default is 'math'; expected one of big, small, or null"):
        RoutedTeacher(teachers, default="math")
    teachers["small"] = FrozenTeacher(tiny_models[1], cache=TeacherCache(str(tmp_path)))
    with pytest.raises(ValueError, match="kd read the teacher's whole vocabulary: a cache keeps"):
        KDRLModule(tiny_models[0], RoutedTeacher(teachers), distillation=Distillation(0.3, "full"))
    with pytest.raises(ValueError, match=r"rollout\.policy is teacher, and there are several"):
        RoutedTeacher(teachers).sampler()


def test_its_metrics_are_those_of_all_teachers(teachers, other, tmp_path):
    cache = TeacherCache(str(tmp_path))
    routed = loaded(RoutedTeacher({"big": FrozenTeacher(other, cache=cache), "small": teachers["small"]}, "big"))
    for expected in ((0.0, 4.0), (4.0, 4.0)):
        experience = rows()
        routed.score(experience, experience.response_mask)
        assert routed.score_metrics == {"teacher/cache_hits": expected}


def test_the_fingerprint_names_every_teacher_and_the_default(teachers):
    names = {
        RoutedTeacher(teachers).fingerprint(),
        RoutedTeacher(teachers, "big").fingerprint(),
        RoutedTeacher({"big": teachers["big"]}).fingerprint(),
        RoutedTeacher({"big": teachers["small"], "small": teachers["big"]}).fingerprint(),
    }
    assert len(names) == 4
    assert f"big={teachers['big'].fingerprint()}" in RoutedTeacher(teachers).fingerprint()


def prompts(tmp_path, own, **settings):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "1+2=", "answer": "3", **row}) + "\n" for row in own))
    tokenizer = load_tokenizer("checkpoints/testbeds/arithmetic/student")
    return load_prompts("s", SetConfig(str(file), **settings), tokenizer)[0]


def test_rows_name_their_teachers(tmp_path):
    columns = [{"domain": {"teacher": "math"}}, {"domain": {"teacher": "code"}}]
    assert [p.teacher for p in prompts(tmp_path, columns)] == [None, None]
    assert [p.teacher for p in prompts(tmp_path, columns, teacher="both")] == ["both", "both"]
    named = prompts(tmp_path, columns, teacher_column="domain.teacher", columns=[])
    assert [p.teacher for p in named] == ["math", "code"]
    with pytest.raises(ValueError, match=r"row 1: no column 'topic'"):
        prompts(tmp_path, columns, teacher_column="topic")
    with pytest.raises(ValueError, match="set 's' has both teacher and teacher_column"):
        prompts(tmp_path, columns, teacher="both", teacher_column="domain.teacher")
