"""What a user gets wrong ends in one message that names it and the cure, without a traceback; all in one process."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from kdrl_pl.__main__ import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
STUDY = "name: s\ntestbeds: {t: {config: configs/debug.yaml}}\n"
ROW = '{"prompt": "12+34=", "answer": "046"}\n'

# name -> content; where a case says {bad}, it means the folder of these files, models and runs
FILES = {
    "rows.jsonl": ROW * 8,
    "broken.jsonl": ROW + '{"prompt": "12+\n',
    "no_prompt.jsonl": '{"question": "12+34="}\n',
    "no_answer.jsonl": '{"prompt": "12+34="}\n',
    "null_answer.jsonl": '{"prompt": "12+34=", "answer": null}\n',
    "list_answer.jsonl": '{"prompt": "12+34=", "answer": ["046"]}\n',
    "empty_prompt.jsonl": '{"prompt": "  ", "answer": "046"}\n',
    "number.jsonl": '{"prompt": 46, "answer": "046"}\n',
    "messages.jsonl": '{"prompt": [{"role": "user", "content": "12+34="}], "answer": "046"}\n',
    "no_object.jsonl": '["12+34=", "046"]\n',
    "latin1.jsonl": b'{"prompt": "12+34=", "answer": "\xe9"}\n',
    "surrogate.jsonl": '{"prompt": "12\\ud83d", "answer": "046"}\n',
    "letters.jsonl": '{"prompt": "What is 1+1?", "answer": "2"}\n',
    "words.jsonl": '{"prompt": "12+34=", "answer": "many"}\n' * 8,
    "empty.jsonl": "",
    "torn.json": '[{"prompt": "12+34="',
    "same.csv": "prompt,prompt\n1+1=,2\n",
    "cells.csv": "prompt,answer\n1+1=,2,3\n",
    "no.parquet": "PAR1 not really",
    "rows.txt": "12+34=\n",
    "torn.yaml": "model: {student: [\n",
    "list.yaml": "- model\n- data\n",
    "latin1.yaml": b"model: {student: \xe9}\n",
    "section.yaml": "rolout: {group_size: 4}\n",
    "key.yaml": "rollout: {group_sise: 4}\n",
    "twice.yaml": "rollout: {seed: 1}\nrollout: {group_size: 8}\n",
    "output.yaml": "output: predictions.jsonl\n",
    "teacher.jsonl": '{"uid": "addition/1", "correct": true}\n',
    "teacher_torn.jsonl": '{"uid": "addition/1"}\n',
    "study_no_arms.yaml": STUDY,
    "study_key.yaml": STUDY + "arms: {a: {}}\nsedes: [0]\n",
    "study_seed.yaml": STUDY + "arms: {a: {}}\nseeds: [x]\n",
    "study_arm.yaml": STUDY + "arms: {kdrl: {}}\nbaseline: kdlr\n",
    "study_set.yaml": STUDY + "arms: {kdrl: {set: {run.name: x}}}\n",
    "study_overlay.yaml": STUDY + "arms: {kdrl: {config: nowhere.yaml}}\n",
}


def rows(file: str, *more: str) -> list[str]:
    """A training set out of one of the files in place of the addition problems."""
    return ["--data.train", "null", "--data.train", f'{{"rows": {{"source": "{{bad}}/{file}"}}}}', *more]


def reward(name: str, *more: str) -> list[str]:
    return ["--rollout.reward", f"kdrl_pl.rewards.{name}", *more]


STUDY_COMMAND = ["study", "--dry-run", "--root", "{bad}/studies", "--config"]
DEBUG = ["--config", "configs/debug.yaml", "--run.root", "{bad}/runs"]

# name -> (a command; or what follows `fit --config configs/debug.yaml`, what the message must hold)
CASES = {
    # a name that is not there
    "option": (["--model.normalizer", "token"], ["--model.normalizer", "did you mean --model.normaliser"]),
    "section": (["--modle.student", "x"], ["--modle.student", "did you mean --model.student"]),
    "far from any": (["--qqq", "x"], ["no setting --qqq", "--help lists them all"]),
    "key of a slot": (["--model.distillation.estimater", "k2"], ["estimater", "did you mean estimator"]),
    "key of a set": (["--data.train.addition.sourse", "x"], ["sourse", "did you mean source"]),
    "key of a schedule": (
        ["--model.distillation.coef", "kdrl_pl.schedules.Linear", "--model.distillation.coef.slop", "1"],
        ["model.distillation.coef.slop: ", "slop; did you mean slope?"],
    ),
    "key of a reward": (reward("MathReward", "--rollout.reward.worker", "1"), ["worker; did you mean workers?"]),
    "section of a file": (["--config", "{bad}/section.yaml"], ["--rolout.group_size; did you mean --rollout."]),
    "key of a file": (["--config", "{bad}/key.yaml"], ["--rollout.group_sise; did you mean --rollout.group_size"]),
    "task": (["--data.train.addition.source", "additoin"], ["additoin", "addition, countdown"]),
    "option of a task": (["--data.train.addition.options", '{"digit": 3}'], ["no option 'digit'", "digits"]),
    "split of a task": (["--data.train.addition.split", "dev"], ["no split 'dev'", "train, val, test"]),
    "optimizer": (["--model.optimizer.class_path", "torch.optim.Adamm"], ["Adamm", "did you mean Adam?"]),
    "reward": (reward("MathsReward"), ["rollout.reward: ", "did you mean MathReward?"]),
    "reward without module": (["--rollout.reward", "MathReward"], ["'MathReward'", "package.module.Class"]),
    "reward that is none": (["--rollout.reward", "kdrl_pl.schedules.Linear"], ["Linear is no Reward"]),
    "optimizer that is none": (["--model.optimizer.class_path", "kdrl_pl.rewards.MathReward"], ["is no Optimizer"]),
    "option of export": (["export", "x", "--outptu", "y"], ["--outptu; did you mean --output?"]),
    "command": (["fitt"], ["did you mean fit?"]),
    "no command": (["--config", "x"], ["'--config' is not a command"]),
    # a value of another type
    "number": (["--model.epochs_per_rollout", "many"], ["model.epochs_per_rollout: is 'many'", "a whole number"]),
    "number or null": (["--model.gradient_clip", "tight"], ["model.gradient_clip: is 'tight'", "a number or null"]),
    "truth": (["--model.overlong_filter", "perhaps"], ["model.overlong_filter: is 'perhaps'", "true or false"]),
    "choice": (["--data.on_bad_row", "ignore"], ["data.on_bad_row: is 'ignore'", "error, skip"]),
    "list": (["--data.train", "[1, 2]"], ["data.train: is '[1, 2]'", "names with their values"]),
    "coefficient": (["--model.distillation.coef", "high"], ["model.distillation.coef: is 'high'", "a number"]),
    "seed of a set": (["--data.train.addition.seed", "one"], ["data.train.addition.seed: is 'one'"]),
    "learning rate": (
        ["--model.optimizer.class_path", "torch.optim.AdamW", "--model.optimizer.init_args.lr", "fast"],
        ["model.optimizer: lr: is 'fast'; expected a number"],
    ),
    "jobs": (["study", "--config", "configs/studies/smoke.yaml", "--jobs", "0"], ["--jobs", "'0'", "from 1 on"]),
    # a value out of range
    "k1": (["--model.distillation.estimator", "k1"], ["k1", "use k2"]),
    "k3": (["--model.distillation.estimator", "k3"], ["k3", "forward_kl"]),
    "normaliser": (["--model.normaliser", "tokens"], ["'tokens'", "group, token, sequence, constant"]),
    "mask": (["--model.distillation.mask", "all"], ["distillation.mask is 'all'", "negative_advantage"]),
    "quantization": (["--model.teacher.quantization", "2bit"], ["'2bit'", "null, 8bit or 4bit"]),
    "dtype": (["--model.dtype", "float8"], ["'float8'", "float32, bfloat16, float16"]),
    "coefficient NaN": (["--model.distillation.coef", ".nan"], ["coef is nan", "finite"]),
    "clip below": (["--model.policy_gradient.clip_low", "2"], ["clip_low is 2.0", "[0, 1]"]),
    "dual clip": (["--model.policy_gradient.dual_clip", "1"], ["dual_clip is 1.0", "more than 1 + clip_high"]),
    "clip": (["--model.gradient_clip", "-1"], ["gradient_clip is -1", "null for none"]),
    "advantage_eps": (["--model.advantage_eps", "-1"], ["advantage_eps is -1", "1e-6"]),
    "micro-batch": (["--model.max_tokens_per_micro_batch", "0"], ["max_tokens_per_micro_batch is 0", "at least 1"]),
    "teacher's micro-batch": (["--model.teacher.max_tokens_per_micro_batch", "0"], ["teacher.max_tokens", "at least"]),
    "skipped steps": (["--model.max_skipped_steps", "0"], ["max_skipped_steps is 0", "at least 1"]),
    "no groups": (["--model.groups_per_update", "0"], ["groups_per_update is 0", "at least 1"]),
    "negative rate": (
        ["--model.optimizer.class_path", "torch.optim.AdamW", "--model.optimizer.init_args.lr", "-1"],
        ["model.optimizer", "learning rate: -1"],
    ),
    "group of one": (["--rollout.group_size", "1"], ["rollout.group_size", "2 or more"]),
    "no group": (["--rollout.group_size", "0"], ["rollout.group_size is 0"]),
    "greedy": (["--rollout.sampling.temperature", "0"], ["rollout.sampling.temperature", "use 1"]),
    "temperature": (["--rollout.sampling.temperature", "-1"], ["temperature is -1.0", ">= 0"]),
    "top_p": (["--rollout.sampling.top_p", "1.5"], ["top_p is 1.5", "(0, 1]"]),
    "top_k": (["--rollout.sampling.top_k", "-1"], ["top_k is -1", ">= 0"]),
    "min_p": (["--rollout.validation_sampling", '{"min_p": 2}'], ["min_p is 2.0", "[0, 1]"]),
    "max_tokens": (["--rollout.sampling.max_tokens", "0"], ["max_tokens is 0", "at least 1"]),
    "stop token": (["--rollout.sampling.stop_token_ids", "[-1]"], ["stop_token_ids", "never negative"]),
    "policy": (["--rollout.policy", "master"], ["rollout.policy is 'master'", "student or teacher"]),
    "batch": (["--data.prompts_per_rollout", "0"], ["data.prompts_per_rollout is 0", "at least 1"]),
    "weight": (["--data.train.addition.weight", "0"], ["'addition' has weight 0", "more than 0"]),
    "name of a set": (["--data.train", '{"a/b": {"source": "addition", "size": 8}}'], ["'a/b'", "without '/'"]),
    "digits": (["--data.train.addition.options", '{"digits": 0}'], ["digits is 0", "1 to 100"]),
    "size of a task": (["--data.train.addition.size", "null"], ["procedural task; set size"]),
    "task is exhausted": (
        ["--data.train.addition.options", '{"digits": 1}', "--data.train.addition.size", "999"],
        ["size is 999", "lower it"],
    ),
    "run name": (["--run.name", "../up"], ["run.name is '../up'", "plain folder name"]),
    "kept rollouts": (["--run.keep_rollouts", "-5"], ["run.keep_rollouts is -5", "-1 for all"]),
    "no rollouts": (["--run.max_rollouts", "0"], ["run.max_rollouts is 0", "at least 1"]),
    "no saves": (["--checkpoint.every_n_rollouts", "0"], ["checkpoint.every_n_rollouts is 0"]),
    "no workers": (reward("MathReward", "--rollout.reward.workers", "0"), ["workers is 0", "at least 1"]),
    # settings that do not go together
    "teacher twice": (["--model.reward_shaping.coef", "0.1"], ["model.distillation: null"]),
    "no teacher": (["--model.teacher", "null"], ["model.teacher.path"]),
    "no terms": (["--model.policy_gradient", "null", "--model.distillation", "null"], ["no term"]),
    "GSPO": (["--model.policy_gradient", "kdrl_pl.losses.gspo.GSPO"], ["set model.normaliser: sequence"]),
    "uneven updates": (["--model.groups_per_update", "3"], ["groups_per_update is 3 with 4 prompts"]),
    "update beyond the rollout": (["--model.groups_per_update", "8"], ["groups_per_update is 8 with 4 prompts"]),
    "too few prompts": (["--data.train.addition.size", "2"], ["prompts_per_rollout=4", "at most 2"]),
    "setting of another source": (["--data.train.addition.revision", "main"], ["revision", "hub sources; remove it"]),
    "no answers wanted": (reward("ExactMatch", "--data.train.addition.answer_column", "null"), ["no reference answer"]),
    "teacher to validate": (
        ["validate", *DEBUG, "--rollout.policy", "teacher", "--model.teacher", "null", "--model.distillation", "null"],
        ["rollout.policy is teacher", "set model.teacher.path"],
    ),
    "no test set": (["test", *DEBUG], ["data.test has no set", "source: rows.jsonl"]),
    "no train set": (["--data.train", "null"], ["data.train has no set"]),
    "sft resumes": (["sft", "--resume", "auto"], ["does not resume"]),
    "validate resumes": (["validate", *DEBUG, "--resume", "auto"], ["--resume is for kdrl fit", "--ckpt_path"]),
    # the Trainer's own settings
    "bf16-true": (["--trainer.precision", "bf16-true"], ["trainer.precision", "bf16-mixed"]),
    "FSDP1": (["--trainer.strategy", "fsdp"], ["trainer.strategy is fsdp: FSDP1", "configs/trainer/fsdp2.yaml"]),
    "tensor parallelism": (
        ["--trainer.strategy", "ModelParallelStrategy", "--trainer.strategy.tensor_parallel_size", "2"],
        ["trainer.strategy is ModelParallelStrategy", "tensor parallelism has not been tried", "fsdp2"],
    ),
    "sharded without FSDP2": (
        ["--checkpoint.sharded", "true"],
        ["checkpoint.sharded is true, but under SingleDeviceStrategy", "configs/trainer/fsdp2.yaml"],
    ),
    "precision": (["--trainer.precision", "8"], ["trainer.precision: is '8'", "32-true or bf16-mixed"]),
    "inference mode": (["--trainer.inference_mode", "true"], ["trainer.inference_mode"]),
    "trainer's clip": (["--trainer.gradient_clip_val", "1.0"], ["use model.gradient_clip"]),
    "trainer's accumulation": (["--trainer.accumulate_grad_batches", "2"], ["max_tokens_per_micro_batch"]),
    "trainer's sampler": (["--trainer.use_distributed_sampler", "true"], ["must stay False", "whole groups"]),
    "trainer's checkpoints": (["--trainer.enable_checkpointing", "true"], ["use section checkpoint"]),
    "no validations": (["--trainer.val_check_interval", "0"], ["val_check_interval is 0", "at least 1"]),
    "no devices": (["--trainer.devices", "0"], ["devices 0", "not a valid input"]),
    "accelerator": (["--trainer.accelerator", "quantum"], ["quantum", "cpu"]),
    # what may be imported (attacks: test_imports.py)
    "foreign class": (["--rollout.reward", "subprocess.Popen"], ["subprocess.Popen", "--allow-import subprocess"]),
    "allowed nothing": (["--allow-import"], ["--allow-import", "expected the name of a module"]),
    "allowed everything": (["--allow-import", "*"], ["--allow-import got '*'", "the name of a module"]),
    "allowed, not there": (
        ["--allow-import", "no_such_rewards", "--rollout.reward", "no_such_rewards.Mine"],
        ["no module 'no_such_rewards'", "PYTHONPATH"],
    ),
    "function not there": (
        ["--allow-import", "math", *reward("FunctionReward", "--rollout.reward.function", "math.exact")],
        ["math has no function 'exact'"],
    ),
    # files
    "no config": (["--config", "nowhere.yaml"], ["no config file 'nowhere.yaml'"]),
    "config without file": (["--config"], ["--config needs the path"]),
    "folder as config": (["--config", "{bad}/run"], ["no config file", "{bad}/run"]),
    "torn config": (["--config", "{bad}/torn.yaml"], ["torn.yaml is not readable as YAML"]),
    "config of a list": (["--config", "{bad}/list.yaml"], ["holds a list", "model:, data:, rollout:"]),
    "config in Latin-1": (["--config", "{bad}/latin1.yaml"], ["latin1.yaml is not readable", "utf-8"]),
    "key twice": (["--config", "{bad}/twice.yaml"], ["twice.yaml", "'rollout' stands there twice", "line 2"]),
    "output in a config": (["predict", *DEBUG, "--config", "{bad}/output.yaml"], ["output is for the command line"]),
    "no set": (rows("nowhere.jsonl"), ["nowhere.jsonl' is a path, and nothing is there"]),
    "no match": (rows("*.nothing"), ["*.nothing' matches no file"]),
    "folder without rows": (rows("run"), ["holds no file with suffix .jsonl"]),
    "suffix": (rows("rows.txt"), ["unknown kind of file", ".jsonl, .json, .csv, .parquet"]),
    "hub": (
        ["--data.train", "null", "--data.train", '{"rows": {"source": "nobody/nothing"}}'],
        ["'nobody/nothing' cannot be loaded from the hub", "./nobody/nothing"],
    ),
    "run root": (["--run.root", "{bad}/rows.jsonl"], ["run.root is {bad}/rows.jsonl", "is a file", "a folder"]),
    "no student": (["--model.student", "nowhere/at/all"], ["no model folder at 'nowhere/at/all'"]),
    "file as student": (["--model.student", "{bad}/rows.jsonl"], ["no model folder at '{bad}/rows.jsonl'"]),
    "no teacher there": (["--model.teacher.path", "nowhere/at/all"], ["no model folder at 'nowhere/at/all'"]),
    "no run": (["--resume", "runs/nowhere"], ["--resume runs/nowhere", "no such run folder"]),
    "no run yet": (["--resume", "must"], ["--resume must: no run with checkpoints"]),
    "resume without path": (["--resume"], ["--resume needs auto, must, never or the path"]),
    "run without checkpoints": (["--resume", "{bad}/run"], ["no last checkpoint in {bad}/run"]),
    "no checkpoint": (["--resume", "{bad}/rows.jsonl"], ["rows.jsonl is no whole checkpoint", "checksum file"]),
    "damaged checkpoint": (["--resume", "{bad}/damaged"], ["no last checkpoint", "1 damaged ones were skipped"]),
    "no checkpoint to validate": (["validate", *DEBUG, "--ckpt_path", "nowhere"], ["checkpoint at nowhere"]),
    "no run to export": (["export", "nowhere"], ["no run folder or checkpoint at nowhere"]),
    "export of nothing": (["export"], ["required: run"]),
    "export without config": (["export", "{bad}/bare"], ["no config file '{bad}/bare/config.yaml'"]),
    "export of half a config": (["export", "{bad}/thin"], ["lacks run.name or model.student"]),
    "export over files": (["export", "{bad}/whole", "--output", "{bad}"], ["not empty", "--output"]),
    "export of no weights": (["export", "{bad}/whole", "--output", "{bad}/exported"], ["holds no student"]),
    "no rollouts to replay": (["replay", "{bad}/run"], ["no stored rollouts at {bad}/run", "run.keep_rollouts"]),
    "rows to replay": (["replay", "{bad}/rows.jsonl"], ["no stored rollout", "000123.jsonl"]),
    "no competence": (["--model.distillation.competence.path", "no.jsonl"], ["no file 'no.jsonl'", "kdrl predict"]),
    "competence misses": (
        ["--model.distillation.competence.path", "{bad}/teacher.jsonl"],
        ["63 of 64 training prompts", "'addition/2'", "kdrl predict"],
    ),
    "torn competence": (
        ["--model.distillation.competence.path", "{bad}/teacher_torn.jsonl"],
        ["teacher_torn.jsonl, line 1", "uid and correct"],
    ),
    "competence in Latin-1": (
        ["--model.distillation.competence.path", "{bad}/latin1.jsonl"],
        ["latin1.jsonl, line 1", "uid and correct"],
    ),
    # rows
    "torn row": (rows("broken.jsonl"), ["broken.jsonl, row 2: invalid JSON", "on_bad_row=skip"]),
    "no prompt": (rows("no_prompt.jsonl"), ["row 1: no column 'prompt'; the row has question"]),
    "no answer": (rows("no_answer.jsonl"), ["row 1: no column 'answer'; the row has prompt"]),
    "null": (rows("null_answer.jsonl"), ["column 'answer' is null"]),
    "list for an answer": (rows("list_answer.jsonl"), ["column 'answer' is a list", "text or a number"]),
    "empty prompt": (rows("empty_prompt.jsonl"), ["row 1: the prompt is empty"]),
    "number for a prompt": (rows("number.jsonl"), ["the prompt is 46", "text or a list of messages"]),
    "messages": (rows("messages.jsonl"), ["list of messages", "template.chat"]),
    "no object": (rows("no_object.jsonl"), ["holds a JSON list", "expected an object"]),
    "Latin-1": (rows("latin1.jsonl"), ["row 1: invalid UTF-8 at byte 32"]),
    "half a character": (rows("surrogate.jsonl"), ["no proper Unicode"]),
    "foreign alphabet": (rows("letters.jsonl"), ["row 1: the tokenizer cannot write 'What is 1+1?'"]),
    "nothing in it": (rows("empty.jsonl"), ["set 'rows' is empty: 0 rows read"]),
    "nothing left": (rows("no_prompt.jsonl", "--data.on_bad_row", "skip"), ["1 bad rows skipped (the first: "]),
    "torn JSON": (rows("torn.json"), ["torn.json: neither a JSON array of rows nor JSON Lines"]),
    "column twice": (rows("same.csv"), ["two columns have the same name"]),
    "too many cells": (rows("cells.csv"), ["row 1: has 3 cells; expected 2"]),
    "no parquet": (rows("no.parquet"), ["not a parquet file"]),
    "no task": (rows("rows.jsonl"), ["has no column 'task'", "choose another reward"]),
    "no number": (rows("words.jsonl", *reward("NumericMatch")), ["'many' of row", "use ExactMatch"]),
    "too long": (["--data.max_prompt_tokens", "3"], ["64 rows over max_prompt_tokens=3 dropped"]),
    "torn pattern": (["--data.train.addition.answer_pattern", "(("], ["'((' is no regular expression"]),
    "pattern without group": (["--data.train.addition.answer_pattern", "[0-9]+"], ["no group", "parentheses"]),
    "pattern that finds nothing": (["--data.train.addition.answer_pattern", "(x)"], ["row 1: answer_pattern '(x)'"]),
    "template": (["--data.template.text", "question"], ["'question'; it must hold {prompt}"]),
    "chat": (["--data.template.chat", "true"], ["no chat template", "auto or false"]),
    "no response column": (
        [
            "sft",
            "--config",
            "configs/sft.yaml",
            "--model.student",
            "checkpoints/testbeds/arithmetic/student",
            "--data.val",
            "null",
            "--data.train",
            '{"rows": {"source": "{bad}/rows.jsonl"}}',
            "--run.root",
            "{bad}/runs",
        ],
        ["row 1: no column 'response'; the row has prompt, answer"],
    ),
    # models
    "model without config": (["--model.student", "{bad}/no_config"], ["holds no config.json"]),
    "torn model config": (["--model.student", "{bad}/torn_config"], ["torn_config/config.json", "valid JSON"]),
    "unknown kind of model": (["--model.student", "{bad}/unknown_kind"], ["the config of {bad}/unknown_kind", "lama"]),
    "torn weights": (["--model.student", "{bad}/torn_weights"], ["the model of {bad}/torn_weights", "copy it again"]),
    "no weights": (["--model.student", "{bad}/no_weights"], ["holds no *.safetensors"]),
    "no tokenizer": (["--model.student", "{bad}/no_tokenizer"], ["tokenizer of {bad}/no_tokenizer", "tokenizer.json"]),
    "torn tokenizer": (["--model.student", "{bad}/torn_tokenizer"], ["the tokenizer of {bad}/torn_tokenizer"]),
    "more ids than rows": (
        ["--model.student", "{bad}/wide_tokenizer", "--model.teacher", "null", "--model.distillation", "null"],
        ["ids up to 40", "only 16 output rows"],
    ),
    "student nowhere": (["--model.student", "nobody/nothing"], ["nobody/nothing cannot be loaded", "connect"]),
    "teacher's tokenizer": (
        ["--model.teacher.path", "{bad}/other_tokenizer"],
        ["another tokenizer than the student", "'0' is id 2 for the student and 3"],
    ),
    "data's tokenizer": (
        ["--data.tokenizer", "{bad}/other_tokenizer"],
        ["other token ids than the student", "set data.tokenizer: null"],
    ),
    "attention": (["--model.attn_implementation", "fast"], ["arithmetic/student cannot be loaded", "sdpa"]),
    # studies
    "no study": ([*STUDY_COMMAND, "nowhere.yaml"], ["no study 'nowhere.yaml'"]),
    "study of nothing": (["study"], ["required: --config"]),
    "torn study": ([*STUDY_COMMAND, "{bad}/torn.yaml"], ["torn.yaml is not readable as YAML"]),
    "list for a study": ([*STUDY_COMMAND, "{bad}/list.yaml"], ["expected a mapping with name, testbeds, arms"]),
    "no arms": ([*STUDY_COMMAND, "{bad}/study_no_arms.yaml"], ["arms: is missing"]),
    "key of a study": ([*STUDY_COMMAND, "{bad}/study_key.yaml"], ["'sedes'; did you mean seeds?"]),
    "seed of a study": ([*STUDY_COMMAND, "{bad}/study_seed.yaml"], ["seeds: is ['x']", "[0, 1, 2]"]),
    "arm": ([*STUDY_COMMAND, "{bad}/study_arm.yaml"], ["no arm 'kdlr'; did you mean kdrl?"]),
    "the study's own setting": ([*STUDY_COMMAND, "{bad}/study_set.yaml"], ["run.name is what the study sets itself"]),
    "no overlay": ([*STUDY_COMMAND, "{bad}/study_overlay.yaml"], ["no config file 'nowhere.yaml'"]),
    "run of a study": ([*STUDY_COMMAND, "configs/studies/smoke.yaml", "--only", "x/y"], ["no run 'x/y'"]),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Path:
    """The folder with everything that is wrong."""
    folder = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for name in ("no_config", "torn_config", "unknown_kind", "torn_weights", "no_weights", "no_tokenizer"):
        shutil.copytree(ROOT / "checkpoints/testbeds/arithmetic/student", folder / name)
    for name in ("torn_tokenizer", "wide_tokenizer", "other_tokenizer"):
        shutil.copytree(ROOT / "checkpoints/testbeds/arithmetic/student", folder / name)
    (folder / "no_config/config.json").unlink()
    (folder / "torn_config/config.json").write_text("{")
    config = (folder / "unknown_kind/config.json").read_text()
    (folder / "unknown_kind/config.json").write_text(config.replace('"llama"', '"lama"'))
    weights = folder / "torn_weights/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "no_weights/model.safetensors").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "no_tokenizer" / name).unlink()
    (folder / "torn_tokenizer/tokenizer.json").write_text("{")
    tokenizer = json.loads((folder / "wide_tokenizer/tokenizer.json").read_text())
    words = dict(tokenizer["model"]["vocab"])
    tokenizer["model"]["vocab"] = {**words, "x": 40}
    (folder / "wide_tokenizer/tokenizer.json").write_text(json.dumps(tokenizer))
    tokenizer["model"]["vocab"] = {**words, "0": words["1"], "1": words["0"]}
    (folder / "other_tokenizer/tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "run").mkdir()
    for name, vouched in (("damaged", False), ("bare", True), ("thin", True), ("whole", True)):
        checkpoint = folder / name / "checkpoints/last-000002.ckpt"
        checkpoint.parent.mkdir(parents=True)
        torch.save({"epoch": 0}, checkpoint)
        checksum = hashlib.blake2b(checkpoint.read_bytes(), digest_size=16).hexdigest() if vouched else "0" * 32
        checkpoint.with_name("last-000002.ckpt.blake2b").write_text(checksum)
        shutil.copy(ROOT / "configs/debug.yaml", folder / name / "config.yaml")
    (folder / "bare/config.yaml").unlink()
    (folder / "thin/config.yaml").write_text("model: {}\n")
    return folder


def test_missing_settings_are_named_as_they_are_typed(capsys):
    assert main(["fit"]) == 1
    assert "--model.student, --rollout.reward" in capsys.readouterr().err


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_told_in_one_readable_message(case, bad, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments, expected = CASES[case]
    small = ["--run.root", str(tmp_path), "--data.val.addition.size", "2", "--trainer.logger", "false"]
    fit = ["fit", "--config", "configs/debug.yaml", *small, "--trainer.num_sanity_val_steps", "0"]
    is_command = arguments[0] in COMMANDS or case in ("command", "no command")
    try:
        status = main([word.replace("{bad}", str(bad)) for word in (arguments if is_command else [*fit, *arguments])])
        assert status == (2 if case in ("command", "no command") else 1)
    except SystemExit as error:  # of commands without config files
        assert error.code == 2
    message = capsys.readouterr().err
    last = message[message.rindex("\nkdrl") + 1 :] if "\nkdrl" in message else message
    assert last.startswith("kdrl") and "Traceback" not in message
    assert len(last) < 900
    for words in expected:
        assert words.replace("{bad}", str(bad)) in last


def test_the_table_is_as_large_as_it_says():
    assert len(CASES) > 150


def test_a_key_may_come_again_through_a_yaml_merge(tmp_path):
    from kdrl_pl.cli.configs import read_yaml

    file = tmp_path / "merge.yaml"
    file.write_text("base: &base {lr: 1, seed: 2}\nother: &other {<<: *base, lr: 3}\nlast: {<<: *other, seed: 4}\n")
    assert read_yaml(file)["last"] == {"lr": 3, "seed": 4}
