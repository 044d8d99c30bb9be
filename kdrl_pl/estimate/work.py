"""Work of one rollout and its updates: tokens, operations, bytes read, bytes between ranks; and the least time of each.

Two operations per multiply-add; norms, rotations and softmaxes are left out. A ring moves (W-1)/W of a tensor over each
rank's link in an all-gather or reduce-scatter, and twice that in an all-reduce.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from kdrl_pl.estimate.models import bytes_at_rest, count, layer_counts
from kdrl_pl.estimate.plan import Plan
from kdrl_pl.models.language_model import LanguageModel
from kdrl_pl.models.loading import DTYPES


@dataclass
class Work:
    """Of one phase, on one rank.

    Args:
        operations: of matrix products.
        read: bytes that a device has to read at least.
        sent: bytes over this rank's link, by what moves them.
        copied: bytes from host memory to the device.
    """

    operations: float = 0.0
    read: float = 0.0
    sent: dict[str, float] = field(default_factory=dict)
    copied: float = 0.0

    def seconds(self, operations_per_s: float, bytes_per_s: float, link_per_s: float) -> tuple[float, str]:
        """Least time of the phase, the others hidden behind the slowest, and which that is."""
        limits = {
            "products": self.operations / operations_per_s,
            "memory": self.read / bytes_per_s,
            "link": sum(self.sent.values()) / link_per_s,
        }
        slowest = max(limits, key=lambda name: limits[name])
        return limits[slowest], slowest


def tokens(plan: Plan) -> dict[str, int]:
    """Tokens of a rollout over all ranks, by what becomes of them, at the lengths of the plan."""
    batch = plan.training
    responses = sum(batch.response_tokens) * plan.ranks
    prompts = batch.rows * plan.prompt_tokens * plan.ranks
    return {
        "rows": batch.rows * plan.ranks,
        "prompt": prompts,
        "response": responses,
        "per update": (prompts + responses) * plan.module.epochs_per_rollout // plan.updates,
        "teacher": (prompts + responses) if plan.module.needs_teacher else 0,
        "micro-batches of a rank": len(plan.student_passes.rows) * plan.module.epochs_per_rollout,
    }


def work(plan: Plan) -> dict[str, Work]:
    """Phase -> work of one rollout on one rank."""
    module, student = plan.module, plan.module.student
    size = 2 if plan.autocast or plan.rollout_dtype else next(iter(student.parameters())).element_size()
    whole = count(student)
    others = (plan.ranks - 1) / plan.ranks
    found = {"rollout": Work(forward(plan, student, True), _decoding_reads(plan, size))}
    if plan.layout == "fsdp2":
        found["rollout"].sent["all-gather of the student"] = others * whole * size
    teacher = module.teacher
    if module.needs_teacher and teacher.model is not None:
        passes = len(plan.teacher_passes.rows)
        found["teacher"] = Work(forward(plan, teacher.model, plan.teacher_passes.shares))
        if teacher in plan.models.teachers:
            weights = bytes_at_rest(teacher.model, teacher.quantization)
            found["teacher"].read = passes * weights
            if teacher.sharded and plan.ranks > 1:
                gathered = others * count(teacher.model) * DTYPES[teacher.dtype].itemsize
                found["teacher"].sent["all-gather of the teacher"] = passes * gathered
            if teacher.offload and not plan.is_cpu:
                found["teacher"].copied = weights
    times, passes = module.epochs_per_rollout, len(plan.student_passes.rows)
    once = forward(plan, student, plan.student_passes.shares)
    root = layer_counts(student)[1]
    if plan.updates > 1 or module.reward_shaping is not None:
        found["score"] = Work(once, passes * whole * size)
        if plan.layout == "fsdp2":
            found["score"].sent["all-gather of the student"] = passes * others * whole * size
    forwards = 4 if module.gradient_checkpointing else 3  # a backward pass is worth two
    found["update"] = update = Work(times * forwards * once, times * passes * 2 * whole * size)
    trained = sum(p.numel() * 4 for p in plan.models.at_rest.parameters() if p.requires_grad)
    if plan.layout == "ddp":
        update.sent["all-reduce of gradients"] = plan.updates * 2 * others * trained
    elif plan.layout == "fsdp2":
        again = whole - root if plan.reshard else 0
        update.sent["all-gather of the student"] = times * passes * others * (whole + again) * size
        update.sent["reduce-scatter of gradients"] = plan.updates * others * trained
    return found


def forward(plan: Plan, model: LanguageModel, shares: bool) -> float:
    """Operations of one forward pass over the rows of a rank.

    Args:
        plan: the run.
        model: student or teacher.
        shares: the prompt of a group is read once, else once per row.
    """
    responses, prompt = list(plan.training.response_tokens), plan.prompt_tokens
    prompts = plan.training.prompts if shares else plan.training.rows
    config = model.model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    # query times keys, and weights times values: two products per head number and earlier token
    reach = prompts * prompt * (prompt + 1) / 2 + sum(n * prompt + n * (n + 1) / 2 for n in responses)
    products = 2 * body_weights(model) * (prompts * prompt + sum(responses))
    head = 2 * model.vocab_size * config.hidden_size * sum(responses)
    return products + head + 4 * config.num_hidden_layers * heads * size * reach


def body_weights(model: LanguageModel) -> int:
    """Weights that every token is multiplied with: those of matrices but embeddings and head."""
    head = model.model.get_output_embeddings()
    layers = (module for module in model.modules() if not isinstance(module, nn.Embedding) and module is not head)
    return sum(p.numel() for layer in layers for p in layer.parameters(recurse=False) if p.ndim > 1)


def _decoding_reads(plan: Plan, size: int) -> float:
    """Bytes of weights, once per step, and of keys and values, those before each token."""
    batch, config = plan.training, plan.module.student.model.config.get_text_config()
    together = min(plan.max_rows or batch.rows, batch.rows)
    steps = max(max(batch.response_tokens), sum(batch.response_tokens) / together)  # finished rows are replaced
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    column = 2 * config.num_hidden_layers * heads * width * size
    cached = sum(n * plan.prompt_tokens + n * (n - 1) / 2 for n in batch.response_tokens)
    return steps * count(plan.module.student) * size + cached * column
