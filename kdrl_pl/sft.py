"""SFTModule: supervised fine-tuning on worked responses, the off-policy baseline and the maker of teachers."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from kdrl_pl.models.adapter_files import adapter_state, keep_trained
from kdrl_pl.models.adapters import Lora
from kdrl_pl.models.language_model import LanguageModel
from kdrl_pl.optim import clip_gradients, default_optimizer, make_optimizer, set_learning_rate
from kdrl_pl.parallel import all_reduce_sum, check_strategy, world_size
from kdrl_pl.schedules import Schedule, as_schedule


class SFTModule(LightningModule):
    """Maximises the log-likelihood of responses: `-1/N * sum of logprobs` over the N response tokens of a batch.

    N is counted over all ranks, so every token counts the same whatever the padding and the number of ranks.

    Args:
        student: Hugging Face folder or hub name of the model to train.
        from_scratch: start from random weights of that folder's config.json.
        adapter: trains a low-rank adapter instead of the student's weights (LoRA); null trains the weights.
        optimizer: optimizer of the weights, by class_path.
        lr_schedule: what the learning rate is multiplied by, as a schedule over optimizer steps.
        gradient_clip: largest norm of the gradient; null does not clip.
        dtype: of the master weights; use the Trainer's precision bf16-mixed to compute in bf16.
        attn_implementation: attention: "sdpa", "eager", "flash_attention_2"; null is transformers' choice.
        gradient_checkpointing: recompute activations in the backward pass.

    Raises:
        ValueError: from_scratch and an adapter.
    """

    def __init__(
        self,
        student: str,
        from_scratch: bool = False,
        adapter: Lora | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_schedule: Schedule | float = 1.0,
        gradient_clip: float | None = 1.0,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if from_scratch and adapter is not None:
            raise ValueError(
                "model.from_scratch starts from random weights, which model.adapter would leave as they are; drop one"
            )
        self.automatic_optimization = False
        self.student_path, self.from_scratch, self.adapter = student, from_scratch, adapter
        self.make_optimizer, self.lr_schedule, self.gradient_clip = optimizer, as_schedule(lr_schedule), gradient_clip
        self.dtype_name, self.attn_implementation = dtype, attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.student: LanguageModel | None = None
        self._validation = torch.zeros(2, dtype=torch.float64)  # nats and tokens over all sets

    @property
    def iterations_done(self) -> int:
        """Optimizer steps so far: what checkpoints are named after."""
        return self.global_step

    def setup(self, stage: str) -> None:
        check_strategy(type(self.trainer.strategy).__name__, self.adapter is not None)

    def configure_model(self) -> None:
        """Lightning's hook: load the student, once."""
        if self.student is None:
            self.student = LanguageModel.load(
                self.student_path,
                self.dtype_name,
                attn_implementation=self.attn_implementation,
                gradient_checkpointing=self.gradient_checkpointing,
                from_scratch=self.from_scratch,
                adapter=self.adapter,
            ).train()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """This rank's share of the mean negative log-likelihood per response token, in nats; shape ().

        Args:
            batch: input_ids (B, T) int64 and response_mask (B, T) bool, padding on the right.
        """
        tokens = all_reduce_sum(batch["response_mask"].sum()).clamp(min=1)
        return -self.student.token_logprobs(batch["input_ids"], batch["response_mask"]).logprobs.sum() / tokens

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        set_learning_rate(optimizer, self.lr_schedule, self.global_step)
        loss = self.loss(batch)
        self.manual_backward(loss * world_size())
        norm = clip_gradients(self.student, self.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        self.log("train/loss", all_reduce_sum(loss), batch_size=1)
        self.log("train/grad_norm", norm, batch_size=1)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        tokens = batch["response_mask"].sum()
        total = all_reduce_sum(torch.stack([self.loss(batch).double() * all_reduce_sum(tokens), tokens.double()]))
        self._validation = self._validation + total

    def on_validation_epoch_start(self) -> None:
        self._validation = torch.zeros(2, dtype=torch.float64, device=self.device)

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", (self._validation[0] / self._validation[1].clamp(min=1)).float(), batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Of an adapted student the adapter alone."""
        if self.adapter is not None:
            checkpoint["adapter"] = adapter_state(self.adapter, self.student_path, self.dtype_name)
            keep_trained(self, checkpoint)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.make_optimizer, self.student)
