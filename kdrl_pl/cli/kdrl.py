"""`kdrl fit | validate | test | predict`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser

from kdrl_pl.cli.imports import allow_imports
from kdrl_pl.cli.lightning import RunCLI
from kdrl_pl.data.datamodule import PromptDataModule
from kdrl_pl.data.prompts import PromptBatch
from kdrl_pl.files import JSONLines
from kdrl_pl.module import KDRLModule
from kdrl_pl.progress import Progress
from kdrl_pl.records import rollout_rows
from kdrl_pl.report.callback import ReportWriter, ValidationSamples
from kdrl_pl.rollout.callback import RolloutCallback
from kdrl_pl.view.closing import closing, say


class KDRLCLI(RunCLI):
    """Sections model, data, rollout, trainer, run, checkpoint, view."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Progress, "view")  # first, so that it times the whole iteration
        super().add_arguments_to_parser(parser)
        parser.add_lightning_class_args(RolloutCallback, "rollout")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        trainer: Any = super().instantiate_trainer(**kwargs)
        trainer.callbacks += [ValidationSamples(), ReportWriter()]
        return trainer

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_argument("--output", type=str, default="predictions.jsonl", help="JSONL file to write")
        return parser

    def after_fit(self) -> None:
        if self.trainer.is_global_zero:
            say(closing(self.folder))

    def before_predict(self) -> None:
        trainer: Any = self.trainer
        trainer.callbacks.append(PredictionWriter(self.config["predict"]["output"]))


class PredictionWriter(Callback):
    """Writes prompt, completion, reward, correct and log-probs of every response as JSONL; ranks > 0 beside rank 0.

    Args:
        output: the file; an existing one is replaced.
    """

    def __init__(self, output: str) -> None:
        self.output = Path(output)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank:
            self.output = self.output.with_suffix(f".rank{trainer.global_rank}{self.output.suffix}")
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.unlink(missing_ok=True)
        self.rows = JSONLines(self.output)
        self.counts = [0, 0]

    def on_predict_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        samples = len(batch.experience) // len(batch)
        rows = list(rollout_rows(batch.rollout, batch.experience, batch.prompts, batch.completions, batch.reward_parts))
        rows = [{"dataset": batch.dataset, **row} for i, row in enumerate(rows) if not batch.is_padding[i // samples]]
        self.rows.append(*rows)
        self.counts[0] += len(rows)
        self.counts[1] += sum(row["correct"] for row in rows)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        print(f"wrote {self.counts[0]} responses, {self.counts[1]} correct, to {self.output}", flush=True)


def main(command: str, arguments: list[str]) -> None:
    """Parse and run one of the four commands.

    Raises:
        ValueError: `--dry-run` was given to another command than fit.
    """
    instead = None
    if "--dry-run" in arguments:
        if command != "fit":
            raise ValueError(f"--dry-run is for kdrl fit; kdrl {command} trains nothing")
        arguments = [argument for argument in arguments if argument != "--dry-run"]
        from kdrl_pl.cli.dry_run import dry_run

        instead = dry_run
    sys.path.insert(0, "")  # a user's own module beside the config, once --allow-import names it
    KDRLCLI(KDRLModule, PromptDataModule, command=command, arguments=allow_imports(arguments), instead=instead)
