"""One torch thread per test process: two runnable threads per core make small models 5-10 times slower."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))  # tests import tiny_run

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _imports_as_in_a_new_process():
    """The command line restricts imports for the rest of its process, which here is that of other tests too."""
    yield
    functions = sys.modules.get("kdrl_pl.rewards.functions")
    if functions is not None:
        functions._allowed = None


@pytest.fixture(autouse=True)
def _no_process_group_is_left():
    """Lightning leaves its own after a run; a process that a later test forks would find it."""
    yield
    if "vllm" in sys.modules:  # the engine of a class of tests has made one, and keeps it
        return
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> tuple[str, str]:
    """Folders of a tiny random student and of a larger tiny random teacher."""
    from tiny_run import write_models

    return write_models(tmp_path_factory.mktemp("models"))
