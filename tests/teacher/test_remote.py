"""RemoteTeacher against real servers: runs that live through their teacher's death, and servers that misbehave."""

import http.server
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from contract import TOKEN, ServedTeacher, rows
from tiny_run import fit, make_data, make_module, make_rollouts, make_trainer, metrics_rows

from kdrl_pl import signals
from kdrl_pl.checkpoint import find_checkpoint
from kdrl_pl.errors import GivenUp, TeacherLost
from kdrl_pl.losses import RewardShaping
from kdrl_pl.models.loading import load_tokenizer
from kdrl_pl.preemption import Preemption
from kdrl_pl.teacher import FrozenTeacher, RemoteTeacher
from kdrl_pl.teacher.calls import read_token
from kdrl_pl.teacher.wire import Limits, read_request, vocabulary_fingerprint

ROOT = Path(__file__).parents[2]


class Host:
    """A server of a teacher on a thread, whose behaviour `fault` decides: number of the score request -> what happens.

    "ok", "hang" (no answer), "close" (the connection ends), a number (that HTTP status), "other" (another fingerprint),
    "short" (a log-prob too few), "nan" or "junk" (no JSON).
    """

    def __init__(self, path, fault=lambda number: "ok", token=None):
        from kdrl_pl.teacher.server import identity, score

        self.fault, self.requests, self.seen = fault, 0, []
        self.lock, self.over = threading.Lock(), threading.Event()
        teacher = FrozenTeacher(path)
        self.told = {**identity(teacher), "max_tokens_per_request": 4096, "max_rows": 64}
        teacher.load("cpu", load_tokenizer(path))
        host = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self, status, told):
                body = told if isinstance(told, bytes) else json.dumps(told).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
                    return self.answer(401, {"detail": "a valid bearer token is needed"})
                self.answer(200, {"model": host.told})

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with host.lock:
                    fault, host.requests = host.fault(host.requests), host.requests + 1
                if fault == "close":
                    self.close_connection = True
                    return
                if fault == "hang":
                    host.over.wait(60)
                    self.close_connection = True
                    return
                if isinstance(fault, int):
                    return self.answer(fault, {"detail": f"injected\x1b[2J {fault}"})
                request = read_request(body, Limits(16))
                host.seen.append(request)
                with host.lock:
                    reply = score(teacher, request)
                if fault == "short":
                    reply.logprobs = reply.logprobs[:-1]
                if fault == "nan":
                    reply.logprobs = reply.logprobs * torch.nan
                if fault == "other":
                    reply.teacher = "0123456789abcdef/float32"
                self.answer(200, b"<html>" if fault == "junk" else reply.to_dict())

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


def loaded(host, path, **settings):
    teacher = RemoteTeacher(host.url, **settings)
    teacher.load("cpu", load_tokenizer(path))
    return teacher


def scored(teacher, experience=None):
    experience = rows() if experience is None else experience
    teacher.score(experience, experience.response_mask)
    return experience.teacher_logprobs


@pytest.fixture(scope="module")
def exact(model):
    teacher = FrozenTeacher(model)
    teacher.load("cpu")
    return scored(teacher)


def test_rows_go_out_in_several_requests_and_come_back_in_their_places(model, exact):
    with Host(model) as host:
        logprobs = scored(loaded(host, model, max_tokens_per_request=12, requests_in_flight=3))
        assert torch.allclose(logprobs, exact, atol=1e-6)
        sizes = sorted([len(g.responses) for g in request.groups] for request in host.seen)
    assert sizes == [[1], [1], [1], [1]]  # 6, 10, 5 and 8 tokens: each pair is above 12, or of two groups above it


def test_a_server_that_stumbles_is_asked_again_and_the_log_says_so_once(model, exact, caplog):
    faults = [503, "close", 500, 429, "ok"]
    with Host(model, lambda number: faults[min(number, 4)]) as host, caplog.at_level(logging.INFO, "kdrl_pl"):
        assert torch.allclose(scored(loaded(host, model)), exact, atol=1e-6)
    messages = [record.getMessage() for record in caplog.records if record.name == "kdrl_pl.teacher.calls"]
    assert len(messages) == 2
    assert r"does not answer (status 503: injected\x1b[2J 503); the run waits" in messages[0]
    assert "answers again after" in messages[1]


def test_an_answer_that_does_not_come_is_asked_for_again(model, exact):
    with Host(model, lambda number: "hang" if number == 0 else "ok") as host:
        assert torch.allclose(scored(loaded(host, model, timeout=0.5)), exact, atol=1e-6)
        assert host.requests == 2


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            "other",
            r"came back with another teacher: 0123456789abcdef/float32 instead of [0-9a-f]{16}/float32; serve the",
        ),
        ("short", r"answered with 14 log-probs; 15 were asked for"),
        ("nan", r"answered with log-probs that are none"),
        ("junk", r"the answer is none of a served teacher's"),
        (413, r"refuses the request with status 413: injected\\x1b\[2J 413"),
        (401, r"refuses the request with status 401"),
    ],
)
def test_a_wrong_answer_is_never_trained_on(fault, said, model):
    with Host(model, lambda number: fault) as host:
        teacher, experience = loaded(host, model), rows()
        with pytest.raises(TeacherLost, match=said):
            scored(teacher, experience)
        assert experience.teacher_logprobs is None
        assert host.requests == 1


def test_a_teacher_that_stays_away_is_given_up_in_time(model):
    with Host(model, lambda number: "close") as host:
        teacher = loaded(host, model, patience=1.0)
        started = time.monotonic()
        with pytest.raises(TeacherLost, match=r"has not answered for \d s .*; start it again, then resume this run"):
            scored(teacher)
        assert 1.0 <= time.monotonic() - started < 4


def test_a_run_waits_for_a_teacher_that_is_not_there_yet(model):
    with Host(model) as host:
        url = host.url
    with pytest.raises(TeacherLost, match="has not answered for 0 s"):
        RemoteTeacher(url, patience=0).load("cpu", load_tokenizer(model))


def test_the_token_is_brought_along_and_must_be_right(model, tmp_path, monkeypatch):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    with Host(model, token=TOKEN) as host:
        loaded(host, model, token_file=str(tmp_path / "token"))
        monkeypatch.setenv("KDRL_TEACHER_TOKEN", TOKEN)
        loaded(host, model)
        monkeypatch.setenv("KDRL_TEACHER_TOKEN", "wrong")
        with pytest.raises(ValueError, match="refuses the request with status 401: a valid bearer token is needed"):
            loaded(host, model)
    monkeypatch.setenv("KDRL_TEACHER_TOKEN", "two words")
    with pytest.raises(ValueError, match=r"\$KDRL_TEACHER_TOKEN holds no token"):
        read_token(None)


def test_wrong_settings_are_refused(model):
    for url in ("localhost:8000", "ftp://x", "http://user:secret@host", "http://"):
        with pytest.raises(ValueError, match="is no URL of a server; expected http://host:port"):
            RemoteTeacher(url)
    with pytest.raises(ValueError, match=r"teacher.requests_in_flight is 0; expected at least 1"):
        RemoteTeacher("http://localhost:1", requests_in_flight=0)
    with Host(model) as host:
        host.told = {"model": "something"}
        with pytest.raises(RuntimeError, match="is no teacher of kdrl serve-teacher; for a vLLM server use"):
            loaded(host, model)


def test_whole_vocabularies_stay_where_they_are(model):
    with Host(model) as host:
        teacher = loaded(host, model)
        with pytest.raises(ValueError, match=r"log-probs of tokens alone; set model.distillation.estimator: k2"):
            teacher.score(rows(), rows().response_mask, hidden=True)
        with pytest.raises(ValueError, match="estimator: k2"):
            teacher.head()


def test_the_most_probable_words_can_be_asked_for(model):
    with Host(model) as host:
        ids, logprobs = loaded(host, model, max_tokens_per_request=12).top_k(rows(), rows().response_mask, 2)
    local = FrozenTeacher(model)
    local.load("cpu")
    experience = rows()
    local.score(experience, experience.response_mask, hidden=True)
    top = local.head().logprobs(experience.teacher_hidden[experience.response_mask], 0.7).topk(2)
    assert torch.equal(ids, top.indices)
    assert torch.allclose(logprobs, top.values, atol=1e-5)


def test_end_tokens_are_no_part_of_the_vocabulary_that_must_agree(model):
    tokenizer = load_tokenizer(model)
    before = vocabulary_fingerprint(tokenizer)
    tokenizer.eos_token = "="
    assert vocabulary_fingerprint(tokenizer) == before


# ---- whole runs ----------------------------------------------------------------------------------------------------


def run(folder, student, teacher, resume=None, after=(), max_rollouts=4, **settings):
    module = make_module(student, "replaced", **settings)
    module.teacher = teacher
    arguments = {"max_rollouts": max_rollouts, "val_check_interval": 3, "after": [*after, Preemption()]}
    trainer = fit(folder, module, make_data(rows=8), resume=resume, rollouts=make_rollouts(), **arguments)
    return module, trainer


def weights(module):
    return torch.cat([value.detach().flatten() for value in module.student.parameters()])


# Validation asks once per batch of 2 problems, of which there are 2 batches: before training (0, 1), after rollout 2
# (5, 6) and at the end (8, 9). Rollouts 0, 1, 2 and 3 ask in 2, 3, 4 and 7.
@pytest.mark.parametrize(
    ("lost_at", "done", "settings"),
    [(2, 0, {}), (4, 2, {}), (5, 3, {}), (4, 2, {"distillation": None, "reward_shaping": RewardShaping(coef=0.1)})],
    ids=["first rollout", "a later one", "in a validation", "reward shaping"],
)
def test_a_run_whose_teacher_is_gone_saves_stops_and_resumes_bit_equal(
    lost_at, done, settings, tiny_models, tmp_path, capsys
):
    student, path = tiny_models
    whole, _ = run(tmp_path / "whole", student, FrozenTeacher(path), **settings)
    with Host(path, lambda number: "ok" if number < lost_at else 503) as host:
        with pytest.raises(GivenUp, match=r"has not answered for \d s .*503"):
            run(tmp_path / "run", student, RemoteTeacher(host.url, patience=0.5), **settings)
        checkpoint = find_checkpoint(tmp_path / "run")
        assert checkpoint.name == f"last-00000{done}.ckpt"
        assert capsys.readouterr().out.endswith(f"stopped: saved {checkpoint}\n")
        assert signals.received() == 0
        host.fault = lambda number: "ok"
        again, _ = run(tmp_path / "run", student, RemoteTeacher(host.url), resume=checkpoint, **settings)
    assert torch.equal(weights(again), weights(whole))
    assert metrics_rows(tmp_path / "run") == metrics_rows(tmp_path / "whole")


@pytest.mark.faults
def test_a_signal_ends_the_wait(tiny_models, tmp_path):
    student, path = tiny_models
    with Host(path, lambda number: "ok" if number < 4 else "hang") as host:
        stopper = threading.Thread(target=lambda: (wait_for(lambda: host.requests > 4), os.kill(os.getpid(), 15)))
        stopper.start()
        started = time.monotonic()
        with pytest.raises(SystemExit) as ended:
            run(tmp_path, student, RemoteTeacher(host.url))
        assert time.monotonic() - started < 40  # and not the 600 s of the request
        stopper.join()
    assert ended.value.code == 143
    assert find_checkpoint(tmp_path).name == "last-000002.ckpt"


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)


SMALL = """
data:
  prompts_per_rollout: 4
  train: {addition: {size: 64}}
  val: {addition: {size: 8}}
rollout: {group_size: 4, validation_samples: 1, sampling: {max_tokens: 24}}
trainer: {logger: false, val_check_interval: 20}
run: {max_rollouts: 12, keep_rollouts: -1}
checkpoint: {every_n_rollouts: 100}
model: {distillation: {estimator: k2}}
"""


def start(folder, *options):
    folder.mkdir()
    (folder / "small.yaml").write_text(SMALL)
    files = ("configs/quickstart.yaml", *options, folder / "small.yaml")
    command = [sys.executable, "-m", "kdrl_pl", "fit", "--run.root", str(folder)]
    with (folder / "output").open("w") as output:
        return subprocess.Popen(
            command
            + [f"--config={file}" for file in files if not str(file).startswith("--")]
            + [option for option in options if str(option).startswith("--")],
            env={**os.environ, "OMP_NUM_THREADS": "1", "KDRL_TEACHER_TOKEN": TOKEN},
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def rows_of(folder):
    files = list(folder.glob("*/*/metrics.jsonl"))
    return metrics_rows(files[0].parent) if files else []


@pytest.mark.faults
def test_a_run_lives_through_the_death_of_its_server(tmp_path):
    """The very run of a teacher in this process, though its server is killed and another one takes its place."""
    path = "checkpoints/testbeds/arithmetic/teacher"
    server = ServedTeacher(path)
    overlay = ("configs/teacher/remote.yaml", f"--model.teacher.url={server.url}")
    whole, parts = start(tmp_path / "whole"), start(tmp_path / "parts", *overlay)
    said = lambda: (tmp_path / "parts/output").read_text()  # noqa: E731
    try:
        wait_for(lambda: len(rows_of(tmp_path / "parts")) >= 3 or parts.poll() is not None)
        server.kill()
        wait_for(lambda: "does not answer" in said() or parts.poll() is not None)
        assert parts.poll() is None, said()
        rollouts = len(rows_of(tmp_path / "parts"))
        assert 3 <= rollouts < 12
        server = ServedTeacher(path, port=server.port).wait()
        for process, folder in ((parts, "parts"), (whole, "whole")):
            assert process.wait(timeout=240) == 0, (tmp_path / folder / "output").read_text()
    finally:
        for process in (whole, parts):
            process.poll() is None and process.send_signal(signal.SIGKILL)
        server.stop()
    assert "answers again after" in said()
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    ends = [
        torch.load(find_checkpoint(next((tmp_path / n).glob("*/*/"))), weights_only=True) for n in ("whole", "parts")
    ]
    assert ends[0]["state_dict"].keys() == ends[1]["state_dict"].keys()
    assert all(torch.equal(value, ends[1]["state_dict"][name]) for name, value in ends[0]["state_dict"].items())
    assert ends[0]["kdrl"] == ends[1]["kdrl"]


@pytest.mark.faults
@pytest.mark.distributed
def test_one_rank_without_a_teacher_stops_both_in_good_order(tmp_path):
    """Each rank asks once in the validation before training and once per rollout; the eighth request finds nobody."""
    path = str(ROOT / "checkpoints/testbeds/arithmetic/teacher")
    with Host(path, lambda number: 503 if number == 7 else "ok", token=TOKEN) as host:
        two = ("--trainer.strategy=ddp", "--trainer.devices=2", "--model.teacher.patience=0")
        process = start(tmp_path / "run", "configs/teacher/remote.yaml", f"--model.teacher.url={host.url}", *two)
        status = process.wait(timeout=240)
    output = (tmp_path / "run/output").read_text()
    assert status == 1, output
    checkpoint = find_checkpoint(next((tmp_path / "run").glob("*/*/")))
    assert checkpoint.name == "last-000002.ckpt"
    assert f"stopped: saved {checkpoint}" in output
    assert "has not answered for 0 s (status 503" in output
    assert "Traceback" not in output


def test_a_served_teacher_does_not_answer_prompts(tiny_models, tmp_path):
    student, path = tiny_models
    with Host(path) as host:
        module = make_module(student, "replaced")
        module.teacher = RemoteTeacher(host.url)
        trainer = make_trainer(tmp_path, rollouts=make_rollouts(policy="teacher"))
        with pytest.raises(ValueError, match=r"rollout\.policy is teacher, but a RemoteTeacher only scores"):
            trainer.validate(module, datamodule=make_data())
