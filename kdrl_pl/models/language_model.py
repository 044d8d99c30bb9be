"""A causal language model as the objective sees it: token ids in, log-probs of the tokens out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from kdrl_pl.logprobs import Head, Reader, TokenScores, Vocabulary, token_scores
from kdrl_pl.models.loading import load_model, load_tokenizer, vocabulary_size
from kdrl_pl.models.quantization import quantization_arguments
from kdrl_pl.models.shared_prompts import SharedPrompts, can_share, hidden_before
from kdrl_pl.sequences import predicting_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdrl_pl.models.adapters import Lora

log = logging.getLogger(__name__)

# How far our head may stand from the model's own logits in fp32, in nats. Rounding alone makes 1.3e-5 of it on 49,152
# words (SmolLM2-135M); a transform that we do not know makes more than 0.1.
HEAD_TOLERANCE = 1e-3


class TokenLogprobs(NamedTuple):
    """What `LanguageModel.token_logprobs` returns.

    Args:
        logprobs: (B, T) float32 nats, zero outside the mask.
        readings: name -> (B, T) float32, what the reader made of the whole vocabulary, zero outside the mask.
        hidden: (B, T, H) last hidden states, at position t the one that predicts token t; None unless asked for.
    """

    logprobs: Tensor
    readings: dict[str, Tensor]
    hidden: Tensor | None = None


class LanguageModel(nn.Module):
    """A transformers model with its vocabulary cut to what the tokenizer knows.

    Body and head run only inside `token_logprobs`, so that FSDP2 can gather the weights around them.

    Args:
        model: a `PreTrainedModel` for causal language modelling.
        vocab_size: V*, largest token id + 1; logits beyond it are cut off before the softmax.

    Raises:
        ValueError: the model has fewer rows than the tokenizer has ids.
    """

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel, vocab_size: int) -> None:
        super().__init__()
        rows = model.get_output_embeddings().weight.shape[0]
        if vocab_size > rows:
            raise ValueError(
                f"the tokenizer has ids up to {vocab_size - 1} but the model only {rows} output rows; "
                "they do not belong together (or call model.resize_token_embeddings and save it)"
            )
        self.model = model
        self.vocab_size = vocab_size
        self.uses_own_head = True
        self.check_head()
        self._can_share_prompts = can_share(model)
        self.check_shared_prompts()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def shares_prompts(self) -> bool:
        """Whether the prompt of a group may be read once; recomputed activations would drop the cache."""
        return self._can_share_prompts and not any(getattr(m, "gradient_checkpointing", False) for m in self.modules())

    @classmethod
    def load(
        cls,
        path: str,
        dtype: str = "float32",
        *,
        attn_implementation: str | None = None,
        quantization: dict | None = None,
        quantize_on: torch.device | str | None = None,
        gradient_checkpointing: bool = False,
        from_scratch: bool = False,
        adapter: Lora | None = None,
    ) -> LanguageModel:
        """A model folder or hub name with its tokenizer's vocabulary; every dropout is off (said once).

        Args:
            path, dtype, attn_implementation, quantization, quantize_on, from_scratch: see `loading.load_model`.
            gradient_checkpointing: recompute activations in the backward pass.
            adapter: trained in place of the weights; its own quantization counts.
        """
        if adapter is not None:
            quantization = quantization_arguments(adapter.quantization, dtype)
        vocab_size = vocabulary_size(load_tokenizer(path))
        model, silenced = load_model(
            path,
            dtype,
            attn_implementation=attn_implementation,
            quantization=quantization,
            quantize_on=quantize_on,
            from_scratch=from_scratch,
        )
        if silenced:
            log.info("dropout is off: %s of %s set to 0", ", ".join(silenced), path)
        if adapter is not None:
            adapter.wrap(model)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return cls(model, vocab_size)

    def token_logprobs(
        self,
        input_ids: Tensor,
        mask: Tensor,
        temperature: float = 1.0,
        *,
        read: Reader | None = None,
        teacher_hidden: Tensor | None = None,
        teacher_head: Head | None = None,
        return_hidden: bool = False,
        shared: SharedPrompts | None = None,
    ) -> TokenLogprobs:
        """Log-probs of the masked tokens, and what else is read off the whole vocabulary at their positions.

        Args:
            input_ids: (B, T) int64, padding only on the right (so the causal mask hides it and no mask is passed).
            mask: (B, T) bool, True on the tokens wanted, never at position 0.
            temperature: of the sampler; logits are divided by it.
            read: see `logprobs.Reader`; sees the teacher's vocabulary with the next two.
            teacher_hidden: (B, T, H_T), from the teacher's `token_logprobs(..., return_hidden=True)`.
            teacher_head: the teacher's `head()`.
            return_hidden: also return the hidden states.
            shared: rows that share their prompt, which is then read once; None reads every row whole.
        """
        rows, columns, before = predicting_positions(mask)
        if shared is None:
            hidden = self._body(input_ids)[rows, before]  # (N, H)
        else:
            hidden = hidden_before(self._body, input_ids, rows, before, shared)
        of_teacher = None if teacher_hidden is None else teacher_hidden[rows, columns]
        scores = self._scores(
            hidden,
            input_ids[rows, columns],
            temperature,
            read=read,
            teacher_hidden=of_teacher,
            teacher_head=teacher_head,
        )
        empty = torch.zeros(input_ids.shape, dtype=scores.logprobs.dtype, device=input_ids.device)
        return TokenLogprobs(
            empty.index_put((rows, columns), scores.logprobs),
            {name: empty.index_put((rows, columns), value) for name, value in scores.readings.items()},
            hidden.new_zeros(*mask.shape, hidden.shape[1]).index_put((rows, columns), hidden)
            if return_hidden
            else None,
        )

    def head(self) -> Head:
        """The output head cut to V*, with the model's own logit transform."""
        if not self.uses_own_head:
            raise ValueError(
                f"{type(self.model).__name__} computes logits in a way that the full-vocabulary form cannot repeat; "
                "use distillation.estimator k2"
            )
        output, config = self.model.get_output_embeddings(), self.model.config
        bias = getattr(output, "bias", None)
        scale = getattr(config, "logit_scale", None) or 1.0
        if getattr(config, "logits_scaling", None):
            scale = 1.0 / config.logits_scaling
        return Head(
            output.weight,
            bias,
            scale,
            getattr(config, "final_logit_softcapping", None),
            self.vocab_size,
        )

    def _body(self, input_ids: Tensor, use_cache: bool = False, **arguments) -> Tensor:
        """(B, T, H) last hidden states; or (B, T, V) logits where the model's head is not ours to repeat."""
        if not self.uses_own_head:
            return self.model(input_ids=input_ids, use_cache=use_cache, **arguments).logits
        return self.model.base_model(input_ids=input_ids, use_cache=use_cache, **arguments).last_hidden_state

    def _scores(
        self,
        hidden: Tensor,
        tokens: Tensor,
        temperature: float,
        *,
        read: Reader | None,
        teacher_hidden: Tensor | None,
        teacher_head: Head | None,
    ) -> TokenScores:
        if self.uses_own_head:
            return token_scores(
                hidden,
                self.head(),
                tokens,
                temperature,
                read=read,
                teacher_hidden=teacher_hidden,
                teacher_head=teacher_head,
            )
        logits = hidden[:, : self.vocab_size]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logprobs = (logits / temperature).log_softmax(-1)
        with torch.no_grad():
            of_teacher = None if teacher_hidden is None else teacher_head.logprobs(teacher_hidden, temperature)
        readings = {} if read is None else read(Vocabulary(logprobs, tokens, of_teacher))
        return TokenScores(logprobs.gather(1, tokens[:, None])[:, 0], readings)

    @torch.no_grad()
    def check_head(self) -> float:
        """Largest difference in nats between our log-probs and those of the model's own logits, on one short row.

        Where it exceeds the tolerance (an output transform we do not know), the plain logits are used from then on.
        """
        length = min(8, self.vocab_size)
        device = self.model.get_output_embeddings().weight.device
        ids = torch.linspace(0, self.vocab_size - 1, length, device=device).long()[None]  # (1, length)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[:, 0] = False
        was_training = self.model.training
        self.model.eval()
        self.uses_own_head = True
        ours = self.token_logprobs(ids, mask).logprobs
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1, : self.vocab_size].float()
        self.model.train(was_training)
        plain = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        difference = float((ours[:, 1:] - plain).abs().max())
        self.uses_own_head = difference <= self._tolerance
        if not self.uses_own_head:
            log.warning(
                "%s transforms its logits in a way we do not know (%.2g nats): the plain logits are used, slower",
                type(self.model).__name__,
                difference,
            )
        return difference

    @torch.no_grad()
    def check_shared_prompts(self) -> float:
        """Largest difference in nats between rows read whole and with their prompts shared, on two short groups.

        Where it exceeds the tolerance, rows are read whole from then on.
        """
        if not self._can_share_prompts:
            return 0.0
        device = self.model.get_output_embeddings().weight.device
        ids = torch.linspace(0, self.vocab_size - 1, 28, device=device).long().view(4, 7)
        ids[1, :3], ids[3, :2] = ids[0, :3], ids[2, :2]  # prompts of three and of two tokens
        lengths = torch.tensor([3, 3, 2, 2], device=device)
        mask = torch.arange(7, device=device) >= lengths[:, None]
        shared = SharedPrompts(torch.tensor([0, 0, 1, 1], device=device), lengths)
        was_training = self.model.training
        self.model.eval()
        whole, once = (self.token_logprobs(ids, mask, shared=form).logprobs for form in (None, shared))
        self.model.train(was_training)
        difference = float((whole - once).abs().max())
        self._can_share_prompts = difference <= self._tolerance
        if not self._can_share_prompts:
            log.warning(
                "%s reads responses differently behind a cached prompt (%.2g nats): every row is read whole, slower",
                type(self.model).__name__,
                difference,
            )
        return difference

    @property
    def _tolerance(self) -> float:
        dtype = self.model.get_output_embeddings().weight.dtype
        return 0.1 if dtype in (torch.bfloat16, torch.float16) else HEAD_TOLERANCE
