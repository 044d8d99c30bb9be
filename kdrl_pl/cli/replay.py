"""`kdrl replay RUN`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrl_pl.cli.errors import Parser
from kdrl_pl.cli.imports import allow_imports

if TYPE_CHECKING:
    from kdrl_pl.replay.tables import Replayed

_COLUMNS = ("loss", "grad_norm", "cosine", "bias", "noise", "variance")
_LEGEND = """\
Against the full-vocabulary gradient f on the same rows under the same weights; samples are groups, norms are over all
trained weights: bias |mean(g - f)| / |mean f|; noise: the bias that an estimator without one would show; variance
mean |g - mean g|^2 / |mean f|^2. coef -: the distillation term alone, at 1; else policy gradient + coef x distillation,
f likewise. loss and grad_norm: of the rollout (of the mean over rollouts)."""


def main(command: str, arguments: list[str]) -> None:
    """Push stored rollouts through every estimator, mask and coefficient, with the student and teacher of the run.

    Prints a table per rollout and one over all of them. What a column says stands in the output.
    """
    options = _options(allow_imports(arguments))

    import torch

    from kdrl_pl.files import write_json_atomic
    from kdrl_pl.losses import Distillation
    from kdrl_pl.replay.gradients import all_variants, replay
    from kdrl_pl.replay.stored import load_rollout, stored_rollouts

    stored = stored_rollouts(options.stored)
    run = _run_of(options.stored)
    config = _config(run, options.config)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    module, student = _module(config, run, options, device)
    variants = all_variants(module.distillation or Distillation(), options.estimators, options.masks)
    sampling = config.get("rollout", {}).get("sampling", {})
    print(f"{len(stored)} stored rollouts, gradients at {student}\n{_LEGEND}", flush=True)
    total, report = None, []
    for name, files in stored.items():
        number, rows = load_rollout(files, sampling.get("temperature") or 1.0, sampling.get("max_tokens"))
        replayed = replay(module, rows.to(device), number, variants)
        coefs = options.coef or _own_coef(module, number)
        report.append(_entry(name, replayed, coefs))
        if total is None:
            total = replayed
        else:
            total.merge(replayed)
    if len(stored) > 1:
        report.append(_entry("all", total, coefs))
    if options.output:
        write_json_atomic(options.output, {"student": str(student), "rollouts": report})
        print(f"\nwrote {options.output}")


def _options(arguments: list[str]) -> argparse.Namespace:
    from kdrl_pl.losses.distillation import ESTIMATORS
    from kdrl_pl.losses.weights import KD_MASKS

    parser = Parser(prog="kdrl replay", description=main.__doc__)
    parser.add_argument("stored", nargs="+", type=Path, help="run folder, or files of its rollouts/ or nonfinite/")
    parser.add_argument("--config", action="append", default=[], help="laid over the run's config.yaml; repeatable")
    parser.add_argument("--checkpoint", type=Path, help="student of this checkpoint (default: the run's newest)")
    parser.add_argument("--student", help="student of this model folder instead of a checkpoint")
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=ESTIMATORS, help="default: all")
    parser.add_argument("--masks", nargs="+", choices=KD_MASKS, default=KD_MASKS, help="default: all")
    parser.add_argument("--coef", nargs="+", type=float, help="coefficients beside the policy gradient (default: "
                        "the run's at each rollout, that of the last one in the table over all)")  # fmt: skip
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--output", type=Path, help="JSON file with the same numbers")
    return parser.parse_args(arguments)


def _run_of(stored: Sequence[Path]) -> Path | None:
    """The run folder that the first path is, or lies in."""
    first = stored[0] if stored[0].is_dir() else stored[0].parent.parent
    return first if (first / "config.yaml").is_file() else None


def _config(run: Path | None, files: Sequence[str]) -> dict[str, Any]:
    from kdrl_pl.cli.configs import read_configs

    own = [] if run is None else [str(run / "config.yaml")]
    if not own and not files:
        raise ValueError("these files lie in no run folder with a config.yaml; name student and teacher with --config")
    return read_configs([*own, *files])


def _module(config: Mapping[str, Any], run: Path | None, options: argparse.Namespace, device: str) -> Any:
    """The loaded module, and what its student is called."""
    from jsonargparse import ArgumentError, ArgumentParser

    from kdrl_pl.checkpoint import find_checkpoint
    from kdrl_pl.cli.errors import SettingsError, explain
    from kdrl_pl.module import KDRLModule
    from kdrl_pl.saved_state import check_adapter
    from kdrl_pl.shards import read_checkpoint, whole

    settings = dict(config.get("model") or {})
    if settings.get("teacher") is None:
        raise ValueError("the run has no teacher to compare with; name one: --config FILE with model.teacher.path")
    if settings.get("distillation", {}) is None:  # a run without distillation is asked what it would have been
        settings |= {"distillation": {}, "reward_shaping": None}
    checkpoint = None
    if options.student is not None:
        settings["student"] = options.student
    elif options.checkpoint is not None or run is not None:
        checkpoint = find_checkpoint(options.checkpoint or run)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(KDRLModule, "model")
    try:
        module = parser.instantiate_classes(parser.parse_object({"model": settings})).model
    except ArgumentError as error:
        raise SettingsError(explain(str(error), parser._option_string_actions)) from None
    module.configure_model()
    if checkpoint is not None:
        content = read_checkpoint(checkpoint)
        check_adapter(module, content)
        module.load_state_dict(whole(content["state_dict"]), strict=module.strict_loading)
    return module.load(device), checkpoint or settings["student"]


def _own_coef(module: Any, rollout: int) -> list[float]:
    """The run's coefficient at a rollout, where it has one beside a policy gradient."""
    coef = module.distillation.coef.value(rollout)
    return [coef] if coef != 0.0 and "pg" in module.objective.terms else []


def _entry(name: str, replayed: Replayed, coefs: Sequence[float]) -> dict[str, Any]:
    """The numbers of one rollout, or of all, which are printed too."""
    rows = replayed.table(coefs)
    _print(f"{name}: {replayed.groups} groups", rows)
    return {"rollout": name, "groups": replayed.groups, "rows": rows}


def _print(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    print(f"\n{title}\n{'estimator':<11}{'mask':<20}{'coef':>9}" + "".join(f"{name:>11}" for name in _COLUMNS))
    for row in rows:
        coef = "-" if row["coef"] is None else f"{row['coef']:.3g}"
        numbers = "".join(f"{row[name]:>11.4g}" for name in _COLUMNS)
        print(f"{row['estimator']:<11}{row['mask']:<20}{coef:>9}{numbers}", flush=True)
