"""Tests of this folder import `contract` beside them; servers and the models they serve live as long as the session."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
from contract import Servers, sure_model


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """A random teacher (128 x 2) with opinions, which ends its responses with 1 or 14."""
    folder = sure_model(tmp_path_factory.mktemp("served") / "model")
    generation = json.loads((folder / "generation_config.json").read_text())
    generation["eos_token_id"] = [1, 14]
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return str(folder)


@pytest.fixture(scope="session")
def servers(tmp_path_factory):
    servers = Servers(tmp_path_factory.mktemp("token") / "token")
    yield servers
    servers.stop()
