"""TGPO: the far teacher's favourite word at every visited state as a target (arXiv 2605.13230; METHOD §7)."""

from __future__ import annotations

from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.logprobs import Vocabulary
from kdrl_pl.losses.base import PolicyOutput, Term, inside
from kdrl_pl.schedules import Linear, Schedule


class TGPO(Term):
    """`-log pi(argmax_v pi_T(v | s_t))` at the states that the student visits, beside the policy gradient and under
    the same weights.

    A teacher that finds the student's own tokens all but impossible says little through `d`; which word it would have
    written it can still say. Where model.distillation masks the teacher it has no say here either. The whole vocabulary
    of both models is read, a chunk of positions at a time; kept are the teacher's hidden states, (B, T, H_T).

    Args:
        coef: w, a number or a schedule over rollouts; the paper's falls from 2e-3 by 1e-5 per rollout, to 0 at 200.
    """

    needs_teacher = True
    reads_vocabulary = reads_teacher_vocabulary = True
    sampled = False

    def __init__(self, coef: Schedule | float = Linear(2e-3, 1e-5, 0.0)) -> None:  # noqa: B008 - without state
        super().__init__(coef)

    def read(self, vocabulary: Vocabulary) -> dict[str, Tensor]:
        favourite = vocabulary.teacher.argmax(1, keepdim=True)  # (N, 1)
        return {"favourite": vocabulary.logprobs.gather(1, favourite)[:, 0]}

    def __call__(self, policy: PolicyOutput, experience: Experience, rollout: int) -> Tensor:
        return -policy.reading("favourite")

    def weights(self, experience: Experience) -> Tensor:
        return inside(experience.token_weights[:, None], experience.teacher_mask & experience.response_mask)

    def teacher_tokens(self, experience: Experience) -> Tensor:
        return experience.response_mask & (experience.token_weights != 0)[:, None]
