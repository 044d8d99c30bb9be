"""What a run leaves for its report: samples of its validations, and the page itself when it ends."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from kdrl_pl.data.prompts import PromptBatch
from kdrl_pl.files import json_line, replacing
from kdrl_pl.records import rollout_rows
from kdrl_pl.report.page import write_report

log = logging.getLogger(__name__)

PROBLEMS = 12  # of each validation set, whose first response is kept


class ValidationSamples(Callback):
    """Keeps the results and a few responses of the first and the newest validation of a training.

    `validation/000040.json` in the run folder is that after 40 rollouts: `{"rollouts": 40, "results": {set: metrics},
    "rows": [...]}`, rows as in rollouts/ with their set as "dataset". All validations sample the same problems with the
    same random numbers, so two of these files show what training changed.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.folder = Path(trainer.strategy.broadcast(trainer.default_root_dir)) / "validation"
        self._rows: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Drop what an interrupted run wrote after its checkpoint."""
        if trainer.is_global_zero:
            for number, file in self._files():
                if number > pl_module.rollouts_done:
                    file.unlink()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._rows = []

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """The first response to each of the first problems, as far as rank 0 has them."""
        if not trainer.is_global_zero or trainer.state.fn != "fit":
            return
        missing = PROBLEMS - sum(row["dataset"] == batch.dataset for row in self._rows)
        samples = len(batch.experience) // max(len(batch), 1)
        chosen = [i * samples for i in range(len(batch)) if not batch.is_padding[i]][: max(missing, 0)]
        if chosen:
            rows = rollout_rows(
                batch.rollout,
                batch.experience[chosen],
                batch.prompts,
                [batch.completions[i] for i in chosen],
                {name: [values[i] for i in chosen] for name, values in batch.reward_parts.items()},
            )
            self._rows += [{"dataset": batch.dataset, **row} for row in rows]

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero or trainer.state.fn != "fit" or not self._rows:
            return
        done = pl_module.rollouts_done
        content = {"rollouts": done, "results": pl_module.evaluation.results, "rows": self._rows}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / f"{done:06d}.json") as file:
                file.write(json_line(content))
            for _, older in self._files()[1:-1]:
                older.unlink()
        except OSError as error:
            log.warning("no samples of this validation: %s", error)

    def _files(self) -> list[tuple[int, Path]]:
        """(rollouts done, file), in order."""
        return sorted((int(file.stem), file) for file in self.folder.glob("*.json") if file.stem.isdecimal())


class ReportWriter(Callback):
    """Makes `report.html` in the run folder when training ends; put it behind the callbacks that write.

    A page that cannot be made is a warning: the run itself has succeeded.
    """

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        try:
            decode = partial(trainer.datamodule.tokenizer.decode, skip_special_tokens=False)
            write_report(Path(trainer.default_root_dir), decode=decode)
        except Exception as error:  # whatever it is, it is no reason to lose a run
            log.warning("no report.html: %s: %s. Try again with: kdrl report RUN", type(error).__name__, error)
