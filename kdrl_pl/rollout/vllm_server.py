"""Rollouts by a vLLM server: rows go over HTTP, token ids in and out, and weights through a folder that both sides see.

The server runs on GPUs of its own (or shares a machine without one), with any parallelism vLLM has:

    python -m kdrl_pl.rollout.plain_weights STUDENT FOLDER
    VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER --tokens-only --logprobs-mode processed_logprobs --dtype bfloat16

The command of vLLM's CPU build does not start; there it is python -m vllm.entrypoints.openai.api_server --model FOLDER.
Before each rollout the student's weights are written as safetensors, the server is told to read them in place
(`collective_rpc` of `reload_weights`), and to forget its prefix cache. Written against vLLM 0.32.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch

from kdrl_pl.errors import RunError
from kdrl_pl.models.loading import DTYPES
from kdrl_pl.parallel import all_reduce_max, gathered_weights, rank
from kdrl_pl.rollout.agreement import check_agreement
from kdrl_pl.rollout.engine import Completions, RolloutInterrupted
from kdrl_pl.rollout.plain_weights import plain_weights, write_weights
from kdrl_pl.rollout.requests import check_request
from kdrl_pl.rollout.sampling import Sampling
from kdrl_pl.rollout.vllm_engine import sampling_settings, seed_of

if TYPE_CHECKING:
    from kdrl_pl.models.language_model import LanguageModel

_NOT_A_NUMBER = -9999.0  # what the server makes of a log-prob that is NaN
_PREFIX = "generate-tokens-"  # what the server puts before the name of a request
_POLL = 0.1  # seconds between two looks at should_stop


class VLLMServerEngine:
    """Samples with a vLLM server that was started for this run, see docs/vllm.md; needs no vLLM on this side.

    Set model.importance_cap: its log-probs are not bit for bit the trainer's. All ranks ask the same server; rank 0
    brings it the weights. The server's endpoints for that are open to everybody who reaches them: keep it on a private
    network.

    Args:
        url: of the server, such as "http://localhost:8000".
        weights_folder: folder that the trainer and the server both see, for one copy of the weights at a time; null =
            the temporary folder of this machine, where the server runs too. /dev/shm is memory.
        dtype: of the weights that are sent, the server's --dtype: "bfloat16", "float16" or "float32".
        max_requests: rows of each rank that are asked for at a time.
        timeout: seconds that one answer may take.

    Raises:
        ValueError: an argument lies outside its range.
    """

    def __init__(
        self,
        url: str,
        weights_folder: str | None = None,
        dtype: str = "bfloat16",
        max_requests: int = 256,
        timeout: float = 600.0,
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise ValueError(f"url is {url!r}; expected something like http://localhost:8000")
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
        if max_requests < 1:
            raise ValueError(f"max_requests is {max_requests}; expected at least 1")
        if not timeout > 0:
            raise ValueError(f"timeout is {timeout}; expected seconds above 0")
        self.url, self.weights_folder, self.dtype = url.rstrip("/"), weights_folder, dtype
        self.max_requests, self.timeout = max_requests, timeout
        self._vocab_size = self._limit = 0
        self._stop_token_ids: list[int] = []

    def sync(self, student: LanguageModel, stop_token_ids: Iterable[int]) -> None:
        """Bring the server the student's weights; every rank calls it, rank 0 does it.

        Raises:
            RunError: the server does not answer, has other settings or another model, computes the student otherwise or
                cannot read the weights; every rank raises it.
            ValueError: see `plain_weights`.
        """
        self._vocab_size, is_first = student.vocab_size, not self._limit
        self._stop_token_ids = [token for token in stop_token_ids if token < student.vocab_size]
        error: RunError | None = None
        with gathered_weights(student):
            if is_first:
                error = self._try(self._check_settings)
            if error is None and rank() == 0:
                error = self._try(lambda: self._send_weights(student))
            if error is None and rank() == 0 and is_first:
                error = self._try(lambda: check_agreement(student, self.dtype, self._sample_one))
        if all_reduce_max(int(error is not None), student.device):
            self._limit = 0
            raise error or RunError("the vLLM server did not take the weights; another rank says why")

    def _sample_one(self, prompt: list[int], tokens: int) -> Completions:
        return self.generate([prompt], 1, Sampling(max_tokens=tokens), [0])

    def _try(self, work: Callable[[], None]) -> RunError | None:
        try:
            work()
        except RunError as error:
            return error
        return None

    def _check_settings(self) -> None:
        """The server must report log-probs of what it sampled from, in the dtype that is sent."""
        config = self._ask("GET", "/server_info?config_format=json")["vllm_config"]["model_config"]
        found = {
            "--logprobs-mode": (config["logprobs_mode"], "processed_logprobs"),
            "--dtype": (str(config["dtype"]).removeprefix("torch."), self.dtype),
        }
        for option, (has, expected) in found.items():
            if has != expected:
                raise RunError(f"the vLLM server at {self.url} runs with {option} {has}; start it with {expected}")
        self._limit = int(config["max_model_len"])

    def _send_weights(self, student: LanguageModel) -> None:
        folder = Path(tempfile.mkdtemp(prefix="kdrl-weights-", dir=self.weights_folder))
        try:
            write_weights(plain_weights(student, student.vocab_size, getattr(torch, self.dtype)), folder)
            folder.chmod(0o755)  # the server may run as somebody else
            self._ask("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        finally:
            shutil.rmtree(folder)
        if not self._ask("POST", "/reset_prefix_cache")["success"]:
            raise RunError(
                f"the vLLM server at {self.url} still works on rows of somebody else, with weights that are gone; a "
                "run needs a server of its own"
            )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        keys: Sequence[int],
        should_stop: Callable[[], bool] | None = None,
    ) -> Completions:
        """See `RolloutEngine.generate`; `should_stop` is polled ten times a second.

        Raises:
            RolloutInterrupted: `should_stop` returned True.
            ValueError: a prompt is empty, too long for the server or has an id outside the vocabulary; the number of
                keys is not P·G; no `sync` came before.
            RunError: the server did not answer.
            FloatingPointError: the model's logits were NaN.
        """
        if not self._limit:
            raise ValueError("the engine has no weights; call sync(student, stop_token_ids) before generate")
        check_request(prompts, group_size, sampling, keys, known_ids=self._vocab_size, vocab_size=self._vocab_size)
        needed = max(map(len, prompts), default=0) + sampling.max_tokens
        if needed > self._limit:
            raise ValueError(
                f"the longest prompt and sampling.max_tokens {sampling.max_tokens} need {needed} tokens, but the "
                f"server has room for {self._limit}; start it with a larger --max-model-len, or lower "
                "sampling.max_tokens"
            )
        settings: dict[str, Any] = sampling_settings(sampling, self._stop_token_ids)
        done = Completions([[]] * len(keys), [[]] * len(keys), [False] * len(keys))
        bodies: list[dict[str, Any]] = [
            {"token_ids": list(prompts[row // group_size]), "sampling_params": {**settings, "seed": seed_of(key)}}
            for row, key in enumerate(keys)
        ]
        for row, answer in enumerate(self._ask_all(bodies, should_stop)):
            (choice,) = answer["choices"]
            told = choice["logprobs"]["content"]
            done.token_ids[row] = choice["token_ids"]
            done.logprobs[row] = [token["logprob"] for token in told]
            done.finished[row] = choice["finish_reason"] == "stop"
            if any(token["rank"] is None or token["logprob"] <= _NOT_A_NUMBER for token in told):
                raise FloatingPointError(
                    "the student's logits are NaN or infinite; its weights have diverged or overflowed"
                )
        return done

    def _ask_all(self, bodies: Sequence[dict], should_stop: Callable[[], bool] | None) -> list[dict]:
        """The answers to all rows; on the way out of an exception the server gives up those that are not done."""
        rollout = uuid.uuid4().hex
        names = [f"{rollout}-{row}" for row in range(len(bodies))]
        given_up = threading.Event()

        def ask(name: str, body: dict) -> dict:
            return (
                {} if given_up.is_set() else self._ask("POST", "/inference/v1/generate", {**body, "request_id": name})
            )

        with ThreadPoolExecutor(self.max_requests, "vllm") as pool:
            answers = [pool.submit(ask, name, body) for name, body in zip(names, bodies, strict=True)]
            waiting = set(answers)
            try:
                while waiting:
                    if should_stop is not None and should_stop():
                        raise RolloutInterrupted("the rollout was asked to stop")
                    finished, waiting = wait(waiting, _POLL, FIRST_COMPLETED)
                    for answer in finished:
                        answer.result()  # raises what went wrong
            except BaseException as error:
                given_up.set()
                open_names = [_PREFIX + name for name, answer in zip(names, answers, strict=True) if not answer.done()]
                if open_names:
                    with suppress(RunError):  # a server that is gone has given them up
                        self._ask("POST", "/inference/v1/abort_requests", {"request_ids": open_names})
                if isinstance(error, RunError) and should_stop is not None and should_stop():
                    # The end of a job reaches the server too, and it goes first.
                    raise RolloutInterrupted("the rollout was asked to stop") from error
                raise
        return [answer.result() for answer in answers]

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One request and its answer.

        Raises:
            RunError: no answer, or one that is an error.
        """
        where = urlsplit(self.url)
        kind = HTTPSConnection if where.scheme == "https" else HTTPConnection
        connection = kind(where.hostname or "", where.port, timeout=self.timeout)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, where.path + path, content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
        except (OSError, HTTPException) as error:
            why = f"{type(error).__name__}: {error}".rstrip(": ")
            raise RunError(
                f"the vLLM server at {self.url} does not answer ({why}); start it as docs/vllm.md says"
            ) from error
        finally:
            connection.close()
        if answer.status == 404:
            raise RunError(
                f"the vLLM server at {self.url} has no {path.partition('?')[0]}; start it with VLLM_SERVER_DEV_MODE=1 "
                "and --tokens-only, as docs/vllm.md says"
            )
        if answer.status != 200:
            cure = "; was it started on what python -m kdrl_pl.rollout.plain_weights writes? Then start it anew"
            raise RunError(
                f"the vLLM server at {self.url} refused {path}: {answer.status} {text[:500]}"
                + (cure if "rpc" in path else "")
            )
        return json.loads(text) if text else {}
