"""Does another program compute what the student does? One short row tells, before a run is built on it.

Weights under a name that the other side does not read, an architecture that it computes otherwise, or a tied head that
keeps its old values raise no error there. In training the sampler check would notice; evaluation has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from kdrl_pl.errors import RunError
from kdrl_pl.rollout.engine import Completions
from kdrl_pl.rollout.in_process import evaluating

if TYPE_CHECKING:
    from kdrl_pl.models.language_model import LanguageModel

PROMPT = RESPONSE = 8  # tokens
LIMITS = {"float32": 1e-2, "bfloat16": 0.3, "float16": 0.1}  # mean difference of so few tokens, nats


@torch.no_grad()
def check_agreement(student: LanguageModel, dtype: str, sample: Callable[[list[int], int], Completions]) -> None:
    """Compare the log-probs of one sampled row with the student's own.

    Args:
        student: its weights lie whole on this process.
        dtype: of the other program's weights.
        sample: takes a prompt and a number of tokens; samples one row of them at temperature 1.

    Raises:
        RunError: they differ by more than rounding.
    """
    prompt = torch.linspace(0, student.vocab_size - 1, PROMPT).long().tolist()
    done = sample(prompt, RESPONSE)
    (tokens,), (told,) = done.token_ids, done.logprobs
    ids = torch.tensor([[*prompt, *tokens]], device=student.device)
    with evaluating(student):
        logits = student.model(input_ids=ids, use_cache=False).logits[0, PROMPT - 1 : -1, : student.vocab_size]
    own = logits.float().log_softmax(-1).gather(1, ids[0, PROMPT:, None])[:, 0].cpu()
    difference = float((own - torch.tensor(told)).abs().mean())
    if not difference <= LIMITS[dtype]:
        raise RunError(
            f"after the weights were handed over, vLLM's log-probs lie {difference:.2g} nats from those of "
            f"{type(student.model).__name__} (limit for {dtype}: {LIMITS[dtype]:g}): it does not compute the same "
            "model. Use the in-process rollout engine; rollout.engine.init_args.dtype: float32 shows whether rounding "
            "is why"
        )
