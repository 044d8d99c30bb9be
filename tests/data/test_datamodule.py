"""The data module through a real Trainer: what is drawn, resumed, padded and refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from kdrl_pl.data.datamodule import PromptDataModule
from kdrl_pl.data.loaders import EvaluationLoader, RolloutLoader
from kdrl_pl.data.loading import SetConfig
from kdrl_pl.data.prompts import Prompt
from kdrl_pl.data.sampler import PromptSampler
from kdrl_pl.models.character_tokenizer import character_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),  # no validation set
]

ROWS, PROMPTS = 20, 4  # 5 rollouts per epoch


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> str:
    folder = tmp_path / "student"
    character_tokenizer("abcdefghijklmnopqrstuvwxyz0123456789").save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    return str(folder)


def write_rows(path: Path, count: int) -> str:
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "answer": i}) + "\n" for i in range(count)))
    return str(path)


class Recorder(LightningModule):
    """Two optimizer steps per rollout, the counter in the checkpoint, and a list of what it saw."""

    def __init__(self, student_path: str | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.student_path = student_path
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.rollouts_done = 0
        self.seen: list[tuple[int, tuple[str, ...]]] = []
        self.evaluated: list[tuple[str, int, tuple[str, ...]]] = []

    def training_step(self, batch, batch_idx):
        assert batch.rollout == self.rollouts_done, "the batch was fetched before the previous rollout ended"
        for _ in range(2):
            self.optimizers().step()
        self.seen.append((batch.rollout, tuple(p.uid for p in batch.prompts)))
        self.rollouts_done += 1

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.evaluated.append((batch.dataset, batch.rollout, tuple(p.uid for p in batch.prompts)))

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["rollouts_done"] = self.rollouts_done

    def on_load_checkpoint(self, checkpoint):
        self.rollouts_done = checkpoint["rollouts_done"]


class Stop(Exception):
    pass


class Crash(Callback):
    """Ends the run like a crash, once `rollouts` are done and their checkpoint is written."""

    def __init__(self, rollouts: int) -> None:
        self.rollouts = rollouts

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.rollouts_done == self.rollouts:
            raise Stop


def trainer(folder: Path, callbacks: list[Callback], **arguments) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=callbacks,
        **{"enable_checkpointing": bool(callbacks), "max_epochs": 3, **arguments},
    )


def data(tmp_path: Path, tokenizer_folder: str | None, val: bool = False, **arguments) -> PromptDataModule:
    train = {"rows": SetConfig(source=write_rows(tmp_path / "rows.jsonl", ROWS))}
    validation = {"v": SetConfig(source=write_rows(tmp_path / "val.jsonl", 3))} if val else None
    return PromptDataModule(
        train, validation, tokenizer=tokenizer_folder, **{"prompts_per_rollout": PROMPTS, **arguments}
    )


def every_rollout(folder: Path, **arguments) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1, **arguments)


@pytest.fixture
def uninterrupted(tmp_path: Path, tokenizer_folder: str) -> list[tuple[int, tuple[str, ...]]]:
    module = Recorder()
    trainer(tmp_path, []).fit(module, datamodule=data(tmp_path, tokenizer_folder))
    return module.seen


def test_three_epochs_are_fifteen_rollouts_each_epoch_a_pass(uninterrupted):
    assert [k for k, _ in uninterrupted] == list(range(15))
    for epoch in range(3):
        uids = [uid for _, batch in uninterrupted[5 * epoch : 5 * epoch + 5] for uid in batch]
        assert sorted(uids) == sorted(f"rows/{i}" for i in range(1, ROWS + 1))
    assert uninterrupted[0] != (0, uninterrupted[5][1])  # another order in the next epoch


@pytest.mark.parametrize("val", [False, True])
def test_resume_after_any_rollout_gives_the_uninterrupted_sequence(tmp_path, tokenizer_folder, uninterrupted, val):
    """Mid-epoch, at the last rollout of an epoch and after it: same prompts, same number, and no rollout twice."""
    folder = tmp_path / "checkpoints"
    for done in range(1, 15):
        first = Recorder()
        callbacks = [every_rollout(folder / str(done)), Crash(done)]
        with pytest.raises(Stop):
            trainer(tmp_path, callbacks).fit(first, datamodule=data(tmp_path, tokenizer_folder, val))
        second = Recorder()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*dataloader is not resumable.*")  # it is
            trainer(tmp_path, []).fit(
                second,
                datamodule=data(tmp_path, tokenizer_folder, val),
                ckpt_path=str(folder / str(done) / f"step={2 * done}.ckpt"),
                weights_only=True,
            )
        assert first.seen + second.seen == uninterrupted, f"resumed after rollout {done}"
        if val and done % 5:
            assert second.evaluated[-1] == ("v", 0, ("v/1", "v/2", "v/3"))


def test_resume_from_a_checkpoint_of_the_epoch_end(tmp_path, tokenizer_folder, uninterrupted):
    callback = ModelCheckpoint(tmp_path / "ends", filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    trainer(tmp_path, [callback]).fit(Recorder(), datamodule=data(tmp_path, tokenizer_folder))
    for epoch in range(3):
        resumed = Recorder()
        path = str(tmp_path / "ends" / f"epoch={epoch}.ckpt")
        trainer(tmp_path, []).fit(
            resumed, datamodule=data(tmp_path, tokenizer_folder), ckpt_path=path, weights_only=True
        )
        assert resumed.seen == uninterrupted[5 * (epoch + 1) :]


@pytest.mark.parametrize("across_epochs", [False, True])
def test_resume_from_a_checkpoint_written_by_validation(tmp_path, tokenizer_folder, uninterrupted, across_epochs):
    """As the best checkpoint is: every second rollout, within epochs of five or counted across them."""
    arguments = {"val_check_interval": 2, "check_val_every_n_epoch": None if across_epochs else 1}
    callback = ModelCheckpoint(tmp_path / "v", filename="{step}", save_on_train_epoch_end=False, save_top_k=-1)
    first = Recorder()
    trainer(tmp_path, [callback], **arguments).fit(first, datamodule=data(tmp_path, tokenizer_folder, val=True))
    assert first.seen == uninterrupted
    saved = sorted(int(path.stem.removeprefix("step=")) // 2 for path in (tmp_path / "v").glob("*.ckpt"))
    assert saved == ([2, 4, 6, 8, 10, 12, 14] if across_epochs else [2, 4, 7, 9, 12, 14])
    for done in saved:
        second = Recorder()
        trainer(tmp_path, [], **arguments).fit(
            second,
            datamodule=data(tmp_path, tokenizer_folder, val=True),
            ckpt_path=str(tmp_path / "v" / f"step={2 * done}.ckpt"),
            weights_only=True,
        )
        assert second.seen == uninterrupted[done:], f"resumed after rollout {done}"


def test_a_finished_run_resumed_with_more_epochs_goes_on(tmp_path, tokenizer_folder, uninterrupted):
    callback = ModelCheckpoint(tmp_path / "last", filename="last")
    trainer(tmp_path, [callback], max_epochs=2).fit(Recorder(), datamodule=data(tmp_path, tokenizer_folder))
    resumed = Recorder()
    trainer(tmp_path, []).fit(
        resumed,
        datamodule=data(tmp_path, tokenizer_folder),
        ckpt_path=str(tmp_path / "last" / "last.ckpt"),
        weights_only=True,
    )
    assert resumed.seen == uninterrupted[10:]


def test_limit_train_batches_shortens_epochs_but_not_the_sequence(tmp_path, tokenizer_folder, uninterrupted):
    module = Recorder()
    trainer(tmp_path, [], max_epochs=4, limit_train_batches=3).fit(module, datamodule=data(tmp_path, tokenizer_folder))
    assert module.seen == uninterrupted[:12]


def test_max_steps_counts_optimizer_steps(tmp_path, tokenizer_folder, uninterrupted):
    module = Recorder()
    trainer(tmp_path, [], max_epochs=-1, max_steps=14).fit(module, datamodule=data(tmp_path, tokenizer_folder))
    assert module.seen == uninterrupted[:7]


def test_the_order_depends_on_the_seed_only(tmp_path, tokenizer_folder, uninterrupted):
    torch.manual_seed(1234)
    same, other = Recorder(), Recorder()
    trainer(tmp_path, []).fit(same, datamodule=data(tmp_path, tokenizer_folder))
    trainer(tmp_path, []).fit(other, datamodule=data(tmp_path, tokenizer_folder, seed=1))
    assert same.seen == uninterrupted
    assert other.seen != uninterrupted


def test_validation_runs_every_set_in_config_order_with_its_name(tmp_path, tokenizer_folder):
    sets = {
        "zebra": SetConfig(source=write_rows(tmp_path / "z.jsonl", 3)),
        "ant": SetConfig(source=write_rows(tmp_path / "a.jsonl", 2)),
    }
    for run, section in (("validate", "val"), ("test", "test"), ("predict", "predict")):
        module = Recorder()
        datamodule = PromptDataModule(tokenizer=tokenizer_folder, val_batch_size=2, **{section: sets})
        getattr(trainer(tmp_path, []), run)(module, datamodule=datamodule)
        assert module.evaluated == [
            ("zebra", 0, ("zebra/1", "zebra/2")),
            ("zebra", 1, ("zebra/3",)),
            ("ant", 0, ("ant/1", "ant/2")),
        ]
        assert list(datamodule.rows) == [section]


def test_fit_without_validation_sets_runs(tmp_path, tokenizer_folder):
    module = Recorder()
    trainer(tmp_path, [], max_epochs=1).fit(module, datamodule=data(tmp_path, tokenizer_folder))
    assert module.evaluated == [] and len(module.seen) == 5


def test_the_tokenizer_is_the_students_unless_given(tmp_path, tokenizer_folder):
    datamodule = data(tmp_path, None)
    trainer(tmp_path, [], max_epochs=1).fit(Recorder(tokenizer_folder), datamodule=datamodule)
    assert datamodule.tokenizer("ab")["input_ids"] == [2, 3]
    with pytest.raises(ValueError, match=r"set data\.tokenizer"):
        data(tmp_path, None).setup("fit")


def test_prompts_carry_text_ids_answer_and_name(tmp_path, tokenizer_folder):
    datamodule = data(tmp_path, tokenizer_folder)
    datamodule.setup("fit")
    prompt = datamodule.rows["train"]["rows"][3]
    assert (prompt.uid, prompt.text, prompt.answer, prompt.dataset) == ("rows/4", "q3", "3", "rows")
    assert prompt.input_ids == (2 + 16, 2 + 26 + 3)  # "q" is letter 16, digits follow the 26 letters


def test_without_a_trainer_the_loader_is_one_epoch(tmp_path, tokenizer_folder, uninterrupted):
    datamodule = data(tmp_path, tokenizer_folder)
    datamodule.setup("fit")
    loader = datamodule.train_dataloader()
    assert len(loader) == 5
    assert [(b.rollout, tuple(p.uid for p in b.prompts)) for b in loader] == uninterrupted[:5]


def test_too_few_rows_and_missing_sets_are_refused_with_the_cure(tmp_path, tokenizer_folder):
    with pytest.raises(ValueError, match=r"20 training prompts are fewer.*prompts_per_rollout to at most 20"):
        data(tmp_path, tokenizer_folder, prompts_per_rollout=64).setup("fit")
    with pytest.raises(ValueError, match=r"data\.val has no set"):
        data(tmp_path, tokenizer_folder).setup("validate")
    with pytest.raises(ValueError, match=r"data\.prompts_per_rollout is 0"):
        data(tmp_path, tokenizer_folder, prompts_per_rollout=0)
    with pytest.raises(ValueError, match="named 'a/b'"):
        PromptDataModule({"a/b": SetConfig(source="addition")})


def test_an_overlay_removes_a_set_with_null():
    datamodule = PromptDataModule({"keep": SetConfig(source="addition"), "drop": None})
    assert list(datamodule.configs["train"]) == ["keep"]


def test_task_sets_of_train_and_val_are_disjoint_unless_told_otherwise(tmp_path):
    folder = tmp_path / "tokenizer"
    character_tokenizer("0123456789+=").save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    sets = {"add": SetConfig(source="addition", size=200, options={"digits": 2})}
    datamodule = PromptDataModule(sets, sets, predict=sets, tokenizer=str(folder), prompts_per_rollout=8)
    datamodule.setup("fit")
    datamodule.setup("predict")
    texts = {section: {p.text for p in datamodule.rows[section]["add"]} for section in ("train", "val", "predict")}
    assert len(texts["train"]) == len(texts["val"]) == 200
    assert not texts["train"] & texts["val"]
    assert texts["predict"] == texts["train"]  # text to train on is made from training problems


def test_what_was_left_out_is_said_once(tmp_path, tokenizer_folder, caplog):
    datamodule = data(tmp_path, tokenizer_folder, max_prompt_tokens=2)
    with caplog.at_level("INFO", "kdrl_pl"):
        datamodule.setup("fit")  # q0 ... q9 have two characters, q10 ... q19 three
        datamodule.setup("fit")
    said = [record.message for record in caplog.records]
    assert said == ["data.train.rows: 10 rows kept; 10 rows over max_prompt_tokens=2 dropped"]
    assert datamodule.counts["train"]["rows"].too_long == 10


def test_the_fingerprint_sees_text_answers_and_rows_but_not_the_rank(tmp_path, tokenizer_folder):
    def fingerprint(rows: str) -> str:
        path = tmp_path / "print.jsonl"
        path.write_text(rows)
        sets = {"rows": SetConfig(source=str(path))}
        datamodule = PromptDataModule(sets, tokenizer=tokenizer_folder, prompts_per_rollout=1)
        datamodule.setup("fit")
        return datamodule.fingerprint()

    base = fingerprint('{"prompt": "a", "answer": 1}\n')
    assert base == fingerprint('{"answer": "1", "prompt": "a"}\n')
    others = ['{"prompt": "b", "answer": 1}\n', '{"prompt": "a", "answer": 2}\n', '\n{"prompt": "a", "answer": 1}\n']
    assert len({base, *map(fingerprint, others)}) == 4


def prompts(count: int, name: str = "s") -> list[Prompt]:
    return [Prompt(f"{name}/{i}", "t", (2,), dataset=name) for i in range(count)]


def test_ranks_share_a_rollout_by_every_wth_prompt_with_global_occurrences():
    # 3 rows and 2 of another set make 4 prompts: rows come again within one rollout and must not share a stream
    sets = {"a": prompts(3, "a"), "b": prompts(2, "b")}
    sampler = PromptSampler({"a": 3, "b": 2}, {"a": 1, "b": 3}, 4, seed=0, world_size=2)
    whole = RolloutLoader(sets, sampler, lambda: (0, None)).batch(5)
    halves = [RolloutLoader(sets, sampler, lambda: (0, None), rank, 2).batch(5) for rank in range(2)]
    for rank in range(2):
        assert [p.uid for p in halves[rank].prompts] == [p.uid for p in whole.prompts][rank::2]
        assert halves[rank].occurrences == whole.occurrences[rank::2]
    assert sum(p.dataset == "b" for p in whole.prompts) == 3  # of 2 rows
    assert sorted(whole.occurrences) == [0, 0, 0, 1]


@pytest.mark.parametrize(("rows", "world_size"), [(7, 3), (6, 3), (1, 4), (5, 1)])
def test_evaluation_ranks_run_equally_many_batches_and_count_every_prompt_once(rows, world_size):
    loaders = [EvaluationLoader("s", prompts(rows), 2, rank, world_size) for rank in range(world_size)]
    assert len({len(loader) for loader in loaders}) == 1
    counted = []
    for loader in loaders:
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(len(batch) > 0 and batch.dataset == "s" for batch in batches)
        counted += [p.uid for b in batches for p, padding in zip(b.prompts, b.is_padding, strict=True) if not padding]
    assert sorted(counted) == sorted(f"s/{i}" for i in range(rows))


def test_seven_prompts_on_three_ranks():
    loader = EvaluationLoader("s", prompts(7), 2, rank=1, world_size=3)
    assert [[p.uid for p in batch.prompts] for batch in loader] == [["s/1", "s/4"], ["s/0"]]
    assert [batch.is_padding for batch in loader] == [[False, False], [True]]


TWO_RANKS = """
import json, sys, torch
torch.set_num_threads(1)
from lightning.pytorch import LightningModule, Trainer
from kdrl_pl.data.datamodule import PromptDataModule
from kdrl_pl.data.loading import SetConfig

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.rollouts_done, self.seen, self.validated = 0, [], []
    def training_step(self, batch, batch_idx):
        self.manual_backward(self.weight.sum())
        self.optimizers().step()
        self.seen.append([p.uid for p in batch.prompts])
        self.rollouts_done += 1
    def validation_step(self, batch, batch_idx):
        self.validated.append([[p.uid for p in batch.prompts], batch.is_padding])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

module = Module()
folder, tokenizer = sys.argv[1:]
data = PromptDataModule(
    {"rows": SetConfig(f"{folder}/rows.jsonl")}, {"v": SetConfig(f"{folder}/val.jsonl")},
    tokenizer=tokenizer, prompts_per_rollout=4,
)
trainer = Trainer(
    accelerator="cpu", strategy="ddp", devices=2, max_epochs=3, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
)
trainer.fit(module, datamodule=data)
result = {"seen": module.seen, "validated": module.validated[0], "fingerprint": data.fingerprint()}
open(f"{folder}/rank{trainer.global_rank}.json", "w").write(json.dumps(result))
"""


@pytest.mark.distributed
def test_two_ddp_ranks_share_the_rollouts_of_one_process(tmp_path, tokenizer_folder, uninterrupted):
    write_rows(tmp_path / "val.jsonl", 3)
    (tmp_path / "run.py").write_text(TWO_RANKS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path), tokenizer_folder]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for k, (_, uids) in enumerate(uninterrupted):
        assert [ranks[0]["seen"][k], ranks[1]["seen"][k]] == [list(uids[0::2]), list(uids[1::2])]
    assert len(ranks[0]["seen"]) == 15
    assert ranks[0]["validated"] == [["v/1", "v/3"], [False, False]]
    assert ranks[1]["validated"] == [["v/2", "v/1"], [False, True]]
    assert ranks[0]["fingerprint"] == ranks[1]["fingerprint"]
