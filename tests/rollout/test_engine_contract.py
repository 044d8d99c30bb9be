"""The in-process engine keeps the contract of all engines; vLLM's tests are in test_vllm_engine.py."""

import pytest
from engine_contract import EngineContract

from kdrl_pl.rollout.in_process import InProcessEngine


class TestInProcess(EngineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls):
        return InProcessEngine()


class TestInProcessBfloat16(EngineContract):
    mean, largest = 0.02, 0.3

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls):
        return InProcessEngine(dtype="bfloat16")
