"""What a run leaves on disk beside its checkpoints: metrics, alarms, rollouts, environment, summary."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from kdrl_pl.alarms import Alarms
from kdrl_pl.data.prompts import PromptBatch
from kdrl_pl.environment import environment
from kdrl_pl.files import JSONLines, json_line, replacing, write_json_atomic
from kdrl_pl.records import NonFiniteRollouts, RolloutFiles, rollout_rows
from kdrl_pl.summary import build_summary

log = logging.getLogger(__name__)


def check_name(name: str) -> str:
    """The name of a run, once it is sure that it is that of one folder.

    Raises:
        ValueError: it could lead elsewhere.
    """
    if not isinstance(name, str) or not name.isprintable() or not name or name[0] == "." or set(name) & {"/", "\\"}:
        raise ValueError(f"run.name is {name!r}; expected a plain folder name, it stands below run.root")
    return name


class RunFolder(Callback):
    """Writes `metrics.jsonl`, `alarms.jsonl`, `rollouts/`, `env.json` and `summary.json` into a training's run folder.

    `kdrl validate` and `kdrl test` leave `validation.json` and `test.json` in a folder of their own.

    Args:
        name: of the run: its folder is `<root>/<name>/<time it was started>`.
        root: folder of all runs.
        keep_rollouts: newest rollouts whose rows stay on disk; 0 writes none, -1 keeps all.
        max_rollouts: rollouts of the whole run, resumed ones counted; null leaves the end to trainer.max_epochs.
    """

    def __init__(
        self, name: str = "kdrl", root: str = "runs", keep_rollouts: int = 20, max_rollouts: int | None = None
    ) -> None:
        check_name(name)
        if keep_rollouts < -1:
            raise ValueError(f"run.keep_rollouts is {keep_rollouts}; expected a number, 0 for none or -1 for all")
        if max_rollouts is not None and max_rollouts < 1:
            raise ValueError(f"run.max_rollouts is {max_rollouts}; expected at least 1, or null")
        self.name, self.root, self.keep_rollouts, self.max_rollouts = name, root, keep_rollouts, max_rollouts
        self.before: dict[str, dict[str, float]] | None = None
        self.after: dict[str, dict[str, float]] = {}
        self.validations = 0
        self.seconds = 0.0
        self._started = 0.0
        self._rollout_started = 0.0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.folder = Path(trainer.strategy.broadcast(trainer.default_root_dir))
        self.metrics = JSONLines(self.folder / "metrics.jsonl")
        self.alarms = Alarms()
        self.rollouts = RolloutFiles(
            self.folder / "rollouts", self.keep_rollouts, trainer.global_rank, trainer.world_size
        )

        if stage == "fit":
            pl_module.nonfinite = NonFiniteRollouts(self.folder / "nonfinite", trainer.global_rank)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Cut back what an interrupted run wrote after its checkpoint."""
        self._started = time.perf_counter()
        self.rollouts.truncate_after(pl_module.rollouts_done)
        if trainer.is_global_zero:
            self.metrics.truncate_after("rollout", pl_module.rollouts_done)
            self.metrics.truncate_after("validation", self.validations)
            write_json_atomic(self.folder / "env.json", environment())
            self._raise_again()

    def _raise_again(self) -> None:
        """The alarms of the part of the run that is resumed, quietly: they follow from its metrics."""
        with replacing(self.folder / "alarms.jsonl") as file:
            file.writelines(json_line(a.row()) for row in self.metrics.read() for a in self.alarms.observe(row))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._stop_when_done(trainer, pl_module)

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        self.before = pl_module.evaluation.results

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: PromptBatch, batch_idx: int) -> None:
        self._rollout_started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        if self.keep_rollouts:
            rows = rollout_rows(batch.rollout, batch.experience, batch.prompts, batch.completions, batch.reward_parts)
            self.rollouts.write(batch.rollout, rows)
        row = {**pl_module.logged, "time/step": time.perf_counter() - self._rollout_started}
        self._append(trainer, {"rollout": batch.rollout, "global_step": trainer.global_step, **row})
        self._stop_when_done(trainer, pl_module)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            write_json_atomic(self.folder / "test.json", pl_module.evaluation.results)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "validate" and trainer.is_global_zero:
            write_json_atomic(self.folder / "validation.json", pl_module.evaluation.results)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.after = pl_module.evaluation.results
            numbers = {"rollout": pl_module.rollouts_done - 1, "validation": self.validations}
            self.validations += 1
            self._append(trainer, {**numbers, "global_step": trainer.global_step, **pl_module.logged})

    def _append(self, trainer: Trainer, row: dict[str, Any]) -> None:
        if not trainer.is_global_zero:
            return
        self.metrics.append(row)
        for alarm in self.alarms.observe(row):
            JSONLines(self.folder / "alarms.jsonl").append(alarm.row())
            log.warning("%s (docs/troubleshooting.md)", alarm)

    def _stop_when_done(self, trainer: Any, pl_module: Any) -> None:
        if self.max_rollouts is not None and pl_module.rollouts_done >= self.max_rollouts:
            trainer.should_stop = True  # Lightning then validates once more and ends the run

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds, self._started = self._seconds(), 0.0
        if trainer.is_global_zero:
            summary = build_summary(
                self.before,
                self.after,
                seconds=self.seconds,
                tokens=pl_module.sampled_tokens,
                rollouts=pl_module.rollouts_done,
            )
            write_json_atomic(self.folder / "summary.json", summary)

    def _seconds(self) -> float:
        """Of training so far, earlier parts of a resumed run counted."""
        return self.seconds + (time.perf_counter() - self._started if self._started else 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {
            "before": self.before,
            "after": self.after,
            "validations": self.validations,
            "seconds": self._seconds(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before, self.after = state_dict["before"], state_dict["after"]
        self.validations, self.seconds = state_dict["validations"], state_dict["seconds"]
