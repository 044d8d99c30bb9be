"""A run as lines of text, for files, pipes and terminals that can only scroll."""

from __future__ import annotations

from collections.abc import Mapping

from kdrl_pl.phases import PHASES

# metric -> how it is shown, in this order, where the run has it
SHOWN = {
    "reward/mean": "reward {:.3f}",
    "reward/correct": "correct {:.1%}",
    "rollout/length": "length {:.0f}",
    "rollout/truncated": "cut {:.0%}",
    "teacher/reverse_kl": "KL {:.3f}",
    "train/kd_coef": "beta {:.2g}",
    "train/grad_norm": "grad {:.2g}",
}


def rollout_line(rollouts: int, metrics: Mapping[str, float], seconds: float) -> str:
    """One finished rollout.

    Args:
        rollouts: done so far.
        metrics: of the last one.
        seconds: that it took.
    """
    words = [text.format(metrics[name]) for name, text in SHOWN.items() if name in metrics]
    return f"rollout {rollouts:>4}  {'  '.join(words)}  {seconds:.1f} s: {shares(metrics, seconds)}"


def shares(metrics: Mapping[str, float], seconds: float) -> str:
    """Where the seconds of an iteration went, in per cent that add up to 100, and the tokens per second of a phase.

    Args:
        metrics: of one rollout; on several ranks the mean over them.
        seconds: of the whole iteration; what no phase accounts for is "other".
    """
    spent = {phase: metrics.get(f"time/{phase}", 0.0) / seconds for phase in PHASES}
    spent["other"] = max(1.0 - sum(spent.values()), 0.0)
    words = []
    for phase, share in spent.items():
        if share >= 0.005:
            speed = metrics.get(f"perf/{phase}_tokens_per_s")
            words.append(f"{phase} {share:.0%}" + (f" ({speed:,.0f} tokens/s)" if speed else ""))
    return ", ".join(words)
