"""`kdrl export RUN`."""

from __future__ import annotations

from pathlib import Path

from kdrl_pl.cli.errors import Parser


def main(command: str, arguments: list[str]) -> None:
    """Write the best (or last) checkpoint of a run as a Hugging Face folder."""
    parser = Parser(prog="kdrl export", description=main.__doc__)
    parser.add_argument("run", type=Path, help="run folder, or one checkpoint of it")
    parser.add_argument("--last", action="store_true", help="the last checkpoint instead of the best")
    parser.add_argument("--output", type=Path, help="folder to write (default: checkpoints/<name of the run>)")
    parser.add_argument("--adapter", action="store_true", help="of a LoRA run the adapter alone, as a peft folder, "
                        "instead of a whole model")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights written")
    options = parser.parse_args(arguments)

    from kdrl_pl.checkpoint import find_checkpoint, run_of
    from kdrl_pl.cli.configs import read_configs
    from kdrl_pl.export import export_checkpoint
    from kdrl_pl.model_card import write_model_card
    from kdrl_pl.run_folder import check_name

    if not options.run.exists():
        raise FileNotFoundError(f"no run folder or checkpoint at {options.run}")
    folder = run_of(options.run)
    try:
        checkpoint = find_checkpoint(options.run, "last" if options.last else "best")
    except FileNotFoundError:
        if options.last:
            raise
        checkpoint = find_checkpoint(options.run, "last")  # a run without validation has no best
    config = read_configs([str(folder / "config.yaml")])
    try:
        name, student = config["run"]["name"], config["model"]["student"]
    except (KeyError, TypeError):
        raise ValueError(f"{folder}/config.yaml lacks run.name or model.student; expected a run folder") from None
    output = options.output or Path("checkpoints") / check_name(name)
    export_checkpoint(checkpoint, student, output, options.dtype, options.adapter)
    write_model_card(folder, checkpoint, output, options.adapter)
    print(f"exported {checkpoint} to {output}")
