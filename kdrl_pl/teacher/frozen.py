"""The teacher as a model in this process: whole, quantised, offloaded or sharded; never trained, never saved."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

from kdrl_pl.experience import Experience
from kdrl_pl.models.loading import check_model_path, load_generation_config, load_tokenizer, revision, stop_ids
from kdrl_pl.models.quantization import check_quantization, quantization_arguments
from kdrl_pl.models.shared_prompts import SharedPrompts
from kdrl_pl.parallel import all_reduce_max, world_size
from kdrl_pl.sequences import group_batches, micro_batches, sharing_pays
from kdrl_pl.stop_cell import CELL, cell_logprobs
from kdrl_pl.teacher.cache import TeacherCache, score_through
from kdrl_pl.teacher.fingerprint import fingerprint
from kdrl_pl.teacher.offload import WaitingWeights
from kdrl_pl.teacher.sharded import cut, idle_pass, whole_head

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
        offload: the weights wait in host memory and are copied to the device for each rollout's scoring.
        sharded: every process keeps its part of the weights (FSDP2) instead of all of them; not with quantization.
        cache: keeps log-probs on disk, so that no row is scored twice; not for forms that read the whole vocabulary.

    Raises:
        ValueError: unknown quantization, a budget below 1, or settings that do not go together.
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
        offload: bool = False,
        sharded: bool = False,
        cache: TeacherCache | None = None,
    ) -> None:
        check_quantization("teacher.quantization", quantization)
        if max_tokens_per_micro_batch < 1:
            raise ValueError(
                f"teacher.max_tokens_per_micro_batch is {max_tokens_per_micro_batch}; expected at least 1 token"
            )
        if sharded and quantization is not None:
            raise ValueError(
                f"teacher.sharded cuts weights over the processes, which bitsandbytes' {quantization} form does not "
                "allow; set teacher.quantization: null (dtype: bfloat16), or teacher.sharded: false"
            )
        if sharded and offload:
            raise ValueError(
                "teacher.sharded and teacher.offload are two ways to make room: set one of them to false; offload "
                "leaves the most room between uses, sharded holds teachers that no device can hold alone"
            )
        if cache is not None and quantization == "8bit" and int8_threshold != 0.0:
            raise ValueError(
                f"teacher.int8_threshold is {int8_threshold:g}: a row's log-probs then depend on the rows beside it, "
                "and a cache would keep those of one company; set teacher.int8_threshold: 0, or teacher.cache: null"
            )
        self.path, self.dtype, self.quantization = path, dtype, quantization
        self.int8_threshold, self.attn_implementation = int8_threshold, attn_implementation
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.report_error, self.offload, self.sharded, self.cache = report_error, offload, sharded, cache
        self.device: torch.device | None = None  # where it scores, once `load` has said so
        self.model: LanguageModel | None = None
        self.score_metrics: dict[str, tuple[float, float]] = {}  # of the last `score`: name -> (sum, count)
        self._waiting: WaitingWeights | None = None
        self._gathered_head: Head | None = None
        self._files: str | None = None  # fingerprint of the folder, and commit on the hub, when it was loaded
        self._commit: str | None = None

    @property
    def is_loaded(self) -> bool:
        """Whether it can be asked."""
        return self.model is not None or (self.cache is not None and self.device is not None)

    @property
    def whole_vocabulary(self) -> str | None:
        """Why forms that read the teacher's whole vocabulary cannot have it, with the cure; None where they can."""
        if self.cache is None:
            return None
        return (
            "a cache keeps the log-probs of sampled tokens alone; set model.distillation.estimator: k2, or "
            "model.teacher.cache: null"
        )

    def check_names(self, named: Iterable[tuple[str, str | None]]) -> None:
        """What a set-up calls with (uid, name of its teacher) of every prompt; one teacher answers to any name."""

    def load(self, device: torch.device | str, student_tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Load the weights onto `device`, once; with a cache not before a row is asked about that it does not hold.

        Raises:
            ValueError: the teacher's tokenizer is another one than the student's.
        """
        if self.is_loaded:
            return
        if student_tokenizer is not None:
            check_same_tokenizer(student_tokenizer, load_tokenizer(self.path), self.path)
        if self.cache is not None:
            self.cache.open()
            self._commit = revision(self.path)
        self._files = fingerprint(check_model_path(self.path))
        self.device = torch.device(device)
        if self.cache is None:
            self._load()

    def _load(self) -> None:
        if self.cuts:
            self.model = cut(self._load_model(self.dtype, None, "cpu"), self.device)
            return
        by_way_of = "cpu" if self.offload and self.quantization is None else self.device
        self.model = self._load_model(self.dtype, self.quantization, by_way_of)
        if self.offload:
            self._waiting = WaitingWeights(self.model, self.device)

    @property
    def cuts(self) -> bool:
        """Whether the weights are cut over several processes, which then score in step."""
        return self.sharded and world_size() > 1

    def sampler(self) -> LanguageModel:
        """The model, on its device until the next `score`, to sample from."""
        if self.model is None:
            self._load()
        if self._waiting is not None:
            self._waiting.bring()
        return self.model

    def _load_model(self, dtype: str, quantization: str | None, device: torch.device | str) -> LanguageModel:
        from kdrl_pl.models.language_model import LanguageModel

        model = LanguageModel.load(
            self.path,
            dtype,
            attn_implementation=self.attn_implementation,
            quantization=quantization_arguments(quantization, dtype, self.int8_threshold),
            quantize_on=device,
        )
        return model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def score(self, experience: Experience, asked: Tensor, *, hidden: bool = False) -> None:
        """Fill in `teacher_logprobs` (and `teacher_hidden` when wanted) where `asked`; zero elsewhere.

        Args:
            experience: rows; log-probs are at their temperature, at stop tokens those of their `stop_cell`.
            asked: (B, T) bool, tokens to score; others than response tokens are ignored. Rows without any are not read.
            hidden: also keep the hidden states, for the full-vocabulary form: (B, T, H_T).

        Every process calls it as often as the others where `sharded`, rows or not.

        Raises:
            RuntimeError: `load` was not called.
            ValueError: hidden states are wanted of a teacher with a cache.
        """
        if not self.is_loaded:
            raise RuntimeError("the teacher is not loaded; call teacher.load(device, tokenizer) first")
        asked = asked & experience.response_mask
        if self.cache is None:
            self._score(experience, asked, hidden)
        elif hidden:
            raise ValueError(f"the teacher's hidden states are wanted, but {self.whole_vocabulary}")
        else:
            hits = score_through(self.cache, self._name_in_cache(), experience, asked, self._score)
            self.score_metrics = {"teacher/cache_hits": hits}

    def _score(self, experience: Experience, asked: Tensor, hidden: bool = False) -> None:
        """The same by the model itself."""
        experience.teacher_logprobs = torch.zeros(asked.shape, dtype=torch.float32, device=experience.device)
        rows = asked.any(1).nonzero().flatten()
        if not (all_reduce_max(len(rows), self.device) if self.cuts else len(rows)):
            return
        model = self.sampler()
        if self.report_error:
            self._report_error(experience)
        head = self.head() if hidden else None
        if head is not None and len(rows):
            shape = (*asked.shape, head.weight.shape[1])
            experience.teacher_hidden = torch.zeros(shape, dtype=head.weight.dtype, device=experience.device)
        stops = experience.stop_cell
        read = (lambda vocabulary: {CELL: cell_logprobs(vocabulary, stops)}) if stops else None
        shares, batches = self._passes(experience, rows)
        for batch in batches:
            if not batch:
                idle_pass(model, self.device, shares)
                continue
            index = rows[batch]
            width = int(experience.attention_mask[index].sum(1).max())
            ids, mask = experience.input_ids[index, :width], asked[index, :width]
            shared = SharedPrompts(experience.group[index], experience.prompt_lengths[index]) if shares else None
            scores = model.token_logprobs(
                ids, mask, experience.temperature, read=read, return_hidden=hidden, shared=shared
            )
            experience.teacher_logprobs[index, :width] = scores.readings.get(CELL, scores.logprobs).float()
            if hidden:
                experience.teacher_hidden[index, :width] = scores.hidden
        if self._waiting is not None:
            self._waiting.send_away(keep=head_parameters(model) if hidden else ())

    def _passes(self, experience: Experience, rows: Tensor) -> tuple[bool, list[list[int]]]:
        """Whether the prompt of a group is read once, and which of `rows` go through each forward pass.

        Where weights are cut over processes all make as many passes, idle ones empty ones at the end.
        """
        lengths = experience.prompt_lengths[rows].tolist(), experience.response_lengths[rows].tolist()
        group, budget = experience.group[rows].tolist(), self.max_tokens_per_micro_batch
        shares = bool(group) and self.model.shares_prompts and sharing_pays(*lengths, group, budget)
        if self.cuts:
            shares = bool(all_reduce_max(int(shares), self.device))
        if shares:
            batches = group_batches(*lengths, group, budget)
        else:
            batches = micro_batches([sum(pair) for pair in zip(*lengths, strict=True)], budget)
        if self.cuts:
            batches += [[]] * (all_reduce_max(len(batches), self.device) - len(batches))
        return shares, batches

    def head(self) -> Head:
        """The output head, for forms that read the whole vocabulary; it stands on the device until the next `score`.

        Gathered once where `sharded`, when hidden states are first scored.
        """
        if self.cuts:
            if self._gathered_head is None:
                self._gathered_head = whole_head(self.model)
            return self._gathered_head
        if self._waiting is not None:
            self._waiting.bring(head_parameters(self.model))
        return self.model.head()

    def stop_ids(self) -> list[int]:
        """Ids that end a response of the teacher."""
        return stop_ids(load_tokenizer(self.path), load_generation_config(self.path))

    def fingerprint(self) -> str:
        """Names the teacher in checkpoints, so that a run is not resumed under another one.

        Once it is loaded, by its files as they were then: what becomes of the folder later is another teacher.
        """
        return f"{self._files or fingerprint(check_model_path(self.path))}/{self.quantization or self.dtype}"

    def _name_in_cache(self) -> str:
        """All that decides about a log-prob beside the row itself."""
        kind = self.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return repr((self.fingerprint(), self._commit, self.dtype, self.attn_implementation, autocast))

    def _report_error(self, experience: Experience) -> None:
        self.report_error = False
        rows = max(self.max_tokens_per_micro_batch // experience.input_ids.shape[1], 1)  # what one pass holds
        error = self.quantization_error(experience[:rows])
        log.info(
            "teacher in %s: its log-probs differ from fp32 by %.3g nats on average, %.3g at most",
            self.quantization or self.dtype,
            error["mean"],
            error["max"],
        )

    @torch.no_grad()
    def quantization_error(self, experience: Experience) -> dict[str, float]:
        """How far quantisation moves the log-probs of these rows from the fp32 model, in nats: mean and maximum.

        Loads the fp32 weights a second time.
        """
        exact = self._load_model("float32", None, experience.device)
        mask = experience.response_mask
        ours = self.sampler().token_logprobs(experience.input_ids, mask, experience.temperature).logprobs
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


def head_parameters(model: LanguageModel) -> list[Parameter]:
    """Weight and bias of the output head."""
    return list(model.model.get_output_embeddings().parameters())
