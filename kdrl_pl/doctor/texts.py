"""Tokenizer, template and reward of a run: what the model reads, how its answers end, whether right ones count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from kdrl_pl.data.prompts import Prompt
from kdrl_pl.doctor.findings import Finding, fail, ok, warn
from kdrl_pl.models.loading import check_model_path, load_tokenizer, stop_ids
from kdrl_pl.rewards.base import Completion
from kdrl_pl.view.completions import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdrl_pl.data.datamodule import PromptDataModule

_GOLD = 20  # prompts whose reference answer is judged
# how an answer may stand in a response; the worked response of a procedural task comes before these
_FORMS = ("\\boxed{{{0}}}", "{0}", "#### {0}", "#{0}", "<answer>{0}</answer>", "The answer is {0}.")
_OWN = ("FunctionReward", "TRLReward")  # rewards that may want any form


def tokenizer_and_template(data: PromptDataModule, student: str, teachers: Sequence[str]) -> Iterator[Finding]:
    """Look at what the student reads and with which tokens its answers end.

    Args:
        data: set up for fit.
        student: its folder or name.
        teachers: likewise, of those whose folders are here.
    """
    tokenizer = data.tokenizer
    prompt = next(iter(next(iter(data.rows["train"].values()))))
    yield ok("prompt", f"{one_line(prompt.text, 600)!r}")
    ids = list(prompt.input_ids)
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        yield warn("prompt", "begins with two beginning-of-sequence tokens", "take one out of the data or the template")
    ends = stop_ids(tokenizer, _generation_config(student))
    yield ok("end tokens", f"{_named(tokenizer, ends)}; padding {_named(tokenizer, [tokenizer.pad_token_id])}")
    if (turn := _end_of_turn(tokenizer)) is not None and turn not in ends:
        yield fail(
            "end tokens",
            f"the chat template ends an answer with {_named(tokenizer, [turn])}, which does not end a response",
            f"set rollout.sampling.stop_token_ids: [{turn}]",
        )
    for teacher in teachers:
        of_teacher = stop_ids(load_tokenizer(teacher), _generation_config(teacher))
        how = "the same as the student's" if of_teacher == ends else "compared with the student's as one word"
        yield ok("end tokens", f"of the teacher: {_named(tokenizer, of_teacher)}, {how}")


def room(data: PromptDataModule, student: str, max_tokens: int) -> Iterator[Finding]:
    """Look whether prompts and responses fit into the student's positions."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(check_model_path(student), trust_remote_code=False).get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    lengths = [len(prompt.input_ids) for prompts in data.rows["train"].values() for prompt in prompts]
    text = f"prompts of at most {max(lengths)} tokens and responses of at most {max_tokens:,}"
    if limit and max(lengths) + max_tokens > limit:
        yield warn("length", f"{text}; the student was made for {limit:,}", "lower rollout.sampling.max_tokens")
    else:
        yield ok("length", text)


def reward(rule: Any, prompts: Sequence[Prompt], max_tokens: int) -> Iterator[Finding]:
    """Look whether the reward counts reference answers as right, and nothing as wrong.

    Args:
        rule: the reward, set up.
        prompts: of the training set.
        max_tokens: budget of a response.
    """
    some = list(islice(prompts, _GOLD))
    inner = getattr(rule, "reward", rule)
    name = type(inner).__name__

    def judge(texts: Sequence[str]) -> list[bool | None]:
        completions = [Completion(p, text, (0,), False, max_tokens) for p, text in zip(some, texts, strict=True)]
        output = rule(completions)
        return output.correct or [None] * len(texts)

    nothing = judge([""] * len(some))
    if any(nothing):
        yield fail("reward", f"{name} judges an empty response right", "look at the reference answers of the data set")
    if not any(p.answer for p in some):
        return
    worked = [str(p.columns.get("response") or "") for p in some]
    forms = [("the worked response", worked)] if all(worked) else []
    forms += [(form.format("…"), [form.format(p.answer) for p in some]) for form in _FORMS]
    judged = [(form, judge(texts)) for form, texts in forms]
    form, verdicts = max(judged, key=lambda pair: sum(map(bool, pair[1])))
    right = sum(map(bool, verdicts))
    text = f"{name} judges {right} of {len(some)} reference answers right, written as {form!r}"
    if right == len(some):
        yield ok("reward", text)
    elif right == 0 and name in _OWN:
        yield warn("reward", f"{name} judges no reference answer right in any usual form", "try it on one by hand")
    else:
        wrong = some[[bool(v) for v in verdicts].index(False)]
        answer = one_line(str(wrong.answer), 80)
        cure = f"look at {wrong.uid}, whose answer is {answer!r}; answer_pattern cuts one out of a longer text"
        yield (fail if right == 0 else warn)("reward", text, cure)


def teacher_paths(teacher: Any) -> list[str]:
    """Folders or hub names of a teacher's models; none where it is another process, or the student's own base."""
    if teacher is None:
        return []
    if hasattr(teacher, "teachers"):
        return [path for one in teacher.teachers.values() for path in teacher_paths(one)]
    return [teacher.path] if getattr(teacher, "path", "") else []


def _generation_config(path: str) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(check_model_path(path))
    except OSError:  # it has none
        return None


def _named(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return ", ".join(f"{token} {tokenizer.convert_ids_to_tokens(token)!r}" for token in ids)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that a chat template writes right after an answer; None where there is none to be found."""
    if not tokenizer.chat_template:
        return None
    import jinja2

    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer7"}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except (jinja2.TemplateError, ValueError):
        return None
    after = tokenizer(str(text).rpartition("answer7")[2].lstrip(), add_special_tokens=False)["input_ids"][:1]
    return after[0] if after and after[0] in tokenizer.all_special_ids else None
