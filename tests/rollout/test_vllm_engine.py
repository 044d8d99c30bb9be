"""vLLM in the training process. Needs an environment with vLLM: `make test-vllm`; what needs none is at the end."""

import contextlib
import copy
import json
from pathlib import Path

import pytest
import torch
from engine_contract import LONG, STOP, TWO_RANKS, EngineContract, contract_student, run_two_ranks

from kdrl_pl.__main__ import main
from kdrl_pl.errors import RunError
from kdrl_pl.rollout import vllm_engine
from kdrl_pl.rollout.engine import RolloutEngine
from kdrl_pl.rollout.sampling import Sampling
from kdrl_pl.rollout.vllm_engine import VLLMEngine

ROOT = Path(__file__).parents[2]
SMALL = {"kv_cache_memory_bytes": 2**26}


class Contract(EngineContract):
    """Skipped as a whole where vLLM is not installed."""

    dtype = "float32"

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls):
        pytest.importorskip("vllm")
        return VLLMEngine(dtype=cls.dtype, engine_args=SMALL)


@pytest.mark.vllm
class TestFloat32(Contract):
    def test_the_callers_autocast_is_not_used(self, engine, student):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            engine.sync(student, [STOP])
            done = self.roll(engine)
        self.check(student, done)

    def test_an_adapter_is_added_to_its_base(self, engine, student):
        from kdrl_pl.models.adapters import Lora, adapter_weights

        plain = self.roll(engine)
        adapted = copy.deepcopy(student)
        Lora(rank=4, target_modules="all-linear").wrap(adapted.model)
        with torch.no_grad():
            for name, weight in adapter_weights(adapted.model).items():
                weight += 0.2 * ("lora_B" in name)
        engine.sync(adapted, [STOP])
        done = self.roll(engine)
        self.check(adapted, done)
        assert done.token_ids != plain.token_ids

    def test_rows_do_not_depend_on_the_others(self, engine):
        # Red: seeds by place in the batch. Logits differ in their last bits, which a token in a thousand may notice.
        whole = self.roll(engine, group_size=4)
        few = self.roll(engine, group_size=4, prompts=[[5, 6, 7, 8, 9, 10, 11, 12, 13]])
        assert few.token_ids == whole.token_ids[:4]

    def test_too_long_requests_are_refused(self, engine):
        with pytest.raises(ValueError, match=r"need 600 tokens, but vLLM has room for 512; raise rollout\.engine\.max"):
            self.roll(engine, [LONG], max_tokens=300)

    def test_another_model_is_refused(self, engine, student):
        other = copy.deepcopy(student)
        other.model.config.num_hidden_layers = 1
        with pytest.raises(ValueError, match="built for another model"):
            engine.sync(other, [STOP])

    def test_sleep_needs_a_gpu(self, student):
        with pytest.raises(ValueError, match="no GPU memory to give back"):
            VLLMEngine(sleep=True).sync(student, [STOP])


@pytest.mark.vllm
class TestBfloat16(Contract):
    """With a tied head, whose copy in vLLM's CPU build must not stay as it was."""

    mean, largest = 0.02, 0.3
    dtype = "bfloat16"

    @pytest.fixture(scope="class")
    @classmethod
    def student(cls):
        return contract_student(tied=True)


@pytest.mark.vllm
def test_a_model_that_vllm_computes_otherwise_is_refused():
    """Here: a head that is scaled in a way of which its config knows nothing."""
    pytest.importorskip("vllm")
    student = contract_student()
    student.model.lm_head.register_forward_hook(lambda module, inputs, output: 3 * output)
    with pytest.raises(RunError, match=r"lie .* nats from those of Qwen2ForCausalLM \(limit for float32: 0\.01\)"):
        VLLMEngine("float32", engine_args=SMALL).sync(student, [STOP])


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestAsleepOnAGpu(EngineContract):
    """Between two rollouts the GPU belongs to the update."""

    mean, largest = 0.02, 0.3

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls):
        pytest.importorskip("vllm")
        return VLLMEngine(dtype="bfloat16", gpu_memory_utilization=0.2, enforce_eager=True, sleep=True)

    @pytest.fixture(scope="class")
    @classmethod
    def student(cls):
        return contract_student().cuda()

    @pytest.fixture(autouse=True)
    def _awake(self, engine, student, monkeypatch):
        """Each call of the contract's tests that follows another one needs the weights again."""
        generate = engine.generate

        def after_sync(*arguments):
            engine.sync(student, engine._stop_token_ids)
            return generate(*arguments)

        monkeypatch.setattr(engine, "generate", after_sync)

    def test_memory_comes_back(self, engine, student):
        engine.sync(student, [STOP])
        awake = torch.cuda.mem_get_info()[0]
        self.roll(engine)
        assert torch.cuda.mem_get_info()[0] > awake + 2**30
        with pytest.raises(ValueError, match="call sync"):
            VLLMEngine.generate(engine, [[3]], 1, Sampling(max_tokens=1), [1])


def quickstart(folder, *options):
    """summary.json and the rows of metrics.jsonl of a quick start with vLLM."""
    files = ["--config", "configs/quickstart.yaml", "--config", "configs/rollout/vllm.yaml"]
    small = f"--rollout.engine.init_args.engine_args={json.dumps(SMALL)}"
    assert main(["fit", *files, small, f"--run.root={folder}", "--trainer.logger=false", *options]) == 0
    (run,) = folder.glob("quickstart/*")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return json.loads((run / "summary.json").read_text()), [row for row in rows if "train/loss" in row]


@pytest.mark.vllm
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_sampler_check_passes_in_a_run(dtype, tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    monkeypatch.chdir(ROOT)
    options = [f"--rollout.engine.init_args.dtype={dtype}", "--run.max_rollouts=2", "--data.val.addition.size=16"]
    _, rows = quickstart(tmp_path, *options)
    assert len(rows) == 2
    limit = {"float32": 1e-4, "bfloat16": 0.05}[dtype]
    for row in rows:
        assert 0 < row["rollout/sampler_drift_mean"] < limit
        assert 0.9 < row["train/importance_weight"] < 1.1


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.parametrize("sleep", ["false", "true"])
@pytest.mark.parametrize("strategy", ["auto", "fsdp2", "fsdp2 in host memory"])
def test_the_sampler_check_passes_on_a_gpu(strategy, sleep, tmp_path, monkeypatch):
    """With CUDA graphs, as a run has them."""
    pytest.importorskip("vllm")
    monkeypatch.chdir(ROOT)
    options = [f"--rollout.engine.init_args.sleep={sleep}", "--run.max_rollouts=2", "--data.val.addition.size=16"]
    options += ["--trainer.accelerator=gpu", "--trainer.devices=1", "--trainer.precision=bf16-mixed"]
    if strategy != "auto":
        options += ["--config=configs/trainer/fsdp2.yaml", "--trainer.devices=1"]
        options += [f"--trainer.strategy.init_args.cpu_offload={str('host' in strategy).lower()}"]
    _, rows = quickstart(tmp_path, *options)
    assert len(rows) == 2
    assert all(0 < row["rollout/sampler_drift_mean"] < 0.05 for row in rows)


@pytest.mark.vllm
@pytest.mark.slow
def test_the_quick_start_learns_as_it_does_with_the_in_process_engine(tmp_path, monkeypatch):
    """docs/evidence.md has 75.4 ± 2.4 % over five seeds of the in-process engine; one seed is left twice that."""
    pytest.importorskip("vllm")
    monkeypatch.chdir(ROOT)
    summary, rows = quickstart(tmp_path)
    assert len(rows) == 120
    assert 0.70 < summary["val"]["after"]["addition"]["avg_at_k"] < 0.81


@pytest.mark.vllm
@pytest.mark.distributed
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_every_rank_has_its_own_engine(sharded, tmp_path):
    pytest.importorskip("vllm")
    script = tmp_path / "rank.py"
    engine = f"VLLMEngine('float32', engine_args={SMALL!r})"
    script.write_text(TWO_RANKS.format(tests=str(ROOT / "tests"), engine=engine, sharded=sharded))
    run_two_ranks(script)


def test_satisfies_the_protocol_without_vllm():
    assert isinstance(VLLMEngine(), RolloutEngine)


def test_the_device_is_that_of_the_gathered_weights(monkeypatch):
    # Red: under FSDP2's cpu_offload the shards lie in host memory; every rank's engine took the first GPU.
    @contextlib.contextmanager
    def gathered(model):
        yield model.to("meta")

    seen = []
    monkeypatch.setattr(vllm_engine, "gathered_weights", gathered)
    monkeypatch.setattr(VLLMEngine, "_hand_over", lambda self, student: seen.append(self._device))
    VLLMEngine().sync(contract_student(), [STOP])
    assert seen == [torch.device("meta")]


def test_a_gpu_that_vllm_would_not_take_is_refused():
    class OnTheFourth(torch.nn.Module):
        device, vocab_size = torch.device("cuda:3"), 70

    with pytest.raises(ValueError, match=r"is on cuda:3, and vLLM takes the first .* CUDA_VISIBLE_DEVICES=3 and train"):
        VLLMEngine().sync(OnTheFourth(), [STOP])


def test_bad_settings_are_refused_with_the_cure():
    with pytest.raises(ValueError, match="dtype is 'int8'; expected one of float32, bfloat16, float16"):
        VLLMEngine(dtype="int8")
    with pytest.raises(ValueError, match=r"gpu_memory_utilization is 30; expected a share in \(0, 1\]"):
        VLLMEngine(gpu_memory_utilization=30)
    with pytest.raises(ValueError, match="max_model_len is 1"):
        VLLMEngine(max_model_len=1)
    with pytest.raises(ValueError, match=r"leave them at 1, and use a vLLM server"):
        VLLMEngine(engine_args={"tensor_parallel_size": 2})
    with pytest.raises(ValueError, match="engine_args names dtype, model, which the engine sets itself"):
        VLLMEngine(engine_args={"model": "x", "dtype": "auto"})
    with pytest.raises(ValueError, match="call sync"):
        VLLMEngine().generate([[3]], 1, Sampling(), [1])
