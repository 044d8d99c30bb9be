"""LoRA inside a transformers model: its gradient, its base, its merged form, and what is refused."""

import sys

import pytest
import torch
from engine_models import build
from peft.tuners.tuners_utils import BaseTunerLayer

from kdrl_pl.models.adapters import EarlierStudent, Lora, adapter_as, adapter_weights, merged_weights
from kdrl_pl.models.language_model import LanguageModel
from kdrl_pl.models.shared_prompts import SharedPrompts
from kdrl_pl.optim import default_optimizer, make_optimizer

RANK, ALPHA = 3, 12.0
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 12, 13, 0, 0], [20, 21, 22, 23, 24, 25, 26]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 0]], dtype=torch.bool)
SHARED = SharedPrompts(torch.tensor([0, 0, 1]), torch.tensor([3, 3, 3]))
WEIGHTS = torch.linspace(-1.0, 2.0, 21, dtype=torch.float64).view(3, 7)  # of the tokens in the loss


def adapted(name="llama", seed=0, moved=0.1, **settings) -> LanguageModel:
    """A model with an adapter that has learnt something."""
    student = build(name, seed)
    Lora(**{"rank": RANK, "alpha": ALPHA, **settings}).wrap(student.model)
    generator = torch.Generator().manual_seed(seed)
    for weight in adapter_weights(student).values():
        weight.data += moved * torch.randn(weight.shape, generator=generator)
    return student


def loss_of(student: LanguageModel, **how) -> torch.Tensor:
    return (student.token_logprobs(IDS, MASK, 0.7, **how).logprobs * WEIGHTS).sum()


def dense(student: LanguageModel, name: str) -> LanguageModel:
    """A whole model of the same function, in float64, merged by hand."""
    plain = build(name).double()
    weights = dict(plain.model.named_parameters())
    ours = dict(student.model.named_modules())
    with torch.no_grad():
        for path, _ in plain.model.named_modules():
            layer = ours[path]
            if isinstance(layer, BaseTunerLayer):
                delta = ALPHA / RANK * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
                weights[f"{path}.weight"] += delta.T if name == "gpt2" else delta  # its layers are transposed
    return plain


@pytest.mark.parametrize("how", ["whole rows", "shared prompts", "checkpointing"])
def test_the_gradient_is_the_dense_one_projected(how):
    # dL/dB = s G A^T and dL/dA = s B^T G, with s = alpha / rank and G the gradient of the merged weight.
    # Red: a factor s, a base that trains or lets no gradient through, activations recomputed with another adapter.
    student = adapted().double().train()
    whole = dense(student, "llama").train()
    loss_of(whole).backward()
    if how == "checkpointing":
        student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = loss_of(student, shared=SHARED if how == "shared prompts" else None)
    assert loss.item() == pytest.approx(loss_of(whole).item(), rel=1e-12)
    loss.backward()
    gradients = {name: weight.grad for name, weight in whole.model.named_parameters()}
    tolerance = 1e-6 if how == "shared prompts" else 1e-12  # Llama's norms round to float32 on the way
    checked = 0
    for path, module in student.model.named_modules():
        if isinstance(module, BaseTunerLayer):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            g = gradients[f"{path}.weight"]
            for found, expected in ((b.grad, 4.0 * g @ a.T), (a.grad, 4.0 * b.T @ g)):
                assert (found - expected).norm() <= tolerance * expected.norm()
                assert expected.norm() > 1e-3
            checked += 1
    assert checked == 14  # seven linear layers in each of two blocks
    assert all(weight.grad is None for weight in student.parameters() if not weight.requires_grad)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_one_entry_by_finite_differences():
    student = adapted("gpt2").double()
    loss_of(student).backward()
    weight = student.model.transformer.h[0].attn.c_attn.lora_A["default"].weight
    values = []
    for step in (1e-5, -2e-5):
        weight.data[1, 4] += step
        values.append(loss_of(student).item())
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(weight.grad[1, 4].item(), rel=1e-6)


def test_the_first_student_is_the_base_and_only_the_adapter_trains():
    base, student = build(), adapted(moved=0.0)
    assert torch.equal(student.token_logprobs(IDS, MASK).logprobs, base.token_logprobs(IDS, MASK).logprobs)
    optimizer = make_optimizer(default_optimizer, student)
    (group,) = optimizer.param_groups
    sizes = {(32, 32): 2, (16, 32): 2, (48, 32): 2, (32, 48): 1}  # outputs, inputs: layers of one block
    expected = 2 * RANK * sum((outputs + inputs) * count for (outputs, inputs), count in sizes.items())
    assert sum(weight.numel() for weight in group["params"]) == expected
    assert all(weight.dtype == torch.float32 for weight in group["params"])


def test_the_start_is_that_of_the_seed_and_no_random_number_is_taken():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    ours = [adapter_weights(adapted(moved=0.0, seed=0)) for _ in range(2)]
    torch.manual_seed(7)
    student = build()
    torch.manual_seed(7)
    Lora(rank=RANK, alpha=ALPHA).wrap(student.model)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(ours[0][name], ours[1][name]) for name in ours[0])
    other = build()
    Lora(rank=RANK, alpha=ALPHA, seed=1).wrap(other.model)
    assert any(not torch.equal(w, ours[0][name]) for name, w in adapter_weights(other).items())


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head", "norm"]])
def test_the_adapter_off_is_the_base_and_comes_back(modules_to_save):
    # transformers' enable_adapters leaves the modules trained whole switched off.
    student, base = adapted(modules_to_save=modules_to_save), build()
    trained = set(adapter_weights(student))
    worn = student.token_logprobs(IDS, MASK).logprobs
    start = base.token_logprobs(IDS, MASK).logprobs
    with adapter_as(student, None):
        assert torch.equal(student.token_logprobs(IDS, MASK).logprobs, start)
        assert torch.equal(student.head().weight, base.head().weight)
    assert torch.equal(student.token_logprobs(IDS, MASK).logprobs, worn)
    assert set(adapter_weights(student)) == trained
    assert (worn - start).abs().max() > 0.1


def test_an_earlier_student_is_asked_as_it_was():
    # Red: a snapshot that shares memory with the adapter that trains on, or one that stays in its place.
    student = adapted(modules_to_save=["lm_head"])
    earlier = EarlierStudent(student)
    assert torch.equal(earlier.token_logprobs(IDS, MASK).logprobs, build().token_logprobs(IDS, MASK).logprobs)
    then = student.token_logprobs(IDS, MASK).logprobs
    earlier.load_state_dict(student.state_dict())
    with torch.no_grad():
        for weight in adapter_weights(student).values():
            weight.add_(0.05)
    now = student.token_logprobs(IDS, MASK).logprobs
    assert torch.equal(earlier.token_logprobs(IDS, MASK).logprobs, then)
    assert torch.equal(student.token_logprobs(IDS, MASK).logprobs, now)
    assert (now - then).abs().max() > 0.01
    again = EarlierStudent(student)
    again.load_state_dict(earlier.state_dict())
    assert torch.equal(again.token_logprobs(IDS, MASK).logprobs, then)
    with pytest.raises(ValueError, match=r"can only be scored; .* run kdrl validate without --ckpt_path"):
        _ = earlier.model


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "gpt2"])
def test_the_merged_weights_are_a_plain_model_of_the_same_function(name):
    # Red: a factor, a transposed layer (GPT-2), a bias or a buffer left out, names of peft's.
    student = adapted(name, moved=0.05)
    worn = student.token_logprobs(IDS, MASK).logprobs
    plain = build(name, seed=1)
    plain.model.load_state_dict(merged_weights(student.model), strict=True)
    assert torch.allclose(plain.token_logprobs(IDS, MASK).logprobs, worn, rtol=0, atol=1e-5)
    assert torch.equal(student.token_logprobs(IDS, MASK).logprobs, worn)
    if name in ("llama", "gpt2"):
        by_hand = dense(student.double(), name).token_logprobs(IDS, MASK).logprobs
        assert torch.allclose(by_hand.float(), worn, rtol=0, atol=1e-5)


def test_a_base_in_four_bits_lets_the_right_gradient_through(tiny_models):
    # Red: bitsandbytes' packed form, made in the first forward pass in eval mode, through which nothing flows back.
    student = LanguageModel.load(tiny_models[1], adapter=Lora(rank=RANK, alpha=ALPHA, quantization="4bit"))
    for weight in adapter_weights(student).values():
        weight.data += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    plain = LanguageModel.load(tiny_models[1])
    plain.model.load_state_dict(merged_weights(student.model))
    ids = IDS % student.vocab_size
    student.eval()
    with torch.no_grad():
        student.token_logprobs(ids, MASK)
    scores = [model.train().token_logprobs(ids, MASK).logprobs for model in (student, plain)]
    assert torch.allclose(*scores, rtol=0, atol=1e-4)
    for score in scores:
        (score * WEIGHTS).sum().backward()
    whole = dict(plain.model.named_parameters())
    for path, module in student.model.named_modules():
        if isinstance(module, BaseTunerLayer):
            expected = ALPHA / RANK * whole[f"{path}.weight"].grad @ module.lora_A["default"].weight.T
            assert (module.lora_B["default"].weight.grad - expected).norm() <= 1e-3 * expected.norm()


def test_the_adapter_of_a_half_precision_base_is_in_single_precision():
    student = build()
    student.model.bfloat16()
    Lora(rank=2).wrap(student.model)
    assert {weight.dtype for weight in adapter_weights(student).values()} == {torch.float32}
    student.token_logprobs(IDS, MASK).logprobs.sum().backward()
    with pytest.raises(ValueError, match=r"trained whole, in model.dtype, and that is torch.bfloat16"):
        Lora(modules_to_save=["lm_head"]).wrap(build().model.bfloat16())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"adapter.rank is 0; expected at least 1"),
        ({"alpha": -1.0}, r"adapter.alpha is -1.0; expected a positive number"),
        ({"dropout": 0.1}, r"adapter.dropout is 0.1; it must be 0"),
        ({"target_modules": []}, r"target_modules is empty"),
        ({"quantization": "8bit"}, r"quantization is '8bit'; expected null or 4bit"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Lora(**settings)


@pytest.mark.parametrize(
    ("settings", "name", "message"),
    [
        ({"target_modules": ["wq"]}, "llama", r"model.adapter does not fit LlamaForCausalLM: Target modules"),
        ({"target_modules": ["q_proj", "lm_head"]}, "llama", r"names the output head.*modules_to_save: \[lm_head\]"),
        ({"modules_to_save": ["wte"]}, "gpt2", r"embedding or the head of GPT2LMHeadModel, which are one weight"),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*tie_word_embeddings")
def test_layers_that_cannot_have_one(settings, name, message):
    with pytest.raises(ValueError, match=message):
        Lora(**settings).wrap(build(name).model)


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"model.adapter needs peft .*pip install 'kdrl_pl\[lora\]'"):
        Lora().wrap(build().model)
