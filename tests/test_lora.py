"""A LoRA run: what its checkpoints hold and refuse, what is exported of it, and that it learns."""

import json
import shutil

import pytest
import torch
from tiny_run import fit, make_data, make_module, metrics_rows, write_models

from kdrl_pl.__main__ import main
from kdrl_pl.checkpoint import find_checkpoint
from kdrl_pl.experience import Experience
from kdrl_pl.export import export_checkpoint
from kdrl_pl.losses import ReferenceKL
from kdrl_pl.models.adapters import Lora, adapter_weights

IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 3, 9, 4, 9, 5]])


def lora(**settings) -> Lora:
    return Lora(**{"rank": 4, "alpha": 8.0, **settings})


def run(folder, models, adapter, rollouts=2, resume=None, anyway=False, **settings):
    module = make_module(*models, adapter=adapter, **settings)
    module.resume_anyway = anyway
    fit(folder, module, make_data(val=0), max_rollouts=rollouts, resume=resume)
    return module


@pytest.fixture(scope="module")
def trained(tiny_models, tmp_path_factory):
    """The module of a run of two rollouts, and its checkpoint."""
    folder = tmp_path_factory.mktemp("lora")
    module = run(folder, tiny_models, lora(modules_to_save=["lm_head"]))
    return module, find_checkpoint(folder)


def test_a_checkpoint_holds_the_adapter_and_nothing_of_the_base(trained):
    module, path = trained
    content = torch.load(path, weights_only=True)
    weights = adapter_weights(module)
    assert content["state_dict"].keys() == weights.keys()
    assert all(torch.equal(content["state_dict"][name], weight) for name, weight in weights.items())
    assert {name.split(".")[-3] for name in weights} == {"lora_A", "lora_B", "modules_to_save"}
    assert len(content["optimizer_states"][0]["state"]) == len(weights)
    said = content["kdrl"]["adapter"]
    assert {k: said[k] for k in ("rank", "alpha", "quantization", "dtype")} == {
        "rank": 4,
        "alpha": 8.0,
        "quantization": None,
        "dtype": "float32",
    }
    assert path.stat().st_size < 4 * 4 * sum(weight.numel() for weight in weights.values())  # two moments, and names


def test_another_base_is_refused_unless_one_insists(trained, tiny_models, tmp_path, caplog):
    _, path = trained
    other = shutil.copytree(tiny_models[0], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config, indent=3))  # the same model, another file
    models = (str(other), tiny_models[1])
    with pytest.raises(ValueError, match=r"was trained on base [0-9a-f]{16}/float32, this run has [0-9a-f]{16}/"):
        run(tmp_path / "a", models, lora(modules_to_save=["lm_head"]), resume=path)
    module = run(tmp_path / "a", models, lora(modules_to_save=["lm_head"]), 3, resume=path, anyway=True)
    assert module.rollouts_done == 3
    assert "resumed anyway, as asked" in caplog.text
    with pytest.raises(ValueError, match=r"the adapter was trained on base [0-9a-f]{16}/float32, and .*other is "):
        export_checkpoint(path, str(other), tmp_path / "out")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (None, r"the checkpoint holds an adapter only, and model.adapter is null; set model.adapter as the run had it"),
        (lora(), r"an adapter with modules_to_save \['lm_head'\], and model.adapter.modules_to_save is None; set it"),
        (lora(alpha=4.0, modules_to_save=["lm_head"]), r"an adapter with alpha 8.0, and model.adapter.alpha is 4.0"),
    ],
)
def test_another_adapter_is_refused(adapter, message, trained, tiny_models, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, tiny_models, adapter, resume=trained[1])


def test_a_whole_student_is_not_taken_for_an_adapter(tiny_models, tmp_path):
    run(tmp_path / "a", tiny_models, None, 1)
    with pytest.raises(ValueError, match=r"holds the whole student, and model.adapter is set"):
        run(tmp_path / "b", tiny_models, lora(), resume=find_checkpoint(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"holds a whole student, and no adapter; leave out --adapter"):
        export_checkpoint(find_checkpoint(tmp_path / "a"), tiny_models[0], tmp_path / "out", adapter_only=True)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_an_export_is_a_plain_model_or_a_folder_of_pefts(trained, tiny_models, tmp_path):
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module, path = trained
    expected = logits_of(module.student.model)
    export_checkpoint(path, tiny_models[0], tmp_path / "whole")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.allclose(logits_of(merged), expected, rtol=0, atol=1e-5)
    assert not list((tmp_path / "whole").glob("adapter*"))
    export_checkpoint(path, tiny_models[0], tmp_path / "adapter", adapter_only=True)
    base = AutoModelForCausalLM.from_pretrained(tiny_models[0])
    assert (logits_of(base) - expected).abs().max() > 1e-2
    worn = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.allclose(logits_of(worn), expected, rtol=0, atol=1e-5)
    assert torch.allclose(
        logits_of(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected, rtol=0, atol=1e-5
    )
    assert len(AutoTokenizer.from_pretrained(tmp_path / "adapter")) == len(
        AutoTokenizer.from_pretrained(tiny_models[0])
    )
    size = sum(file.stat().st_size for file in (tmp_path / "adapter").glob("*.safetensors"))
    assert size < 5 * sum(weight.numel() for weight in adapter_weights(module).values())


@pytest.mark.parametrize("how", ["4bit", "bfloat16"])
def test_an_export_of_a_small_base_is_what_was_trained(how, tmp_path):
    # Red: the adapter put on the weights as they were before they were rounded to four bits.
    from transformers import AutoModelForCausalLM

    _, student = write_models(tmp_path / "models")  # nf4 wants hidden sizes that are multiples of 64
    settings = {"adapter": lora(quantization="4bit")} if how == "4bit" else {"adapter": lora(), "dtype": how}
    module = make_module(student, None, **settings)
    fit(tmp_path / "run", module, make_data(val=0), max_rollouts=2)
    export_checkpoint(find_checkpoint(tmp_path / "run"), student, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.dtype == (torch.float32 if how == "4bit" else torch.bfloat16)
    ours = logits_of(module.student.model).float()
    assert torch.allclose(logits_of(exported).float(), ours, rtol=0, atol=1e-4 if how == "4bit" else 0.1)
    before = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    assert (logits_of(before) - ours).abs().max() > (0.05 if how == "4bit" else 0.0)


def test_the_reference_is_the_base_until_it_is_reset(tiny_models, tmp_path):
    # Red: a second model in memory, a reference that moves with the adapter, or one that is saved whole.
    def saved(rollouts):
        terms = {"reference": ReferenceKL(1.0, reset_every=2)}
        module = run(tmp_path / str(rollouts), (tiny_models[0], None), lora(), rollouts, terms=terms)
        return module, torch.load(find_checkpoint(tmp_path / str(rollouts)), weights_only=True)

    module, content = saved(1)
    assert content["kdrl"]["reference"] is None
    assert module.reference.model.student is module.student
    module, content = saved(2)
    reference = content["kdrl"]["reference"]
    assert {f"student.{name}" for name in reference} == content["state_dict"].keys()
    assert all(torch.equal(value, content["state_dict"][f"student.{name}"]) for name, value in reference.items())
    rows = metrics_rows(tmp_path / "2")
    assert rows[0]["reference/kl"] == 0.0
    assert rows[1]["reference/kl"] != 0.0


def test_an_adapter_learns(tiny_models):
    """A few steps on two answers: the rewarded one becomes likely, the other unlikely, and the base stays."""
    module = make_module(tiny_models[0], None, adapter=lora()).load()
    base = {name: weight.clone() for name, weight in module.state_dict().items()}
    rows = Experience.from_rows([[5, 6, 7]] * 2, [[3, 4, 5], [3, 8, 9]], [1.0, 0.0], [0, 0], correct=[True, False])
    optimizer = module.configure_optimizers()
    logprobs = []
    for _ in range(25):
        output = module.loss(module.score(rows, 0), 0)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        logprobs.append(output.logprobs.detach().sum(1))  # (2,) of the right answer and of the wrong one
    assert logprobs[-1][0] > logprobs[0][0] + 1.0
    assert logprobs[-1][1] < logprobs[0][1] - 1.0
    moved = {name for name, weight in module.state_dict().items() if not torch.equal(weight, base[name])}
    assert moved == set(adapter_weights(module))


CONFIG = """
model:
  student: checkpoints/testbeds/arithmetic/student
  teacher: {class_path: kdrl_pl.teacher.BaseTeacher}
  adapter: {rank: 4, alpha: 8.0}
  normaliser: token
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-2}}
data:
  prompts_per_rollout: 4
  train: {addition: {source: addition, size: 12, options: {digits: 3}}}
  val: {addition: {source: addition, size: 32, options: {digits: 3}}}
rollout:
  reward: {class_path: kdrl_pl.rewards.TaskReward}
  group_size: 4
  validation_samples: 2
  sampling: {max_tokens: 40}
trainer: {accelerator: cpu, val_check_interval: 2, logger: false}
run: {name: lora, max_rollouts: 2}
"""


def test_the_commands(tmp_path, monkeypatch, capsys):
    """fit, validate from a checkpoint, export both ways, validate what was exported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora.yaml").write_text(CONFIG)
    assert main(["fit", "--config=lora.yaml"]) == 0
    (folder,) = (tmp_path / "runs").glob("lora/*")
    capsys.readouterr()

    def accuracies():
        """Of the table that a validation prints: avg@k, pass@2 and maj@k."""
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("addition")]
        return line.split()[1:4]

    assert main(["validate", "--config=lora.yaml", f"--ckpt_path={find_checkpoint(folder)}"]) == 0
    of_checkpoint = accuracies()
    assert main(["export", str(folder), "--last", "--output=whole"]) == 0
    assert main(["export", str(folder), "--last", "--output=adapter", "--adapter"]) == 0
    assert (tmp_path / "adapter/adapter_config.json").is_file()
    assert main(["replay", str(folder), "--estimators", "k2", "--masks", "none"]) == 0
    capsys.readouterr()
    plain = ["--model.student=whole", "--model.adapter=null", "--model.teacher=null", "--model.distillation=null"]
    assert main(["validate", "--config=lora.yaml", *plain]) == 0
    assert accuracies() == of_checkpoint
    assert main(["validate", "--config=lora.yaml"]) == 0
    assert accuracies() != of_checkpoint  # the starting student


def test_fsdp2_is_refused(tmp_path, capsys):
    (tmp_path / "lora.yaml").write_text(CONFIG)
    command = ["fit", f"--config={tmp_path}/lora.yaml", "--trainer.strategy=fsdp2", "--trainer.devices=1"]
    assert main([*command, f"--run.root={tmp_path}"]) != 0
    assert "model.adapter and trainer.strategy fsdp2 have not been tried together" in capsys.readouterr().err
