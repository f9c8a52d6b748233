"""TRL's names for settings: what they mean here, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from clha_fast.cli.options import merge
from clha_fast.hf import CLHAConfig, CLHATrainer
from tests.support.tiny import make_model, make_rows, make_tokenizer

TOKENIZER = make_tokenizer()
ROWS = [
    {"prompt": row["prompt"], "chosen": " " + row["completions"][0], "rejected": " " + row["completions"][1]}
    for row in make_rows(6)
]


def config(folder: Path, **changes: Any) -> CLHAConfig:
    return CLHAConfig(output_dir=str(folder), use_cpu=True, report_to=[], save_strategy="no", **changes)


@pytest.fixture
def saved(tmp_path: Path) -> str:
    folder = str(tmp_path / "model")
    make_model(len(TOKENIZER)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


MEANT = {
    "sigmoid": ({"loss_type": "sigmoid"}, "dpo"),
    "in a list, with beta": ({"loss_type": ["ipo"], "beta": 0.5}, {"name": "ipo", "beta": 0.5}),
    "beside its objective": (
        {"loss_type": "sigmoid", "objective": {"name": "dpo", "form": "pairs"}, "beta": 0.3},
        {"name": "dpo", "form": "pairs", "beta": 0.3},
    ),
    "hinge": ({"loss_type": "hinge", "beta": 0.1}, "hinge"),
    "beta of another objective": ({"objective": "simpo", "beta": 2.5}, {"name": "simpo", "beta": 2.5}),
    "nothing is cut": ({"truncation_mode": "keep_end"}, "clha"),
}


@pytest.mark.parametrize("case", MEANT)
def test_meant(case: str, tmp_path: Path) -> None:
    given, objective = MEANT[case]
    made = config(tmp_path, **given)
    assert made.objective == objective
    again = {name: getattr(made, name) for name in ("objective", "loss_type", "beta", "truncation_mode")}
    assert config(tmp_path, **again).objective == objective


REFUSED = {
    "an unknown loss": ({"loss_type": "robust"}, "loss_type: expected one of sigmoid, hinge, ipo, got 'robust'"),
    "two losses": ({"loss_type": ["sigmoid", "ipo"]}, "loss_type: expected one of"),
    "another objective": (
        {"loss_type": "ipo", "objective": "dpo"},
        "loss_type: expected none beside objective='dpo', got 'ipo', which is 'ipo'",
    ),
    "CLHA's settings": ({"loss_type": "ipo", "objective": {"name": "clha", "margin": 1.0}}, "beside objective='clha'"),
    "no beta": ({"beta": 0.1}, "beta: expected none with objective='clha', which has none, got 0.1"),
    "two betas": (
        {"objective": {"name": "dpo", "beta": 0.2}, "beta": 0.1},
        "beta: expected one value, got 0.1, and 0.2 in objective",
    ),
    "another way to cut": (
        {"truncation_mode": "keep_start", "max_length": 32},
        "truncation_mode: expected None beside max_length, got 'keep_start'",
    ),
    "no way to cut": ({"truncation_mode": "middle"}, "truncation_mode: expected one of keep_start, keep_end"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    given, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **given)


def test_another_objectives_flag_leaves_them_behind() -> None:
    file = {"objective": "dpo", "beta": 0.2, "loss_type": "sigmoid", "learning_rate": 1e-4}
    assert merge(file, {"objective": "pro"}) == {"objective": {"name": "pro"}, "learning_rate": 1e-4}
    assert merge(file, {"objective": "dpo"})["beta"] == 0.2


def test_a_models_folder_is_loaded_with_its_tokenizer(saved: str, tmp_path: Path) -> None:
    given = {"attn_implementation": "eager", "dtype": "bfloat16"}
    args = config(tmp_path, loss_type="sigmoid", beta=0.2, max_steps=2, model_init_kwargs=given, pad_token="</s>")
    trainer = CLHATrainer(saved, args, train_dataset=ROWS)
    assert trainer.model.config._attn_implementation == "eager"
    assert trainer.model.dtype == torch.bfloat16
    assert trainer.processing_class.pad_token == "</s>"
    trainer.train()
    assert trainer.state.global_step == 2
    plain = CLHATrainer(saved, config(tmp_path, loss_type="sigmoid"), train_dataset=ROWS)
    assert plain.model.dtype == torch.float32


def test_dropout_is_off_everywhere(tmp_path: Path) -> None:
    model = make_model(len(TOKENIZER), attention_dropout=0.3)
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], lora_dropout=0.5)
    args = config(tmp_path, disable_dropout=True)
    trainer = CLHATrainer(model, args, train_dataset=ROWS, processing_class=TOKENIZER, peft_config=adapter)
    modules = list(trainer.model.modules())
    rates = [module.p for module in modules if isinstance(module, nn.Dropout)]
    assert rates
    assert set(rates) == {0.0}
    assert {m.attention_dropout for m in modules if hasattr(m, "attention_dropout")} == {0.0}


def test_what_a_trainer_refuses(saved: str, tmp_path: Path) -> None:
    def trainer(model: Any = None, **changes: Any) -> CLHATrainer:
        model = make_model(len(TOKENIZER)) if model is None else model
        return CLHATrainer(model, config(tmp_path, **changes), train_dataset=ROWS, processing_class=TOKENIZER)

    with pytest.raises(ValueError, match="model_init_kwargs: expected None beside a model that has been made already"):
        trainer(model_init_kwargs={"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="model_init_kwargs: expected dtype to be one of auto"):
        trainer(saved, model_init_kwargs={"dtype": "int3"})
    with pytest.raises(ValueError, match=r"pad_token: expected a token of the tokenizer .*, got '<nothing>'"):
        trainer(pad_token="<nothing>")
    with pytest.raises(ValueError, match="model: expected a causal language model"):
        trainer(3)
    with pytest.raises(ValueError, match="model: expected a folder"):
        trainer(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda model: torch.compile(model, backend="eager"),
        lambda model: torch.compile(peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2))),
        lambda model: peft.get_peft_model(
            torch.compile(model, backend="eager"), peft.LoraConfig(target_modules=["q_proj"])
        ),
    ],
    ids=["a model", "an adapted one", "adapted when it was wrapped"],
)
def test_a_wrapped_model_is_refused(wrapped: Any, tmp_path: Path) -> None:
    model = wrapped(make_model(len(TOKENIZER)))
    with pytest.raises(
        ValueError, match=r"got a compiled \w+; torch_compile=True compiles it, and so does model.compile"
    ):
        CLHATrainer(model, config(tmp_path), train_dataset=ROWS, processing_class=TOKENIZER)
