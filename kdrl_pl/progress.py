"""One plain line per rollout and a table after each validation."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback

from kdrl_pl.summary import format_table
from kdrl_pl.text import printable

# metric -> how it is shown, in this order, where the run has it
_SHOWN = {
    "reward/mean": "reward {:.3f}",
    "reward/correct": "correct {:.1%}",
    "rollout/length": "length {:.0f}",
    "rollout/truncated": "cut {:.0%}",
    "teacher/reverse_kl": "KL {:.3f}",
    "train/kd_coef": "beta {:.2g}",
    "train/grad_norm": "grad {:.2g}",
}
_PHASES = ("rollout", "reward", "teacher", "score", "update")


class Progress(Callback):
    """Prints what a person wants to know while the run goes on; rank 0 only."""

    def __init__(self) -> None:
        self._started = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not trainer.is_global_zero:
            return
        metrics = pl_module.logged
        shown = [text.format(metrics[name]) for name, text in _SHOWN.items() if name in metrics]
        seconds = time.perf_counter() - self._started
        print(
            f"rollout {pl_module.rollouts_done:>4}  {'  '.join(shown)}  {seconds:.1f} s: {shares(metrics, seconds)}",
            flush=True,
        )

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        rollouts = pl_module.rollouts_done
        if rollouts:
            when = f" after {rollouts} rollout{'s' if rollouts > 1 else ''}"
        else:
            when = " before training" if trainer.state.fn == "fit" else ""
        what = "test" if trainer.testing else "validation"
        print(printable(f"\n{what}{when}\n{format_table(None, pl_module.evaluation.results)}\n"), flush=True)

    on_test_end = on_validation_end


def shares(metrics: dict[str, float], seconds: float) -> str:
    """Where the seconds of an iteration went, in per cent that add up to 100, and the tokens per second of a phase.

    Args:
        metrics: of one rollout; on several ranks the mean over them.
        seconds: of the whole iteration; what no phase accounts for is "other".
    """
    spent = {phase: metrics.get(f"time/{phase}", 0.0) / seconds for phase in _PHASES}
    spent["other"] = max(1.0 - sum(spent.values()), 0.0)
    words = []
    for phase, share in spent.items():
        if share >= 0.005:
            speed = metrics.get(f"perf/{phase}_tokens_per_s")
            words.append(f"{phase} {share:.0%}" + (f" ({speed:,.0f} tokens/s)" if speed else ""))
    return ", ".join(words)
