"""Rollouts by vLLM in the training process: its own copy of the student, overwritten in place before each rollout.

vLLM is given a config of V* rows and random weights, then the student's: nothing is masked, and the log-probs that it
returns are those of the distribution it drew from (`logprobs_mode=processed_logprobs`: after temperature and filters).
Token ids go in and come out; it never sees a tokenizer. Written against vLLM 0.32.

Where this differs from the in-process engine: samples are another draw than that engine's of the same keys; a row
draws the same numbers again under the same key, but logits depend on which rows share a step, in their last bits. With
several filters on, vLLM applies min-p first.
"""

from __future__ import annotations

import math
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdrl_pl.models.loading import DTYPES
from kdrl_pl.parallel import gathered_weights, rank, world_size
from kdrl_pl.rollout.agreement import check_agreement
from kdrl_pl.rollout.engine import Completions, RolloutInterrupted
from kdrl_pl.rollout.plain_weights import plain_weights, write_config
from kdrl_pl.rollout.requests import check_request
from kdrl_pl.rollout.sampling import Sampling

if TYPE_CHECKING:
    from kdrl_pl.models.language_model import LanguageModel

_SEEDS = 2**63  # what torch's generators take
_OURS = {
    "model",
    "dtype",
    "load_format",
    "skip_tokenizer_init",
    "logprobs_mode",
    "generation_config",
    "max_model_len",
    "gpu_memory_utilization",
    "enforce_eager",
    "enable_sleep_mode",
    "distributed_executor_backend",
}
_ONE = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


class VLLMEngine:
    """Samples with vLLM on the student's own device; needs `pip install 'kdrl_pl[vllm]'`, see docs/vllm.md.

    Built at the first rollout. Each rank of DDP or FSDP2 has an engine of its own for its rows. Set
    model.importance_cap: vLLM's log-probs are not bit for bit the trainer's.

    Args:
        dtype: of vLLM's weights: "bfloat16", "float16" or "float32".
        gpu_memory_utilization: share of the device's memory for vLLM's weights and cache together; the trainer needs
            the rest. On the CPU of the machine's memory.
        max_model_len: tokens of the longest prompt and response together; null = what the model's config allows.
        enforce_eager: run without compilation and CUDA graphs; null = on the CPU only.
        sleep: give weights and cache back to the GPU between rollouts (vLLM's sleep mode, level 2), so that the update
            has the memory; takes seconds per rollout with a large model.
        engine_args: further arguments of `vllm.LLM`, such as max_num_seqs or kv_cache_memory_bytes.

    Raises:
        ValueError: an argument lies outside its range, or engine_args names what is set here.
    """

    def __init__(
        self,
        dtype: str = "bfloat16",
        gpu_memory_utilization: float = 0.3,
        max_model_len: int | None = None,
        enforce_eager: bool | None = None,
        sleep: bool = False,
        engine_args: dict[str, Any] | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
        if not 0 < gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization is {gpu_memory_utilization}; expected a share in (0, 1]")
        if max_model_len is not None and max_model_len < 2:
            raise ValueError(f"max_model_len is {max_model_len}; expected room for a prompt and a response, or null")
        engine_args = dict(engine_args or {})
        if any(engine_args.get(name, 1) != 1 for name in _ONE):
            raise ValueError(
                f"engine_args spreads a model over several processes ({', '.join(_ONE)}); every rank has an engine of "
                "its own here: leave them at 1, and use a vLLM server (VLLMServerEngine) for a model too large for one"
            )
        if clash := sorted(engine_args.keys() & _OURS):
            raise ValueError(
                f"engine_args names {', '.join(clash)}, which the engine sets itself or has an argument for"
            )
        self.dtype, self.gpu_memory_utilization, self.max_model_len = dtype, gpu_memory_utilization, max_model_len
        self.enforce_eager, self.sleep, self.engine_args = enforce_eager, sleep, engine_args
        self._llm: Any = None
        self._built_for = ""  # the config of the model that it was built for
        self._is_awake = True
        self._vocab_size = 0
        self._device = torch.device("cpu")
        self._stop_token_ids: list[int] = []
        self._requests = 0

    def sync(self, student: LanguageModel, stop_token_ids: Iterable[int]) -> None:
        """Overwrite vLLM's weights with the student's, and forget what it cached; collective under DDP and FSDP2.

        Raises:
            ValueError: vLLM is not installed; the engine was built for another model; sleep without a GPU; a GPU that
                vLLM would not take; see also `plain_weights`.
            RunError: vLLM does not compute the student, see `check_agreement`; looked at once.
        """
        self._vocab_size = student.vocab_size
        self._stop_token_ids = [token for token in stop_token_ids if token < student.vocab_size]
        with gathered_weights(student):  # offloaded ones lie elsewhere (FSDP2's cpu_offload)
            self._device = student.device
            self._hand_over(student)

    def _hand_over(self, student: LanguageModel) -> None:
        if self.sleep and self._device.type != "cuda":
            raise ValueError("rollout.engine.sleep is on, and there is no GPU memory to give back; set it to false")
        if world_size() == 1 and self._device.index:
            raise ValueError(
                f"the student is on {self._device}, and vLLM takes the first GPU that its process sees; start the run "
                f"with CUDA_VISIBLE_DEVICES={self._device.index} and trainer.devices: 1"
            )
        with _left_as_it_was(self._device):
            is_new = self._build(student)
            if not self._is_awake:
                self._llm.wake_up(tags=["weights"])
            weights = plain_weights(student, student.vocab_size, getattr(torch, self.dtype))
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            if not self._is_awake:
                self._llm.wake_up(tags=["kv_cache"])
            self._is_awake = True
            # Keys and values of prompts, which the old weights made.
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("vLLM did not forget its prefix cache: an earlier rollout still runs in it")
            if is_new:
                check_agreement(
                    student, self.dtype, lambda ids, size: self._run([ids], 1, Sampling(max_tokens=size), [0], None)
                )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        keys: Sequence[int],
        should_stop: Callable[[], bool] | None = None,
    ) -> Completions:
        """See `RolloutEngine.generate`; ranks may have as many prompts as they like.

        Raises:
            RolloutInterrupted: `should_stop` returned True.
            ValueError: a prompt is empty, too long for the engine or has an id outside the vocabulary; the number of
                keys is not P·G; no `sync` came before.
            FloatingPointError: the model's logits were NaN.
        """
        if self._llm is None or not self._is_awake:
            raise ValueError("the engine has no weights; call sync(student, stop_token_ids) before generate")
        check_request(prompts, group_size, sampling, keys, known_ids=self._vocab_size, vocab_size=self._vocab_size)
        limit = self._llm.llm_engine.model_config.max_model_len
        needed = max(map(len, prompts), default=0) + sampling.max_tokens
        if needed > limit:
            raise ValueError(
                f"the longest prompt and sampling.max_tokens {sampling.max_tokens} need {needed} tokens, but vLLM has "
                f"room for {limit}; raise rollout.engine.max_model_len (up to what the model allows) or lower "
                "sampling.max_tokens"
            )
        with _left_as_it_was(self._device):
            done = self._run(prompts, group_size, sampling, keys, should_stop)
            if self.sleep:
                self._llm.sleep(level=2)  # level 2 drops the weights: the next sync brings new ones
                self._is_awake = False
        return done

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        keys: Sequence[int],
        should_stop: Callable[[], bool] | None,
    ) -> Completions:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        settings = sampling_settings(sampling, self._stop_token_ids)
        names = [f"{self._requests + row}" for row in range(len(keys))]
        self._requests += len(keys)
        done = Completions([[]] * len(keys), [[]] * len(keys), [False] * len(keys))
        try:
            for row, (name, key) in enumerate(zip(names, keys, strict=True)):
                params = SamplingParams(**settings, seed=seed_of(key), output_kind=RequestOutputKind.FINAL_ONLY)
                engine.add_request(name, {"prompt_token_ids": list(prompts[row // group_size])}, params)
            row_of = {name: row for row, name in enumerate(names)}
            while engine.has_unfinished_requests():
                if should_stop is not None and should_stop():
                    raise RolloutInterrupted("the rollout was asked to stop")
                for output in engine.step():
                    row, (sample,) = row_of[output.request_id], output.outputs
                    done.token_ids[row] = list(sample.token_ids)
                    done.logprobs[row] = [
                        of_step[token].logprob for of_step, token in zip(sample.logprobs, sample.token_ids, strict=True)
                    ]
                    done.finished[row] = sample.finish_reason == "stop"
        except BaseException:
            engine.abort_request(names)
            raise
        check_finite(done)
        return done

    def _build(self, student: LanguageModel) -> bool:
        """Make vLLM's model, with random weights, if there is none yet; whether it did."""
        config = student.model.config.to_json_string()
        if self._llm is not None:
            if config != self._built_for:
                raise ValueError(
                    "the vLLM engine was built for another model, and it can hold only one; sample from the other one "
                    "in a run of its own, or with the in-process engine"
                )
            return False
        try:
            from vllm import LLM
        except ImportError as error:
            raise ValueError(
                f"VLLMEngine needs vLLM ({error}); pip install 'kdrl_pl[vllm]', see docs/vllm.md"
            ) from error
        is_cpu = self._device.type == "cpu"
        settings: dict[str, Any] = {
            "enforce_eager": is_cpu if self.enforce_eager is None else self.enforce_eager,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "max_model_len": self.max_model_len,
            **self.engine_args,
        }
        if world_size() > 1:
            # vLLM then takes the process group that is there, and this rank's device from these.
            os.environ |= {"RANK": str(rank()), "LOCAL_RANK": str(self._device.index or 0)}
            settings["distributed_executor_backend"] = "external_launcher"
        with tempfile.TemporaryDirectory() as folder:
            write_config(student, Path(folder), self.dtype)
            self._llm = LLM(
                model=folder,
                dtype=self.dtype,
                load_format="dummy",
                skip_tokenizer_init=True,
                logprobs_mode="processed_logprobs",
                generation_config="vllm",  # no settings of the model's own
                enable_sleep_mode=self.sleep,
                **settings,
            )
        self._built_for = config
        return True


def sampling_settings(sampling: Sampling, stop_token_ids: Iterable[int]) -> dict[str, Any]:
    """Arguments of vLLM's `SamplingParams` without the seed.

    Args:
        sampling: how tokens are drawn.
        stop_token_ids: ids that end a row besides those of `sampling`.
    """
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": sorted({*stop_token_ids, *(sampling.stop_token_ids or ())}),
        "ignore_eos": True,  # only ours end a row
        "logprobs": 0,  # of the sampled token alone
        "detokenize": False,
    }


def seed_of(key: int) -> int:
    """The seed of a row's random numbers in vLLM, from its 128-bit key."""
    return key % _SEEDS


def check_finite(done: Completions) -> None:
    """Refuse samples of a model that has diverged.

    Raises:
        FloatingPointError: a log-prob is NaN.
    """
    if any(math.isnan(logprob) for logprobs in done.logprobs for logprob in logprobs):
        raise FloatingPointError("the student's logits are NaN or infinite; its weights have diverged or overflowed")


@contextmanager
def _left_as_it_was(device: torch.device) -> Iterator[None]:
    """Inside, vLLM may change this process as it likes; afterwards the trainer finds it unchanged.

    It seeds all random generators, sets threads (and forbids setting them), precision and environment variables, which
    child processes would inherit. It computes in its own dtype, whatever autocast the trainer has set.
    """
    environment, set_threads, threads = dict(os.environ), torch.set_num_threads, torch.get_num_threads()
    precision, python, numpy = torch.get_float32_matmul_precision(), random.getstate(), np.random.get_state()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where the weights are
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns of much that is as it should be here
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ |= environment
        torch.set_num_threads = set_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        random.setstate(python)
        np.random.set_state(numpy)
