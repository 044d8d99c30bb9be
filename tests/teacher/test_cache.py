"""A teacher with a cache: what is looked up, what is scored, and that a resumed run is bit for bit the same."""

import json

import pytest
import torch
from lightning.pytorch import Callback
from tiny_run import fit, make_module, make_rollouts, metrics_rows, rollout_files, weights_of

from kdrl_pl.experience import Experience
from kdrl_pl.losses import Distillation
from kdrl_pl.module import KDRLModule
from kdrl_pl.teacher import FrozenTeacher, TeacherCache
from kdrl_pl.teacher.cache import row_keys


def rows(**settings):
    """Four ragged rows, of which the first and the last are equal."""
    settings = {"temperature": 0.7, **settings}
    return Experience.from_rows(
        prompts=[[3, 4, 12], [3, 4, 12], [5, 6, 7, 12], [3, 4, 12]],
        responses=[[8, 9, 1], [2, 3, 4, 5, 9, 11, 1], [6], [8, 9, 1]],
        rewards=[1.0, 0.0, 0.0, 1.0],
        group=[0, 0, 1, 2],
        **settings,
    )


def cached(path, folder, **settings):
    teacher = FrozenTeacher(path, cache=TeacherCache(str(folder)), **settings)
    teacher.load("cpu")
    return teacher


def scored(teacher, experience=None, asked=None):
    experience = rows() if experience is None else experience
    teacher.score(experience, experience.response_mask if asked is None else asked)
    return experience.teacher_logprobs


def count_passes(teacher):
    read = []
    embeddings = teacher.sampler().model.get_input_embeddings()
    embeddings.register_forward_hook(lambda part, inputs, _: read.append(inputs[0].tolist()))
    return read


def test_rows_are_scored_once_and_found_after_that(tiny_models, tmp_path):
    plain = FrozenTeacher(tiny_models[1])
    plain.load("cpu")
    teacher = cached(tiny_models[1], tmp_path)
    read = count_passes(teacher)
    first = scored(teacher)
    assert torch.allclose(first, scored(plain), atol=1e-6)
    assert first.std() > 0.1
    assert sum(len(ids) for ids in read) == 3  # the two equal rows are one
    assert teacher.score_metrics == {"teacher/cache_hits": (0.0, 4.0)}
    assert torch.equal(scored(teacher), first)
    assert sum(len(ids) for ids in read) == 3
    assert teacher.score_metrics == {"teacher/cache_hits": (4.0, 4.0)}


def test_only_what_is_asked_for_is_told_though_whole_rows_are_stored(tiny_models, tmp_path):
    teacher, experience = cached(tiny_models[1], tmp_path), rows()
    asked = torch.zeros_like(experience.response_mask)
    asked[1, 4:6] = True
    asked[2, 0] = True  # a token of a prompt
    partly = scored(teacher, experience, asked)
    assert partly.nonzero().tolist() == [[1, 4], [1, 5]]
    assert teacher.score_metrics == {"teacher/cache_hits": (0.0, 1.0)}
    whole = scored(teacher)
    assert teacher.score_metrics == {"teacher/cache_hits": (1.0, 4.0)}
    assert torch.equal(whole[1, 4:6], partly[1, 4:6])
    nothing = scored(teacher, rows(), torch.zeros_like(asked))
    assert not nothing.any()
    assert teacher.score_metrics == {"teacher/cache_hits": (0.0, 0.0)}


def test_weights_are_not_loaded_where_every_row_is_known(tiny_models, tmp_path):
    first = scored(cached(tiny_models[1], tmp_path))
    teacher = cached(tiny_models[1], tmp_path)
    assert teacher.is_loaded and teacher.stop_ids() == [1]
    assert torch.equal(scored(teacher), first)
    assert teacher.model is None
    scored(teacher, rows(temperature=0.8))
    assert teacher.model is not None


@pytest.mark.parametrize("change", ["temperature", "stop_cell", "prompt", "boundary", "precision", "teacher"])
def test_what_moves_a_log_prob_is_another_row(change, tiny_models, tmp_path):
    scored(cached(tiny_models[1], tmp_path))
    experience, path, settings = rows(), tiny_models[1], {}
    if change == "temperature":
        experience = rows(temperature=0.70001)
    elif change == "stop_cell":
        experience = rows(stop_cell=(1, 9))
    elif change == "prompt":
        experience.input_ids[:, 1] = 5
    elif change == "boundary":  # the same ids, but the first token of the response belongs to the prompt
        experience.response_mask[:, 3:5] = False
    elif change == "precision":
        settings = {"dtype": "bfloat16"}
    else:
        path = tiny_models[0]
    teacher = cached(path, tmp_path, **settings)
    plain = FrozenTeacher(path, **settings)
    plain.load("cpu")
    expected = scored(plain, experience[[0, 1, 2, 3]])
    logprobs = scored(teacher, experience)
    assert teacher.score_metrics["teacher/cache_hits"][0] == 0.0
    assert torch.allclose(logprobs, expected, atol=0.05 if change == "precision" else 1e-6)


def test_what_autocast_has_rounded_is_another_row(tiny_models, tmp_path):
    # Red: a run in 32-true beside the cache of one in bf16-mixed was taught by rounded log-probs.
    teacher, plain = cached(tiny_models[1], tmp_path), FrozenTeacher(tiny_models[1])
    plain.load("cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = scored(teacher)
    assert torch.allclose(scored(teacher), scored(plain), rtol=0, atol=1e-6)
    assert teacher.score_metrics == {"teacher/cache_hits": (0.0, 4.0)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scored(teacher), rounded)
    assert 1e-5 < (rounded - scored(plain)).abs().max() < 0.1


def test_padding_and_neighbours_are_not_part_of_a_row():
    experience, wider = rows(), rows()
    wider.input_ids = torch.cat([wider.input_ids, torch.full((4, 3), 7)], 1)
    no = torch.zeros(4, 3, dtype=torch.bool)
    wider.attention_mask = torch.cat([wider.attention_mask, no], 1)
    wider.response_mask = torch.cat([wider.response_mask, no], 1)
    keys = row_keys("t", experience, [0, 1, 2, 3])
    assert keys == row_keys("t", wider, [0, 1, 2, 3])
    assert keys[0] == keys[3] and len(set(keys.values())) == 3
    assert row_keys("t", experience[[2]], [0])[0] == keys[2]


def test_what_another_process_stored_meanwhile_is_used(tiny_models, tmp_path):
    """Two runs may score the same row at once, in passes that round differently; both use the one that is stored."""
    first, second = (cached(tiny_models[1], tmp_path) for _ in range(2))
    get = second.cache.get
    second.cache.get = lambda keys: (get(keys), scored(first))[0]  # scores and stores between look-up and storing
    for module in second.sampler().modules():
        if hasattr(module, "bias") and module.__class__.__name__ == "Linear":
            module.weight.data.mul_(1.0001)  # what "rounds differently" is here
    assert torch.equal(scored(second), scored(first))


def test_the_outlier_threshold_of_8_bit_is_refused(tmp_path):
    cache = TeacherCache(str(tmp_path))
    with pytest.raises(ValueError, match=r"int8_threshold is 6: .* set teacher\.int8_threshold: 0, or teacher\.cache"):
        FrozenTeacher("nowhere", quantization="8bit", int8_threshold=6.0, cache=cache)
    FrozenTeacher("nowhere", quantization="8bit", cache=cache)
    with pytest.raises(ValueError, match=r"teacher\.cache\.max_gb is 0; expected a size above 0"):
        TeacherCache(str(tmp_path), 0)


def test_a_folder_that_cannot_be_made_is_named(tiny_models, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"teacher\.cache\.folder '.*file/below' cannot be used"):
        cached(tiny_models[1], tmp_path / "file/below")


def test_whole_vocabularies_are_refused_when_the_module_is_made(tiny_models, tmp_path):
    teacher = FrozenTeacher(tiny_models[1], cache=TeacherCache(str(tmp_path)))
    with pytest.raises(
        ValueError, match=r"kd read the teacher's whole vocabulary: .*estimator: k2, or model\.teacher\.cache"
    ):
        KDRLModule(tiny_models[0], teacher, distillation=Distillation(0.3, "full"))
    teacher.load("cpu")
    experience = rows()
    with pytest.raises(ValueError, match="hidden states are wanted, but a cache keeps"):
        teacher.score(experience, experience.response_mask, hidden=True)


class SaveAfter(Callback):
    def __init__(self, rollouts, path):
        self.rollouts, self.path = rollouts, path

    def on_train_batch_end(self, trainer, module, *_):
        if module.rollouts_done == self.rollouts:
            trainer.save_checkpoint(self.path)


def run(folder, models, cache, rollouts, resume=None):
    module = make_module(*models)
    module.teacher = FrozenTeacher(models[1], cache=TeacherCache(str(cache), 0.01))
    fit(folder, module, max_rollouts=rollouts, rollouts=make_rollouts(), resume=resume)
    return module


def test_a_run_resumed_beside_its_cache_is_bit_for_bit_the_same(tiny_models, tmp_path):
    """It scored two rollouts more than its last checkpoint knows of; they come out of the cache."""
    straight = run(tmp_path / "straight", tiny_models, tmp_path / "cache-1", 5)
    module = make_module(*tiny_models)
    module.teacher = FrozenTeacher(tiny_models[1], cache=TeacherCache(str(tmp_path / "cache-2"), 0.01))
    broken = tmp_path / "broken"
    fit(broken, module, max_rollouts=4, rollouts=make_rollouts(), after=[SaveAfter(2, tmp_path / "two.ckpt")])
    resumed = run(broken, tiny_models, tmp_path / "cache-2", 5, resume=str(tmp_path / "two.ckpt"))
    for name, weight in weights_of(straight).items():
        assert torch.equal(weight, weights_of(resumed)[name]), name
    assert rollout_files(tmp_path / "straight") == rollout_files(broken)
    hits = [row["teacher/cache_hits"] for row in metrics_rows(broken) if "teacher/cache_hits" in row]
    assert hits[2:4] == [1.0, 1.0] and hits[4] < 1.0
    apart = [  # only what says how they were made differs
        {k for k in ours if json.dumps(ours[k]) != json.dumps(theirs.get(k))}
        for ours, theirs in zip(metrics_rows(tmp_path / "straight"), metrics_rows(broken), strict=True)
    ]
    assert set().union(*apart) <= {"teacher/cache_hits"}
