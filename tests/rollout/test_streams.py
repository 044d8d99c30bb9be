import numpy as np
import pytest

from kdrl_pl.rollout.streams import group_keys, stream_key, uniforms


def test_the_stream_is_pinned():
    # If these numbers change, runs resumed across versions no longer repeat themselves.
    key = stream_key(seed=0, rollout=0, uid="train/0", occurrence=0, sample=0)
    assert key == 54011520270631243128299992708208714862
    assert uniforms([key], 0, 6)[0].tolist() == [
        0.09867703328665667,
        0.15942051068329488,
        0.25440091289435685,
        0.8745944633956424,
        0.18578938179919202,
        0.8558481498369221,
    ]


def test_every_part_of_the_name_changes_the_key():
    keys = {
        stream_key(*name)
        for name in [
            (0, 0, "a/1", 0, 0),
            (1, 0, "a/1", 0, 0),
            (0, 1, "a/1", 0, 0),
            (0, 0, "a/2", 0, 0),
            (0, 0, "a/1", 1, 0),
            (0, 0, "a/1", 0, 1),
            (0, 0, "0/a/1", 0, 0),
        ]
    }
    assert len(keys) == 7


def test_group_keys_are_prompt_major():
    keys = group_keys(5, 3, ["a", "b", "a"], [0, 0, 1], group_size=2)
    assert keys == [
        stream_key(5, 3, uid, occurrence, sample)
        for uid, occurrence, sample in [("a", 0, 0), ("a", 0, 1), ("b", 0, 0), ("b", 0, 1), ("a", 1, 0), ("a", 1, 1)]
    ]
    with pytest.raises(ValueError):
        group_keys(5, 3, ["a", "b"], [0], group_size=2)


@pytest.mark.parametrize("start", [0, 1, 4, 7, 64, 131])
def test_position_t_is_always_number_t(start):
    keys = [stream_key(0, 0, str(uid), 0, 0) for uid in range(3)]
    whole = uniforms(keys, 0, 200)
    assert np.array_equal(uniforms(keys, start, 60), whole[:, start : start + 60])
    assert np.array_equal(uniforms(keys[::-1], start, 60)[::-1], whole[:, start : start + 60])


def test_numbers_are_uniform_and_rows_unrelated():
    numbers = uniforms([stream_key(0, 0, "train/0", 0, sample) for sample in range(64)], 0, 512)
    assert numbers.dtype == np.float64 and numbers.min() >= 0 and numbers.max() < 1
    steps = np.sort(numbers.ravel()) - np.arange(numbers.size) / numbers.size
    assert np.abs(steps).max() < 1.95 / numbers.size**0.5  # Kolmogorov-Smirnov at 0.1 %
    assert np.abs(np.corrcoef(numbers) - np.eye(64)).max() < 0.25  # 5.6 standard errors


def test_every_row_may_start_elsewhere():
    keys = [stream_key(0, 0, str(uid), 0, 0) for uid in range(3)]
    whole = uniforms(keys, 0, 80)
    shifted = uniforms(keys, [0, 5, 64], 10)
    assert [row.tolist() for row in shifted] == [
        whole[0, :10].tolist(),
        whole[1, 5:15].tolist(),
        whole[2, 64:74].tolist(),
    ]
