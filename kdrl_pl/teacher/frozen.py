"""The teacher as a model in this process: fp32, bf16, 8-bit or 4-bit, never trained, never saved."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdrl_pl.experience import Experience
from kdrl_pl.models.loading import check_model_path, load_tokenizer, stop_ids
from kdrl_pl.models.quantization import check_quantization, quantization_arguments
from kdrl_pl.models.shared_prompts import SharedPrompts
from kdrl_pl.sequences import group_batches, micro_batches, sharing_pays
from kdrl_pl.stop_cell import CELL, cell_logprobs
from kdrl_pl.teacher.fingerprint import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdrl_pl.logprobs import Head
    from kdrl_pl.models.language_model import LanguageModel

log = logging.getLogger(__name__)


class FrozenTeacher:
    """A frozen causal language model that scores the student's tokens.

    A plain object outside the module tree: as a submodule it would land in checkpoints, be set to train mode, cast and
    wrapped by the strategy.

    Args:
        path: Hugging Face folder or hub name of the teacher; its tokenizer must be the student's.
        dtype: "float32", "bfloat16" or "float16" of the weights (of the parts that are not quantised).
        quantization: "8bit" (LLM.int8) or "4bit" (nf4), through bitsandbytes; null loads the weights as they are.
        int8_threshold: outlier threshold of the 8-bit form. 0 makes a row's log-probs independent of the rows beside
            it; bitsandbytes' 6 is more exact but is not.
        attn_implementation: of the teacher: "sdpa", "eager", "flash_attention_2"; null is transformers' choice.
        max_tokens_per_micro_batch: tokens, padding counted, of one forward pass.
        report_error: measure on the first rows how far quantisation moves the log-probs, and say so; loads the
            unquantised weights once for it.

    Raises:
        ValueError: unknown quantization, or a budget below 1.
    """

    def __init__(
        self,
        path: str,
        dtype: str = "float32",
        quantization: str | None = None,
        int8_threshold: float = 0.0,
        attn_implementation: str | None = None,
        max_tokens_per_micro_batch: int = 16384,
        report_error: bool = False,
    ) -> None:
        check_quantization("teacher.quantization", quantization)
        if max_tokens_per_micro_batch < 1:
            raise ValueError(
                f"teacher.max_tokens_per_micro_batch is {max_tokens_per_micro_batch}; expected at least 1 token"
            )
        self.path, self.dtype, self.quantization = path, dtype, quantization
        self.int8_threshold, self.attn_implementation = int8_threshold, attn_implementation
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.report_error = report_error
        self.model: LanguageModel | None = None

    def load(self, device: torch.device | str, student_tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Load the weights onto `device`, once.

        Raises:
            ValueError: the teacher's tokenizer is another one than the student's.
        """
        if self.model is not None:
            return
        if student_tokenizer is not None:
            check_same_tokenizer(student_tokenizer, load_tokenizer(self.path), self.path)
        self.model = self._load_model(self.dtype, self.quantization, device)

    def _load_model(self, dtype: str, quantization: str | None, device: torch.device | str) -> LanguageModel:
        from kdrl_pl.models.language_model import LanguageModel

        model = LanguageModel.load(
            self.path,
            dtype,
            attn_implementation=self.attn_implementation,
            quantization=quantization_arguments(quantization, dtype, self.int8_threshold),
        )
        return model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def score(self, experience: Experience, asked: Tensor, *, hidden: bool = False) -> None:
        """Fill in `teacher_logprobs` (and `teacher_hidden` when wanted) where `asked`; zero elsewhere.

        Args:
            experience: rows; log-probs are at their temperature, at stop tokens those of their `stop_cell`.
            asked: (B, T) bool, tokens to score; others than response tokens are ignored. Rows without any are not read.
            hidden: also keep the hidden states, for the full-vocabulary form: (B, T, H_T).

        Raises:
            RuntimeError: `load` was not called.
        """
        if self.model is None:
            raise RuntimeError("the teacher is not loaded; call teacher.load(device, tokenizer) first")
        if self.report_error:
            self.report_error = False
            error = self.quantization_error(experience)
            log.info(
                "teacher in %s: its log-probs differ from fp32 by %.3g nats on average, %.3g at most",
                self.quantization or self.dtype,
                error["mean"],
                error["max"],
            )
        asked = asked & experience.response_mask
        experience.teacher_logprobs = torch.zeros(asked.shape, dtype=torch.float32, device=experience.device)
        rows = asked.any(1).nonzero().flatten()
        if hidden:
            weight = self.head().weight
            shape = (*asked.shape, weight.shape[1])
            experience.teacher_hidden = torch.zeros(shape, dtype=weight.dtype, device=experience.device)
        stops = experience.stop_cell
        read = (lambda vocabulary: {CELL: cell_logprobs(vocabulary, stops)}) if stops else None
        shares, batches = self._passes(experience, rows)
        for batch in batches:
            index = rows[batch]
            width = int(experience.attention_mask[index].sum(1).max())
            ids, mask = experience.input_ids[index, :width], asked[index, :width]
            shared = SharedPrompts(experience.group[index], experience.prompt_lengths[index]) if shares else None
            scores = self.model.token_logprobs(
                ids, mask, experience.temperature, read=read, return_hidden=hidden, shared=shared
            )
            experience.teacher_logprobs[index, :width] = scores.readings.get(CELL, scores.logprobs).float()
            if hidden:
                experience.teacher_hidden[index, :width] = scores.hidden

    def _passes(self, experience: Experience, rows: Tensor) -> tuple[bool, list[list[int]]]:
        """Whether the prompt of a group is read once, and which of `rows` go through each forward pass."""
        lengths = experience.prompt_lengths[rows].tolist(), experience.response_lengths[rows].tolist()
        group, budget = experience.group[rows].tolist(), self.max_tokens_per_micro_batch
        if self.model.shares_prompts and sharing_pays(*lengths, group, budget):
            return True, group_batches(*lengths, group, budget)
        return False, micro_batches([sum(pair) for pair in zip(*lengths, strict=True)], budget)

    def head(self) -> Head:
        """The teacher's output head, for the full-vocabulary form."""
        return self.model.head()

    def stop_ids(self) -> list[int]:
        """Ids that end a response of the teacher."""
        return stop_ids(load_tokenizer(self.path), self.model.model.generation_config)

    def fingerprint(self) -> str:
        """Names the teacher in checkpoints, so that a run is not resumed under another one."""
        return f"{fingerprint(check_model_path(self.path))}/{self.quantization or self.dtype}"

    @torch.no_grad()
    def quantization_error(self, experience: Experience) -> dict[str, float]:
        """How far quantisation moves the log-probs of these rows from the fp32 model, in nats: mean and maximum.

        Loads the fp32 weights a second time.
        """
        exact = self._load_model("float32", None, experience.device)
        mask = experience.response_mask
        ours = self.model.token_logprobs(experience.input_ids, mask, experience.temperature).logprobs
        theirs = exact.token_logprobs(experience.input_ids, mask, experience.temperature).logprobs
        difference = (ours - theirs).abs()[mask]
        return {"mean": float(difference.mean()), "max": float(difference.max())}


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, path: str) -> None:
    """Refuse a teacher whose token ids mean something else. Widths of the models may differ; the tokenizers may not.

    Raises:
        ValueError: names the first token on which the two differ.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    differing = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
    example = differing[0]
    raise ValueError(
        f"the teacher {path} has another tokenizer than the student: {len(differing)} tokens differ, for example "
        f"{example!r} is id {ours.get(example)} for the student and {theirs.get(example)} for the teacher. "
        "Distillation compares probabilities of the same token ids; choose a teacher of the student's model family"
    )
