"""Preemption: a run that is told to stop gives up the rollout it is in, saves, and exits with the signal's status."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from kdrl_pl import signals
from kdrl_pl.errors import GivenUp
from kdrl_pl.parallel import give_way


class Preemption(Callback):
    """SIGTERM and SIGINT end a run within one token step of a rollout, or after the updates they arrive in.

    The checkpoint it leaves is the boundary before the interrupted rollout, so that a resumed run equals one that was
    never interrupted. It makes no difference which rank gets the signal (with `RankWatch`, without it the others finish
    their rollouts first). The exit status is 143 for SIGTERM and 130 for SIGINT; a second SIGINT ends at once, without
    a checkpoint. A rank that cannot go on, because its teacher is gone, stops the run in the same way, with its error.
    Put it behind the callbacks that write: it speaks up last in `on_train_batch_end`.
    """

    def _catch(self, trainer: Any, pl_module: Any) -> None:
        """Lightning puts up handlers of its own after `setup`; they take part in a broadcast whatever rank 0 is at."""
        signals.catch()

    on_sanity_check_start = on_train_start = on_validation_start = on_test_start = on_predict_start = _catch

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        give_way(pl_module.device)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Save, on every rank at once."""
        if not isinstance(exception, signals.Preempted | GivenUp):
            return
        checkpoints = next((c for c in trainer.callbacks if hasattr(c, "save_last")), None)
        if trainer.state.fn != "fit" or trainer.sanity_checking or checkpoints is None:
            told = "nothing to save"
        else:
            told = f"saved {checkpoints.save_last(trainer, pl_module)}"
        if trainer.is_global_zero:
            by = f" by {exception.name}" if isinstance(exception, signals.Preempted) else ""
            print(f"stopped{by}: {told}", flush=True)
        signals.forget()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        signals.forget()
