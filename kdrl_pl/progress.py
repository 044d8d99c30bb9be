"""What a person sees of a run while it goes on: a live display on a terminal, else one plain line per rollout."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

from kdrl_pl import phases
from kdrl_pl.summary import format_table
from kdrl_pl.text import printable
from kdrl_pl.view.completions import shown
from kdrl_pl.view.plain import rollout_line
from kdrl_pl.view.state import RunState

if TYPE_CHECKING:
    from kdrl_pl.view.live import LiveView

KINDS = ("auto", "rich", "plain", "quiet")


class Progress(Callback):
    """Shows what a person wants to know while the run goes on; rank 0 only.

    Args:
        kind: "rich" draws a live display, "plain" prints one line per rollout, "quiet" prints only warnings and
            alarms; "auto" is rich on a terminal that can do it and plain everywhere else (files, pipes, CI, TERM=dumb).
        completions_every: rollouts between two looks at completions (best, worst, one at random) in the live display;
            0 shows none.
    """

    def __init__(self, kind: str = "auto", completions_every: int = 10) -> None:
        if kind not in KINDS:
            raise ValueError(f"view.kind is {kind!r}; expected {', '.join(KINDS)}")
        if completions_every < 0:
            raise ValueError(f"view.completions_every is {completions_every}; expected rollouts, or 0 for none")
        self.kind, self.completions_every = kind, completions_every
        self._started = 0.0
        self._state = RunState()
        self._view: LiveView | None = None
        self._is_quiet = kind == "quiet"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._is_quiet = self.kind == "quiet" or not trainer.is_global_zero
        if self._is_quiet or not _draws(self.kind, os.environ):
            return
        from kdrl_pl.view.live import LiveView

        run = next((c for c in trainer.callbacks if hasattr(c, "max_rollouts")), None)  # RunFolder
        name, total = (run.name, run.max_rollouts) if run is not None else ("", None)
        self._state = RunState(name, total if stage == "fit" else None)
        self._view = LiveView(self._state)
        atexit.register(self._end)

    def _begin(self) -> None:
        if self._view is not None:
            phases.listen(self._state)
            self._view.start()

    def _end(self) -> None:
        phases.listen(None)
        if self._view is not None:
            self._view.stop()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._state.start(pl_module.rollouts_done)
        self._begin()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._is_quiet:
            return
        metrics, done = pl_module.logged, pl_module.rollouts_done
        if self._view is None:
            print(rollout_line(done, metrics, time.perf_counter() - self._started), flush=True)
            return
        self._state.finish(done, metrics)
        if self.completions_every and done % self.completions_every == 0:
            self._view.show(batch.rollout, shown(batch))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._state.evaluate(_validation(trainer, pl_module))
        self._begin()

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._state.doing = f"{_validation(trainer, pl_module)}: {batch.dataset}, batch {batch_idx + 1}"

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._state.evaluate("")
        if not self._is_quiet:
            table = format_table(None, pl_module.evaluation.results)
            print(printable(f"\n{_validation(trainer, pl_module)}\n{table}\n"), flush=True)

    on_test_start, on_test_end = on_validation_start, on_validation_end
    on_predict_start = on_validation_start
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._end()


def _draws(kind: str, environment: Mapping[str, str]) -> bool:
    """Whether stdout is a terminal on which lines can be drawn anew, and that is wanted."""
    can = sys.stdout.isatty() and (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    if kind == "rich":
        return can
    return (
        kind == "auto"
        and can
        and environment.get("TERM", "dumb") not in ("dumb", "unknown")
        and not (environment.get("CI"))
    )


def _validation(trainer: Any, pl_module: Any) -> str:
    """What is evaluated and when."""
    rollouts = pl_module.rollouts_done
    if rollouts:
        when = f" after {rollouts} rollout{'s' if rollouts > 1 else ''}"
    else:
        when = " before training" if trainer.state.fn == "fit" else ""
    what = "test" if trainer.testing else "prediction" if trainer.predicting else "validation"
    return f"{what}{when}"
