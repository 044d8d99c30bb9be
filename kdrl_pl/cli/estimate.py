"""`kdrl estimate`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from kdrl_pl.cli.errors import Parser, SettingsError
from kdrl_pl.cli.imports import allow_imports
from kdrl_pl.cli.kdrl import KDRLCLI
from kdrl_pl.data.datamodule import PromptDataModule
from kdrl_pl.estimate.models import without_numbers
from kdrl_pl.estimate.plan import Batch, Plan
from kdrl_pl.estimate.report import report, table
from kdrl_pl.module import KDRLModule
from kdrl_pl.rollout.in_process import InProcessEngine

_RATES = ("tflops", "memory_gb_per_s", "link_gb_per_s")


class Settings(KDRLCLI):
    """The settings of a `kdrl fit`, read and checked; nothing runs and nothing is loaded."""

    def instantiate_classes(self) -> None:
        """All but the Trainer, which would ask for the devices."""
        try:
            self.config_init = self.parser.instantiate_classes(self.config)
        except ValueError as error:
            if "Given value" not in str(error):
                raise
            raise SettingsError(self._explain(error)) from None

    def _run_subcommand(self, subcommand: str) -> None:
        """None runs."""

    def get(self, section: str) -> Any:
        """A section with its objects."""
        return self.config_init["fit"][section]


def main(command: str, arguments: list[str]) -> None:
    """Say what a `kdrl fit` with these settings would take: memory of each phase on each rank, tokens, operations,
    bytes between ranks and on disk. Reads config.json of the models and loads no weights; every prompt is as long as
    data.max_prompt_tokens allows and every response as rollout.sampling.max_tokens does, unless said otherwise."""
    options, rest = _options(arguments)
    plan = plan_of(Settings(KDRLModule, PromptDataModule, command="fit", arguments=allow_imports(rest)), options)
    given = [getattr(options, name) for name in _RATES]
    if any(given) and not all(given):
        raise ValueError(
            "--tflops, --memory-gb-per-s and --link-gb-per-s go together: all of them bound a phase's time"
        )
    told = report(plan, (given[0] * 1e12, given[1] * 1e9, given[2] * 1e9) if all(given) else None)
    print(json.dumps(told, indent=1) if options.json else table(told))


def plan_of(settings: Settings, options: argparse.Namespace) -> Plan:
    """What the settings amount to on one rank.

    Raises:
        ValueError: prompts cannot be divided over the ranks; the models are not there or cannot run without numbers.
    """
    module, data, rollouts = settings.get("model"), settings.get("data"), settings.get("rollout")
    trainer = settings.config["fit"]["trainer"]
    layout, strategy = _layout(trainer["strategy"])
    nodes = options.nodes or int(trainer["num_nodes"] or 1)
    ranks = options.ranks or nodes * _devices(trainer["devices"])
    if ranks % nodes:
        raise ValueError(f"--ranks is {ranks} on {nodes} nodes; expected as many on each")
    if data.prompts_per_rollout % ranks:
        raise ValueError(
            f"data.prompts_per_rollout is {data.prompts_per_rollout} on {ranks} ranks; it must be a multiple of them"
        )
    layout = "single" if ranks == 1 else "ddp" if layout == "single" else layout
    autocast = str(trainer["precision"]) == "bf16-mixed"
    gathered_in = "bfloat16" if layout == "fsdp2" and autocast else None
    prompts, group, engine = data.prompts_per_rollout // ranks, rollouts.group_size, rollouts.engine
    tokens = options.response_tokens or rollouts.sampling.max_tokens
    validated = rollouts.validation_sampling
    validation = None
    if data.configs.get("val"):
        rows = data.val_batch_size * rollouts.validation_samples
        longest = options.response_tokens or validated.max_tokens
        validation = Batch(data.val_batch_size, rollouts.validation_samples, [longest] * rows, validated.is_filtered)
    in_process = isinstance(engine, InProcessEngine)
    return Plan(
        module,
        without_numbers(module, gathered_in),
        Batch(prompts, group, [tokens] * (prompts * group), rollouts.sampling.is_filtered),
        options.prompt_tokens or data.max_prompt_tokens,
        rollouts.sampling,
        validation,
        max_rows=engine.max_rows if in_process else None,
        refill=engine.refill if in_process else True,
        rollout_dtype=engine.dtype if in_process else None,
        in_process=in_process,
        layout=layout,
        ranks=ranks,
        nodes=nodes,
        cpu_offload=bool(strategy.get("cpu_offload")),
        reshard=strategy.get("reshard_after_forward", True) is not False,
        is_cpu=_is_cpu(trainer["accelerator"]),
        autocast=autocast,
    )


def _options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Ours, and the settings of a fit."""
    parser = Parser(
        prog="kdrl estimate",
        description=main.__doc__,
        epilog="Besides these: --config FILE and every setting of kdrl fit.",
        allow_abbrev=False,
    )
    parser.add_argument("--ranks", type=_positive, help="data-parallel processes (default: those of section trainer)")
    parser.add_argument("--nodes", type=_positive, help="machines they stand on")
    parser.add_argument("--prompt-tokens", type=_positive, help="of every prompt (default: data.max_prompt_tokens)")
    parser.add_argument("--response-tokens", type=_positive, help="of every response (default: sampling.max_tokens)")
    parser.add_argument("--tflops", type=float, help="assumed rate of matrix products of a device, 1e12 per second")
    parser.add_argument("--memory-gb-per-s", type=float, help="assumed bandwidth of its memory, 1e9 bytes per second")
    parser.add_argument("--link-gb-per-s", type=float, help="assumed bandwidth of its link to other ranks")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_known_args(arguments)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _layout(strategy: Any) -> tuple[str, dict[str, Any]]:
    """ "single", "ddp" or "fsdp2", and the strategy's arguments."""
    if isinstance(strategy, str):
        name, arguments = strategy, {}
    else:
        name, arguments = strategy["class_path"], dict(strategy.get("init_args") or {})
    if name.startswith("ddp") or "DDP" in name:
        return "ddp", arguments
    if "fsdp2" in name.lower() or "ModelParallel" in name:
        return "fsdp2", arguments
    return "single", arguments


def _devices(devices: Any) -> int:
    if isinstance(devices, list):
        return len(devices)
    if str(devices) in ("auto", "-1"):
        import torch

        return max(torch.cuda.device_count(), 1)
    return len(str(devices).split(",")) if "," in str(devices) else int(devices)


def _is_cpu(accelerator: Any) -> bool:
    if str(accelerator) != "auto":
        return str(accelerator) == "cpu"
    import torch

    return not torch.cuda.is_available()
