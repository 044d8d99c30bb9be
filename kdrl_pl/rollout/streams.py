"""Random numbers of a rollout: every sampled row owns a stream of uniforms, and token t always uses number t.

The stream depends only on what the row *is* (run seed, rollout, prompt, sample), so samples do not depend on batch
make-up, padding, rank or row order, and a resumed run needs no random state. Philox is counter-based: any stretch of
a stream is made on its own, so long budgets cost no memory up front.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

_PER_COUNTER = 4  # Philox 4x64 yields four numbers per step of its counter


def stream_key(seed: int, rollout: int, uid: str, occurrence: int, sample: int) -> int:
    """The 128-bit key of one row's stream.

    Args:
        seed: of the run.
        rollout: number of the rollout, from 0 (in evaluation: any number that names the evaluation).
        uid: the prompt's stable name.
        occurrence: which occurrence of the prompt in the rollout's global list, from 0.
        sample: which sample of the group, from 0.
    """
    # The free text stands last, so that no two rows spell the same name.
    name = f"{seed}/{rollout}/{occurrence}/{sample}/{uid}"
    return int.from_bytes(blake2b(name.encode(), digest_size=16).digest(), "little")


def group_keys(seed: int, rollout: int, uids: Sequence[str], occurrences: Sequence[int], group_size: int) -> list[int]:
    """Keys of all P·G rows of a rollout in prompt-major order, as `RolloutEngine.generate` takes them.

    Args:
        seed: of the run.
        rollout: number of the rollout.
        uids: (P,) names of the prompts.
        occurrences: (P,) which occurrence of its uid in the rollout's global list each prompt is.
        group_size: G, samples per prompt.
    """
    return [
        stream_key(seed, rollout, uid, occurrence, sample)
        for uid, occurrence in zip(uids, occurrences, strict=True)
        for sample in range(group_size)
    ]


def uniforms(keys: Sequence[int], start: int | Sequence[int], count: int) -> np.ndarray:
    """Numbers `start` to `start + count - 1` of each stream.

    Args:
        keys: (B,) from `stream_key`.
        start: first token; one number for all streams, or one for each.
        count: tokens.

    Returns:
        (B, count) float64 in [0, 1): the upper 53 bits of Philox's raw 64, whose stream NumPy promises never to change.
    """
    starts = [start] * len(keys) if isinstance(start, int) else start
    raw = np.empty((len(keys), count), dtype=np.uint64)
    for row, (key, first) in enumerate(zip(keys, starts, strict=True)):
        counter, skip = divmod(first, _PER_COUNTER)
        raw[row] = np.random.Philox(key=key, counter=counter).random_raw(skip + count)[skip:]
    return (raw >> np.uint64(11)) * 2.0**-53
