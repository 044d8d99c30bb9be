"""The least work of each phase of a step: operations and bytes that no implementation gets around.

Two operations per multiply-add. A prompt is read once for its whole group, a forward pass is not repeated, every weight
is read once per pass (in decoding: once per token step) and the optimizer reads weight, gradient and two moments and
writes weight and moments. Norms, rotations, softmax over the vocabulary and everything smaller are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.workloads import Shape, Workload

ADAMW_NUMBERS = 7  # four read, three written, per weight


@dataclass(frozen=True)
class Work:
    """Operations of matrix products, and bytes moved."""

    operations: float
    bytes: float

    def least_seconds(self, operations_per_s: float, bytes_per_s: float) -> float:
        """The time of the slower of the two, the other one hidden behind it."""
        return max(self.operations / operations_per_s, self.bytes / bytes_per_s)

    def bound(self, operations_per_s: float, bytes_per_s: float) -> str:
        """Which of the two that is."""
        is_products = self.operations / operations_per_s >= self.bytes / bytes_per_s
        return "matrix products" if is_products else "memory"


def _forward(shape: Shape, workload: Workload, lengths: list[int]) -> float:
    """Operations of one forward pass: prompts once, heads on response tokens only."""
    tokens = workload.prompts * workload.prompt_tokens + sum(lengths)
    body = 2 * shape.body_weights * tokens
    head = 2 * workload.vocabulary * shape.hidden * sum(lengths)
    before = workload.prompt_tokens
    # query times keys, and weights times values: 2 x 2 operations per hidden number and earlier token
    reach = workload.prompts * before * (before + 1) / 2 + sum(n * before + n * (n + 1) / 2 for n in lengths)
    return body + head + 4 * shape.layers * shape.hidden * reach


def least_work(workload: Workload, step: int, weight_bytes: int = 4) -> dict[str, Work]:
    """Phase -> least work of one step.

    Args:
        workload: the sizes.
        step: which of its rollouts, for the table of lengths.
        weight_bytes: of one weight as products read it; optimizer state is always fp32.
    """
    lengths = workload.lengths(step)
    student, teacher = workload.student, workload.teacher
    head = workload.vocabulary * student.hidden
    read = (student.body_weights + head) * weight_bytes
    forward = _forward(student, workload, lengths)
    kv = 2 * student.layers * student.hidden * student.kv_heads // student.heads * weight_bytes
    # each decoded token reads the keys and values before it; those of the prompt are one copy for the group
    own = sum(n * (n - 1) / 2 for n in lengths)
    groups = [lengths[i : i + workload.group] for i in range(0, len(lengths), workload.group)]
    shared = sum(max(group) for group in groups) * workload.prompt_tokens
    return {
        "rollout": Work(forward, read * max(lengths) + kv * (own + shared)),
        "teacher": Work(
            _forward(teacher, workload, lengths),
            (teacher.body_weights + workload.vocabulary * teacher.hidden) * weight_bytes,
        ),
        "score": Work(forward, read),
        "update": Work(3 * forward, 2 * read + ADAMW_NUMBERS * 4 * workload.model_weights),
    }
