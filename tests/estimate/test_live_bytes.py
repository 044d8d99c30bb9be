"""Bytes alive, against sums done by hand."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kdrl_pl.estimate.live_bytes import LiveBytes, fake, nbytes

KB = 1024


def test_bytes_live_as_long_as_somebody_holds_them():
    with FakeTensorMode():
        x = torch.empty(256)  # 1 KB, there before
    with LiveBytes([x]) as live:
        y = x + 1
        assert live.now == KB
        z = y.view(16, 16)[:4]  # a view: nothing new
        w = torch.cat([y, y])
        assert live.now == 3 * KB
        del w
        assert (live.now, live.peak) == (KB, 3 * KB)
        live.restart()
        del y
        assert (live.now, live.peak) == (KB, KB)  # the view holds it
        del z
        assert live.now == 0
        x.mul_(2)
        assert live.peak == KB
    assert nbytes([x, x]) == 2 * KB


def test_what_autograd_saves_is_alive_until_the_backward_pass():
    with FakeTensorMode():
        x, w = torch.empty(64, 32), torch.empty(32, 16, requires_grad=True)
    with LiveBytes([x, w]) as live:
        h = (x @ w).tanh()  # (64, 16) of 4 KB: tanh keeps its result, the product is gone
        assert (live.now, live.peak) == (4 * KB, 8 * KB)
        loss = h.sum()
        del h
        assert live.now == 4 * KB + 4
        loss.backward()
        del loss
        assert live.now == nbytes([w.grad]) == 2 * KB


def test_a_fake_tensor_has_the_world_of_another():
    with FakeTensorMode():
        x = torch.empty(2)
    with LiveBytes([x]) as live:
        y = fake((256, 4), torch.bfloat16, x)
        assert (y.shape, y.dtype, live.now) == ((256, 4), torch.bfloat16, 2 * KB)
        assert not y.requires_grad
