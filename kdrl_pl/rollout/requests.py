"""What every engine asks of a rollout's request before it samples: a wrong one gets the same message everywhere."""

from __future__ import annotations

from collections.abc import Sequence

from kdrl_pl.rollout.sampling import Sampling


def check_request(
    prompts: Sequence[Sequence[int]],
    group_size: int,
    sampling: Sampling,
    keys: Sequence[int],
    *,
    known_ids: int,
    vocab_size: int,
) -> None:
    """Refuse what no engine can sample from.

    Args:
        prompts: (P,) token ids.
        group_size: G.
        sampling: with its further stop ids.
        keys: (P·G,) one per row.
        known_ids: ids that a prompt may hold: 0 to this, exclusive.
        vocab_size: V*; ids from here on are never sampled.

    Raises:
        ValueError: a prompt is empty or has an unknown id, the number of keys is not P·G, or a stop id is never
            sampled.
    """
    if group_size < 1 or len(keys) != len(prompts) * group_size:
        raise ValueError(
            f"{len(keys)} keys for {len(prompts)} prompts with group_size {group_size}; expected one key per row"
        )
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {number} has no tokens; a completion needs at least one before it")
        if min(prompt) < 0 or max(prompt) >= known_ids:
            raise ValueError(
                f"prompt {number} has ids from {min(prompt)} to {max(prompt)}; the model knows 0 to {known_ids - 1}"
            )
    for token in sampling.stop_token_ids or ():
        if token >= vocab_size:
            raise ValueError(
                f"sampling.stop_token_ids names {token}, which is never sampled: ids end at {vocab_size - 1}"
            )
