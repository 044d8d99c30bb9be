"""What is said between a served teacher and those who ask it: JSON both ways, floats as base64 of their bytes.

The format is written down in docs/served_teacher.md. Everything that comes in from the network is checked here, before
any model sees it.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdrl_pl.experience import Experience

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCORE_PATH, INFO_PATH, HEALTH_PATH = "/score", "/info", "/health"
MAX_TOP_K = 256
_FIELDS = {"groups", "temperature", "stop_cell", "top_k"}
_GROUP_FIELDS = {"prompt", "responses", "asked"}


class BadRequest(ValueError):
    """A request that is refused.

    Args:
        status: HTTP status.
        message: one short sentence.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What one request may hold.

    Args:
        vocab_size: token ids are smaller.
        max_tokens: of all rows, prompts counted once per row.
        max_row_tokens: of one row: what the model has positions for.
        max_rows: responses.
        max_bytes: of the body.
    """

    vocab_size: int
    max_tokens: int = 65536
    max_row_tokens: int = 65536
    max_rows: int = 4096
    max_bytes: int = 16 << 20


@dataclass
class Group:
    """Responses to one prompt.

    Args:
        prompt: token ids, at least one.
        responses: token ids per row, at least one each.
        asked: per row one character per response token: "1" is asked about, "0" is not.
    """

    prompt: list[int]
    responses: list[list[int]]
    asked: list[str]

    @property
    def tokens(self) -> int:
        return sum(len(self.prompt) + len(response) for response in self.responses)


@dataclass
class ScoreRequest:
    """Rows to score.

    Args:
        groups: the rows, with those of one prompt together.
        temperature: log-probs are at it.
        stop_cell: ids that count as one word where one of them was sampled (`kdrl_pl/stop_cell.py`).
        top_k: how many of the teacher's most probable words are wanted for every token asked.
    """

    groups: list[Group]
    temperature: float = 1.0
    stop_cell: tuple[int, ...] = ()
    top_k: int = 0

    def to_json(self) -> bytes:
        return json.dumps(
            {
                "groups": [vars(group) for group in self.groups],
                "temperature": self.temperature,
                "stop_cell": list(self.stop_cell),
                "top_k": self.top_k,
            },
            separators=(",", ":"),
        ).encode()

    def rows(self) -> Iterator[tuple[int, Group, int]]:
        """(number of the group, the group, row within it), in the order of the log-probs of an answer."""
        for number, group in enumerate(self.groups):
            for row in range(len(group.responses)):
                yield number, group, row

    def experience(self) -> tuple[Experience, Tensor]:
        """The rows and, (B, T) bool, the tokens asked about."""
        rows = list(self.rows())
        experience = Experience.from_rows(
            [group.prompt for _, group, _ in rows],
            [group.responses[row] for _, group, row in rows],
            [0.0] * len(rows),
            [number for number, _, _ in rows],
            temperature=self.temperature,
            stop_cell=self.stop_cell,
        )
        asked = torch.zeros_like(experience.response_mask)
        for i, (_, group, row) in enumerate(rows):
            flags = torch.tensor([flag == "1" for flag in group.asked[row]])
            asked[i, len(group.prompt) : len(group.prompt) + len(flags)] = flags
        return experience, asked


def read_request(body: bytes, limits: Limits) -> ScoreRequest:
    """The request in `body`.

    Raises:
        BadRequest: it is none (400), too much (413), or asks for something that there is not (422).
    """
    try:
        told = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, NaN, numbers of thousands of digits, nested too deeply
        raise BadRequest(400, "the body is no JSON object, or holds NaN or Infinity") from None
    _check_fields("the request", told, _FIELDS, {"groups"})
    groups = told["groups"]
    _check_list("groups", groups)
    if len(groups) > limits.max_rows:
        raise BadRequest(413, f"{len(groups)} groups; at most {limits.max_rows} rows go into one request")
    read = [_group(group, limits.vocab_size) for group in groups]
    rows, tokens = sum(len(group.responses) for group in read), sum(group.tokens for group in read)
    if rows > limits.max_rows:
        raise BadRequest(413, f"{rows} rows; at most {limits.max_rows} go into one request")
    if tokens > limits.max_tokens:
        raise BadRequest(413, f"{tokens} tokens; at most {limits.max_tokens} go into one request")
    longest = max(len(group.prompt) + max(map(len, group.responses)) for group in read)
    if longest > limits.max_row_tokens:
        raise BadRequest(422, f"a row of {longest} tokens; the teacher reads at most {limits.max_row_tokens}")
    temperature, top_k = told.get("temperature", 1.0), told.get("top_k", 0)
    if type(temperature) not in (int, float) or not 0 < temperature < math.inf or not 1e-3 <= temperature <= 1e3:
        raise BadRequest(422, "temperature must be a number between 0.001 and 1000")
    if type(top_k) is not int or not 0 <= top_k <= min(MAX_TOP_K, limits.vocab_size):
        raise BadRequest(422, f"top_k must be a whole number from 0 to {min(MAX_TOP_K, limits.vocab_size)}")
    stops = told.get("stop_cell", [])
    _check_ids("stop_cell", stops, limits.vocab_size, may_be_empty=True)
    return ScoreRequest(read, float(temperature), tuple(sorted(set(stops))), top_k)


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _group(told: Any, vocab_size: int) -> Group:
    _check_fields("a group", told, _GROUP_FIELDS, {"prompt", "responses"})
    prompt, responses = told["prompt"], told["responses"]
    _check_ids("prompt", prompt, vocab_size)
    _check_list("responses", responses)
    for response in responses:
        _check_ids("a response", response, vocab_size)
    asked = told.get("asked")
    if asked is None:
        asked = ["1" * len(response) for response in responses]
    matches = isinstance(asked, list) and len(asked) == len(responses)
    if not matches or not all(
        isinstance(flags, str) and len(flags) == len(response) and not flags.strip("01")
        for flags, response in zip(asked, responses, strict=True)
    ):
        raise BadRequest(422, "asked must hold one text of 0 and 1 per response, one character per token")
    return Group(prompt, responses, asked)


def _check_fields(what: str, told: Any, known: set[str], required: set[str]) -> None:
    if not isinstance(told, dict):
        raise BadRequest(422, f"{what} must be a JSON object")
    if missing := required - told.keys():
        raise BadRequest(422, f"{what} lacks {', '.join(sorted(missing))}")
    if told.keys() - known:
        raise BadRequest(422, f"{what} has unknown fields; known are {', '.join(sorted(known))}")


def _check_list(what: str, value: Any) -> None:
    if not isinstance(value, list) or not value:
        raise BadRequest(422, f"{what} must be a list that is not empty")


def _check_ids(what: str, ids: Any, vocab_size: int, may_be_empty: bool = False) -> None:
    if not (may_be_empty and ids == []):
        _check_list(what, ids)
    if any(type(token) is not int for token in ids):  # True and 1.0 are none either
        raise BadRequest(422, f"{what} must hold token ids, which are whole numbers")
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise BadRequest(422, f"{what} holds a token id outside of 0 to {vocab_size - 1}")


@dataclass
class ScoreReply:
    """The teacher's answer; N tokens asked about, in the order of the rows.

    Args:
        teacher: its fingerprint.
        logprobs: (N,) float32 nats.
        top_ids: (N, K) int64, most probable first; None where none were asked for.
        top_logprobs: (N, K) float32 nats.
    """

    teacher: str
    logprobs: Tensor
    top_ids: Tensor | None = field(default=None)
    top_logprobs: Tensor | None = field(default=None)

    def to_dict(self) -> dict[str, Any]:
        told: dict[str, Any] = {"teacher": self.teacher, "logprobs": _pack(self.logprobs, "<f4")}
        if self.top_ids is not None:
            told["top_ids"], told["top_logprobs"] = _pack(self.top_ids, "<i4"), _pack(self.top_logprobs, "<f4")
        return told


def read_reply(body: bytes, tokens: int, top_k: int = 0) -> ScoreReply:
    """What `ScoreReply.to_dict` told, once it is sure that it answers what was asked.

    Args:
        body: of the answer.
        tokens: how many were asked about.
        top_k: how many words were asked for.

    Raises:
        ValueError: it does not.
    """
    try:
        told = json.loads(body)
        reply = ScoreReply(str(told["teacher"]), _unpack(told["logprobs"], "<f4"))
        if top_k:
            reply.top_ids = _unpack(told["top_ids"], "<i4").long().view(tokens, top_k)
            reply.top_logprobs = _unpack(told["top_logprobs"], "<f4").view(tokens, top_k)
    except (ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise ValueError(f"the answer is none of a served teacher's ({type(error).__name__}: {error})") from None
    if len(reply.logprobs) != tokens:
        raise ValueError(f"the teacher answered with {len(reply.logprobs)} log-probs; {tokens} were asked for")
    if not bool((reply.logprobs <= 1e-3).all()):  # NaN too
        raise ValueError("the teacher answered with log-probs that are none")
    return reply


def _pack(values: Tensor, kind: str) -> str:
    return base64.b64encode(values.detach().cpu().numpy().astype(kind).tobytes()).decode()


def _unpack(text: str, kind: str) -> Tensor:
    import numpy

    values = numpy.frombuffer(base64.b64decode(text, validate=True), dtype=kind)
    return torch.from_numpy(values.astype(kind[1:]))


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits over the ids of all tokens; end tokens are no part of it, they may differ (`stop_cell`)."""
    return blake2b(repr(sorted(tokenizer.get_vocab().items())).encode(), digest_size=8).hexdigest()


def split(groups: Sequence[Group], max_tokens: int, max_rows: int) -> list[list[Group]]:
    """Groups into requests of at most so many tokens and rows, in their order; only a group that is too large is cut.

    What goes into a request depends on the rows alone, so that the same rows are scored in the same passes.

    Raises:
        ValueError: a single row is longer than `max_tokens`.
    """
    requests: list[list[Group]] = []
    tokens = rows = 0
    for group in (part for whole in groups for part in _parts(whole, max_tokens, max_rows)):
        if not requests or tokens + group.tokens > max_tokens or rows + len(group.responses) > max_rows:
            requests.append([])
            tokens = rows = 0
        requests[-1].append(group)
        tokens, rows = tokens + group.tokens, rows + len(group.responses)
    return requests


def _parts(group: Group, max_tokens: int, max_rows: int) -> Iterator[Group]:
    start = tokens = 0
    for row, response in enumerate(group.responses):
        length = len(group.prompt) + len(response)
        if length > max_tokens:
            raise ValueError(
                f"a row has {length} tokens and a request to the teacher holds at most {max_tokens}; raise "
                "max_tokens_per_request of model.teacher and --max-tokens-per-request of kdrl serve-teacher"
            )
        if row > start and (tokens + length > max_tokens or row - start == max_rows):
            yield Group(group.prompt, group.responses[start:row], group.asked[start:row])
            start, tokens = row, 0
        tokens += length
    yield Group(group.prompt, group.responses[start:], group.asked[start:])
