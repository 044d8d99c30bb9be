"""How far sampler and trainer may lie apart, by what computed the two."""

import pytest
import torch

from kdrl_pl.errors import RunError
from kdrl_pl.experience import Experience
from kdrl_pl.metrics import MetricSums
from kdrl_pl.sampler_check import SamplerCheck


def run(drift, dtype, sampler_dtype):
    """A first rollout of four tokens, each `drift` nats off."""
    rows = Experience.from_rows([[1]], [[2, 3, 4, 5]], [0.0], [0], behavior_logprobs=[[-1.0] * 4])
    sums, check = MetricSums({}), SamplerCheck()
    check.measure(torch.full(rows.input_ids.shape, drift - 1.0), rows, sums)
    check.run(sums, torch.device("cpu"), dtype, sampler_dtype)
    return check.done


@pytest.mark.parametrize(
    ("dtype", "sampler_dtype", "limit"),
    [
        ("float32", None, 1e-5),
        ("float32", "float32", 1e-3),  # another engine
        ("float32", "bfloat16", 0.05),
        ("bfloat16", None, 0.05),
        ("bfloat16", "float32", 0.05),  # the coarser of the two
    ],
)
def test_the_limit_is_that_of_the_coarser_side(dtype, sampler_dtype, limit):
    assert run(0.9 * limit, dtype, sampler_dtype)
    with pytest.raises(RunError, match=f"limits for {sampler_dtype or dtype}: {limit:g} and"):
        run(1.1 * limit, dtype, sampler_dtype)
