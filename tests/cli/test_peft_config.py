"""An adapter asked for by settings: `peft_config` of the trainer and of `clha-fast train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from clha_fast.cli import main as cli
from clha_fast.models.adapters import with_adapter
from clha_fast.models.loading import adapter_config, load_model
from clha_fast.training.config import CLHAConfig
from clha_fast.training.trainer import CLHATrainer
from tests.support.adapters import BODY, TOKENIZER, base, lora, lora_config
from tests.support.command_line import command, one_sentence
from tests.support.tiny import make_rows

LORA = ["--peft_config.r", "4", "--peft_config.target_modules", "[q_proj, v_proj]"]
SHORT = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "num_train_epochs": 1, "learning_rate": 1e-2}


def make_trainer(folder: Path, model: Any, **given: Any) -> CLHATrainer:
    args = CLHAConfig(
        output_dir=str(folder), max_steps=2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    return CLHATrainer(model, args, train_dataset=make_rows(6), processing_class=TOKENIZER, **given)


def test_trainer_adds_the_adapter_from_its_seed_and_trains_it_alone(tmp_path: Path) -> None:
    firsts = []
    for state in (1, 2):
        torch.manual_seed(state)
        trainer = make_trainer(
            tmp_path, base(), peft_config=LoraConfig(r=2, target_modules=BODY, task_type="CAUSAL_LM")
        )
        assert isinstance(trainer.model, PeftModel)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        firsts.append(before)
        trainer.train()
        changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
        assert changed
        assert all("lora_" in name for name in changed)
    assert all(torch.equal(firsts[0][name], firsts[1][name]) for name in firsts[0] if "lora_" in name)


@pytest.mark.filterwarnings("error")
def test_an_adapter_is_added_without_warnings() -> None:
    with_adapter(base(), lora_config(["q_proj"]))


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (base, {"r": 2}, r"^peft_config: expected a configuration of peft's, .* got \{'r': 2\}$"),
        (lambda: lora(BODY), LoraConfig(target_modules=BODY), "^peft_config: expected None for a model that has an"),
        (base, LoraConfig(target_modules=["nothing"]), "^peft_config: Target modules .* not found"),
    ],
)
def test_adapters_that_cannot_be_added(tmp_path: Path, model: Any, config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model(), peft_config=config)


def test_nothing_to_train_is_said_before_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, base().requires_grad_(False))
    with pytest.raises(ValueError, match=r"^model: expected parameters to train, got none"):
        trainer.train()


def test_settings_of_a_file() -> None:
    config = adapter_config({"r": 2, "target_modules": ["q_proj"]})
    assert (type(config), config.r, config.task_type) == (LoraConfig, 2, "CAUSAL_LM")
    assert adapter_config({"peft_type": "ia3"}).peft_type.value == "IA3"
    with pytest.raises(ValueError, match=r"^peft_config: unknown key 'lora_alfa'; did you mean 'lora_alpha'"):
        adapter_config({"lora_alfa": 2})
    with pytest.raises(ValueError, match=r"^peft_config.peft_type: expected one of .*LORA.*, got 'LOR'$"):
        adapter_config({"peft_type": "lor"})


def test_command_trains_resumes_and_goes_on_with_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base_folder, run = tmp_path / "base", tmp_path / "run"
    base().save_pretrained(base_folder)
    TOKENIZER.save_pretrained(base_folder)
    given = {"model": str(base_folder), "model_config": None, "build_tokenizer": None, **SHORT}
    assert cli.main(command(tmp_path, *LORA, **given)) == 0
    said = capsys.readouterr().out
    assert json.loads((run / "adapter_config.json").read_text())["r"] == 4
    assert not (run / "model.safetensors").exists()
    whole = load_file(run / "adapter_model.safetensors")
    assert f" ({sum(tensor.numel() for tensor in whole.values()):,} of them trained), vocabulary" in said

    for path in (run / "checkpoint-4").iterdir():
        path.unlink()
    (run / "checkpoint-4").rmdir()
    (run / "adapter_model.safetensors").unlink()
    assert cli.main(command(tmp_path, *LORA, "--resume", **given)) == 0
    resumed = load_file(run / "adapter_model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    # The folder of an adapter is a model to train further.
    model = load_model(str(run))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    capsys.readouterr()
    again = command(tmp_path, "--output_dir", str(tmp_path / "more"), **{**given, "model": str(run)})
    assert cli.main(again) == 0
    assert any(
        not torch.equal(whole[name], value)
        for name, value in load_file(tmp_path / "more" / "adapter_model.safetensors").items()
    )


def test_wrong_settings_leave_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(tmp_path, "--peft_config.lora_alfa", "4")) == 2
    assert "peft_config: unknown key 'lora_alfa'; did you mean 'lora_alpha'?" in one_sentence(capsys)
    assert not (tmp_path / "run").exists()
