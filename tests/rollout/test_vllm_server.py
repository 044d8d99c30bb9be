"""A real vLLM server, on the CPU. Needs an environment with vLLM: `make test-vllm`; what needs none is at the end."""

import contextlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from engine_contract import LONG, PROMPTS, STOP, TWO_RANKS, EngineContract, contract_student, run_two_ranks

from kdrl_pl.__main__ import main
from kdrl_pl.errors import RunError
from kdrl_pl.rollout import plain_weights
from kdrl_pl.rollout.engine import RolloutEngine, RolloutInterrupted
from kdrl_pl.rollout.plain_weights import write_folder
from kdrl_pl.rollout.sampling import Sampling
from kdrl_pl.rollout.vllm_server import VLLMServerEngine

ROOT = Path(__file__).parents[2]
VLLM = os.environ.get("KDRL_VLLM_PYTHON", "")
START = 600  # seconds; a loaded machine takes minutes


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@contextlib.contextmanager
def serving(model, log):
    """The address of a vLLM server with this model."""
    if not VLLM:
        pytest.skip("KDRL_VLLM_PYTHON names no Python that has vLLM; use make test-vllm")
    port = free_port()
    # `vllm serve` itself: the CPU wheel's command looks for a package of another name.
    command = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--tokens-only"]
    command += ["--enforce-eager", "--logprobs-mode", "processed_logprobs", "--dtype", "float32"]
    command += ["--port", str(port), "--host", "127.0.0.1"]
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    url = f"http://127.0.0.1:{port}"
    with open(log, "w") as said:
        process = subprocess.Popen(command, env={**os.environ, **settings}, stdout=said, stderr=subprocess.STDOUT)
        try:
            for _ in range(START):
                assert process.poll() is None, log.read_text()[-4000:]
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=1)
                    break
                except OSError:
                    time.sleep(1)
            else:
                pytest.fail(log.read_text()[-4000:])
            yield url
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server whose weights are zeros: only sync brings the student's."""
    folder = tmp_path_factory.mktemp("server")
    write_folder(contract_student(), folder / "model", "float32")
    with serving(folder / "model", folder / "log.txt") as url:
        yield url


@pytest.mark.vllm
class TestServer(EngineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, server, tmp_path_factory):
        cls.folder = tmp_path_factory.mktemp("weights")
        return VLLMServerEngine(server, str(cls.folder), "float32", max_requests=32)

    def test_no_weights_stay_on_disk(self, engine, student):
        engine.sync(student, [STOP])
        assert list(self.folder.iterdir()) == []

    def test_rows_that_are_given_up_do_not_run_on(self, engine, student):
        # Red: the server goes on with rows that nobody waits for.
        engine.sync(student, [])
        seconds = []
        for stops_after in (10**9, 2):
            polled, started = [], time.perf_counter()
            with contextlib.suppress(RolloutInterrupted):
                self.roll(
                    engine,
                    group_size=8,
                    max_tokens=480,
                    should_stop=lambda polled=polled, limit=stops_after: len(polled) >= limit or polled.append(1),
                )
            engine.sync(student, [])  # the server refuses to forget its cache while rows run
            seconds.append(time.perf_counter() - started)
        assert seconds[1] < seconds[0] / 2

    def test_too_long_requests_are_refused(self, engine):
        with pytest.raises(ValueError, match="need 600 tokens, but the server has room for 512"):
            self.roll(engine, [LONG], max_tokens=300)

    def test_a_server_with_other_settings_is_refused(self, server, student):
        with pytest.raises(RunError, match="runs with --dtype float32; start it with bfloat16"):
            VLLMServerEngine(server, dtype="bfloat16").sync(student, [STOP])

    def test_a_student_that_it_computes_otherwise_is_refused(self, server):
        other = contract_student()
        other.model.lm_head.register_forward_hook(lambda module, inputs, output: 3 * output)
        with pytest.raises(RunError, match=r"lie .* nats from those of Qwen2ForCausalLM"):
            VLLMServerEngine(server, dtype="float32").sync(other, [STOP])


@pytest.mark.vllm
@pytest.mark.distributed
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_ranks_share_a_server(server, sharded, tmp_path):
    script = tmp_path / "rank.py"
    engine = f"VLLMServerEngine({server!r}, dtype='float32')"
    script.write_text(TWO_RANKS.format(tests=str(ROOT / "tests"), engine=engine, sharded=sharded))
    run_two_ranks(script)


@pytest.mark.vllm
def test_weights_of_another_model_are_refused(server):
    """The last test with this server: vLLM does not recover from half a hand-over."""
    other = contract_student()
    engine = VLLMServerEngine(server, dtype="float32")
    engine.sync(other, [STOP])
    other.model.lm_head = type(other.model.lm_head)(32, 80)
    with pytest.raises(RunError, match=r"refused /collective_rpc: 500.*plain_weights writes\? Then start it anew"):
        engine.sync(other, [STOP])


@pytest.mark.vllm
def test_the_overlay_trains_on_the_quick_start(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    files = ["--config", "configs/quickstart.yaml", "--config", "configs/rollout/vllm_server.yaml"]
    options = ["--run.max_rollouts=3", "--data.val.addition.size=16", "--trainer.logger=false"]
    command = ["checkpoints/testbeds/arithmetic/student", str(tmp_path / "model"), "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["plain_weights", *command])
    plain_weights.main()
    with serving(tmp_path / "model", tmp_path / "log.txt") as url:
        where = [f"--rollout.engine.init_args.url={url}", "--rollout.engine.init_args.dtype=float32"]
        assert main(["fit", *files, *options, *where, f"--run.root={tmp_path}"]) == 0
    rows = [json.loads(line) for line in next(tmp_path.glob("*/*/metrics.jsonl")).read_text().splitlines()]
    rows = [row for row in rows if "train/loss" in row]
    assert len(rows) == 3
    for row in rows:  # weights that stayed behind drift by more after the first step
        assert 0 < row["rollout/sampler_drift_mean"] < 1e-4
        assert row["train/importance_weight"] == pytest.approx(1, abs=1e-3)


def test_satisfies_the_protocol():
    assert isinstance(VLLMServerEngine("http://localhost:1"), RolloutEngine)


def test_bad_settings_are_refused_with_the_cure():
    with pytest.raises(ValueError, match="url is 'localhost:8000'; expected something like http://"):
        VLLMServerEngine("localhost:8000")
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        VLLMServerEngine("http://x", dtype="int8")
    with pytest.raises(ValueError, match="max_requests is 0"):
        VLLMServerEngine("http://x", max_requests=0)
    with pytest.raises(ValueError, match="timeout is 0"):
        VLLMServerEngine("http://x", timeout=0)
    with pytest.raises(ValueError, match="call sync"):
        VLLMServerEngine("http://x").generate(PROMPTS, 1, Sampling(), [1] * 4)


def test_nobody_there():
    with pytest.raises(RunError, match=r"does not answer \(ConnectionRefusedError.*start it as docs/vllm.md says"):
        VLLMServerEngine(f"http://127.0.0.1:{free_port()}").sync(contract_student(), [STOP])


@pytest.fixture
def answers():
    """An HTTP server that answers from a table path -> (status, value), and its address."""
    table = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, value = table.get(self.path.partition("?")[0], (404, {}))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        do_POST = do_GET

        def log_message(self, *arguments):
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}", table
    listening.shutdown()


def test_a_server_without_the_endpoints_is_refused_with_the_cure(answers):
    url, table = answers
    with pytest.raises(RunError, match="has no /server_info; start it with VLLM_SERVER_DEV_MODE=1"):
        VLLMServerEngine(url).sync(contract_student(), [STOP])
    model = {"logprobs_mode": "raw_logprobs", "dtype": "torch.bfloat16", "max_model_len": 512}
    table["/server_info"] = 200, {"vllm_config": {"model_config": model}}
    with pytest.raises(RunError, match="--logprobs-mode raw_logprobs; start it with processed_logprobs"):
        VLLMServerEngine(url).sync(contract_student(), [STOP])
    model["logprobs_mode"] = "processed_logprobs"
    table["/collective_rpc"] = 500, {"error": "out of memory"}
    with pytest.raises(RunError, match=r"refused /collective_rpc: 500.*out of memory"):
        VLLMServerEngine(url).sync(contract_student(), [STOP])
    table["/collective_rpc"], table["/reset_prefix_cache"] = (200, {}), (200, {"success": False})
    with pytest.raises(RunError, match="still works on rows of somebody else"):
        VLLMServerEngine(url).sync(contract_student(), [STOP])


def test_a_server_that_goes_with_the_job_does_not_hide_that_the_run_was_told_to_stop(answers):
    # Red: the error of a row, or of giving rows up, instead of a rollout that was interrupted: no checkpoint was left.
    url, table = answers
    table["/inference/v1/generate"] = 503, {"error": "shutting down"}  # and there is no abort_requests any more
    engine = VLLMServerEngine(url, max_requests=1)
    engine._limit, engine._vocab_size = 512, 70
    told = iter([False])
    for should_stop in (lambda: True, lambda: next(told, True)):
        with pytest.raises(RolloutInterrupted):
            engine.generate(PROMPTS, 1, Sampling(max_tokens=4), [1] * 4, should_stop)
    with pytest.raises(RunError, match="refused /inference/v1/generate: 503"):
        engine.generate(PROMPTS, 1, Sampling(max_tokens=4), [1] * 4)
