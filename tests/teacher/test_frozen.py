"""FrozenTeacher in every precision, really loaded: what it says, of which tokens, and which teachers it refuses."""

import json
import logging
import shutil

import pytest
import torch
from contract import AND_BF16, rows, sure_model, widened
from tiny_run import fit, make_module, metrics_rows

from kdrl_pl.losses import Distillation
from kdrl_pl.models.character_tokenizer import character_tokenizer
from kdrl_pl.models.loading import load_tokenizer
from kdrl_pl.teacher import FrozenTeacher


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A teacher of another size than the student, sure enough that quantisation changes something."""
    return str(sure_model(tmp_path_factory.mktemp("big")))


def loaded(path, **settings):
    teacher = FrozenTeacher(path, **settings)
    teacher.load("cpu", load_tokenizer(path))
    return teacher


def scored(teacher, experience=None, asked=None):
    experience = rows() if experience is None else experience
    teacher.score(experience, experience.response_mask if asked is None else asked)
    return experience.teacher_logprobs


def test_fp32_is_the_softmax_of_the_models_own_logits(big):
    from transformers import AutoModelForCausalLM

    experience = rows()
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(big, dtype=torch.float32)(experience.input_ids).logits
    logprobs = (logits / 0.7).log_softmax(-1)[:, :-1].gather(2, experience.input_ids[:, 1:, None])[..., 0]
    expected = torch.where(experience.response_mask[:, 1:], logprobs, 0.0)
    assert torch.allclose(scored(loaded(big))[:, 1:], expected, atol=1e-5)
    assert expected.std() > 0.5


@pytest.mark.parametrize(
    ("precision", "smallest", "largest"), [("bf16", 1e-4, 0.1), ("8bit", 1e-4, 0.2), ("4bit", 1e-3, 1.5)]
)
def test_lower_precision_is_close_and_says_how_close(precision, smallest, largest, big):
    exact, teacher, mask = scored(loaded(big)), loaded(big, **AND_BF16[precision]), rows().response_mask
    difference = (scored(teacher) - exact).abs()[mask]
    assert smallest < difference.mean() < difference.max() < largest
    error = teacher.quantization_error(rows())
    assert error == pytest.approx({"mean": float(difference.mean()), "max": float(difference.max())}, rel=1e-3)
    assert scored(teacher).dtype == torch.float32


@pytest.mark.parametrize(
    ("precision", "layer"), [("fp32", "Linear"), ("bf16", "Linear"), ("8bit", "Linear8bitLt"), ("4bit", "Linear4bit")]
)
def test_the_weights_are_really_stored_so(precision, layer, big):
    model = loaded(big, **AND_BF16[precision]).model
    part = model.model.model.layers[0].mlp.down_proj
    assert type(part).__name__ == layer
    stored = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.int8, "4bit": torch.uint8}[precision]
    assert part.weight.dtype == stored
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(part.training for part in model.modules())


@pytest.mark.parametrize("precision", AND_BF16)
def test_a_row_scores_the_same_whatever_stands_beside_it(precision, big):
    """Also in 8 bits: with bitsandbytes' own outlier threshold of 6 it would depend on the other rows."""
    teacher = loaded(big, **AND_BF16[precision])
    together = scored(teacher)
    tolerance = 0.05 if precision == "bf16" else 1e-5
    for i in range(4):
        alone = scored(teacher, rows()[[i]])
        assert torch.allclose(alone[0], together[i, : alone.shape[1]], atol=tolerance)
    teacher.max_tokens_per_micro_batch = 12
    assert torch.allclose(scored(teacher), together, atol=tolerance)


@pytest.mark.parametrize(
    ("precision", "estimator"), [("8bit", "k2"), ("4bit", "k2"), ("8bit", "full"), ("bf16", "full")]
)
def test_a_teacher_of_another_size_and_precision_teaches(precision, estimator, big, tiny_models, tmp_path):
    settings = {"policy_gradient": None, "distillation": Distillation(coef=1.0, estimator=estimator)}
    module = make_module(tiny_models[0], big, **settings)
    module.teacher = FrozenTeacher(big, **AND_BF16[precision])
    fit(tmp_path, module, max_rollouts=6, val_check_interval=6)
    val = [row["val/val/kl_teacher"] for row in metrics_rows(tmp_path) if "validation" in row]
    before = json.loads((tmp_path / "summary.json").read_text())["val"]["before"]["val"]["kl_teacher"]
    assert val[-1] < 0.8 * before


def test_only_the_tokens_asked_for_are_scored_and_only_their_rows_read(big):
    teacher, experience = loaded(big), rows()
    everything = scored(teacher)
    read = []
    teacher.model.model.get_input_embeddings().register_forward_hook(
        lambda part, inputs, _: read.append(inputs[0].tolist())
    )
    asked = torch.zeros_like(experience.response_mask)
    asked[1, 4:6] = True  # two response tokens
    asked[2, 0] = True  # a token of a prompt, which nobody sampled
    logprobs = scored(teacher, experience, asked)
    assert logprobs.nonzero().tolist() == [[1, 4], [1, 5]]
    assert torch.allclose(logprobs[1, 4:6], everything[1, 4:6], atol=1e-6)
    assert read == [[experience.input_ids[1].tolist()]]
    scored(teacher, experience, torch.zeros_like(asked))
    assert len(read) == 1


def test_padded_vocabularies_of_another_width_are_cut_off_before_the_softmax(big, tiny_models, tmp_path):
    wide = widened(big, tmp_path / "wide", 48, scale=3.0)  # rows that would take most of the probability
    assert torch.allclose(scored(loaded(wide)), scored(loaded(big)), atol=1e-6)
    gradients = []
    for path in (big, wide):
        settings = {"policy_gradient": None, "distillation": Distillation(coef=1.0, estimator="full")}
        module = make_module(tiny_models[0], path, **settings).load()
        module.loss(module.score(rows())).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.student.parameters()]))
    assert torch.allclose(*gradients, atol=1e-7)
    assert gradients[0].norm() > 1e-3


def test_another_tokenizer_is_refused_by_a_token(big):
    tokenizer = character_tokenizer("0123456789-+=;#")
    with pytest.raises(ValueError) as error:
        FrozenTeacher(big).load("cpu", tokenizer)
    assert "has another tokenizer than the student: 5 tokens differ" in str(error.value)
    assert "'#' is id 16 for the student and 15 for the teacher" in str(error.value)
    assert "choose a teacher of the student's model family" in str(error.value)


def test_a_teacher_is_loaded_once_and_not_before_it_is_asked_to(big):
    teacher = FrozenTeacher(big)
    with pytest.raises(RuntimeError, match=r"the teacher is not loaded; call teacher\.load"):
        scored(teacher)
    teacher.load("cpu")
    model = teacher.model
    teacher.load("cpu")
    assert teacher.model is model


def test_a_misspelt_path_is_named(tiny_models, tmp_path):
    teacher = FrozenTeacher(str(tmp_path / "taecher"))
    with pytest.raises(FileNotFoundError, match=r"no model folder at '.*taecher'"):
        teacher.load("cpu")
    with pytest.raises(FileNotFoundError, match=r"no model folder at '.*taecher'"):
        make_module(tiny_models[0], str(tmp_path / "taecher")).load()


def test_unknown_settings_are_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match=r"teacher.quantization is 'int8'; expected null, 8bit or 4bit"):
        FrozenTeacher("nowhere", quantization="int8")


def test_the_quantisation_error_is_said_once_when_asked_for(big, caplog):
    teacher = loaded(big, quantization="8bit", report_error=True)
    with caplog.at_level(logging.INFO, "kdrl_pl"):
        scored(teacher)
        scored(teacher)
    (record,) = [record for record in caplog.records if record.name == "kdrl_pl.teacher.frozen"]
    error = teacher.quantization_error(rows())
    assert record.getMessage() == (
        f"teacher in 8bit: its log-probs differ from fp32 by {error['mean']:.3g} nats on average, "
        f"{error['max']:.3g} at most"
    )


def test_the_fingerprint_names_the_model_and_its_precision(big, tmp_path):
    shutil.copytree(big, tmp_path / "copy")
    copy = tmp_path / "copy"
    first = FrozenTeacher(str(copy)).fingerprint()
    assert first == FrozenTeacher(big).fingerprint()
    seen = {first, *(FrozenTeacher(big, **AND_BF16[name]).fingerprint() for name in ("bf16", "8bit", "4bit"))}
    assert len(seen) == 4

    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    for place in (len(content) // 2, -1):
        content[place] ^= 1
        file.write_bytes(content)
        seen.add(FrozenTeacher(str(copy)).fingerprint())
    for name in ("config.json", "tokenizer.json"):
        (copy / name).write_text((copy / name).read_text() + "\n")
        seen.add(FrozenTeacher(str(copy)).fingerprint())
    assert len(seen) == 8


def test_a_loaded_teacher_is_named_after_the_files_it_was_loaded_from(big, tmp_path):
    # Red: a folder that is written anew during a run gave its checkpoints, or a server's answers, another teacher.
    copy = shutil.copytree(big, tmp_path / "copy")
    teacher = loaded(str(copy))
    first = teacher.fingerprint()
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert teacher.fingerprint() == first != FrozenTeacher(str(copy)).fingerprint()


def test_the_quantisation_error_is_measured_in_one_pass_of_the_budget(big):
    # Red: all rows of the first rollout in one pass, which no GPU holds.
    teacher = loaded(big, quantization="8bit", report_error=True, max_tokens_per_micro_batch=22)
    read = []
    teacher.model.model.get_input_embeddings().register_forward_hook(
        lambda part, inputs, _: read.append(inputs[0].numel())
    )
    scored(teacher)
    assert len(read) > 2 and max(read) <= 22


def test_quantised_weights_are_made_where_the_teacher_scores(big, monkeypatch):
    """transformers' own choice is the current GPU; what bitsandbytes keeps beside the weights would stay there."""
    from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

    asked, own = [], Bnb8BitHfQuantizer.update_device_map
    monkeypatch.setattr(Bnb8BitHfQuantizer, "update_device_map", lambda self, m: asked.append(m) or own(self, m))
    loaded(big, quantization="8bit")
    assert asked == [{"": "cpu"}]
