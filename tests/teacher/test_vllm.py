"""VLLMTeacher against a real vLLM server on the CPU (`make test-vllm`); what needs none is at the end."""

import http.server
import json
import logging
import os
import subprocess
import threading
import time
import urllib.request

import pytest
import torch
from contract import ROOT, free_port, rows, widened
from tiny_run import fit, make_data, make_module, make_rollouts, metrics_rows

from kdrl_pl.errors import TeacherLost
from kdrl_pl.models.character_tokenizer import character_tokenizer
from kdrl_pl.models.loading import load_tokenizer
from kdrl_pl.teacher import FrozenTeacher, VLLMTeacher

VLLM = os.environ.get("KDRL_VLLM_PYTHON", "")
START = 240  # seconds


class VLLMServer:
    """The OpenAI-compatible server of vLLM as a process of its own."""

    def __init__(self, model, log, port=None):
        self.port, self.log = port or free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        command = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "teacher"]
        command += ["--enforce-eager", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(self.port)]
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, env={**os.environ, **settings}, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT
            )

    def wait(self):
        until = time.monotonic() + START
        while True:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < until, self.log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=1)
                return self
            except OSError:
                time.sleep(0.5)

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    if not VLLM:
        pytest.skip("KDRL_VLLM_PYTHON names no Python that has vLLM; use make test-vllm")
    server = VLLMServer(model, tmp_path_factory.mktemp("vllm") / "log.txt")
    try:
        yield server.wait()
    finally:
        server.stop()


def loaded(server, path, **settings):
    teacher = VLLMTeacher(server.url, **settings)
    teacher.load("cpu", load_tokenizer(path))
    return teacher


def scored(teacher, experience):
    teacher.score(experience, experience.response_mask)
    return experience.teacher_logprobs


def exactly(model, experience):
    teacher = FrozenTeacher(model)
    teacher.load("cpu")
    return scored(teacher, experience)


@pytest.mark.vllm
@pytest.mark.parametrize("stop_cell", [(), (1, 14)])
def test_a_vllm_server_says_what_the_model_says(stop_cell, served, model, caplog):
    teacher = loaded(served, model, stop_token_ids=[14, 1], max_tokens_per_request=12)
    assert "beyond" not in caplog.text
    assert teacher.fingerprint() == f"vllm:{model}"
    assert teacher.stop_ids() == [1, 14]
    expected = exactly(model, rows(1.0, stop_cell=stop_cell))
    assert torch.allclose(scored(teacher, rows(1.0, stop_cell=stop_cell)), expected, atol=1e-5)
    asked = torch.zeros_like(rows().response_mask)
    asked[1, 4:6] = asked[0, 5] = True
    experience = rows(1.0, stop_cell=stop_cell)
    teacher.score(experience, asked)
    assert torch.allclose(experience.teacher_logprobs, torch.where(asked, expected, 0.0), atol=1e-5)


@pytest.mark.vllm
def test_what_a_vllm_server_cannot_do_is_said(served, model):
    teacher = loaded(served, model)
    with pytest.raises(ValueError, match=r"at temperature 0\.7, and vLLM's prompt_logprobs are at 1 whatever one asks"):
        scored(teacher, rows(0.7))
    with pytest.raises(ValueError, match=r"set model.distillation.estimator: k2"):
        teacher.score(rows(1.0), rows().response_mask, hidden=True)
    with pytest.raises(ValueError, match=r"has the models teacher; name one as model.teacher.model"):
        loaded(served, model, model="other")
    with pytest.raises(ValueError, match="has another tokenizer than the student"):
        VLLMTeacher(served.url).load("cpu", character_tokenizer("9876543210-+=;#"))


@pytest.mark.vllm
def test_a_run_learns_from_a_vllm_server(served, model, tiny_models, tmp_path):
    losses = {}
    for name in ("vllm", "here"):
        module = make_module(tiny_models[0], model)
        if name == "vllm":
            module.teacher = VLLMTeacher(served.url, stop_token_ids=[1, 14])
        fit(tmp_path / name, module, make_data(rows=8), rollouts=make_rollouts(), max_rollouts=2, val_check_interval=5)
        losses[name] = [row["train/kd_loss"] for row in metrics_rows(tmp_path / name) if "train/kd_loss" in row]
    assert len(losses["here"]) == 2
    assert losses["vllm"] == pytest.approx(losses["here"], rel=1e-3)


@pytest.mark.vllm
def test_rows_beyond_the_tokenizers_ids_are_noticed_and_so_is_another_model(model, tmp_path, caplog):
    """Zero rows have a logit of 0 each, so the words lose probability that FrozenTeacher leaves them."""
    wide = widened(model, tmp_path / "wide", 48)
    server = VLLMServer(wide, tmp_path / "log.txt").wait()
    try:
        with caplog.at_level(logging.WARNING, "kdrl_pl"):
            teacher = loaded(server, model)
        assert "has rows beyond the 16 ids of the tokenizer" in caplog.text
        experience = rows(1.0)
        below = scored(teacher, experience) - exactly(model, rows(1.0))
        assert (below[experience.response_mask] < -1e-3).all()
        server.stop()
        server = VLLMServer(model, tmp_path / "log2.txt", server.port)
        with pytest.raises(RuntimeError, match="came back with another teacher under the name teacher"):
            scored(teacher, rows(1.0))
    finally:
        server.stop()


class Pretender(http.server.BaseHTTPRequestHandler):
    """Answers as vLLM does, the same log-prob for every token; closes connections that are idle, as vLLM does."""

    protocol_version, timeout = "HTTP/1.1", 0.2

    def answer(self, told, status=200):
        body = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer({"data": [{"id": "teacher"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            ids = self.server.tokenizer(asked["prompt"], add_special_tokens=False)["input_ids"]
            return self.answer({"tokens": ids})
        if max(map(max, asked["prompt"])) >= 16:
            return self.answer({"error": "out of vocabulary"}, 400)
        choices = [
            {"index": i, "prompt_logprobs": [None, *({str(t): {"logprob": self.server.said}} for t in ids[1:])]}
            for i, ids in enumerate(asked["prompt"])
        ]
        return self.answer({"model": "teacher", "choices": choices})

    def log_message(self, *arguments):
        pass


def test_another_model_is_noticed_also_where_the_server_was_away_between_two_rollouts(model):
    # Red: a connection that is found closed was made anew without a question.
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pretender)
    server.tokenizer, server.said = load_tokenizer(model), -1.0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    teacher = VLLMTeacher(f"http://127.0.0.1:{server.server_port}")
    teacher.load("cpu", load_tokenizer(model))
    for _ in range(2):
        experience = rows(1.0)
        assert torch.equal(scored(teacher, experience), -experience.response_mask.float())
        time.sleep(0.5)
    server.said = -2.0
    with pytest.raises(TeacherLost, match=r"another teacher under the name teacher: its log-probs moved by 1 nats"):
        scored(teacher, rows(1.0))
    server.shutdown()
