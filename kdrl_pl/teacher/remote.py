"""The teacher on another process or machine: `kdrl serve-teacher` holds it, this one asks over HTTP."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from kdrl_pl import signals
from kdrl_pl.errors import RunError, TeacherLost
from kdrl_pl.experience import Experience
from kdrl_pl.teacher.calls import Refused, Server, read_token
from kdrl_pl.teacher.frozen import FrozenTeacher
from kdrl_pl.teacher.wire import (
    INFO_PATH,
    SCORE_PATH,
    Group,
    ScoreReply,
    ScoreRequest,
    read_reply,
    split,
    vocabulary_fingerprint,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdrl_pl.logprobs import Head
    from kdrl_pl.models.language_model import LanguageModel

log = logging.getLogger(__name__)

POLL = 0.1  # seconds between two looks for a signal while answers are awaited

Answer = TypeVar("Answer")


class RemoteTeacher(FrozenTeacher):
    """A teacher that `kdrl serve-teacher` holds in another process, on this machine or another one.

    It tells log-probs of tokens, so it serves every form that needs no more: distillation.estimator k2, reward shaping,
    the masks, the KL in validation. Where the server is away, the run waits and says so; a server that comes back with
    another model is refused. Every rank asks for its own rows.

    Args:
        url: of the server, http://host:port or https://host:port.
        token_file: file with the bearer token; null takes the environment variable KDRL_TEACHER_TOKEN, if it is set.
        timeout: seconds without a byte of an answer after which a request is made anew.
        patience: seconds without any answer after which the run saves what it has and stops; it can be resumed.
        max_tokens_per_request: tokens of a request, the prompt counted once per row; the server's limit counts too.
        requests_in_flight: requests at the same time.

    Raises:
        ValueError: the URL is none, or a number is too small.
    """

    def __init__(
        self,
        url: str,
        token_file: str | None = None,
        timeout: float = 600.0,
        patience: float = 1800.0,
        max_tokens_per_request: int = 16384,
        requests_in_flight: int = 2,
    ) -> None:
        for name, value, least in (
            ("timeout", timeout, 0.1),
            ("patience", patience, 0),
            ("max_tokens_per_request", max_tokens_per_request, 1),
            ("requests_in_flight", requests_in_flight, 1),
        ):
            if not value >= least:
                raise ValueError(f"teacher.{name} is {value}; expected at least {least}")
        self.url, self.token_file, self.requests_in_flight = url, token_file, requests_in_flight
        self.max_tokens_per_request, self.max_rows = max_tokens_per_request, 4096
        self.server = Server(url, None, timeout, patience, lambda: self._is_over or signals.should_stop())
        self.model, self.score_metrics = None, {}
        self.told: dict[str, Any] | None = None  # what the server says of itself
        self._is_over = False  # a request failed: those in flight end
        self._workers: ThreadPoolExecutor | None = None

    @property
    def is_loaded(self) -> bool:
        return self.told is not None

    @property
    def whole_vocabulary(self) -> str:
        """Why forms that read the teacher's whole vocabulary cannot have it, with the cure."""
        return (
            f"{type(self).__name__} tells log-probs of tokens alone; set model.distillation.estimator: k2, or take a "
            "teacher into this process (model.teacher.class_path: kdrl_pl.teacher.FrozenTeacher)"
        )

    def load(self, device: torch.device | str, student_tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Ask the server who it is, once; waits for a server that is not there yet.

        Raises:
            ValueError: its tokenizer is another one than the student's, or the token is wrong.
            TeacherLost: it does not answer.
        """
        if self.is_loaded:
            return
        self.server.token = read_token(self.token_file)
        if self.server.is_exposed:
            log.warning(
                "the token goes to %s in clear, as do prompts and responses: use an https:// proxy or an SSH tunnel",
                self.server.url,
            )
        told = self._identify(student_tokenizer)
        self.told = told
        log.info("the teacher is %s at %s", self.fingerprint(), self.server.url)

    def _identify(self, student_tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
        told = _identity(self.server)
        self.max_tokens_per_request = min(self.max_tokens_per_request, told["max_tokens_per_request"])
        self.max_rows = told["max_rows"]
        if student_tokenizer is not None and vocabulary_fingerprint(student_tokenizer) != told["vocabulary"]:
            raise ValueError(
                f"the teacher at {self.server.url} has another tokenizer than the student: {told['vocab_size']} token "
                f"ids against {len(student_tokenizer.get_vocab())}, or the same ids for other tokens. Distillation "
                "compares probabilities of the same token ids; serve a teacher of the student's model family"
            )
        return told

    @torch.no_grad()
    def score(self, experience: Experience, asked: Tensor, *, hidden: bool = False) -> None:
        """Fill in `teacher_logprobs` where `asked`; zero elsewhere.

        Args:
            experience: rows; log-probs are at their temperature, at stop tokens those of their `stop_cell`.
            asked: (B, T) bool, tokens to score; others than response tokens are ignored. Rows without any are not sent.
            hidden: refused: the whole vocabulary does not go over the network.

        Raises:
            ValueError: `hidden`.
            RuntimeError: `load` was not called.
            TeacherLost: no answer for `patience` seconds, a server with another model, or a signal while waiting.
        """
        if hidden:
            raise ValueError(self.whole_vocabulary)
        asked = asked & experience.response_mask
        parts = self._ask(experience, asked, lambda groups: self._score_groups(groups, experience))
        experience.teacher_logprobs = torch.zeros(asked.shape, dtype=torch.float32, device=experience.device)
        experience.teacher_logprobs[asked] = torch.cat([torch.zeros(0), *parts]).to(experience.device)

    def top_k(self, experience: Experience, asked: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The teacher's `k` most probable words at the N tokens asked about, row by row, and their log-probs.

        Args:
            experience, asked: as in `score`.
            k: from 1 to 256.

        Returns:
            ids, (N, k) int64, most probable first, and log-probs, (N, k) float32 nats, of words, not of stop cells.
        """
        asked = asked & experience.response_mask
        replies = self._ask(experience, asked, lambda groups: self._reply(groups, experience, k))
        empty = torch.zeros(0, k)
        ids = torch.cat([empty.long(), *(reply.top_ids for reply in replies)])
        return ids, torch.cat([empty, *(reply.top_logprobs for reply in replies)])

    def _score_groups(self, groups: list[Group], experience: Experience) -> Tensor:
        """(N,) log-probs of the tokens asked about."""
        return self._reply(groups, experience).logprobs

    def _reply(self, groups: list[Group], experience: Experience, top_k: int = 0) -> ScoreReply:
        request = ScoreRequest(groups, float(experience.temperature), tuple(experience.stop_cell), top_k)
        tokens = sum(flags.count("1") for group in groups for flags in group.asked)
        reply = read_reply(self.server.post(SCORE_PATH, request.to_json()), tokens, top_k)
        if reply.teacher != self.fingerprint():
            raise TeacherLost(
                f"the server at {self.server.url} came back with another teacher: {reply.teacher} instead of "
                f"{self.fingerprint()}; serve the one that this run began with, and resume the run"
            )
        return reply

    def _ask(self, experience: Experience, asked: Tensor, ask: Callable[[list[Group]], Answer]) -> list[Answer]:
        """The answers to all requests that these rows make, in their order."""
        if not self.is_loaded:
            raise RuntimeError("the teacher is not loaded; call teacher.load(device, tokenizer) first")
        requests = split(groups_of(experience, asked), self.max_tokens_per_request, self.max_rows)
        if self._workers is None:
            self._workers = ThreadPoolExecutor(self.requests_in_flight, "ask-teacher")
        self._is_over = False
        futures = [self._workers.submit(ask, groups) for groups in requests]
        try:
            self._await(futures)
            return [future.result() for future in futures]
        except (Refused, ValueError) as error:
            raise TeacherLost(str(error)) from error
        finally:
            self._is_over = True
            if not all(future.done() for future in futures):
                for future in futures:
                    future.cancel()
                self.server.interrupt()
                wait(futures)

    def _await(self, futures: Sequence[Future]) -> None:
        """Until all are done or one failed; a signal may come in between, which only the main thread can see."""
        waiting: set[Future] = set(futures)
        while waiting:
            done, waiting = wait(waiting, POLL, FIRST_EXCEPTION)
            for future in done:
                future.result()
            if signals.should_stop():
                raise TeacherLost(f"stopped while waiting for the teacher at {self.server.url}")

    def head(self) -> Head:
        """Refused: the teacher's head is elsewhere.

        Raises:
            ValueError: always.
        """
        raise ValueError(self.whole_vocabulary)

    def sampler(self) -> LanguageModel:
        """Refused: it answers no prompts.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"rollout.policy is teacher, but a {type(self).__name__} only scores; take the teacher into this process "
            "(model.teacher.class_path: kdrl_pl.teacher.FrozenTeacher)"
        )

    def stop_ids(self) -> list[int]:
        """Ids that end a response of the teacher; before `load` the server is asked for them alone."""
        told = self.told
        if told is None:
            self.server.token = read_token(self.token_file)
            told = _identity(self.server)
        return list(told["stop_ids"])

    def fingerprint(self) -> str:
        """That of the same model in this process: a run may be resumed with either."""
        if self.told is None:
            raise RuntimeError("the teacher is not loaded; call teacher.load(device, tokenizer) first")
        return self.told["fingerprint"]

    def quantization_error(self, experience: Experience) -> dict[str, float]:
        """Refused: only the server has the weights.

        Raises:
            ValueError: always.
        """
        raise ValueError("a served teacher cannot be compared with its fp32 weights; do it where the weights are")


def groups_of(experience: Experience, asked: Tensor) -> list[Group]:
    """Rows with a token that is asked about, in their order; neighbours with one prompt together.

    Args:
        experience: rows.
        asked: (B, T) bool, response tokens.
    """
    groups: list[Group] = []
    last = None
    ids, prompts = experience.input_ids.cpu(), experience.prompt_lengths.tolist()
    lengths, flags, numbers = experience.attention_mask.sum(1).tolist(), asked.cpu(), experience.group.tolist()
    for row in flags.any(1).nonzero().flatten().tolist():
        begin, end = prompts[row], lengths[row]
        prompt = ids[row, :begin].tolist()
        if last is None or numbers[row] != last or groups[-1].prompt != prompt:
            groups.append(Group(prompt, [], []))
            last = numbers[row]
        groups[-1].responses.append(ids[row, begin:end].tolist())
        groups[-1].asked.append("".join("1" if flag else "0" for flag in flags[row, begin:end].tolist()))
    return groups


def _identity(server: Server) -> dict[str, Any]:
    """What a served teacher says of itself.

    Raises:
        RunError: there is another kind of server.
    """
    try:
        told = json.loads(server.get(INFO_PATH))["model"]
        numbers = ("vocab_size", "max_tokens_per_request", "max_rows")
        texts = ("fingerprint", "vocabulary", "precision")
        fits = all(type(told[name]) is int for name in numbers) and all(type(told[name]) is str for name in texts)
        fits = fits and all(type(token) is int for token in told["stop_ids"])
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, Refused) and error.status != 404:
            raise
        fits = False
    if not fits:
        raise RunError(
            f"{server.url} is no teacher of kdrl serve-teacher; for a vLLM server use model.teacher.class_path: "
            "kdrl_pl.teacher.VLLMTeacher"
        )
    return told
