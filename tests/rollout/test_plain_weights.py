"""What another program is given is read back by transformers and must be the student, cut to V* rows."""

import pytest
import torch
import transformers
from engine_models import CONFIGS, SMALL, VOCABULARY, build
from safetensors.torch import load_file

from kdrl_pl.errors import RunError
from kdrl_pl.models.language_model import LanguageModel
from kdrl_pl.rollout.agreement import check_agreement
from kdrl_pl.rollout.in_process import InProcessEngine
from kdrl_pl.rollout.plain_weights import plain_weights, write_config, write_folder, write_weights
from kdrl_pl.rollout.sampling import Sampling


def mixtral():
    """Its experts are stacked in memory and single in a checkpoint."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**{**SMALL, "num_hidden_layers": 1}, num_local_experts=2)
    return LanguageModel(transformers.AutoModelForCausalLM.from_config(config).eval(), VOCABULARY)


def tied():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SMALL, "tie_word_embeddings": True})
    return LanguageModel(transformers.AutoModelForCausalLM.from_config(config).eval(), VOCABULARY)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None], use_cache=False).logits[0]


@pytest.mark.parametrize("name", [*CONFIGS, "mixtral", "tied"])
def test_transformers_reads_the_student_back(name, tmp_path):
    student = {"mixtral": mixtral, "tied": tied}[name]() if name in ("mixtral", "tied") else build(name)
    before = student.model.config.to_json_string()
    write_config(student, tmp_path, "float32")
    write_weights(plain_weights(student, VOCABULARY, torch.float32), tmp_path)
    assert student.model.config.to_json_string() == before
    read, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values()), told
    assert read.get_output_embeddings().weight.shape[0] == VOCABULARY
    assert read.lm_head.weight.data_ptr() != read.get_input_embeddings().weight.data_ptr()
    torch.testing.assert_close(logits(read.eval()), logits(student.model)[:, :VOCABULARY], atol=1e-5, rtol=0)


def test_names_are_those_of_a_checkpoint_and_dtypes_those_asked_for():
    weights = dict(plain_weights(mixtral(), VOCABULARY, torch.bfloat16))
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert sum("experts" in name for name in weights) == 2 * 3
    assert not any(tensor.requires_grad for tensor in weights.values())


def test_an_adapter_is_in_the_weights():
    from kdrl_pl.models.adapters import Lora, adapter_weights

    student = build()
    plain = dict(plain_weights(student, VOCABULARY, torch.float32))
    Lora(rank=2, target_modules=["q_proj"]).wrap(student.model)
    with torch.no_grad():
        for name, weight in adapter_weights(student.model).items():
            weight += 0.1 * ("lora_B" in name)
    adapted = dict(plain_weights(student, VOCABULARY, torch.float32))
    assert adapted.keys() == plain.keys()
    assert [name for name in plain if not torch.equal(plain[name], adapted[name])] == [
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)
    ]


def test_a_server_starts_on_zeros(tmp_path):
    write_folder(build(), tmp_path / "served", "bfloat16")
    weights = load_file(tmp_path / "served/model.safetensors")
    assert len(weights) == len(dict(plain_weights(build(), VOCABULARY, torch.float32)))
    assert not any(tensor.any() for tensor in weights.values())


def test_quantised_weights_are_refused():
    student = build()
    weight = student.model.lm_head.weight
    student.model.lm_head.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"lm_head\.weight is torch\.int8: quantised weights cannot be handed"):
        plain_weights(student, VOCABULARY, torch.float32)


@pytest.mark.parametrize("changed", [None, "model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_program_with_one_other_weight_is_found_out(changed):
    engine, other = InProcessEngine(), build()
    with torch.no_grad():
        if changed:
            other.model.get_parameter(changed).mul_(1.2)
    engine.sync(other, [])

    def sample(prompt, tokens):
        return engine.generate([prompt], 1, Sampling(max_tokens=tokens), [0])

    student = build().train()
    if changed:
        with pytest.raises(RunError, match=r"nats from those of LlamaForCausalLM \(limit for float32: 0\.01\)"):
            check_agreement(student, "float32", sample)
    else:
        check_agreement(student, "float32", sample)
    assert student.model.training
