"""A frozen teacher behind HTTP, for `kdrl_pl.teacher.RemoteTeacher`; LitServe is the engine.

One process speaks HTTP and checks every request; another one holds the model and takes them one by one. A request is
scored in passes of its own, so that its log-probs are the same bits whatever else is asked meanwhile; `max_batch_size`
above 1 lets small requests share a pass, and gives that up.
"""

# Annotations are not postponed in this file: LitServe hands that of `decode_request` to FastAPI as it is.

import asyncio
import os
import secrets
import signal
import threading
import time
from queue import Empty
from typing import Annotated, Any

import litserve
import torch
from fastapi import Depends, HTTPException, Request
from litserve.loops.base import _SENTINEL_VALUE, _StopLoopError
from litserve.loops.simple_loops import BatchedLoop
from starlette.requests import ClientDisconnect

from kdrl_pl.models.loading import check_model_path, load_tokenizer, stop_ids, vocabulary_size
from kdrl_pl.teacher.frozen import FrozenTeacher
from kdrl_pl.teacher.wire import (
    HEALTH_PATH,
    INFO_PATH,
    SCORE_PATH,
    BadRequest,
    Limits,
    ScoreReply,
    ScoreRequest,
    read_request,
    vocabulary_fingerprint,
)

BODY_SECONDS = 60.0  # in which the body of a request must arrive
_QUEUE_TIMEOUT = 600.0  # seconds after which a request that still waits is answered with 504: its client has gone


async def read_body(request: Request) -> ScoreRequest:
    """The request, checked before it reaches the model's process; errors become one short JSON sentence."""
    limits: Limits = request.app.state.limits
    try:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise BadRequest(415, "the body must be application/json")
        body = bytearray()
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.max_bytes:
                    raise BadRequest(413, f"a body of more than {limits.max_bytes} bytes")
        return read_request(bytes(body), limits)
    except BadRequest as error:
        raise HTTPException(error.status, str(error)) from None
    except ClientDisconnect:
        raise HTTPException(400, "the client hung up") from None
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {BODY_SECONDS:.0f} s") from None


class TeacherAPI(litserve.LitAPI):
    """What LitServe calls.

    Args:
        teacher: not loaded yet; that happens in the process of the model.
        device: where it goes.
        token: bearer token that every request must bring; None lets everyone ask.
        max_batch_size, batch_timeout: see `make_server`.
    """

    def __init__(
        self, teacher: FrozenTeacher, device: str, token: str | None, max_batch_size: int, batch_timeout: float
    ) -> None:
        loop = WaitingLoop() if max_batch_size > 1 else "auto"
        super().__init__(max_batch_size, batch_timeout, api_path=SCORE_PATH, loop=loop)
        self.teacher, self.device_name, self.token = teacher, device, token

    def setup(self, device: str) -> None:
        end_with_parent()
        self.teacher.load(self.device_name)

    def authorize(self, request: Request) -> None:
        """Refuse, in a time that tells nothing about the token, whoever does not know it."""
        if self.token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if not secrets.compare_digest(given.encode(), self.token.encode()) or scheme.lower() != "bearer":
            raise HTTPException(401, "a valid bearer token is needed", {"WWW-Authenticate": "Bearer"})

    def decode_request(self, request: Annotated[ScoreRequest, Depends(read_body)]) -> ScoreRequest:
        return request

    def predict(self, x: Any) -> Any:
        """The answer to a request, or to each of several."""
        return self._answer([x])[0] if isinstance(x, ScoreRequest) else self._answer(x)

    def encode_response(self, output: ScoreReply) -> dict:
        return output.to_dict()

    def _answer(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        """Requests of the same temperature, stop cell and top-k as one."""
        replies: dict[int, ScoreReply] = {}
        kinds: dict[tuple, list[int]] = {}
        for i, request in enumerate(requests):
            kinds.setdefault((request.temperature, request.stop_cell, request.top_k), []).append(i)
        for kind, members in kinds.items():
            whole = score(self.teacher, ScoreRequest([g for i in members for g in requests[i].groups], *kind))
            sizes = [sum(flags.count("1") for g in requests[i].groups for flags in g.asked) for i in members]
            parts = [
                [None] * len(sizes) if part is None else part.split(sizes)
                for part in (whole.logprobs, whole.top_ids, whole.top_logprobs)
            ]
            for i, *answer in zip(members, *parts, strict=True):
                replies[i] = ScoreReply(whole.teacher, *answer)
        return [replies[i] for i in range(len(requests))]


@torch.no_grad()
def score(teacher: FrozenTeacher, request: ScoreRequest) -> ScoreReply:
    """What the teacher says of the rows of a request."""
    experience, asked = request.experience()
    experience, asked = experience.to(teacher.device), asked.to(teacher.device)
    teacher.score(experience, asked, hidden=request.top_k > 0)
    reply = ScoreReply(teacher.fingerprint(), experience.teacher_logprobs[asked])
    if request.top_k:
        head, states = teacher.head(), experience.teacher_hidden  # None where nothing is asked
        hidden = head.weight[:0] if states is None else states[asked]  # (N, H)
        chunks = hidden.split(max(2**24 // head.weight.shape[0], 1))
        tops = [head.logprobs(chunk, request.temperature).topk(request.top_k) for chunk in chunks]
        reply.top_ids, reply.top_logprobs = torch.cat([t.indices for t in tops]), torch.cat([t.values for t in tops])
    return reply


class WaitingLoop(BatchedLoop):
    """LitServe's loop for batches asks its queue a thousand times a second; this one waits for a first request."""

    def get_batch_requests(self, lit_api: Any, request_queue: Any, transport: Any) -> tuple[list, list]:
        batch: list = []
        until = 0.0
        while len(batch) < lit_api.max_batch_size:
            try:
                item = request_queue.get(timeout=max(until - time.monotonic(), 0.0) if batch else 1.0)
            except Empty:
                break
            if item == _SENTINEL_VALUE:
                raise _StopLoopError
            consumer, uid, _, request = item
            until = until or time.monotonic() + lit_api.batch_timeout
            batch.append((consumer, uid, request))
        return batch, []


def end_with_parent() -> None:
    """End this process by its parent's hand, or soon after it: a server that was killed leaves nothing behind."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C on a terminal goes to all; the parent stops the others
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


def identity(teacher: FrozenTeacher) -> dict[str, Any]:
    """What a client wants to know of a teacher that is not loaded yet."""
    from transformers import AutoConfig, GenerationConfig

    path = check_model_path(teacher.path)
    tokenizer, config = load_tokenizer(path), AutoConfig.from_pretrained(path, trust_remote_code=False)
    try:
        generation = GenerationConfig.from_pretrained(path)
    except OSError:  # the folder has no generation_config.json
        generation = GenerationConfig.from_model_config(config)
    vocab_size = vocabulary_size(tokenizer)
    return {
        "fingerprint": teacher.fingerprint(),
        "precision": teacher.quantization or teacher.dtype,
        "vocabulary": vocabulary_fingerprint(tokenizer),
        "vocab_size": vocab_size,
        "stop_ids": [token for token in stop_ids(tokenizer, generation) if token < vocab_size],
        "max_row_tokens": getattr(config.get_text_config(), "max_position_embeddings", None),
    }


def make_server(
    teacher: FrozenTeacher,
    *,
    device: str = "cpu",
    token: str | None = None,
    max_batch_size: int = 1,
    batch_timeout: float = 0.0,
    max_tokens_per_request: int = 65536,
) -> litserve.LitServer:
    """A server of `teacher`, ready to `run`.

    Args:
        teacher: not loaded; the process of the model does it.
        device: where: "cpu", "cuda", "cuda:1".
        token: bearer token that every request must bring; None lets everyone ask.
        max_batch_size: requests that may share a forward pass.
        batch_timeout: seconds to wait for them.
        max_tokens_per_request: of all rows of a request, the prompt counted once per row.

    Raises:
        FileNotFoundError, ValueError: there is no such model.
    """
    known = identity(teacher)
    limits = Limits(
        vocab_size=known["vocab_size"],
        max_tokens=max_tokens_per_request,
        max_row_tokens=known["max_row_tokens"] or max_tokens_per_request,
        max_bytes=12 * max_tokens_per_request
        + (1 << 16),  # an id of seven digits, its comma and its flag, and to spare
    )
    known |= {"max_tokens_per_request": limits.max_tokens, "max_rows": limits.max_rows}
    server = litserve.LitServer(
        TeacherAPI(teacher, device, token, max_batch_size, batch_timeout),
        accelerator="cpu",  # LitServe only names a device; `TeacherAPI` has its own
        timeout=_QUEUE_TIMEOUT,
        healthcheck_path=HEALTH_PATH,
        info_path=INFO_PATH,
        model_metadata=known,
        disable_openapi_url=True,
    )
    server.app.state.limits = limits
    return server
