"""LightningCLI as all commands use it: our Trainer defaults, the run folder, resume."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from kdrl_pl import fsdp2  # noqa: F401 - makes `--trainer.strategy fsdp2` known
from kdrl_pl.checkpoint import AtomicCheckpointIO, Checkpoints, find_checkpoint, has_checkpoints, run_of
from kdrl_pl.cli.configs import merge_configs
from kdrl_pl.cli.errors import SettingsError, explain
from kdrl_pl.cli.hash_text import keep_hash_text
from kdrl_pl.cli.run import report
from kdrl_pl.cli.secrets import masked, refuse_masked
from kdrl_pl.parallel import check_strategy
from kdrl_pl.preemption import Preemption
from kdrl_pl.rank_watch import RankWatch
from kdrl_pl.run_folder import RunFolder

TRAINER_DEFAULTS = {
    "max_epochs": -1,
    "val_check_interval": 20,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": -1,  # the whole validation before training: `val.before` of the summary
    "log_every_n_steps": 1,
    "use_distributed_sampler": False,
    "inference_mode": False,  # its tensors cannot enter a backward pass
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,  # ours: see kdrl_pl.checkpoint
}
# Trainer setting -> the only sound value, or None for "leave it alone", and what to use instead
_REFUSED = {
    "inference_mode": (False, "tensors of inference_mode cannot enter a backward pass"),
    "use_distributed_sampler": (False, "the data module gives every rank its whole groups"),
    "gradient_clip_val": (None, "use model.gradient_clip"),
    "enable_checkpointing": (False, "checkpoints are whole or absent here: use section checkpoint"),
    "accumulate_grad_batches": (1, "use model.max_tokens_per_micro_batch (and model.groups_per_update)"),
}
_DESCRIPTION = (
    "Besides the settings below: --resume auto|must|never|PATH (fit) goes on with the newest run of that name, or with "
    "the run folder or checkpoint PATH; --resume-anyway does so also with another teacher, tokenizer or data set; "
    "--allow-import NAME lets the config name classes and functions of your module; --dry-run (fit) says what would "
    "run."
)
_PRECISIONS = ("32-true", "32", "bf16-mixed")


class RunCLI(LightningCLI):
    """LightningCLI with a run folder, checkpoints and resume.

    Args:
        model_class: the LightningModule of section `model`.
        data_class: the LightningDataModule of section `data`.
        command: the subcommand.
        arguments: what follows it on the command line.
        instead: called with this object, everything built, instead of the subcommand; nothing is written.
    """

    trainer_defaults_of_command: dict[str, Any] = TRAINER_DEFAULTS

    def __init__(
        self,
        model_class: type,
        data_class: type,
        command: str,
        arguments: list[str],
        instead: Callable[[RunCLI], None] | None = None,
    ) -> None:
        keep_hash_text()
        self.command, self.instead = command, instead
        self.resume_anyway = "--resume-anyway" in arguments
        arguments = [argument for argument in arguments if argument != "--resume-anyway"]
        self.resume = _take_resume(arguments)
        if command != "fit" and self.resume != "never":
            raise ValueError(f"--resume is for kdrl fit; kdrl {command} takes --ckpt_path, a run folder or checkpoint")
        run = _run_of(self.resume)
        if command == "fit" and run is not None and not any(a.startswith(("--config", "-c")) for a in arguments):
            arguments = ["--config", str(run / "config.yaml"), *arguments]
        super().__init__(
            model_class,
            data_class,
            args=[command, *merge_configs(arguments)],
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            parser_kwargs={
                "prog": "kdrl",
                "exit_on_error": False,
                command: {"exit_on_error": False, "description": _DESCRIPTION},
            },
            trainer_defaults=dict(self.trainer_defaults_of_command),
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the one that runs (building a parser takes its time), without the arguments we set ourselves."""
        ours = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders", "weights_only"}
        of_command = {"fit": {"ckpt_path"}, "validate": {"verbose"}, "test": {"verbose"}}
        return {self.command: ours | of_command.get(self.command, {"return_predictions"})}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Errors become one message.

        Raises:
            SettingsError: a setting is wrong.
        """
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise SettingsError(self._explain(error)) from None

    def instantiate_classes(self) -> None:
        """Constructors check their arguments; their errors come without the parser's wrapping."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if "Given value" not in str(error):
                raise
            raise SettingsError(self._explain(error)) from None

    def _explain(self, error: Exception) -> str:
        return explain(str(error), self._parser(self.command)._option_string_actions)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(RunFolder, "run")
        parser.add_lightning_class_args(Checkpoints, "checkpoint")

    def _parse_ckpt_path(self) -> None:
        """Lightning would let hyper-parameters of a checkpoint override the command line; config.yaml is the record."""

    def before_instantiate_classes(self) -> None:
        settings = self.config[self.subcommand]
        refuse_masked(settings)
        _check_trainer(settings["trainer"])
        self.folder, self.checkpoint = self._resolve(settings["run"])
        settings["trainer"]["default_root_dir"] = str(self.folder)

    def _resolve(self, run: Any) -> tuple[Path, Path | None]:
        """Run folder and checkpoint to start from."""
        runs = Path(run["root"]) / run["name"]
        if file := next((path for path in (runs, *runs.parents) if path.is_file()), None):
            raise ValueError(f"run.root is {run['root']}, and {file} is a file; expected a folder, existing or new")
        fresh = _unused(runs / time.strftime("%Y-%m-%d_%H-%M-%S"))
        if self.subcommand != "fit" or self.resume == "never":
            return fresh, None
        if self.resume in ("auto", "must"):
            # A run that was killed before its first checkpoint was whole has none.
            folders = [folder for folder in runs.glob("*") if has_checkpoints(folder)]
            if folders:
                return max(folders), find_checkpoint(max(folders))
            if self.resume == "must":
                raise FileNotFoundError(f"--resume must: no run with checkpoints in {runs}")
            return fresh, None
        checkpoint = find_checkpoint(self.resume)
        if checkpoint.absolute().parent.name != "checkpoints":  # its run is written to, and cut back
            raise ValueError(
                f"--resume {self.resume}: {checkpoint.name} lies in no run folder; put it into checkpoints/ of its run"
            )
        return run_of(checkpoint), checkpoint

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        plugins: list[Any] = [AtomicCheckpointIO()]
        if SLURMEnvironment.detect():
            plugins.append(SLURMEnvironment(auto_requeue=False))
        settings = self._get(self.config_init, "trainer")
        given = settings["plugins"] or []
        logger = self._logger() if settings["logger"] in (None, True) else settings["logger"]
        extra = {"plugins": [*(given if isinstance(given, list) else [given]), *plugins], "logger": logger}
        try:
            trainer: Any = super().instantiate_trainer(**extra, **kwargs)
        except MisconfigurationException as error:
            where = ", ".join(f"{name} {settings[name]}" for name in ("accelerator", "devices", "strategy"))
            cure = "; auto takes what is there" if "backend" in str(error) else ""
            raise SettingsError(f"section trainer ({where}): {error}{cure}") from None
        trainer.callbacks.insert(0, RankWatch(partial(report, self.command)))
        trainer.callbacks.append(Preemption())
        return trainer

    def _logger(self) -> Any:
        """TensorBoard in the run folder, when it is installed; metrics.jsonl is written always."""
        if self.subcommand != "fit" or self.instead is not None:
            return False
        try:
            import tensorboard  # noqa: F401
        except ImportError:
            return False
        from lightning.pytorch.loggers import TensorBoardLogger

        return TensorBoardLogger(save_dir=self.folder, name="", version="tensorboard")

    def _run_subcommand(self, subcommand: str) -> None:
        if self.instead is not None:
            self.instead(self)
        else:
            super()._run_subcommand(subcommand)

    def before_fit(self) -> None:
        if self.checkpoint is not None:
            self.trainer.num_sanity_val_steps = 0  # the validation before training is in the checkpoint
            self.model.resume_anyway = self.datamodule.resume_anyway = self.resume_anyway
        if self.trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.checkpoint is None:
                self._save_config()
            else:  # later, because a checkpoint that does not fit these settings is refused and its run stays as it was
                trainer: Any = self.trainer
                trainer.callbacks.append(LambdaCallback(on_fit_start=lambda *_: self._save_config()))
            doing = f"resuming {self.checkpoint}" if self.checkpoint else "training"
            print(f"{doing} in {self.folder}", flush=True)

    def _save_config(self) -> None:
        settings = masked(self.config[self.subcommand])
        self._parser(self.subcommand).save(settings, self.folder / "config.yaml", overwrite=True)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["weights_only"] = True
        if subcommand == "fit":
            kwargs["ckpt_path"] = self.checkpoint
        elif kwargs.get("ckpt_path"):
            kwargs["ckpt_path"] = find_checkpoint(kwargs["ckpt_path"], "best")
        if subcommand == "predict":
            kwargs["return_predictions"] = False
        elif subcommand in ("validate", "test"):
            kwargs["verbose"] = False
        return kwargs

    def after_fit(self) -> None:
        if self.trainer.is_global_zero:
            print(f"run folder: {self.folder}", flush=True)


def _unused(folder: Path) -> Path:
    """`folder`, or with a number behind it where a run of the same second has it."""
    number = 1
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{folder.name.partition('.')[0]}.{number}")
    return folder


def _take_resume(arguments: list[str]) -> str:
    """Removes `--resume VALUE` from `arguments` and returns the value; "never" without it."""
    for i, argument in enumerate(arguments):
        if argument == "--resume":
            if i + 1 == len(arguments):
                raise ValueError("--resume needs auto, must, never or the path of a run folder or checkpoint")
            value = arguments[i + 1]
            del arguments[i : i + 2]
            return value
        if argument.startswith("--resume="):
            del arguments[i]
            return argument.partition("=")[2]
    return "never"


def _run_of(resume: str) -> Path | None:
    """The run folder that `--resume PATH` names; None for the words auto, must and never."""
    if resume in ("auto", "must", "never"):
        return None
    path = Path(resume)
    if not path.exists():
        raise FileNotFoundError(
            f"--resume {resume}: no such run folder or checkpoint; give one, or auto, must or never"
        )
    return run_of(path)


def _check_trainer(trainer: Any) -> None:
    for name, (sound, cure) in _REFUSED.items():
        if trainer[name] != sound:
            raise ValueError(f"trainer.{name} is {trainer[name]}; it must stay {sound}: {cure}")
    strategy = trainer["strategy"]
    check_strategy(strategy if isinstance(strategy, str) else strategy["class_path"].rpartition(".")[2])
    interval = trainer["val_check_interval"]
    if isinstance(interval, int | float) and interval <= 0:
        raise ValueError(f"trainer.val_check_interval is {interval}; expected rollouts between validations, at least 1")
    precision = trainer["precision"]
    if precision is not None and str(precision) not in _PRECISIONS:
        raise ValueError(
            f"trainer.precision is {precision}; expected 32-true or bf16-mixed. In bf16-true, weights at small "
            "learning rates never move and log-probs are rounded; fp16 needs a loss scale"
        )
