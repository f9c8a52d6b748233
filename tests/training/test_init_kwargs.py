"""`model_init_kwargs` of a trainer that is given a name: used for model and reference, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from clha_fast.batching.batch import CandidateBatch
from clha_fast.experiments.run import Run, RunOptions
from clha_fast.hf import CLHAConfig, CLHATrainer, RolloutConfig, RolloutTrainer
from clha_fast.models.adapters import base_model
from tests.support.adapters import BODY, lora_config
from tests.support.command_line import write_rows
from tests.support.comparing import exact
from tests.support.tiny import make_model, make_rows
from tests.support.trainers import TOKENIZER

ROWS = make_rows(4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("saved")
    TOKENIZER.save_pretrained(folder)
    make_model(len(TOKENIZER)).save_pretrained(folder)
    return str(folder)


def trainer(folder: Path, model: Any, given: Any = None, **changes: Any) -> CLHATrainer:
    settings = {"output_dir": str(folder), "use_cpu": True, "report_to": [], "save_strategy": "no", **changes}
    args = CLHAConfig(**settings, model_init_kwargs=given)
    return CLHATrainer(model, args, train_dataset=ROWS, processing_class=TOKENIZER)


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": torch.float16}, torch.float16),
        ({"torch_dtype": "auto"}, torch.float32),
        ('{"torch_dtype": "bfloat16"}', torch.bfloat16),
        ({"torch_dtype": "bfloat16", "dtype": torch.bfloat16, "attn_implementation": "eager"}, torch.bfloat16),
        ({"attention_dropout": 0.5}, torch.float32),
    ],
)
def test_both_names_of_the_dtype(tmp_path: Path, saved: str, given: Any, dtype: torch.dtype) -> None:
    assert trainer(tmp_path, saved, given).model.dtype == dtype


def test_a_rollout_s_model(tmp_path: Path, saved: str) -> None:
    """Prompts are held to its positions, as those of a model that is given."""
    prompts = [{"prompt": "the cat sat " * 40}]
    args = RolloutConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        max_completion_length=8,
        model_init_kwargs={"torch_dtype": "bfloat16"},
    )
    lengths = []
    for model in (saved, make_model(len(TOKENIZER))):
        args.model_init_kwargs = args.model_init_kwargs if model is saved else None
        ours = RolloutTrainer(
            model, args, lambda _, answers: [[0.0] * len(a) for a in answers], prompts, processing_class=TOKENIZER
        )
        lengths.append((ours.train_dataset.settings, ours.train_dataset.cut_prompts))
        assert ours.model.dtype == (torch.bfloat16 if model is saved else torch.float32)
    assert lengths[0] == lengths[1]
    assert lengths[0][1] == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"torch_dtype": "int3"}, r"model_init_kwargs: expected torch_dtype to be one of auto, .*, got 'int3'$"),
        ({"torch_dtype": "bfloat16", "dtype": "float16"}, "expected one of dtype and torch_dtype, which mean the same"),
        ({"foo": 1}, r"model_init_kwargs: expected arguments of from_pretrained or fields .*, got {'foo': 1} \("),
        ({"name": "other"}, "model_init_kwargs: expected arguments of from_pretrained or fields"),
        ({"revision": "main"}, "expected no revision, which here is model=DIR after `hf download NAME --revision"),
        ({"subfolder": "a"}, "expected no subfolder, which here is model= with the path of that folder"),
        ({"load_in_4bit": True}, r"which here is model_init_kwargs={'quantization_config': {'load_in_4bit': True}}$"),
        ({"option": "x"}, "model_init_kwargs: expected no option, which here is not to be set"),
        ({"base": "x"}, "model_init_kwargs: expected no base, which here is not to be set"),
    ],
)
def test_refused_in_a_sentence(tmp_path: Path, saved: str, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as found:
        trainer(tmp_path, saved, given)
    assert "\n" not in str(found.value)


SAME: list[dict[str, Any]] = [
    {"hidden_act": "relu"},
    {"rms_norm_eps": 0.3, "torch_dtype": "bfloat16"},
    {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10.0}, "attn_implementation": "eager"},
]


def _says_the_same(ours: Any) -> None:
    """A reference that was loaded from where the policy is from: no margin before the first step."""
    batch = CandidateBatch.from_dict(ours.data_collator(ROWS))
    model, frozen = base_model(ours.model), ours.reference.own_model
    torch.testing.assert_close(ours.reference.frozen(batch), exact(model, batch).float(), rtol=0, atol=1e-5)
    assert frozen.config._attn_implementation == model.config._attn_implementation


@pytest.mark.parametrize("given", SAME)
def test_a_reference_is_loaded_like_the_model(tmp_path: Path, saved: str, given: dict[str, Any]) -> None:
    kept = dict(given)
    ours = trainer(tmp_path, saved, given, reference=saved, objective="dpo")
    theirs = base_model(ours.reference.own_model)
    assert theirs is not ours.model
    assert theirs.config.to_diff_dict() == ours.model.config.to_diff_dict()
    if theirs.dtype == torch.float32:
        _says_the_same(ours)
    assert given == kept


@pytest.mark.parametrize("given", SAME[::2])
def test_the_same_of_a_run_from_files(tmp_path: Path, saved: str, given: dict[str, Any]) -> None:
    given = dict(given)
    attention = given.pop("attn_implementation", None)
    rows = str(write_rows(tmp_path / "train.jsonl"))
    options = RunOptions(train_file=rows, model=saved, eval_fraction=0, attn_implementation=attention)
    settings = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "model_init_kwargs": given}
    run = Run(options, {**settings, "objective": "dpo", "reference": saved}).prepare()
    _says_the_same(run.trainer)


def test_an_adapter_as_reference(tmp_path: Path, saved: str) -> None:
    """Its base model is what is loaded like the policy."""
    policy = make_model(len(TOKENIZER)).from_pretrained(saved)
    peft.get_peft_model(policy, lora_config(BODY)).save_pretrained(tmp_path / "adapter")
    ours = trainer(tmp_path, saved, {"hidden_act": "relu"}, reference=str(tmp_path / "adapter"), objective="dpo")
    assert base_model(ours.reference.own_model).config.hidden_act == "relu"
    _says_the_same(ours)


def test_the_attention_of_a_model_that_was_given(tmp_path: Path, saved: str) -> None:
    policy = make_model(len(TOKENIZER), attn_implementation="eager")
    ours = trainer(tmp_path, policy, reference=saved, objective="dpo")
    _says_the_same(ours)
    assert ours.reference.own_model.config._attn_implementation == "eager"


@pytest.mark.parametrize("given", [{"hidden_act": "relu"}, {"mlp_bias": True, "intermediate_size": 48}])
def test_a_reference_that_cannot_be_loaded_so(tmp_path: Path, given: dict[str, Any]) -> None:
    other = str(tmp_path / "other")
    GPT2LMHeadModel(GPT2Config(vocab_size=len(TOKENIZER), n_embd=16, n_layer=1, n_head=2)).save_pretrained(other)
    policy = str(tmp_path / "policy")
    make_model(len(TOKENIZER), **given).save_pretrained(policy)
    message = r"reference: expected a model that loads with .*; reference='copy' takes .* and ref_model= of the trainer"
    with pytest.raises(ValueError, match=message) as found:
        trainer(tmp_path, policy, given, reference=other, objective="dpo")
    assert "\n" not in str(found.value)
    assert trainer(tmp_path, policy, given, reference="copy", objective="dpo").reference.kind == "copy"
    with pytest.raises(ValueError, match="reference: expected a folder that holds one, or a name on the Hub, got"):
        trainer(tmp_path, policy, given, reference=str(tmp_path / "absent"), objective="dpo")


def test_a_reference_in_full_width_beside_a_quantised_model_is_said(
    tmp_path: Path, saved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that the trainer was given, nobody knows what it was loaded with."""
    from clha_fast.models import init_kwargs

    policy = make_model(len(TOKENIZER))
    policy.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    said: list[str] = []
    monkeypatch.setattr(init_kwargs.logger, "warning", said.append)
    init_kwargs.load_like(policy, saved, "reference")
    assert len(said) == 1
    assert "is quantised; ref_model= takes one" in said[0]
    del policy.config.quantization_config
    init_kwargs.load_like(policy, saved, "reference")
    assert len(said) == 1
