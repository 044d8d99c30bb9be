"""From a command and its arguments to an exit status: quiet imports, one line per user error."""

from __future__ import annotations

import importlib
import logging
import os
import select
import sys
import traceback
import warnings

from kdrl_pl.errors import RunError
from kdrl_pl.text import printable

# What a wrong setting, path or row raises. Anything else is a bug and keeps its traceback.
USER_ERRORS = (RunError, ValueError, OSError)

# Commands that are not in a module of cli/ of their own name.
_MODULES = dict.fromkeys(("fit", "validate", "test", "predict"), "kdrl") | {"serve-teacher": "serve_teacher"}


def run(command: str, arguments: list[str]) -> int:
    """Run `command`; user errors become one message on stderr and status 1.

    Raises:
        SystemExit: the run gave way to a signal: 143 after SIGTERM, 130 after SIGINT.
    """
    quieten()
    try:
        main = importlib.import_module(f"kdrl_pl.cli.{_MODULES.get(command, command)}").main
        quieten_lightning()
        return main(command, arguments) or 0
    except BrokenPipeError as error:  # whoever read what we print has gone, as `head` does
        if not _is_unread(sys.stdout.fileno()):
            report(command, error)
            return 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at the end
        return 141
    except KeyboardInterrupt:  # before training began; see kdrl_pl.preemption
        print(f"kdrl {command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        report(command, error)
        return 1


def _is_unread(descriptor: int) -> bool:
    """Whether it is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def report(command: str, error: BaseException) -> None:
    """Print an error on stderr: a user error as one message, anything else (a bug) with its traceback.

    It may hold what a model wrote, so control characters are written as escapes.
    """
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")  # imported by whoever could have raised it
    kinds = USER_ERRORS if lightning is None else (*USER_ERRORS, lightning.MisconfigurationException)
    if isinstance(error, kinds) and not os.environ.get("KDRL_TRACEBACK"):
        text = f"kdrl {command}: {error}"
    else:
        text = "".join(traceback.format_exception(error)).rstrip()
    print(printable(text), file=sys.stderr, flush=True)


class _Printable(logging.Formatter):
    """A message may quote what a model wrote."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def quieten() -> None:
    """Our own messages, and warnings of other libraries; not their chatter."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # How long threads that wait for each other spin before they sleep. libgomp's own 300,000 turns make small models
    # several times slower on a machine with other work; none at all, as PASSIVE has it, a third slower on idle cores.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("kdrl_pl").setLevel(logging.INFO)
    for message in (
        ".*does not have many workers.*",
        ".*isinstance.treespec, LeafSpec.*",
        "It is recommended to use `self.log",  # our metrics are the same on every rank when they are logged
        ".*Total length of `list` across ranks is zero.*",  # no validation set was asked for
    ):
        warnings.filterwarnings("ignore", message=message)
    try:
        from jsonargparse._deprecated import JsonargparseDeprecationWarning

        warnings.filterwarnings("ignore", category=JsonargparseDeprecationWarning)
    except ImportError:
        pass


def quieten_lightning() -> None:
    """Lightning sets its own level when it is imported, so this comes after."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
