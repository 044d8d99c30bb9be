"""A teacher cut over two processes says what a whole one says, and nobody waits for ever.

Run as a script, this file is one process of the test.
"""

import faulthandler
import json
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from kdrl_pl.experience import Experience
from kdrl_pl.teacher import FrozenTeacher


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantised_weights_are_not_cut(quantization):
    with pytest.raises(
        ValueError, match=r"teacher\.sharded .* set teacher\.quantization: null \(dtype: bfloat16\), or"
    ):
        FrozenTeacher("nowhere", quantization=quantization, sharded=True)


def test_sharded_and_offloaded_is_refused():
    with pytest.raises(ValueError, match=r"two ways to make room: set one of them to false"):
        FrozenTeacher("nowhere", offload=True, sharded=True)


def test_alone_it_is_a_whole_teacher(tiny_models):
    logprobs = []
    for sharded in (False, True):
        teacher, experience = FrozenTeacher(tiny_models[1], sharded=sharded), rows()
        teacher.load("cpu")
        teacher.score(experience, experience.response_mask)
        logprobs.append(experience.teacher_logprobs)
    assert torch.equal(*logprobs)


@pytest.mark.distributed
def test_two_processes_agree_with_one(tiny_models, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.path.dirname(os.path.dirname(__file__))}
    command = [sys.executable, __file__, str(tmp_path), *tiny_models]
    processes = [
        subprocess.Popen([*command, str(number)], env=environment, stderr=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    try:
        errors = [process.communicate(timeout=180)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_ddp_run_under_a_sharded_teacher_is_that_under_a_whole_one(tmp_path):
    small = """
data:
  prompts_per_rollout: 4
  val_batch_size: 16
  train: {addition: {size: 64}}
  val: {addition: {size: 16}}
rollout: {group_size: 4, validation_samples: 1}
trainer: {logger: false, val_check_interval: 2}
run: {max_rollouts: 2}
"""
    (tmp_path / "small.yaml").write_text(small)
    rows = []
    for overlay in ("trainer/ddp", "teacher/sharded"):
        files = ["quickstart", *dict.fromkeys(("trainer/ddp", overlay))]
        command = [sys.executable, "-m", "kdrl_pl", "fit", *(f"--config=configs/{name}.yaml" for name in files)]
        command += [f"--config={tmp_path}/small.yaml", f"--run.root={tmp_path}/{overlay}"]
        root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
        ran = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr
        (file,) = (tmp_path / overlay).rglob("metrics.jsonl")
        rows.append([json.loads(line) for line in file.read_text().splitlines()])
    for whole, sharded in zip(*rows, strict=True):
        names = [name for name in whole if not name.startswith(("time/", "perf/"))]
        assert {name: sharded[name] for name in names} == pytest.approx({name: whole[name] for name in names}, rel=1e-4)


def rows(groups=4, share=True):
    """Groups of three ragged rows; long common prompts are read once."""
    generator = torch.Generator().manual_seed(groups)

    def ids(n):
        return torch.randint(2, 16, (n,), generator=generator).tolist()

    prompts = [ids(60 if share else 3) for _ in range(groups)]
    responses = [ids(n) for n in torch.randint(1, 9, (3 * groups,), generator=generator).tolist()]
    return Experience.from_rows(
        [prompt for prompt in prompts for _ in range(3)],
        responses,
        [1.0, 0.0, 0.5] * groups,
        [g for g in range(groups) for _ in range(3)],
        temperature=0.7,
        stop_cell=(1, 7),
    )


def scored(teacher, experience, asked=None, hidden=False):
    asked = experience.response_mask if asked is None else asked
    teacher.score(experience, asked, hidden=hidden)
    return experience


def main(folder, student, path, number):
    from torch.distributed.tensor import DTensor

    from kdrl_pl.errors import TeacherLost
    from kdrl_pl.losses import Distillation
    from kdrl_pl.module import KDRLModule
    from kdrl_pl.rollout.in_process import InProcessEngine
    from kdrl_pl.rollout.sampling import Sampling
    from kdrl_pl.rollout.streams import group_keys
    from kdrl_pl.teacher import RoutedTeacher, TeacherCache

    faulthandler.dump_traceback_later(170, exit=True)  # a rank that waits says where
    torch.set_num_threads(1)
    whole = FrozenTeacher(path)
    whole.load("cpu")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=2)
    teacher = FrozenTeacher(path, sharded=True, max_tokens_per_micro_batch=100)
    teacher.load("cpu")

    def is_cut():
        parameters = list(teacher.model.parameters())
        held = sum(parameter.to_local().numel() for parameter in parameters)
        return all(isinstance(p, DTensor) for p in parameters) and held <= 0.51 * sum(p.numel() for p in parameters)

    assert is_cut()
    for share in (True, False):
        for groups in ([4, 1], [1, 3]):  # rows of rank 0 and of rank 1: other numbers of passes
            mine = scored(teacher, rows(groups[number], share))
            theirs = scored(whole, rows(groups[number], share))
            assert torch.allclose(mine.teacher_logprobs, theirs.teacher_logprobs, atol=1e-6)
            assert mine.teacher_logprobs.std() > 0.1
            assert is_cut()  # the head's and the embeddings' root too
    experience = rows(2)
    nothing = torch.zeros_like(experience.response_mask)
    scored(teacher, experience, experience.response_mask if number else nothing)  # rank 0 asks about nothing
    assert bool(experience.teacher_logprobs.any()) == bool(number)
    scored(teacher, experience, nothing)  # nobody asks about anything

    # The full vocabulary: the whole head on every rank, gathered once.
    mine, theirs = scored(teacher, rows(1 + number), hidden=True), scored(whole, rows(1 + number), hidden=True)
    assert torch.allclose(mine.teacher_hidden, theirs.teacher_hidden, atol=1e-5)
    assert torch.equal(teacher.head().weight, whole.head().weight)
    assert teacher.head() is teacher.head() and is_cut()

    # In a module: rank 1 has only correct rows, about which mask "response" asks nothing.
    for estimator in ("k2", "full"):
        gradients = []
        for kind in (whole, FrozenTeacher(path, sharded=True)):
            settings = {"policy_gradient": None, "distillation": Distillation(1.0, estimator, mask="response")}
            module = KDRLModule(student, kind, **settings).load()
            experience = rows(2)
            experience.correct = torch.full((6,), bool(number))
            module.score(experience)
            assert bool(experience.teacher_mask.any()) != bool(number)
            module.loss(experience).loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in module.student.parameters() if p.grad is not None]))
        assert torch.allclose(*gradients, atol=1e-6)
        assert (gradients[0].norm() > 0) != bool(number)

    # It answers prompts itself; ranks take different numbers of steps.
    sampling, prompts = Sampling(max_tokens=[12, 2][number]), [[[3, 4, 5], [6]], [[9, 10]]][number]
    sampled = []
    for kind in (teacher, whole):
        engine, model = InProcessEngine(), kind.sampler()
        engine.sync(model, [])
        keys = group_keys(number, 0, [str(i) for i in range(len(prompts))], [0] * len(prompts), 2)
        sampled.append(engine.generate(prompts, 2, sampling, keys).token_ids)
    assert sampled[0] == sampled[1]
    mine = scored(teacher, rows(2))
    assert torch.allclose(mine.teacher_logprobs, scored(whole, rows(2)).teacher_logprobs, atol=1e-6)

    # With a cache in which rank 0 finds all of its rows and rank 1 none.
    cached = FrozenTeacher(path, sharded=True, cache=TeacherCache(f"{folder}/{number}"))
    cached.load("cpu")
    if number == 0:
        alone = FrozenTeacher(path, cache=TeacherCache(f"{folder}/0"))
        alone.load("cpu")
        scored(alone, rows(3))
    mine = scored(cached, rows(3))
    assert cached.score_metrics["teacher/cache_hits"] == ([9, 0][number], 9)
    assert torch.allclose(mine.teacher_logprobs, scored(whole, rows(3)).teacher_logprobs, atol=1e-6)
    assert scored(cached, rows(3)).teacher_logprobs.equal(mine.teacher_logprobs)

    # Beside one that rank 0 alone has lost: it passes in step all the same, and says so after that.
    class Away(FrozenTeacher):
        def score(self, experience, asked, *, hidden=False):
            if number == 0:
                raise TeacherLost("gone")
            super().score(experience, asked, hidden=hidden)

    routed = RoutedTeacher({"away": Away(path), "here": FrozenTeacher(path, sharded=True)})
    routed.load("cpu")
    experience = rows(2)
    experience.teachers = ["away"] * 3 + ["here"] * 3
    with pytest.raises(TeacherLost) if number == 0 else nullcontext():
        routed.score(experience, experience.response_mask)
    expected = scored(whole, rows(2)).teacher_logprobs
    assert torch.allclose(experience.teacher_logprobs[3 * (1 - number) :], expected[3 * (1 - number) :], atol=1e-6)
    assert torch.allclose(scored(teacher, rows(2)).teacher_logprobs, expected, atol=1e-6)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
