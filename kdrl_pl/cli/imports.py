"""What a configuration may import: jsonargparse lets `class_path` name any Python object, and a config is data."""

from __future__ import annotations

from jsonargparse import set_parsing_settings

from kdrl_pl.rewards.functions import restrict_imports

ALLOWED = (
    "kdrl_pl",
    "torch.optim",
    "bitsandbytes.optim",
    "lightning.pytorch",
)


def allow_imports(arguments: list[str]) -> list[str]:
    """Restrict class paths to our own and our libraries' classes, plus what `--allow-import NAME` names.

    Returns:
        the arguments without `--allow-import`.

    Raises:
        ValueError: `--allow-import` without the name of a module.
    """
    names, rest = [], []
    waiting = False
    for argument in arguments:
        if waiting:
            names.append(argument)
            waiting = False
        elif argument == "--allow-import":
            waiting = True
        elif argument.startswith("--allow-import="):
            names.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    if waiting:
        names.append("")
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(
                f"--allow-import got {name!r}; expected the name of a module, for example --allow-import my_rewards"
            )
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=[*ALLOWED, *names],
        instantiate_subclass_spec_in_any=False,
    )
    restrict_imports(names)  # none of ours or of theirs is a reward function
    return rest
