"""Run as a script, this file is one process of the FSDP2 test below."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from kdrl_pl.parallel import all_reduce_sum, check_strategy, gathered_weights, rank, world_size


def test_without_a_process_group_everything_is_one_process():
    assert (rank(), world_size()) == (0, 1)
    tensor = torch.tensor([1.0, 2.0])
    total = all_reduce_sum(tensor)
    assert total.tolist() == [1.0, 2.0]
    total += 1
    assert tensor.tolist() == [1.0, 2.0]  # a new tensor


def test_plain_modules_are_left_alone():
    model = nn.Linear(2, 2)
    before = dict(model.named_parameters())
    with gathered_weights(model):
        assert all(parameter is before[name] for name, parameter in model.named_parameters())
        assert not any(name.startswith("_settle") for name in vars(model))


@pytest.mark.parametrize("name", ["auto", "ddp", "ddp_find_unused_parameters_true", "DDPStrategy", "FSDP2Strategy"])
def test_ways_of_training_that_are_known(name):
    check_strategy(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fsdp", "FSDP1 gathers the weights in its root's forward only"),
        ("FSDPStrategy", "FSDP1 gathers the weights in its root's forward only"),
        ("ModelParallelStrategy", "its checkpoints can tear, and of what it offers beyond FSDP2 tensor parallelism"),
        ("deepspeed_stage_3", "it has not been tried with rollouts in the training process"),
        ("kdrl_pl.fsdp2.FSDP2Strategy", "a class is given as class_path and init_args"),
    ],
)
def test_others_are_refused_with_the_cure(name, reason):
    with pytest.raises(ValueError, match=rf"trainer.strategy is {name}: {reason}.*Use auto .* or fsdp2 "):
        check_strategy(name)


def test_a_trainer_with_another_strategy_is_refused_too(tiny_models, tmp_path):
    from lightning.pytorch.strategies import SingleDeviceStrategy
    from tiny_run import fit, make_module

    class Own(SingleDeviceStrategy):
        pass

    with pytest.raises(ValueError, match=r"trainer.strategy is Own: it has not been tried"):
        fit(tmp_path, make_module(*tiny_models), strategy=Own("cpu"), accelerator="auto", devices="auto")


@pytest.mark.distributed
def test_rollouts_under_fsdp2(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path / "store")]
    processes = [
        subprocess.Popen([*command, str(number)], env=environment, stderr=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)


def build():
    from transformers import LlamaConfig, LlamaForCausalLM

    from kdrl_pl.models.language_model import LanguageModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, pad_token_id=0
    )
    model = LlamaForCausalLM(config)
    nn.init.normal_(model.lm_head.weight, std=0.5)
    return LanguageModel(model, 37)


def roll(student, number, should_stop=None):
    """Rank 0 decodes 3 prompts for up to 12 tokens, rank 1 one prompt for 2: their numbers of steps differ."""
    from kdrl_pl.rollout.in_process import InProcessEngine
    from kdrl_pl.rollout.sampling import Sampling
    from kdrl_pl.rollout.streams import group_keys

    engine = InProcessEngine()
    engine.sync(student, [])
    prompts = [[[3, 4, 5], [6], [7, 8]], [[9, 10]]][number]
    keys = group_keys(number, 0, [str(i) for i in range(len(prompts))], [0] * len(prompts), 2)
    return engine.generate(prompts, 2, Sampling(max_tokens=[12, 2][number]), keys, should_stop).token_ids


def row():
    return torch.tensor([[3, 4, 5, 6]]), torch.tensor([[False, True, True, True]])


def group():
    return torch.tensor([[3, 4, 5, 6], [3, 4, 7, 8]]), torch.tensor([[False, False, True, True]]).expand(2, -1)


def train(student, optimizer, share):
    """One step on the same group everywhere, so that averaging over ranks changes nothing."""
    from kdrl_pl.models.shared_prompts import SharedPrompts

    shared = SharedPrompts(torch.tensor([0, 0]), torch.tensor([2, 2])) if share else None
    loss = -student.token_logprobs(*group(), shared=shared).logprobs.sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def main(store, number):
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import DTensor

    from kdrl_pl.rollout.engine import RolloutInterrupted

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    assert (rank(), world_size()) == (number, 2)
    assert all_reduce_sum(torch.tensor([number, 5])).tolist() == [1, 10]

    plain, sharded = build(), build()
    for layer in sharded.model.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    register_fsdp_forward_method(sharded, "token_logprobs")
    optimizers = [torch.optim.AdamW(student.parameters(), lr=0.05) for student in (plain, sharded)]

    with pytest.raises(ValueError, match="LlamaForCausalLM holds FSDP2 modules but is not sharded itself"):
        gathered_weights(sharded.model).__enter__()
    seen = []
    for _ in range(3):  # the first rollout comes before the root's first forward
        seen.append(roll(plain, number))
        assert roll(sharded, number) == seen[-1]
        assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
        with torch.no_grad():
            sharded.token_logprobs(*row())
        # FSDP2's default is back: layers reshard after their forward.
        assert all(isinstance(parameter, DTensor) for parameter in sharded.model.model.layers.parameters())
        # The sharded student reads the prompt once, in two passes of its body within one gathering of the weights.
        losses = [train(plain, optimizers[0], share=False), train(sharded, optimizers[1], share=True)]
        assert abs(losses[0] - losses[1]) < 1e-4
    assert seen[0] != seen[1]  # the weights moved

    # One rank gives its rollout up while the other goes on; training continues on both.
    if number == 0:
        polled = iter([False, False, True])
        with pytest.raises(RolloutInterrupted):
            roll(sharded, number, should_stop=lambda: next(polled))
    else:
        assert roll(sharded, number) == roll(plain, number)
    assert abs(train(sharded, optimizers[1], share=True) - train(plain, optimizers[0], share=False)) < 1e-4
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
