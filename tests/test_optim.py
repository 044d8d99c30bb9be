"""Optimizers by class_path: those of bitsandbytes keep their moments in 8 bits, save for small tensors."""

import pytest
import torch

from kdrl_pl.__main__ import main
from kdrl_pl.optim import keep_settings, make_optimizer


def test_eight_bit_adamw_steps_like_adamw():
    # Red: small tensors rounded to 8 bits, where one of norms or biases can throw a run off.
    from bitsandbytes.optim import AdamW8bit

    steps, states = [], []
    for make in (torch.optim.AdamW, AdamW8bit):
        generator = torch.Generator().manual_seed(0)
        model = torch.nn.Linear(128, 64)
        before = [torch.zeros(64, 128), torch.zeros(64)]
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.data = value.clone()
        optimizer = make_optimizer(lambda p, make=make: make(p, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0), model)
        for _ in range(5):
            for parameter in model.parameters():
                parameter.grad = 1.0 + torch.rand(parameter.shape, generator=generator)
            optimizer.step()
        steps.append([parameter.detach() for parameter in model.parameters()])
        states.append(optimizer.state)
    weight, bias = zip(*steps, strict=True)
    assert torch.allclose(bias[0], bias[1], rtol=0, atol=1e-6)  # 64 elements: moments in 32 bits
    assert 0 < (weight[0] - weight[1]).abs().max() < 0.05 * 5e-2  # of five steps of 1e-2
    assert [state["state1"].dtype for state in states[1].values()] == [torch.uint8, torch.float32]


def test_only_what_has_a_gradient_is_optimised_and_settings_are_named():
    model = torch.nn.Linear(4, 2)
    model.weight.requires_grad_(False)
    (group,) = make_optimizer(lambda p: torch.optim.AdamW(p, lr=0.5), model).param_groups
    assert group["params"] == [model.bias]
    assert group["initial_lr"] == 0.5
    with pytest.raises(ValueError, match=r"model.optimizer does not take its settings: Invalid learning rate: -1"):
        make_optimizer(lambda p: torch.optim.AdamW(p, lr=-1), model)


class Counting(torch.optim.SGD):
    """Keeps a number of its own among the settings of a group, as optimizers that find their rate themselves do."""

    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, lr, weight_decay=weight_decay)
        self.param_groups[0]["steps"] = 0

    def step(self):
        super().step()
        self.param_groups[0]["steps"] += 1


def test_a_checkpoint_brings_the_state_and_this_run_its_settings():
    # Red: torch's load_state_dict alone, which takes the settings too; or all put back, and with them "steps".
    model = torch.nn.Linear(4, 2)
    first = make_optimizer(lambda p: Counting(p, lr=0.5), model)
    first.step()
    first.param_groups[0]["lr"] = 0.1  # the schedule's
    for lr, decay, expected in ((0.5, 0.0, (0.1, 0.5, 0.0, 1)), (0.25, 0.01, (0.25, 0.25, 0.01, 1))):
        second = make_optimizer(lambda p, lr=lr, decay=decay: Counting(p, lr=lr, weight_decay=decay), model)
        second.load_state_dict(first.state_dict())
        keep_settings(second)
        (group,) = second.param_groups
        assert tuple(group[name] for name in ("lr", "initial_lr", "weight_decay", "steps")) == expected
    keep_settings(second)
    assert second.param_groups[0]["steps"] == 1
    assert second.state_dict()["param_groups"][0]["settings"]["lr"] == 0.25  # what the next run is compared with


def test_of_bitsandbytes_a_config_may_name_optimizers_alone(tmp_path, capsys):
    command = ["fit", "--config=configs/quickstart.yaml", f"--run.root={tmp_path}"]
    assert main([*command, "--model.optimizer=bitsandbytes.functional.dequantize_4bit"]) != 0
    assert "bitsandbytes.functional" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
