"""The teacher behind a vLLM server (OpenAI-compatible `/v1/completions` with `prompt_logprobs`)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdrl_pl.errors import RunError, TeacherLost
from kdrl_pl.experience import Experience
from kdrl_pl.models.loading import vocabulary_size
from kdrl_pl.teacher.calls import Refused
from kdrl_pl.teacher.remote import RemoteTeacher, log
from kdrl_pl.teacher.wire import Group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPLETIONS, MODELS, TOKENIZE = "/v1/completions", "/v1/models", "/tokenize"
PROBED_TOKENS = 4096  # of the vocabulary, whose text both tokenizers must read alike
PROBE = 16  # ids of a row that is asked about again when the server may have been away
SAME_MODEL = 0.05  # nats by which the probe may differ when the server comes back: rounding, no other weights


class VLLMTeacher(RemoteTeacher):
    """A teacher that a vLLM server holds: `vllm serve MODEL`, with any parallelism and quantisation that vLLM has.

    It tells log-probs at temperature 1 only, over all rows of its head: where the model has more rows than the
    tokenizer has ids, their probability is missing from the words', which is said once (docs/served_teacher.md).

    Args:
        url: of the server, http://host:port or https://host:port, without /v1.
        model: name that the server gives it (--served-model-name); null takes the only one there is.
        stop_token_ids: ids that end a response of the teacher, which the server does not tell; null takes the student's
            end token.
        token_file: file with the server's API key; null takes the environment variable KDRL_TEACHER_TOKEN, if set.
        timeout: seconds without a byte of an answer after which a request is made anew.
        patience: seconds without any answer after which the run saves what it has and stops; it can be resumed.
        max_tokens_per_request: tokens of a request, the prompt counted once per row.
        requests_in_flight: requests at the same time.

    Raises:
        ValueError: the URL is none, or a number is too small.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        stop_token_ids: list[int] | None = None,
        token_file: str | None = None,
        timeout: float = 600.0,
        patience: float = 1800.0,
        max_tokens_per_request: int = 16384,
        requests_in_flight: int = 2,
    ) -> None:
        super().__init__(url, token_file, timeout, patience, max_tokens_per_request, requests_in_flight)
        self.served_name, self.stop_token_ids = model, stop_token_ids
        self._probe: list[int] = []
        self._answer: list[float] = []
        self._absences = 0

    def _identify(self, student_tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
        try:
            models = {entry["id"]: entry for entry in json.loads(self.server.get(MODELS))["data"]}
        except (Refused, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self.server.url} is no vLLM server, or wants another token: {error}") from None
        name = self.served_name or next(iter(models), None)
        if name not in models or (self.served_name is None and len(models) > 1):
            found = ", ".join(models) or "none"
            raise ValueError(f"the server at {self.server.url} has the models {found}; name one as model.teacher.model")
        if student_tokenizer is None:
            raise ValueError("VLLMTeacher needs the student's tokenizer, to compare its own with; pass it to load")
        self._check_tokenizer(name, student_tokenizer)
        stops = [student_tokenizer.eos_token_id] if self.stop_token_ids is None else self.stop_token_ids
        told = {
            "name": name,
            "fingerprint": f"vllm:{models[name].get('root') or name}",
            "stop_ids": sorted(stops),
        }
        self._check_vocabulary(name, vocabulary_size(student_tokenizer))
        size = vocabulary_size(student_tokenizer)
        self._probe = [size * i // PROBE for i in range(PROBE)]
        self._answer, self._absences = self._ask_for(name, [self._probe])[0], self.server.absences
        return told

    def _check_tokenizer(self, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """A text made of many of the student's tokens must become the same ids on both sides."""
        size, special = vocabulary_size(tokenizer), set(tokenizer.all_special_ids)
        probed = [token for token in range(0, size, max(size // PROBED_TOKENS, 1)) if token not in special]
        words = tokenizer.batch_decode([[token] for token in probed])
        text = "".join(word for word in words if "\ufffd" not in word)  # half a character is no text
        body = json.dumps({"model": name, "prompt": text, "add_special_tokens": False}).encode()
        try:
            theirs = json.loads(self.server.post_once(TOKENIZE, body))["tokens"]
        except Refused:  # a text that it cannot read at all
            theirs = []
        ours = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ours != theirs:
            raise ValueError(
                f"the teacher {name} at {self.server.url} has another tokenizer than the student: it reads a text of "
                f"{len(probed)} of its tokens as {len(theirs)} other ones. Distillation compares probabilities of the "
                "same token ids; serve a teacher of the student's model family"
            )

    def _check_vocabulary(self, name: str, size: int) -> None:
        """Whether the model's head has rows beyond the tokenizer's ids: then it takes the first of them for a word."""
        try:
            self.server.post(COMPLETIONS, _body(name, [[0, size]]))
        except Refused:
            return
        log.warning(
            "the teacher's head at %s has rows beyond the %d ids of the tokenizer: vLLM leaves them part of the "
            "probability, which FrozenTeacher and kdrl serve-teacher cut off (docs/served_teacher.md)",
            self.server.url,
            size,
        )

    def stop_ids(self) -> list[int]:
        """Ids that end a response of the teacher.

        Raises:
            RuntimeError: `load` was not called, and `stop_token_ids` are not given.
        """
        if self.stop_token_ids is not None:
            return sorted(self.stop_token_ids)
        if self.told is None:
            raise RuntimeError(
                "the teacher is not loaded; call teacher.load(device, tokenizer) first, or give stop_token_ids"
            )
        return super().stop_ids()

    @torch.no_grad()
    def score(self, experience: Experience, asked: Tensor, *, hidden: bool = False) -> None:
        """As `RemoteTeacher.score`.

        Raises:
            ValueError: the rows were sampled at another temperature than 1.
        """
        if experience.temperature != 1.0:
            raise ValueError(
                f"the rows are at temperature {experience.temperature:g}, and vLLM's prompt_logprobs are at 1 whatever "
                "one asks for; sample at temperature 1 (for validation: model.evaluate_kl: false), or use kdrl "
                "serve-teacher"
            )
        super().score(experience, asked, hidden=hidden)

    def _score_groups(self, groups: list[Group], experience: Experience) -> Tensor:
        """(N,) log-probs of the tokens asked about."""
        stops = set(experience.stop_cell)
        rows = [(g.prompt, r, a) for g in groups for r, a in zip(g.responses, g.asked, strict=True)]
        # What a stop cell adds: in the place of a sampled stop token the others, each at the end of a row of its own.
        twins = [
            (i, place, other)
            for i, (_, response, asked) in enumerate(rows)
            for place, (token, flag) in enumerate(zip(response, asked, strict=True))
            if flag == "1" and token in stops
            for other in sorted(stops - {token})
        ]
        prompts = [prompt + response for prompt, response, _ in rows]
        prompts += [rows[i][0] + rows[i][1][:place] + [other] for i, place, other in twins]
        told = self._prompt_logprobs(prompts)
        flat = []
        for i, (prompt, response, asked) in enumerate(rows):
            logprobs = told[i][len(prompt) :]
            for place in (p for p, token in enumerate(response) if token in stops and asked[p] == "1"):
                others = [told[len(rows) + j][-1] for j, twin in enumerate(twins) if twin[:2] == (i, place)]
                cell = torch.tensor([logprobs[place], *others], dtype=torch.float64)
                logprobs[place] = float(cell.logsumexp(0))
            flat += [value for value, flag in zip(logprobs, asked, strict=True) if flag == "1"]
        return torch.tensor(flat, dtype=torch.float32)

    def _prompt_logprobs(self, prompts: list[list[int]]) -> list[list[float]]:
        """Per prompt the log-prob of each of its tokens; the first, which has none, gets 0."""
        told = self._ask_for(self.told["name"], prompts)
        absences = self.server.absences
        if absences != self._absences:  # it may have been away, and have come back with other weights
            again = self._ask_for(self.told["name"], [self._probe])[0]
            moved = max(abs(a - b) for a, b in zip(again, self._answer, strict=True))
            if not moved <= SAME_MODEL:
                raise TeacherLost(
                    f"the server at {self.server.url} came back with another teacher under the name "
                    f"{self.told['name']}: its log-probs moved by {moved:.2g} nats; serve the one that this run began "
                    "with, and resume the run"
                )
            self._absences = absences
        return told

    def _ask_for(self, name: str, prompts: list[list[int]]) -> list[list[float]]:
        answer = json.loads(self.server.post(COMPLETIONS, _body(name, prompts)))
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if answer["model"] != name or len(choices) != len(prompts):
            raise ValueError(f"the server at {self.server.url} answered for another model or other rows")
        return [
            [0.0, *(entry[str(token)]["logprob"] for token, entry in zip(ids[1:], told[1:], strict=True))]
            for ids, told in zip(prompts, (choice["prompt_logprobs"] for choice in choices), strict=True)
        ]


def _body(name: str, prompts: list[list[int]]) -> bytes:
    settings = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
    return json.dumps({"model": name, "prompt": prompts, **settings}, separators=(",", ":")).encode()
