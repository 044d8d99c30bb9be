"""`kdrl serve-teacher` as a real process on a real socket: what it answers, and what it refuses without falling."""

import base64
import importlib
import json
import socket
import struct
import time
from pathlib import Path

import pytest
import torch
from contract import TOKEN, ServedTeacher, free_port

from kdrl_pl.__main__ import main
from kdrl_pl.models.loading import load_tokenizer
from kdrl_pl.teacher import FrozenTeacher
from kdrl_pl.teacher.wire import BadRequest, Group, Limits, ScoreRequest, read_reply, read_request, split

GOOD = {"groups": [{"prompt": [3, 4, 12], "responses": [[8, 9, 1], [2, 14]]}], "temperature": 0.7}


@pytest.fixture(scope="module")
def server(model):
    """It takes at most 200 tokens."""
    server = ServedTeacher(model, "--max-tokens-per-request", 200, "--max-batch-size", 4, "--batch-timeout", 0.02)
    yield server.wait()
    output = server.stop()
    assert "Traceback" not in output
    assert TOKEN not in output


def post(server, told, **headers):
    status, body = server.ask("/score", told if isinstance(told, bytes) else json.dumps(told).encode(), **headers)
    return status, json.loads(body)


def with_group(**fields):
    return {**GOOD, "groups": [{**GOOD["groups"][0], **fields}]}


def test_an_answer_is_base64_of_little_endian_floats(server, model):
    from transformers import AutoModelForCausalLM

    status, told = post(server, GOOD)
    assert status == 200
    values = struct.unpack("<5f", base64.b64decode(told["logprobs"]))
    with torch.no_grad():
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        expected = []
        for response in GOOD["groups"][0]["responses"]:
            ids = torch.tensor([[3, 4, 12, *response]])
            logprobs = (network(ids).logits[0, 2:-1] / 0.7).log_softmax(-1)
            expected += logprobs.gather(1, ids[0, 3:, None])[:, 0].tolist()
    assert values == pytest.approx(expected, abs=1e-5)
    assert told["teacher"] == FrozenTeacher(model).fingerprint()


def test_the_most_probable_words_come_when_asked_for(server, model):
    status, told = post(server, {**GOOD, "top_k": 3, "groups": [{**GOOD["groups"][0], "asked": ["010", "11"]}]})
    assert status == 200
    reply = read_reply(json.dumps(told).encode(), 3, 3)
    teacher = FrozenTeacher(model)
    teacher.load("cpu", load_tokenizer(model))
    experience, asked = read_request(json.dumps(GOOD).encode(), Limits(16)).experience()
    teacher.score(experience, asked, hidden=True)
    exact = teacher.head().logprobs(experience.teacher_hidden[asked][[1, 3, 4]], 0.7).topk(3)
    assert torch.equal(reply.top_ids, exact.indices)
    assert torch.allclose(reply.top_logprobs, exact.values, atol=1e-5)
    assert len(reply.logprobs) == 3
    status, told = post(server, {**GOOD, "top_k": 3, "groups": [{**GOOD["groups"][0], "asked": ["000", "00"]}]})
    assert status == 200  # red: 500 where nothing was asked about
    assert (told["logprobs"], told["top_ids"], told["top_logprobs"]) == ("", "", "")


def test_it_says_who_it_is(server, model):
    status, body = server.ask("/info")
    told = json.loads(body)["model"]
    assert status == 200
    assert told["fingerprint"] == FrozenTeacher(model).fingerprint()
    assert (told["vocab_size"], told["precision"], told["stop_ids"]) == (16, "float32", [1, 14])
    assert told["max_tokens_per_request"] == 200


def nested(depth):
    return b'{"groups":' + b"[" * depth + b"]" * depth + b"}"


ATTACKS = {
    "no JSON": (b'{"groups":', 400),
    "no UTF-8": (b'{"groups": "\xff\xfe"}', 400),
    "empty": (b"", 400),
    "nested": (nested(100), 422),
    "nested deeper than Python goes": (nested(1_000_000), 413),
    "nested as deep as the limit on bytes lets through": (nested(30_000), 400),
    "NaN temperature": (json.dumps({**GOOD, "temperature": float("nan")}).encode(), 400),
    "infinite temperature": ({**GOOD, "temperature": 1e300}, 422),
    "temperature 0": ({**GOOD, "temperature": 0}, 422),
    "temperature of another type": ({**GOOD, "temperature": "1"}, 422),
    "a list": ([1, 2, 3], 422),
    "null": (b"null", 422),
    "no groups": ({"groups": []}, 422),
    "unknown field": ({**GOOD, "prompt_logprobs": 1}, 422),
    "negative id": (with_group(prompt=[3, -1]), 422),
    "id beyond the vocabulary": (with_group(prompt=[3, 16]), 422),
    "huge id": (with_group(prompt=[3, 2**70]), 422),
    "id of ten thousand digits": (b'{"groups": [{"prompt": [' + b"9" * 10_000 + b'], "responses": [[1]]}]}', 400),
    "true as an id": (with_group(prompt=[True]), 422),
    "float as an id": (with_group(prompt=[3.0]), 422),
    "text as an id": (with_group(prompt=["3"]), 422),
    "no prompt": (with_group(prompt=[]), 422),
    "empty response": (with_group(responses=[[]]), 422),
    "asked does not fit": (with_group(asked=["111", "1"]), 422),
    "asked holds something else": (with_group(asked=["1x1", "11"]), 422),
    "asked is a number": (with_group(asked=111), 422),
    "stop cell out of range": ({**GOOD, "stop_cell": [99]}, 422),
    "stop cell of another type": ({**GOOD, "stop_cell": {"1": 1}}, 422),
    "top_k beyond the vocabulary": ({**GOOD, "top_k": 17}, 422),
    "too many tokens": (with_group(responses=[[1] * 150, [1] * 150]), 413),
    "too many rows": ({"groups": [{"prompt": [1], "responses": [[1]]}] * 5000}, 413),
    "too many bytes": (b" " * 100_000, 413),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_bad_requests_get_a_short_reason(attack, server):
    told, expected = ATTACKS[attack]
    status, answer = post(server, told)
    assert status == expected, answer
    assert set(answer) == {"detail"}
    assert len(answer["detail"]) < 200
    assert post(server, GOOD)[0] == 200


@pytest.mark.parametrize(
    "given", ["Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer ", "", "Bearer é"]
)
@pytest.mark.parametrize("path", ["/score", "/info", "/health"])
def test_without_the_token_nothing_is_told(given, path, server):
    body = json.dumps(GOOD).encode() if path == "/score" else None
    status, answer = server.ask(path, body, Authorization=given)
    assert (status, json.loads(answer)) == (401, {"detail": "a valid bearer token is needed"})


def test_another_content_type_is_refused(server):
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"):
        status, answer = post(server, GOOD, Content_Type=kind)
        assert (status, answer["detail"]) == (415, "the body must be application/json")
    assert post(server, GOOD, Content_Type="application/json; charset=utf-8")[0] == 200


def test_other_paths_and_methods_tell_nothing(server):
    assert server.ask("/docs")[0] == server.ask("/openapi.json")[0] == server.ask("/predict", b"{}")[0] == 404
    assert server.ask("/score")[0] == 405


def test_a_client_that_hangs_up_in_the_middle_does_no_harm(server):
    for part in (b"POST /score HTTP/1.1\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01", b"GET /" + b"a" * 100_000):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(part)
    head = f"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(f"{head}Content-Length: 1000000000\r\n\r\n{{".encode())
    assert post(server, GOOD)[0] == 200


def processes_below(pid):
    """Processes of the server's session, which it is the leader of."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_until_gone(server):
    until = time.monotonic() + 10
    while left := processes_below(server.process.pid):
        assert time.monotonic() < until, left
        time.sleep(0.1)


def test_a_server_that_is_killed_leaves_nothing_behind_and_one_that_is_stopped_ends_quietly(model):
    first = ServedTeacher(model).wait()
    assert len(processes_below(first.process.pid)) > 2
    first.kill()
    wait_until_gone(first)
    second = ServedTeacher(model, port=first.port).wait()  # the port is free again
    output = second.stop()
    assert second.process.returncode in (0, 130)
    assert output.startswith(f"teacher {FrozenTeacher(model).fingerprint()} ({model}) at {second.url}")
    assert "Traceback" not in output
    wait_until_gone(second)


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (
            ["--host", "0.0.0.0"],
            1,
            "give a token, as --token-file FILE or in the environment variable KDRL_TEACHER_TOK",
        ),
        (["--model", "nowhere/at/all"], 1, "no model folder at 'nowhere/at/all'"),
        (["--token-file", "empty"], 1, "empty holds no token; expected one line of printable characters without"),
        (["--token", "secret"], 2, "there is no setting --token"),
        (["--port", "80"], 2, "--port is 80; expected 1024 to 65535"),
        (["--max-batch-size", "0"], 2, "--max-batch-size and --max-tokens-per-request are at least 1"),
        (["--quantization", "2bit"], 2, "invalid choice: '2bit'"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_served(
    options, status, said, model, tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv("KDRL_TEACHER_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("\n")
    given = options if "--model" in options else ["--model", model, *options]
    try:
        ended = main(["serve-teacher", *given])
    except SystemExit as error:
        ended = error.code
    assert ended == status
    assert said in capsys.readouterr().err


def test_requests_read_as_they_were_written():
    request = ScoreRequest([Group([3], [[4, 5], [1]], ["01", "1"]), Group([2, 2], [[1]], ["1"])], 0.5, (1, 14), 2)
    assert read_request(request.to_json(), Limits(16)) == request
    experience, asked = request.experience()
    assert experience.input_ids.tolist() == [[3, 4, 5], [3, 1, 0], [2, 2, 1]]
    assert asked.nonzero().tolist() == [[0, 2], [1, 1], [2, 2]]
    assert experience.group.tolist() == [0, 0, 1]
    with pytest.raises(BadRequest, match="a row of 3 tokens; the teacher reads at most 2"):
        read_request(request.to_json(), Limits(16, max_row_tokens=2))


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'{"teacher": "x"}',
        b'{"teacher": "x", "logprobs": "AAAA!"}',
        b'{"teacher": "x", "logprobs": "AAA="}',
        b'{"teacher": "x", "logprobs": "AAAAAAAAAAA="}',  # two numbers
        b'{"teacher": "x", "logprobs": "AADAfw=="}',  # NaN
        b'{"teacher": "x", "logprobs": "AACAPw=="}',  # 1.0
    ],
)
def test_an_answer_that_is_none_is_refused(body):
    with pytest.raises(ValueError, match=r"the teacher answered with|is none of a served teacher's"):
        read_reply(body, 1)


def test_rows_are_split_in_their_order_and_groups_cut_only_where_they_must():
    groups = [
        Group([1, 2], [[3] * n for n in lengths], ["1" * n for n in lengths]) for lengths in ([2, 3], [4], [1, 1, 9])
    ]
    parts = split(groups, 12, 100)  # 4 + 5; 6; 3 + 3 and 11
    assert [[[len(r) for r in g.responses] for g in request] for request in parts] == [[[2, 3]], [[4], [1, 1]], [[9]]]
    assert [len(request) for request in split(groups, 1000, 2)] == [1, 1, 1, 1]
    assert split(groups, 1000, 100) == [groups]
    with pytest.raises(ValueError, match="a row has 11 tokens and a request to the teacher holds at most 10"):
        split(groups, 10, 100)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [[], ["--dtype", "bfloat16"], ["--quantization", "8bit"]])
def test_it_serves_from_a_gpu(precision, model):
    server = ServedTeacher(model, "--device", "cuda:0", *precision)
    try:
        status, told = post(server.wait(), GOOD)
    finally:
        server.stop()
    assert status == 200
    served = read_reply(json.dumps(told).encode(), 5).logprobs
    teacher = FrozenTeacher(model)
    teacher.load("cpu")
    experience, asked = read_request(json.dumps(GOOD).encode(), Limits(16)).experience()
    teacher.score(experience, asked)
    assert torch.allclose(served, experience.teacher_logprobs[asked], rtol=0, atol=0.3 if precision else 1e-3)


def test_a_taken_port_is_an_error(model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
        taken.listen()
        server = ServedTeacher(model, port=taken.getsockname()[1])
        output = server.process.communicate(timeout=120)[0]
    assert server.process.returncode != 0
    assert "address already in use" in output.lower()


def test_the_benchmark_of_the_round_trip_runs(model, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    program = importlib.import_module("served_teacher")
    program.main(["--model", model, "--port", str(free_port()), "--repeats", "1", "--sizes", "1"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert [float(cell) for cell in line.strip("| ").split("|")][:3] == [4, 32, 16]
