"""The README.md of an exported folder: what the model is, how it was trained, how well it does, how to load it.

It says only what the run folder says. The licence is the user's to choose, so none is named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdrl_pl.files import replacing
from kdrl_pl.report.run import Run, read_run, validation_results
from kdrl_pl.report.sections import results_rows
from kdrl_pl.text import printable

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SECTIONS = ("model", "rollout")  # of the recipe
_PAPER = "[KDRL, arXiv 2506.02208](https://arxiv.org/abs/2506.02208)"
_NO_LICENCE = "# license: yours to choose, within those of base model, teacher and data"
_MASKS = {
    "response": "wrong responses",
    "group": "groups without a right response",
    "negative_advantage": "responses with a negative advantage",
}
_ESTIMATORS = {
    "k2": "reverse KL on the sampled tokens (k2)",
    "full": "reverse KL over the whole vocabulary",
    "top_k": "reverse KL over the student's likeliest words",
    "forward_kl": "forward KL on the sampled tokens (k3)",
}


def write_model_card(run_folder: Path, checkpoint: Path, output: Path, adapter: bool = False) -> None:
    """Write `output/README.md`.

    Args:
        run_folder: of the run that was exported.
        checkpoint: what was exported; its name says after how many rollouts.
        output: the exported folder.
        adapter: it holds a LoRA adapter alone.
    """
    match = re.search(r"-(\d+)(\.sharded)?\.ckpt$", checkpoint.name)
    run, done = read_run(run_folder), int(match[1]) if match else None
    card = model_card(run, done, output.name, best=checkpoint.name.startswith("best-"), adapter=adapter)
    with replacing(output / "README.md") as file:
        file.write(card.encode("utf-8", "backslashreplace"))


def model_card(run: Run, done: int | None, name: str, best: bool = False, adapter: bool = False) -> str:
    """The card as Markdown with the YAML head that the model hub reads.

    Args:
        run: it comes from.
        done: rollouts (steps) of the exported checkpoint; None when its name does not say.
        name: of the exported folder.
        best: it was chosen by its validation.
        adapter: it holds a LoRA adapter alone.
    """
    when = "" if done is None else f" after {done:,} {run.counter}{'' if done == 1 else 's'}"
    parts = [
        f"---\n{_yaml(_head(run, adapter))}{_NO_LICENCE}\n---",
        f"# {name}",
        f"{_objective(run)} This is the {'adapter' if adapter else 'student'}{when} of the run `{run.name}`.",
        "## Results",
        _results(run, done, best),
        "## Loading",
        f"```python\n{_snippet(run, name, adapter)}```",
        "## Training data",
        _sources(run),
        "## Recipe",
        "Settings of the run; `kdrl fit` takes them from a file with `--config`.",
        f"```yaml\n{_yaml(_recipe(run))}```",
        "## Made with",
        _versions(run),
        "## Licence",
        "No licence is stated yet. Those of the base model, of the teacher and of the data may all bind this model; "
        "choose one that they allow, and add it above. The recipe quotes local paths: look through it before you "
        "publish.",
    ]
    return printable("\n\n".join(parts) + "\n")


def _head(run: Run, adapter: bool) -> dict[str, Any]:
    """The keys that the hub knows; only names that can be on it, no local folders."""
    model = run.config.get("model") or {}
    named = {"base_model": model.get("student")}
    sources = [source for source in _train_sources(run).values() if _on_hub(source)]
    tags = ["kdrl_pl", *_methods(run)]
    return {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        **{key: value for key, value in named.items() if _on_hub(value)},
        **({"datasets": sources} if sources else {}),
        "tags": tags,
    }


def _methods(run: Run) -> list[str]:
    if run.counter == "step":
        return ["sft"]
    rl, kd = _has(run, "policy_gradient"), _has(run, "distillation")
    return [*(["reinforcement-learning", "grpo"] if rl else []), *(["distillation"] if kd else [])]


def _has(run: Run, term: str) -> bool:
    """Whether the objective has it; a saved config leaves out what is null."""
    return bool((run.config.get("model") or {}).get(term))


def _objective(run: Run) -> str:
    model = run.config.get("model") or {}
    student = f"`{model.get('student')}`"
    if run.counter == "step":
        return f"A language model fine-tuned on text (SFT) from {student}."
    rl, kd = _has(run, "policy_gradient"), _has(run, "distillation")
    method = {
        (True, True): "reinforcement learning (GRPO) and on-policy distillation from a frozen teacher in one objective",
        (True, False): "reinforcement learning (GRPO) alone",
        (False, True): "on-policy distillation from a frozen teacher alone",
    }.get((rl, kd), "the terms below")
    said = [f"A language model post-trained from {student} by {method} ({_PAPER})."]
    teacher = _arguments(model.get("teacher"))
    if kd and teacher:
        path, dtype = teacher.get("path", teacher.get("url")), teacher.get("dtype")
        said.append(f"The teacher is `{path}`{f' in {dtype}' if dtype else ''}.")
        settings = _arguments(model["distillation"])
        where = _MASKS.get(settings.get("mask", "none"))
        estimator = _ESTIMATORS.get(settings.get("estimator", "k2"), settings.get("estimator"))
        said.append(f"Distillation is the {estimator}{f', on {where} only' if where else ''}.")
    if model.get("terms"):
        said.append(f"Further terms: {', '.join(model['terms'])}.")
    return " ".join(said)


def _arguments(setting: Any) -> Mapping[str, Any]:
    """Those that an object of the config is built with."""
    return (setting.get("init_args") or {}) if isinstance(setting, Mapping) else {}


def _results(run: Run, done: int | None, best: bool) -> str:
    after = validation_results(next((row for row in reversed(run.validations) if run.position(row) == done), {}))
    if not after:
        return "This checkpoint was not validated."
    heads, late = results_rows(after)
    kept = {of: {m: v for m, v in (run.before or {}).get(of, {}).items() if m in after[of]} for of in after}
    early_heads, early = results_rows({of: metrics for of, metrics in kept.items() if metrics})
    lines = [f"| set | | {' | '.join(heads)} |", f"|---|---|{'---|' * len(heads)}"]
    for of, cells in late.items():
        if of in early and early_heads == heads:
            lines.append(f"| {of} | before | {' | '.join(early[of])} |")
        lines.append(f"| {of} | after | {' | '.join(cells)} |")
    samples = (run.config.get("rollout") or {}).get("validation_samples")
    notes = ["On the validation sets of the run, one seed."]
    notes += [f"`correct` is the mean over {samples} samples per problem."] if samples else []
    notes += ["The checkpoint was chosen by this validation, so its figures flatter it."] if best else []
    return "\n".join(lines) + f"\n\n{' '.join(notes)}"


def _snippet(run: Run, name: str, adapter: bool) -> str:
    """Python that loads the folder and answers one prompt, as the run rendered it."""
    sampling = (run.config.get("rollout") or {}).get("sampling") or {}
    tokens = sampling.get("max_tokens", 128)
    prompt = repr(_example(run))
    loading = "model = AutoModelForCausalLM.from_pretrained(folder)"
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if adapter:
        base = (run.config.get("model") or {}).get("student")
        imports = f"from peft import PeftModel\n{imports}"
        loading = f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), folder)"
    return (
        f"{imports}\n\n"
        f"folder = {name!r}  # where this file is, or its name on the hub\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        f"{loading}\n\n"
        f"prompt = {prompt}  # as the model read it in training, chat template applied\n"
        'inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")\n'
        f"output = model.generate(**inputs, max_new_tokens={tokens}, do_sample=True)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))\n'
    )


def _example(run: Run) -> str:
    """A short prompt of the run."""
    rows = [row for sample in run.samples.values() for row in sample["rows"]] or run.rows((run.stored() or [0])[-1])
    texts = [row["prompt"] for row in rows if len(row["prompt"]) <= 800 and "```" not in row["prompt"]]
    return min(texts, key=len, default="...")


def _sources(run: Run) -> str:
    sources = [f"- {name}: `{source}`" for name, source in _train_sources(run).items()]
    return "\n".join(sources) or "Not named in the settings of the run."


def _train_sources(run: Run) -> dict[str, Any]:
    sets = (run.config.get("data") or {}).get("train") or {}
    return {name: (settings or {}).get("source", name) for name, settings in sets.items()}


def _on_hub(name: Any) -> bool:
    """Whether this can be a name on the model hub, and is no local folder."""
    return isinstance(name, str) and bool(_HUB_NAME.fullmatch(name)) and not Path(name).exists()


def _recipe(run: Run) -> Mapping[str, Any]:
    return {section: run.config[section] for section in _SECTIONS if section in run.config}


def _versions(run: Run) -> str:
    env = run.environment or {}
    packages = {name: version for name, version in (env.get("packages") or {}).items() if version is not None}
    said = ", ".join(f"{name} {version}" for name, version in packages.items())
    python = f", Python {env['python']}" if env.get("python") else ""
    return f"{said or 'kdrl_pl'}{python}."


def _yaml(value: Mapping[str, Any]) -> str:
    from yaml import safe_dump

    return safe_dump(dict(value), sort_keys=False, allow_unicode=True)
