"""Supervised fine-tuning against plain cross entropy, and exports that transformers loads."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from tiny_run import adamw, fit, make_data, make_module, make_trainer

from kdrl_pl.checkpoint import AtomicCheckpointIO, find_checkpoint
from kdrl_pl.cli import export as export_command
from kdrl_pl.cli import sft as sft_command
from kdrl_pl.cli.lightning import TRAINER_DEFAULTS
from kdrl_pl.data.examples import SFTSetConfig
from kdrl_pl.data.sft import SFTDataModule
from kdrl_pl.export import export_checkpoint
from kdrl_pl.models.adapters import Lora, adapter_weights
from kdrl_pl.sft import SFTModule

BATCH = {
    "input_ids": torch.tensor([[3, 4, 12, 8, 9, 1], [5, 6, 12, 2, 1, 0], [7, 12, 1, 0, 0, 0]]),
    "response_mask": torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0]], dtype=torch.bool),
}


def plain_loss(model, batch):
    """transformers' logits, torch's cross entropy, the mean over response tokens."""
    logits = model(batch["input_ids"]).logits[:, :-1]
    labels = torch.where(batch["response_mask"], batch["input_ids"], -100)[:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_the_loss_is_cross_entropy_over_response_tokens(tiny_models):
    from transformers import AutoModelForCausalLM

    module = SFTModule(tiny_models[0])
    module.configure_model()
    loss = module.loss(BATCH)
    loss.backward()
    reference = AutoModelForCausalLM.from_pretrained(tiny_models[0], dtype=torch.float32)
    expected = plain_loss(reference, BATCH)
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert (gradient(module.student) - gradient(reference)).norm() < 1e-6 * gradient(reference).norm()
    assert float(loss) > 2


def task(size, **settings):
    return SFTSetConfig(source="addition", size=size, options={"digits": 1}, **settings)


def train(student, folder, **settings):
    module = SFTModule(student, optimizer=adamw, **settings)
    data = SFTDataModule(train={"a": task(64)}, val={"even": task(8), "odd": task(3)}, batch_size=16)
    defaults = {**TRAINER_DEFAULTS, "val_check_interval": 1.0, "check_val_every_n_epoch": 1, "max_epochs": 8}
    trainer = Trainer(**defaults, accelerator="cpu", logger=False, default_root_dir=folder)
    trainer.fit(module, datamodule=data)
    return module, trainer, data


@pytest.mark.parametrize("from_scratch", [False, True])
def test_it_learns_and_validates_over_tokens(from_scratch, tiny_models, tmp_path):
    module, trainer, data = train(tiny_models[0], tmp_path, from_scratch=from_scratch)
    assert trainer.global_step == 8 * 4
    value = float(trainer.callback_metrics["val/loss"])
    assert value < 1.5  # it began at more than log(16) = 2.77
    batches = [batch for loader in data.val_dataloader() for batch in loader]
    assert [len(batch["input_ids"]) for batch in batches] == [8, 3]  # uneven
    with torch.no_grad():
        sums = [float(plain_loss(module.student.model, b)) * int(b["response_mask"].sum()) for b in batches]
    assert value == pytest.approx(sum(sums) / sum(int(b["response_mask"].sum()) for b in batches), rel=1e-5)


def test_an_adapter_is_trained_saved_alone_and_exported_on_its_base(tiny_models, tmp_path):
    from transformers import AutoModelForCausalLM

    module, trainer, _ = train(tiny_models[0], tmp_path / "run", adapter=Lora(rank=8))
    trainer.save_checkpoint(tmp_path / "adapter.ckpt")
    saved = torch.load(tmp_path / "adapter.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == adapter_weights(module).keys() and all("lora" in name for name in saved)
    export_checkpoint(tmp_path / "adapter.ckpt", tiny_models[0], tmp_path / "out")
    with torch.no_grad():
        ours = module.student.model.eval()(BATCH["input_ids"]).logits
        exported, base = (
            AutoModelForCausalLM.from_pretrained(path).eval()(BATCH["input_ids"]).logits
            for path in (tmp_path / "out", tiny_models[0])
        )
    assert torch.allclose(exported, ours, rtol=0, atol=1e-4)
    assert (exported - base).abs().max() > 0.1
    with pytest.raises(ValueError, match=r"model\.from_scratch starts from random weights, which model\.adapter would"):
        SFTModule(tiny_models[0], from_scratch=True, adapter=Lora())


def test_the_command_leaves_a_checkpoint_that_exports(tiny_models, tmp_path):
    from transformers import AutoModelForCausalLM

    config = tmp_path / "sft.yaml"
    config.write_text(
        f"""
model: {{student: {tiny_models[0]}, optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.003}}}}}}
data:
  batch_size: 16
  train: {{a: {{source: addition, size: 32, options: {{digits: 1}}}}}}
  val: {{a: {{source: addition, size: 8, options: {{digits: 1}}}}}}
trainer: {{accelerator: cpu, max_epochs: 2}}
run: {{name: taught, root: {tmp_path}}}
"""
    )
    sft_command.main("sft", ["--config", str(config)])
    (run,) = (tmp_path / "taught").iterdir()
    assert find_checkpoint(run).name == "last-000004.ckpt"
    assert find_checkpoint(run, "best").name == "best-000004.ckpt"  # the loss falls
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["global_step"] for row in rows if "val/loss" in row] == [2, 4]
    export_command.main("export", [str(run), "--output", str(tmp_path / "out")])
    weights = torch.load(find_checkpoint(run), weights_only=True)["state_dict"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(value, weights[f"student.model.{name}"]) for name, value in exported.items())
    with pytest.raises(ValueError, match=r"was not written by kdrl fit; one of kdrl sft becomes a student by kdrl exp"):
        make_trainer(tmp_path).validate(make_module(*tiny_models), make_data(), ckpt_path=find_checkpoint(run))


# ---- exports ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def students(tiny_models, tmp_path_factory):
    """Untied and tied embeddings, and GPT-2, which is tied and whose generation config names two end tokens."""
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from kdrl_pl.models.loading import load_tokenizer

    tokenizer = load_tokenizer(tiny_models[0])
    folder = tmp_path_factory.mktemp("students")
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    llama = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    models = {
        "tied": LlamaForCausalLM(LlamaConfig(**llama, **size, tie_word_embeddings=True)),
        "gpt2": GPT2LMHeadModel(GPT2Config(**size, n_embd=32, n_layer=1, n_head=2, n_positions=64)),
    }
    models["gpt2"].generation_config = GenerationConfig(eos_token_id=[1, 5], temperature=0.6, do_sample=True)
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {"untied": tiny_models[0], **{name: str(folder / name) for name in models}}


@pytest.mark.parametrize("kind", ["untied", "tied", "gpt2"])
def test_an_export_is_the_trained_student(kind, students, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = students[kind]
    module = make_module(path, None)
    fit(tmp_path / "run", module, make_data(val=0), max_rollouts=2)
    export_checkpoint(find_checkpoint(tmp_path / "run"), path, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    before = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    module.student.eval()
    ids = BATCH["input_ids"]
    with torch.no_grad():
        logits = exported(ids).logits
        assert torch.equal(logits, module.student.model(ids).logits)
        assert not torch.allclose(logits, before(ids).logits, atol=1e-3)
    assert (exported.get_output_embeddings().weight is exported.get_input_embeddings().weight) == (kind != "untied")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == AutoTokenizer.from_pretrained(path).get_vocab()
    )
    for name in ("generation_config.json", "config.json"):
        ours, theirs = (json.loads((folder / name).read_text()) for folder in (tmp_path / "out", Path(path)))
        assert {**ours, "transformers_version": ""} == {**theirs, "transformers_version": ""}


def test_an_export_may_be_in_half_precision(tiny_models, tmp_path):
    from transformers import AutoModelForCausalLM

    module = make_module(tiny_models[0], None)
    fit(tmp_path / "run", module, make_data(val=0), max_rollouts=1)
    export_checkpoint(find_checkpoint(tmp_path / "run"), tiny_models[0], tmp_path / "out", "bfloat16")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.dtype == torch.bfloat16
    for ours, theirs in zip(exported.parameters(), module.student.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16())


def test_an_export_does_not_overwrite_and_does_not_mix_models(tiny_models, students, tmp_path):
    fit(tmp_path / "run", make_module(tiny_models[0], None), make_data(val=0), max_rollouts=1)
    checkpoint = find_checkpoint(tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="full is not empty; choose another folder with --output"):
        export_checkpoint(checkpoint, tiny_models[0], tmp_path / "full")
    for other in ("tied", "gpt2"):  # the same names in other shapes, and other names
        with pytest.raises(ValueError, match=f"the weights of {checkpoint} are not those of {students[other]}: "):
            export_checkpoint(checkpoint, students[other], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert isinstance(AtomicCheckpointIO().load_checkpoint(checkpoint), dict)
