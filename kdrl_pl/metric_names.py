"""Every metric a run logs: name, meaning, unit, and how ranks are put together. docs/metrics.md is made from it.

`<term>`, `<part>`, `<set>` and `<k>` stand for the names of a term, a reward and a validation set and for a number.
`python -m kdrl_pl.metric_names` prints the tables of docs/metrics.md; a test compares the two.
"""

from __future__ import annotations

import re

# name -> one line, its unit last, in brackets
METRICS: dict[str, str] = {
    "train/loss": "loss as METHOD defines it: summed over all rows of an update, all ranks; mean over updates [1]",
    "train/pg_loss": "the policy-gradient term of `train/loss`, its coefficient included [1]",
    "train/kd_loss": "the distillation term of `train/loss`, its coefficient included; not the KL [1]",
    "train/grad_norm": "norm of the whole gradient before clipping, mean over updates [1]",
    "train/clip_fraction": "response tokens whose importance ratio, modulated by the teacher if it is, the surrogate "
    "clipped [share]",
    "train/importance_ratio": "current over old policy, mean over response tokens; 1 with one update per rollout [1]",
    "train/importance_weight": "old policy over sampler, at most model.importance_cap, mean over response tokens; only "
    "with such a cap [1]",
    "train/entropy": "entropy of the student's next-token distribution, mean over response tokens; "
    "only when a term computes it [nats]",
    "train/lr": "learning rate of the last update of the rollout [1]",
    "train/pg_coef": "coefficient a of the policy-gradient term at this rollout [1]",
    "train/kd_coef": "coefficient β of the distillation term at this rollout [1]",
    "train/skipped_steps": "optimizer steps skipped so far, because no row carried a signal or a loss, log-prob "
    "or gradient was not finite [steps]",
    "train/kd_to_rl": "pull of the teacher over pull of the reward, β·Σw·m·abs(f(d)) / Σw·abs(Â); "
    "absent when all advantages are zero [1]",
    "train/sign_conflict": "response tokens on which reward and teacher pull in opposite directions [share]",
    "train/<term>_loss": "a further term of the objective by its name in model.terms, its coefficient included [1]",
    "train/<term>_coef": "its coefficient at this rollout [1]",
    "train/kl_to_old": "KL(old ‖ current), mean over response tokens, as it is before each update; only with DisCO "
    "[nats]",
    "rollout/length": "length of a response, end token included, mean over responses [tokens]",
    "rollout/length_correct": "the same over correct responses; absent when there are none [tokens]",
    "rollout/length_incorrect": "the same over incorrect responses; absent when there are none [tokens]",
    "rollout/truncated": "responses that ran out of budget before an end token [share]",
    "rollout/groups_all_correct": "groups in which every response is correct [share]",
    "rollout/groups_all_wrong": "groups in which no response is correct [share]",
    "rollout/groups_no_signal": "groups whose rewards are all equal (max − min ≤ 1e-6): their advantages are 0 [share]",
    "rollout/pass_at_k": "groups in which at least one of the k = group size responses is correct [share]",
    "rollout/sampler_drift_mean": "difference of sampler and trainer log-probs of the same token, absolute value, "
    "mean over response tokens [nats]",
    "rollout/sampler_drift_max": "the largest such difference of the rollout [nats]",
    "rollout/entropy": "−log-prob of the sampled tokens under the sampler, mean over response tokens: an unbiased "
    "estimate of its entropy [nats]",
    "reward/mean": "shaped reward, mean over responses [1]",
    "reward/std": "standard deviation (n − 1) of the rewards inside a group, mean over groups [1]",
    "reward/correct": "responses the rule judges correct; never derived from the shaped reward [share]",
    "reward/errors": "responses whose reward raised or returned nonsense and got the configured value [share]",
    "reward/unparsable": "responses in which no answer could be read; apart from wrong answers [share]",
    "reward/timeout": "responses whose judgement ran past the time limit [share]",
    "reward/<part>": "one reward of a weighted sum before its weight, mean over the responses it applies to [1]",
    "teacher/reverse_kl": "KL(student ‖ teacher), mean over distilled tokens (elsewhere the teacher is not asked), "
    "estimated by ρ·(−d): unbiased, untransformed; single rollouts can be negative [nats]",
    "teacher/reverse_kl_k3": "the same by ρ·(exp(d) − d − 1): unbiased too, never negative [nats]",
    "teacher/top_k_overlap": "the student's 8 likeliest words that are among the teacher's 8, mean over tokens the "
    "teacher was asked about; only when a term reads its vocabulary [share]",
    "teacher/top_k_mass": "probability that the student gives its K likeliest words, mean over distilled tokens; only "
    "with distillation.estimator top_k [share]",
    "teacher/kd_tokens": "response tokens with a distillation weight other than 0 [share]",
    "teacher/logprob": "teacher's log-prob of the student's tokens, mean over response tokens it scored [nats]",
    "teacher/cache_hits": "rows it was asked about whose log-probs lay on disk; only with model.teacher.cache [share]",
    "reference/kl": "KL(student ‖ reference), mean over response tokens, estimated by ρ·(−d), d to the reference: "
    "unbiased; single rollouts can be negative; only with ReferenceKL [nats]",
    "reference/kl_k3": "the same by ρ·(exp(d) − d − 1): unbiased too, never negative [nats]",
    "data/prompts_seen": "training prompts drawn so far; only with a curriculum [prompts]",
    "data/pass_rate_mean": "measured pass rate, mean over those prompts; of each an average over its visits [share]",
    "val/avg_at_k": "`val/<set>/avg_at_k`, plain mean over sets: what checkpoints and early stopping watch [share]",
    "val/<set>/avg_at_k": "correct responses, k samples per problem, mean over problems [share]",
    "val/<set>/pass_at_<k>": "unbiased pass@k, k = 1, 2, 4, … up to the samples per problem, mean over problems "
    "[share]",
    "val/<set>/maj_at_k": "problems whose most frequent answer is correct; absent without extracted answers [share]",
    "val/<set>/length": "length of a response, mean over responses [tokens]",
    "val/<set>/truncated": "responses that ran out of budget before an end token [share]",
    "val/<set>/kl_teacher": "KL(student ‖ teacher), mean over response tokens, at their sampler's temperature; under "
    "top_p, top_k, min_p or temperature 0 it is the mean log-ratio of what was sampled, and no KL; absent without a "
    "teacher [nats]",
    "val/<set>/accuracy_per_1k_tokens": "correct responses per 1,000 response tokens [1/1k tokens]",
    "time/rollout": "sampling the responses [s]",
    "time/reward": "judging them [s]",
    "time/teacher": "the teacher's pass over them [s]",
    "time/score": "old log-probs of the student, those of the reference, and sampler check [s]",
    "time/update": "all updates of the rollout: forward, backward, optimizer [s]",
    "time/step": "one iteration from end to end, what is not listed above included [s]",
    "perf/rollout_tokens_per_s": "response tokens sampled per second of `time/rollout`, per rank [tokens/s]",
    "perf/teacher_tokens_per_s": "tokens of the rows the teacher was asked about, prompts once per row and rows that a "
    "cache knew included, per second of `time/teacher`, per rank [tokens/s]",
    "perf/update_tokens_per_s": "tokens trained on per second of `time/update`, per rank [tokens/s]",
    "perf/tokens": "response tokens sampled since the run began, all ranks together [tokens]",
}

# All others are a mean: the ranks' sums over the ranks' counts.
MAXIMA = frozenset({"rollout/sampler_drift_max"})  # the largest value of any rank
TOTALS = frozenset({"perf/tokens"})  # the ranks' sums, not divided

GROUPS = {
    "train": "The updates of one rollout",
    "rollout": "What the student sampled",
    "reward": "What the rules said",
    "teacher": "Student and teacher on the student's tokens",
    "reference": "Student and reference",
    "data": "Which prompts are drawn",
    "val": "Validation",
    "time": "Seconds per rollout",
    "perf": "Speed",
}

_PLACEHOLDERS = {"<part>": r"[^\s]+", "<term>": r"[^\s/]+", "<set>": r"[^\s]+", "<k>": r"[1-9][0-9]*"}


def _pattern(name: str) -> str:
    return "".join(_PLACEHOLDERS.get(piece, re.escape(piece)) for piece in re.split(r"(<\w+>)", name))


_KNOWN = re.compile("|".join(_pattern(name) for name in METRICS))


def is_known(name: str) -> bool:
    """True when `name` is one of `METRICS`, its placeholders filled in (`val/gsm8k/pass_at_4`)."""
    return _KNOWN.fullmatch(name) is not None


def reduction(name: str) -> str:
    """How the ranks' values of `name` are put together: `mean`, `max` or `total`."""
    return "max" if name in MAXIMA else "total" if name in TOTALS else "mean"


def markdown_tables() -> str:
    """The tables of docs/metrics.md, one per group, in the order of `METRICS`."""
    lines: list[str] = []
    for group, title in GROUPS.items():
        lines += [f"### `{group}/`: {title}", "", "| name | meaning | unit | over ranks |", "|---|---|---|---|"]
        for name, text in METRICS.items():
            if name.startswith(f"{group}/"):
                meaning, _, unit = text.rpartition(" [")
                lines.append(f"| `{name}` | {meaning} | {unit.removesuffix(']')} | {reduction(name)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_tables(), end="")
