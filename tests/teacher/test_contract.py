"""One suite for all teachers: they say the same of the same tokens. The teachers are listed in contract.py."""

import json
import shutil

import pytest
import torch
from contract import FACTORIES, PRECISIONS, rows

from kdrl_pl.models.character_tokenizer import character_tokenizer
from kdrl_pl.models.loading import load_tokenizer
from kdrl_pl.teacher import FrozenTeacher, RoutedTeacher
from kdrl_pl.teacher.server import identity


def scored(teacher, experience, asked=None):
    teacher.score(experience, experience.response_mask if asked is None else asked)
    return experience.teacher_logprobs


@pytest.fixture(scope="module")
def in_process(model):
    """precision -> FrozenTeacher, loaded once."""
    teachers = {}
    for name, settings in PRECISIONS.items():
        teachers[name] = FrozenTeacher(model, **settings)
        teachers[name].load("cpu", load_tokenizer(model))
    return teachers


@pytest.fixture(scope="module", params=FACTORIES)
def pair(request, model, servers, in_process):
    """The teacher, loaded, and the one of the same precision in this process."""
    factory, precision = FACTORIES[request.param]
    teacher = factory(model, servers)
    assert not teacher.is_loaded
    teacher.load("cpu", load_tokenizer(model))
    assert teacher.is_loaded
    return teacher, in_process[precision]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_the_log_probs_are_those_of_the_model(temperature, pair):
    teacher, exact = pair
    logprobs, expected = scored(teacher, rows(temperature)), scored(exact, rows(temperature))
    assert torch.allclose(logprobs, expected, atol=1e-6)
    assert logprobs.dtype == torch.float32
    assert expected[rows().response_mask].std() > 0.3


def test_temperatures_differ(pair):
    assert (scored(pair[0], rows(0.7)) - scored(pair[0], rows(2.5))).abs().max() > 0.1


def test_only_response_tokens_that_are_asked_about_are_filled_in(pair):
    teacher, _ = pair
    everything, asked = scored(teacher, rows()), torch.zeros_like(rows().response_mask)
    asked[1, 4:6] = asked[3, 7] = True
    asked[2, 0] = True  # a token of a prompt, which nobody sampled
    logprobs = scored(teacher, rows(), asked)
    assert logprobs.nonzero().tolist() == [[1, 4], [1, 5], [3, 7]]
    assert torch.allclose(logprobs[logprobs != 0], everything[logprobs != 0], atol=1e-6)
    assert not scored(teacher, rows(), torch.zeros_like(asked)).any()
    assert not everything[~rows().response_mask].any()


def test_a_row_scores_the_same_whatever_stands_beside_it(pair):
    teacher, _ = pair
    together = scored(teacher, rows())
    for i in range(4):
        alone = scored(teacher, rows()[[i]])
        assert torch.allclose(alone[0], together[i, : alone.shape[1]], atol=1e-5)


def test_at_stop_tokens_the_whole_cell_counts(pair):
    """p(1) + p(14) at the last tokens of rows 0, 1 and 3; elsewhere nothing changes."""
    teacher, exact = pair
    cell, plain = scored(teacher, rows(stop_cell=(1, 14))), scored(teacher, rows())
    changed = (cell - plain).abs() > 1e-4
    assert changed.nonzero().tolist() == [[0, 5], [1, 9], [3, 7]]
    assert (cell >= plain - 1e-6).all()
    other = rows()
    other.input_ids[[0, 1, 3], [5, 9, 7]] = torch.tensor([14, 14, 1])
    both = torch.stack([plain[changed], scored(exact, other)[changed]]).logsumexp(0)
    assert torch.allclose(cell[changed], both, atol=1e-5)


def test_its_stop_ids_are_the_models(pair):
    assert pair[0].stop_ids() == [1, 14]


def test_the_fingerprint_is_stable_and_names_the_precision(pair):
    teacher, exact = pair
    name = f"one={exact.fingerprint()}; default one" if isinstance(teacher, RoutedTeacher) else exact.fingerprint()
    assert teacher.fingerprint() == teacher.fingerprint() == name


@pytest.mark.parametrize("name", FACTORIES)
def test_another_tokenizer_is_refused(name, model, servers):
    teacher = FACTORIES[name][0](model, servers)
    with pytest.raises(ValueError, match="another tokenizer than the student"):
        teacher.load("cpu", character_tokenizer("0123456789-+=;#"))
    assert not teacher.is_loaded


@pytest.mark.parametrize("name", FACTORIES)
def test_a_teacher_that_was_not_loaded_says_so(name, model, servers):
    with pytest.raises(RuntimeError, match=r"the teacher is not loaded; call teacher\.load"):
        scored(FACTORIES[name][0](model, servers), rows())


@pytest.mark.parametrize("configured", [[1, 14], 1, None])
def test_a_server_knows_the_stop_ids_before_it_has_the_model(configured, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    generation = folder / "generation_config.json"
    if configured is None:
        generation.unlink()
    else:
        generation.write_text(json.dumps({"eos_token_id": configured}))
    teacher = FrozenTeacher(str(folder))
    told = identity(teacher)
    teacher.load("cpu")
    assert told["stop_ids"] == teacher.stop_ids()
    assert (told["vocab_size"], told["max_row_tokens"]) == (16, 512)
