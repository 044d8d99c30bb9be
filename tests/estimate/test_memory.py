"""Memory without loading anything, against sums done by hand and against what real tensors take."""

from dataclasses import replace

import pytest
import torch
import transformers
from bitsandbytes.optim import AdamW8bit

from kdrl_pl.estimate.memory import memory
from kdrl_pl.estimate.models import bytes_at_rest, count, without_numbers
from kdrl_pl.estimate.plan import Batch, Plan
from kdrl_pl.estimate.report import report
from kdrl_pl.estimate.work import forward, tokens, work
from kdrl_pl.losses import Distillation
from kdrl_pl.module import KDRLModule
from kdrl_pl.rollout.sampling import Sampling
from kdrl_pl.teacher import FrozenTeacher, RemoteTeacher, RoutedTeacher

H, F, L, V = 32, 64, 3, 100  # hidden, feed-forward, layers, words
BODY = L * (2 * H * H + 2 * H * H // 2 + 3 * H * F)  # query and output, key and value of half the heads, feed-forward
WEIGHTS = BODY + 2 * V * H + (2 * L + 1) * H


def llama(folder, **settings):
    """config.json alone."""
    transformers.LlamaConfig(
        hidden_size=H,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=V,
        **settings,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def bare(tmp_path):
    return llama(tmp_path / "bare")


def plan_of(path, *, teacher=None, layout="single", gathered_in=None, **settings):
    plan_settings = {k: settings.pop(k) for k in list(settings) if k in Plan.__dataclass_fields__}
    module = KDRLModule(path, FrozenTeacher(path, **(teacher or {})), **settings)
    plan = Plan(
        module,
        without_numbers(module, gathered_in),
        Batch(2, 4, [16] * 8),
        8,
        Sampling(max_tokens=16),
        layout=layout,
        is_ragged=False,
    )
    return replace(plan, **plan_settings)


def test_weights_gradients_and_optimizer_state_are_counted(bare):
    plan = plan_of(bare, max_tokens_per_micro_batch=100)
    found = memory(plan)
    buffers = sum(b.numel() * 4 for b in plan.module.student.buffers())
    assert count(plan.module.student) == WEIGHTS
    assert found.held == {
        "student": 4 * WEIGHTS + buffers,
        "optimizer": pytest.approx(8 * WEIGHTS, abs=200),
        "teacher": 4 * WEIGHTS + buffers,
    }
    assert found.phases["update"]["gradients"] == 4 * WEIGHTS
    assert found.export == 4 * WEIGHTS + buffers
    assert found.checkpoint == found.export + found.held["optimizer"]
    assert found.total("update") == sum(found.held.values()) + sum(found.phases["update"].values())


def test_the_cache_is_the_one_that_a_rollout_has(bare):
    """Keys and values of 8 rows, 23 columns (the last token is never read) and room: 23 // 64 + 4, on a CPU."""
    found = memory(plan_of(bare))
    capacity = 8 + 8 // 64 + 4  # at the start; full after 12, then 13 + 0 + 4 = 17, then 18 + 4 = 22, then 23 + 4
    while capacity < 23:
        capacity += 1 + 4
    assert found.phases["rollout"]["key-value cache"] == 8 * capacity * L * 2 * (H // 2) * 4


@pytest.mark.parametrize("name", ["8bit", "4bit"])
def test_a_quantised_teacher(bare, name):
    model = plan_of(bare).models.teachers[0].model
    rest = 4 * (2 * V * H + (2 * L + 1) * H) + sum(b.numel() * 4 for b in model.buffers())
    rows = L * (2 * H + 2 * H // 2 + 2 * F + H)  # output rows of the seven linear layers
    linear = BODY + 4 * rows if name == "8bit" else BODY * (0.5 + 4 / 64)
    assert bytes_at_rest(model, name) == rest + linear


def test_layouts(bare):
    one = plan_of(bare, max_tokens_per_micro_batch=50)
    single, ddp = memory(one), memory(replace(one, layout="ddp", ranks=4))
    assert ddp.held == {**single.held, "gradient buckets": 4 * WEIGHTS}
    assert ddp.phases == single.phases
    cut = memory(replace(one, layout="fsdp2", ranks=4))
    assert cut.held["student"] == single.held["student"] // 4
    assert cut.held["optimizer"] == single.held["optimizer"] // 4
    assert cut.held["teacher"] == single.held["teacher"]
    assert cut.phases["rollout"]["gathered weights"] == 4 * WEIGHTS
    layer, root = BODY // L + 2 * H, 2 * V * H + H
    assert cut.phases["update"]["gathered weights"] == 4 * (2 * layer + root)
    assert cut.phases["update"]["gradients"] == 4 * WEIGHTS + 4 * layer  # whole until the last micro-batch
    half = memory(plan_of(bare, layout="fsdp2", ranks=4, gathered_in="bfloat16", autocast=True))
    assert (
        half.held["student"] == single.held["student"] // 4 and half.held["optimizer"] == single.held["optimizer"] // 4
    )
    assert half.phases["rollout"]["gathered weights"] == 2 * WEIGHTS


def test_teachers_elsewhere(bare):
    gpu = {"is_cpu": False, "layout": "ddp", "ranks": 4}
    here = memory(plan_of(bare, **gpu)).held["teacher"]
    away = memory(plan_of(bare, teacher={"offload": True}, **gpu))
    assert away.held["teacher"] == 0 and away.phases["teacher"]["teacher's weights"] == here
    assert memory(plan_of(bare, teacher={"sharded": True}, **gpu)).held["teacher"] == here // 4


def test_the_head_of_a_teacher_that_stands_elsewhere_is_kept_for_the_full_vocabulary(bare):
    gpu = {"is_cpu": False, "layout": "ddp", "ranks": 4, "distillation": Distillation(estimator="full")}
    here = memory(plan_of(bare, **gpu)).held["teacher"]
    head = V * H * 4
    away = memory(plan_of(bare, teacher={"offload": True}, **gpu))
    assert away.held["teacher"] == head and away.phases["teacher"]["teacher's weights"] == here - head
    assert memory(plan_of(bare, teacher={"sharded": True}, **gpu)).held["teacher"] == here // 4 + head


def test_several_teachers(bare):
    def told(**teachers):
        module = KDRLModule(bare, RoutedTeacher(teachers))
        batch, sampling = Batch(2, 4, [16] * 8), Sampling(max_tokens=16)
        return report(Plan(module, without_numbers(module), batch, 8, sampling, is_ragged=False))

    one = told(a=FrozenTeacher(bare))["memory"]["held"]["teacher"]
    two = told(a=FrozenTeacher(bare), b=FrozenTeacher(bare, dtype="bfloat16"))  # of one folder
    assert two["teachers"] == [{"path": bare, "parameters": WEIGHTS}] * 2
    assert one < two["memory"]["held"]["teacher"] < 2 * one
    served = told(a=RemoteTeacher("http://localhost:1"), b=RemoteTeacher("http://localhost:2"))
    assert served["teachers"] == [] and set(served["memory"]["phases"]) == {"rollout", "update"}


def test_hidden_states_of_the_teacher_are_kept_for_the_full_vocabulary(bare):
    found = memory(plan_of(bare, distillation=Distillation(estimator="full")))
    assert found.phases["teacher"]["teacher's hidden states"] == 8 * (8 + 16) * H * 4


def test_recomputed_activations_are_fewer(bare):
    ways = [memory(plan_of(bare, gradient_checkpointing=way)).phases["update"]["passes"] for way in (True, False)]
    assert ways[0] < 0.7 * ways[1]


def test_activations_of_a_layer_are_those_that_autograd_saves(tmp_path):
    """Per token of a Llama layer in fp32: of each norm its input, the normalised input and the scaled one, and a
    number; q, k, v and the attention's result, and a number per head; of the feed-forward part gate, its activation, up
    and their product. One layer more costs just that."""
    peaks, heads = [], 4
    for layers in (4, 8):
        transformers.LlamaConfig(
            hidden_size=H, intermediate_size=F, num_hidden_layers=layers, num_attention_heads=heads, vocab_size=V
        ).save_pretrained(tmp_path / str(layers))
        parts = memory(plan_of(str(tmp_path / str(layers)))).phases["update"]
        peaks.append(parts["passes"] + parts["gradients"])
    per_token = (peaks[1] - peaks[0]) / 4 / (8 * (8 + 16)) / 4
    assert per_token == 2 * (3 * H + 1) + 4 * H + heads + 4 * F


def test_work_can_be_redone_by_hand(bare):
    plan = plan_of(bare, ranks=2, layout="ddp")
    reach = 8 * (8 * 9 / 2) + 8 * (16 * 8 + 16 * 17 / 2)
    once = 2 * BODY * 8 * 24 + 2 * V * H * 8 * 16 + 4 * L * H * reach
    assert forward(plan, plan.module.student, False) == once
    found = work(plan)
    assert found["teacher"].operations == once and found["update"].operations == 3 * once
    assert found["update"].sent == {"all-reduce of gradients": 2 * 0.5 * 4 * WEIGHTS}
    shared = once - 2 * BODY * 6 * 8 - 4 * L * H * 6 * 8 * 9 / 2
    assert found["rollout"].operations == shared
    assert tokens(plan)["response"] == 2 * 8 * 16 and tokens(plan)["rows"] == 16
    least = found["teacher"].seconds(once / 3, 1e15, 1e15)
    assert least == (pytest.approx(3), "products")


def test_bytes_between_ranks_under_fsdp2(bare):
    plan = plan_of(bare, ranks=4, layout="fsdp2", max_tokens_per_micro_batch=96, teacher={"sharded": True})
    passes = len(plan.student_passes.rows)
    assert passes == 2
    found, root = work(plan), 2 * V * H + H
    assert found["rollout"].sent == {"all-gather of the student": 0.75 * 4 * WEIGHTS}
    assert found["teacher"].sent == {"all-gather of the teacher": 0.75 * 4 * WEIGHTS}
    assert found["update"].sent == {
        "all-gather of the student": 2 * 0.75 * 4 * (2 * WEIGHTS - root),
        "reduce-scatter of gradients": 0.75 * 4 * WEIGHTS,
    }


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adafactor, AdamW8bit])
def test_the_optimizers_state_is_its_own(make, tmp_path):
    # AdamW8bit keeps matrices below 4,096 weights in fp32, so these are larger.
    config = transformers.LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=1, vocab_size=V)
    config.save_pretrained(tmp_path / "wider")
    plan = plan_of(str(tmp_path / "wider"), optimizer=lambda weights: make(weights, lr=1e-3))
    per_weight = memory(plan).held["optimizer"] / count(plan.module.student)
    expected = {"SGD": (0, 0.01), "AdamW": (8, 8.01), "Adafactor": (0.01, 0.1), "AdamW8bit": (2, 2.1)}[make.__name__]
    assert expected[0] <= per_weight <= expected[1]


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen3", "mistral"])
def test_other_architectures(name, tmp_path):
    from engine_models import CONFIGS

    CONFIGS[name]().save_pretrained(tmp_path / name)
    found = memory(plan_of(str(tmp_path / name)))
    assert set(found.phases) == {"rollout", "teacher", "update"}
    assert min(sum(parts.values()) for parts in found.phases.values()) > 0


def test_a_kernel_that_needs_a_gpu_is_stood_in_for(bare):
    ways = [memory(plan_of(bare, attn_implementation=kernel)) for kernel in ("sdpa", "flash_attention_2")]
    assert ways[0] == ways[1]
