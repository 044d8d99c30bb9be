"""Where a rollout happens: prompts in, sampled and judged rows out. Needs no Trainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from kdrl_pl import phases, signals
from kdrl_pl.data.prompts import Prompt, PromptBatch
from kdrl_pl.errors import RunError
from kdrl_pl.experience import Experience
from kdrl_pl.models.loading import stop_ids
from kdrl_pl.parallel import give_way
from kdrl_pl.rewards.base import Completion, Reward, RewardOutput
from kdrl_pl.rollout.engine import Completions, RolloutEngine, RolloutInterrupted
from kdrl_pl.rollout.sampling import Sampling
from kdrl_pl.rollout.statistics import rollout_statistics
from kdrl_pl.rollout.streams import group_keys

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdrl_pl.models.language_model import LanguageModel


def sample_experience(
    batch: PromptBatch,
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    engine: RolloutEngine,
    reward: Reward,
    *,
    samples: int,
    sampling: Sampling,
    seed: int,
    number: int,
    device: torch.device | str,
    precision: Callable[[], AbstractContextManager] = nullcontext,
    meanwhile: Callable[[Experience], None] | None = None,
) -> Experience:
    """The rows of a batch: completions of every prompt, judged; whole groups in the order of the prompts.

    What else is to be known of them (texts, answers, metrics) is filled into `batch`. Every rank calls it.

    Args:
        batch: this rank's prompts.
        model: answers them.
        tokenizer: the model's.
        engine: samples.
        reward: judges.
        samples: responses per prompt.
        sampling: how they are drawn.
        seed: of the random streams of the rows.
        number: of the rollout in those streams.
        device: where the rows go.
        precision: makes the context to sample in, such as autocast.
        meanwhile: called with the rows, whose rewards are still missing, while a reward's worker processes judge.

    Raises:
        Preempted: a signal reached a rank; every rank raises it.
        RunError: the model's logits are no numbers.
    """
    keys = group_keys(seed, number, [p.uid for p in batch.prompts], batch.occurrences, samples)
    phases.begin("rollout")
    started = time.perf_counter()
    with precision():
        engine.sync(model, stop_ids(tokenizer, model.model.generation_config))
        sampled = _generate(engine, batch, samples, sampling, keys)
    give_way(device)
    generated = time.perf_counter()
    phases.begin("reward")
    completions = _completions(tokenizer, batch.prompts, sampled, samples, sampling)
    experience = _experience(tokenizer, completions, sampled, samples, sampling)
    on_device = experience.to(device)
    judged = _judge(reward, completions, on_device, meanwhile)
    give_way(device)  # before ranks wait for each other in `score`
    for rows in (experience, on_device):
        _fill_in(rows, judged)
    batch.completions = [completion.text for completion in completions]
    batch.answers, batch.reward_parts = judged.answers or [], judged.parts
    batch.sampler_is_exact = not sampling.is_filtered and not sampling.is_greedy
    batch.sampler_dtype = getattr(engine, "dtype", None)
    batch.metrics |= {
        **rollout_statistics(experience, judged),
        "time/rollout": (generated - started, 1),
        "time/reward": (time.perf_counter() - generated, 1),
        "perf/rollout_tokens_per_s": (sum(map(len, sampled.token_ids)), generated - started),
    }
    return on_device


def _generate(
    engine: RolloutEngine, batch: PromptBatch, samples: int, sampling: Sampling, keys: Sequence[int]
) -> Completions:
    """What the engine sampled; nothing when a signal made it give up."""
    try:
        prompts = [prompt.input_ids for prompt in batch.prompts]
        return engine.generate(prompts, samples, sampling, keys, phases.counted(signals.should_stop))
    except RolloutInterrupted:
        if not signals.received():
            raise
        return Completions()
    except FloatingPointError as error:
        raise RunError(
            f"rollout {batch.rollout}: {error}. Resume from an earlier checkpoint with a lower learning rate"
        ) from error


def _judge(
    reward: Reward,
    completions: Sequence[Completion],
    experience: Experience,
    meanwhile: Callable[[Experience], None] | None,
) -> RewardOutput:
    if meanwhile is None or not getattr(reward, "runs_in_workers", False):
        return reward(completions)
    with ThreadPoolExecutor(1, "reward") as waiting:  # the thread only waits for the workers
        judged = waiting.submit(reward, completions)
        meanwhile(experience)
        return judged.result()


def _completions(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampled: Completions,
    samples: int,
    sampling: Sampling,
) -> list[Completion]:
    texts = tokenizer.batch_decode(sampled.token_ids, skip_special_tokens=True)
    return [
        Completion(prompts[row // samples], text, tuple(ids), not finished, sampling.max_tokens)
        for row, (text, ids, finished) in enumerate(zip(texts, sampled.token_ids, sampled.finished, strict=True))
    ]


def _experience(
    tokenizer: PreTrainedTokenizerBase,
    completions: Sequence[Completion],
    sampled: Completions,
    samples: int,
    sampling: Sampling,
) -> Experience:
    """The rows before they are judged: rewards of 0."""
    return Experience.from_rows(
        [completion.prompt.input_ids for completion in completions],
        sampled.token_ids,
        [0.0] * len(completions),
        [row // samples for row in range(len(completions))],
        pad_token_id=tokenizer.pad_token_id,
        behavior_logprobs=sampled.logprobs,
        truncated=[completion.truncated for completion in completions],
        temperature=sampling.temperature or 1.0,
        max_response_tokens=sampling.max_tokens,
        uids=[completion.prompt.uid for completion in completions],
        teachers=[completion.prompt.teacher for completion in completions],
    )


def _fill_in(experience: Experience, judged: RewardOutput) -> None:
    values = [0.0 if value is None else value for value in judged.values]
    experience.rewards = torch.tensor(values, dtype=torch.float32, device=experience.device)
    verdicts = judged.correct or [False] * len(values)
    experience.correct = torch.tensor([bool(verdict) for verdict in verdicts], device=experience.device)
