"""Where reference log-probabilities come from in training: one number whatever the way, and the same after a resume."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import clha_fast
from clha_fast.batching.batch import CandidateBatch
from clha_fast.batching.collator import RankedCollator
from clha_fast.batching.signals import token_checksum
from clha_fast.training.trainer import CLHATrainer
from tests.support.adapters import BODY, HEAD, lora_config, stir, virtual
from tests.support.comparing import COMPARING, add_to_table, exact, with_reference
from tests.support.comparing import comparing_trainer as trainer
from tests.support.power_cuts import dropout_model
from tests.support.tiny import make_model, make_rows
from tests.support.trainers import TOKENIZER
from tests.support.versions import needs

SCORED = [{**row, "reference_logps": [-9.0] * len(row["completions"])} for row in make_rows(4)]


@pytest.fixture(autouse=True)
def _one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    add_to_table(monkeypatch)


def batch_of(ours: CLHATrainer, count: int = 3) -> CandidateBatch:
    return CandidateBatch.from_dict(ours.data_collator(make_rows(count, seed=8)))


def test_every_way_says_what_the_frozen_model_says(tmp_path: Path) -> None:
    """At the start both models are one: x is 0, and each pair costs log 2; then the model moves and the other stays."""
    start, rows = make_model(len(TOKENIZER)), make_rows(6)
    start.save_pretrained(tmp_path / "start")
    TOKENIZER.save_pretrained(tmp_path / "start")
    pairs = sum(len(row["completions"]) * (len(row["completions"]) - 1) / 2 for row in rows) / len(rows)
    ways: dict[str, dict[str, Any]] = {
        "copy": {"reference": "copy"},
        "model": {"reference": str(tmp_path / "start")},
        "given": {"ref_model": copy.deepcopy(start)},
        "file": {"rows": with_reference(rows, start)},
    }
    lines = {}
    for name, way in ways.items():
        way = dict(way)
        data = way.pop("rows", rows)
        ours = trainer(tmp_path / name, copy.deepcopy(start), data, max_steps=4, logging_steps=1, **way)
        assert ours.reference.kind == ("model" if name == "given" else name)
        first = ours.compute_loss(ours.model.eval(), ours.data_collator(data))
        assert first.item() == pytest.approx(pairs * math.log(2), rel=1e-5)
        ours.train()
        lines[name] = [line["loss"] for line in ours.state.log_history if "loss" in line]
        if ours.reference.frozen is not None:
            batch = batch_of(ours)
            found = ours.reference.frozen(batch)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), exact(start, batch), rtol=0, atol=1e-5)
            assert not torch.allclose(found.double(), exact(ours.model, batch), atol=1e-3)
    assert lines["copy"] == lines["model"] == lines["given"]
    assert lines["copy"][-1] != lines["copy"][0]
    torch.testing.assert_close(lines["file"], lines["copy"], rtol=2e-5, atol=0)


@pytest.mark.parametrize(
    ("targets", "saved"), [(BODY, None), (HEAD, None), (BODY, ["lm_head"])], ids=["body", "head", "modules_to_save"]
)
def test_a_switched_off_adapter_is_the_model_before(
    tmp_path: Path, targets: list[str], saved: list[str] | None
) -> None:
    base = make_model(len(TOKENIZER), tie_word_embeddings=False)
    adapter = lora_config(targets, lora_dropout=0.3, modules_to_save=saved)
    ours = trainer(tmp_path, copy.deepcopy(base), peft_config=adapter, max_steps=3)
    assert ours.reference.kind == "adapter"
    stir(ours.model).train()
    modes = [module.training for module in ours.model.modules()]
    needs = [parameter.requires_grad for parameter in ours.model.parameters()]
    batch = batch_of(ours)
    assert ours.reference.frozen is not None
    torch.testing.assert_close(ours.reference.frozen(batch).double(), exact(base, batch), rtol=0, atol=1e-5)
    assert [module.training for module in ours.model.modules()] == modes
    assert [parameter.requires_grad for parameter in ours.model.parameters()] == needs
    loss = ours.compute_loss(ours.model, batch.as_dict())
    assert loss.requires_grad
    ours.train()
    torch.testing.assert_close(ours.reference.frozen(batch).double(), exact(base, batch), rtol=0, atol=1e-5)


def test_virtual_tokens_are_an_adapter_too(tmp_path: Path) -> None:
    model = virtual("PromptTuningConfig")
    base = model.get_base_model()
    ours = trainer(tmp_path, model, max_steps=1, reference="adapter")
    batch = batch_of(ours)
    assert ours.reference.frozen is not None
    torch.testing.assert_close(ours.reference.frozen(batch).double(), exact(base, batch), rtol=0, atol=1e-5)
    ours.train()


def _peft(kind: str = "LoraConfig", **settings: Any) -> nn.Module:
    config = getattr(peft, kind)(task_type="CAUSAL_LM", target_modules=BODY, **settings)
    return peft.get_peft_model(make_model(len(TOKENIZER), tie_word_embeddings=False), config)


def _one_weight(part: str, **settings: Any) -> nn.Module:
    """Of all the weights that begin at zero a single one has moved."""
    model = _peft(**settings)
    with torch.no_grad():
        last = [weight for name, weight in model.named_parameters() if part in name][-1]
        last.view(-1)[-1] = 0.5
    return model


def _second_adapter(active: str) -> nn.Module:
    model: Any = stir(_peft())
    model.add_adapter("fresh", lora_config(BODY))
    model.set_adapter(active)
    return model


NEUTRAL: dict[str, Any] = {
    "lora": _peft,
    "lora on embeddings": lambda: peft.get_peft_model(make_model(len(TOKENIZER)), lora_config(["embed_tokens"])),
    "dora": lambda: _peft(use_dora=True),
    "adalora": lambda: _peft("AdaLoraConfig", total_step=10),
    "vera": lambda: _peft("VeraConfig"),
    "loha": lambda: _peft("LoHaConfig"),
    "a trained one that is not active": lambda: _second_adapter("fresh"),
}
MOVED: dict[str, tuple[Any, str]] = {
    "lora": (
        lambda: stir(_peft()),
        r"the adapter 'default' changes the model already \(.*lora_B.default.weight is not",
    ),
    "one weight": (lambda: _one_weight("lora_B"), "is not zero"),
    "adalora": (lambda: _one_weight("lora_E", kind="AdaLoraConfig", total_step=10), "is not zero"),
    "pissa": (lambda: _peft(init_lora_weights="pissa"), "is not zero"),
    "the active one of two": (lambda: _second_adapter("default"), "is not zero"),
    "ia3": (lambda: _peft("IA3Config", feedforward_modules=[]), "the IA3 adapter 'default' is not known to change not"),
    "virtual tokens": (lambda: virtual("PromptTuningConfig"), "the PROMPT_TUNING adapter 'default' is not known to"),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_an_adapter_that_changes_nothing_is_switched_off(tmp_path: Path, name: str) -> None:
    assert trainer(tmp_path, NEUTRAL[name]()).reference.kind == "adapter"


@pytest.mark.parametrize("name", MOVED)
def test_training_goes_on_from_an_adapter_that_changes_the_model(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where none is named the reference is the model as it starts: x is 0 for every pair."""
    make, why = MOVED[name]
    model, start = make(), make()
    start.load_state_dict(model.state_dict())
    ours = trainer(tmp_path, model, max_steps=2, learning_rate=0.05)
    assert ours.reference.kind == "copy"
    assert re.search(f"compares with a frozen copy of .*, not with the model with its adapter.*{why}", caplog.text)
    assert ours.reference.frozen is not None
    batch = batch_of(ours)
    before = ours.reference.frozen(batch)
    torch.testing.assert_close(before.double(), exact(start, batch), rtol=0, atol=1e-5)
    ours.train()
    assert torch.equal(ours.reference.frozen(batch), before)
    assert trainer(tmp_path, make(), reference="adapter").reference.kind == "adapter"


@pytest.mark.parametrize(
    ("way", "kind"), [(True, "adapter"), ("gaussian", "adapter"), (False, "adapter"), ("pissa", "copy")]
)
def test_a_new_adapter_that_takes_the_models_weights(tmp_path: Path, way: Any, kind: str) -> None:
    """The reference is the model that was given, whatever the adapter makes of it."""
    start = make_model(len(TOKENIZER), tie_word_embeddings=False)
    ours = trainer(tmp_path, copy.deepcopy(start), peft_config=lora_config(BODY, init_lora_weights=way))
    assert ours.reference.kind == kind
    batch = batch_of(ours)
    assert ours.reference.frozen is not None
    torch.testing.assert_close(ours.reference.frozen(batch).double(), exact(start, batch), rtol=0, atol=1e-5)


def test_a_resumed_run_keeps_to_the_switched_off_adapter(tmp_path: Path) -> None:
    trainer(tmp_path, _peft(), max_steps=2, save_strategy="steps", save_steps=1).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    begun = peft.PeftModel.from_pretrained(
        make_model(len(TOKENIZER), tie_word_embeddings=False), checkpoint, is_trainable=True
    )
    other = trainer(tmp_path, copy.deepcopy(begun), max_steps=2)
    assert other.reference.kind == "copy"
    with pytest.raises(
        ValueError, match=r"^resume_from_checkpoint: expected the reference .* give the trainer reference='a"
    ):
        other.train(resume_from_checkpoint=checkpoint)
    for model, way in ((_peft(), {}), (begun, {"reference": "adapter"})):
        trainer(tmp_path, model, max_steps=2, **way).train(resume_from_checkpoint=checkpoint)


def test_what_trains_beside_the_adapter_would_change_it(tmp_path: Path) -> None:
    def model() -> nn.Module:
        found = peft.get_peft_model(make_model(len(TOKENIZER)), lora_config(BODY))
        found.get_base_model().model.norm.weight.requires_grad_(True)
        return found

    with pytest.raises(ValueError, match=r"^reference: expected nothing to train beside the adapter .*model\.norm\.we"):
        trainer(tmp_path, model())
    assert trainer(tmp_path, model(), reference="copy").reference.kind == "copy"


def test_dropout_is_off_for_the_frozen_model_alone(tmp_path: Path) -> None:
    start = dropout_model()
    ours = trainer(tmp_path, copy.deepcopy(start))
    batch = batch_of(ours)
    ours.model.train()
    losses = [ours.compute_loss(ours.model, batch.as_dict()).item() for _ in range(2)]
    assert losses[0] != losses[1]
    assert ours.reference.frozen is not None
    torch.testing.assert_close(ours.reference.frozen(batch).double(), exact(start, batch), rtol=0, atol=1e-5)
    assert ours.model.training
    state = torch.get_rng_state()
    ours.reference.frozen(batch)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("way", [{}, {"peft_config": lora_config(BODY)}], ids=["copy", "adapter"])
def test_autocast_is_that_of_both(tmp_path: Path, way: dict[str, Any]) -> None:
    """In bfloat16, too, a model that has not moved is 0 away from itself: each pair costs log 2."""
    rows = make_rows(4)
    pairs = sum(len(row["completions"]) * (len(row["completions"]) - 1) / 2 for row in rows) / len(rows)
    given = {"bf16": True, "max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 4, **way}
    ours = trainer(tmp_path, rows=rows, objective={"name": "comparing", "beta": 50.0}, **given)
    assert ours.evaluate(rows)["eval_loss"] == pytest.approx(pairs * math.log(2), rel=1e-5)
    ours.train()
    assert ours.state.log_history[-2]["loss"] == pytest.approx(pairs * math.log(2), rel=1e-4)


def test_a_temperature_is_that_of_both(tmp_path: Path) -> None:
    start = make_model(len(TOKENIZER))
    ours = trainer(tmp_path, copy.deepcopy(start), temperature=1.7)
    batch = batch_of(ours)
    with torch.no_grad():
        logits = start.eval()(**batch.model_inputs(), use_cache=False).logits.double().flatten(0, 1) / 1.7
    expected = logits[batch.row_index].log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    assert ours.reference.frozen is not None
    torch.testing.assert_close(ours.reference.frozen(batch).double(), expected, rtol=0, atol=1e-5)
    rows = with_reference(make_rows(3), start)
    with pytest.raises(ValueError, match=r"^temperature: expected 1 with reference_logps of the records, .* got 1.7;"):
        trainer(tmp_path, rows=rows, temperature=1.7)


def test_which_reference_is_taken_where_none_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = make_rows(4)
    scored = with_reference(rows, make_model(len(TOKENIZER)))
    may = {"name": "comparing", "must": False}
    cases: list[tuple[Any, Any, dict[str, Any], str | None]] = [
        (COMPARING, scored, {}, "file"),
        (COMPARING, scored, {"reference": "copy"}, "copy"),
        (COMPARING, rows, {}, "copy"),
        (COMPARING, rows, {"peft_config": lora_config(BODY)}, "adapter"),
        (COMPARING, scored, {"peft_config": lora_config(BODY)}, "file"),
        (may, rows, {}, None),
        (may, scored, {}, "file"),
        (may, rows, {"reference": "copy"}, "copy"),
        ("sft", scored, {}, None),
        ("policy", scored, {}, None),
        # It compares token by token, and a file has sums.
        ({"name": "policy", "kl_weight": 0.1}, scored, {}, "copy"),
    ]
    for objective, data, changes, kind in cases:
        caplog.clear()
        with caplog.at_level("INFO"):
            ours = trainer(tmp_path, rows=data, objective=objective, **changes)
        assert ours.reference.kind == kind
        assert ("reference_logps" in ours.data_collator(data[:1])) == (kind == "file")
        chosen = kind is not None and "reference" not in changes
        assert caplog.text.count("reference: the objective ") == chosen
        left_out = data is scored and kind != "file"
        assert ("reference_logps are left out" in caplog.text) == left_out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "file"}, "^reference: expected records with reference_logps for 'file', got none in the first"),
        (
            {"reference": "file", "objective": {"name": "policy", "kl_weight": 0.1}, "rows": SCORED},
            "^reference: expected adapter, copy or a model with the objective 'policy', which compares token by token",
        ),
        ({"reference": "adapter"}, "^reference: expected a model with an adapter of peft's for 'adapter'"),
        ({"reference": "./nowhere"}, r"^reference: expected a folder that holds one, .* got './nowhere'"),
        ({"ref_model": "gpt2"}, "^ref_model: expected a model, got 'gpt2'; reference= takes the name of one"),
        ({"ref_model": nn.Linear(1, 1), "reference": "copy"}, "^ref_model: expected None beside reference='copy'"),
        ({"ref_model": nn.Linear(1, 1), "objective": "sft"}, "^ref_model: expected None with the objective 'sft'"),
        ({"reference": "copy", "fsdp": True}, "^reference: expected 'file' under FSDP, .* got 'copy'; clha-fast score"),
        ({"fsdp": True}, "^reference: expected 'file' under FSDP, .* got 'copy'; clha-fast score --policy"),
    ],
)
def test_references_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    if "fsdp" in changes:
        needs("accelerate", "1.6", "knows no FSDP2")
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **changes)


def test_more_that_is_refused(tmp_path: Path) -> None:
    model = make_model(len(TOKENIZER))
    with pytest.raises(ValueError, match=r"^ref_model: expected another model than the one that trains, got the same"):
        trainer(tmp_path, model, ref_model=model)
    other = tmp_path / "other"
    model.save_pretrained(other)
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(
        ValueError, match=r"^reference: expected a model with the tokenizer of the one that trains, got"
    ):
        trainer(tmp_path, reference=str(other))
    scored = with_reference(make_rows(4), model)
    with pytest.raises(
        ValueError, match=r"^eval_dataset: expected records with reference_logps, .* got none in the fi"
    ):
        trainer(tmp_path, rows=scored, eval_dataset=make_rows(2))
    ours = trainer(tmp_path, rows=scored, reference="copy")
    batch = RankedCollator(TOKENIZER, ours.loss_options)(scored[:2])
    with pytest.raises(
        ValueError, match=r"^reference_logps: expected none in a batch beside a frozen copy of the model"
    ):
        ours.compute_loss(ours.model, batch)
    short = make_model(len(TOKENIZER))
    long = [{"prompt": "a", "completions": ["b", "c" * 100]}] * 2
    with pytest.raises(ValueError, match=r"^max_length: .* the 64 positions of GPT2LMHeadModel, got up to 103 tokens"):
        trainer(tmp_path, short, rows=long, ref_model=dropout_model())


def test_other_tokens_than_those_that_were_scored_are_refused(tmp_path: Path) -> None:
    rows = with_reference(make_rows(4), make_model(len(TOKENIZER)))
    collator = RankedCollator(TOKENIZER)
    for row in rows:
        feature = collator.tokenize_record(row)
        row["reference_tokens"] = [token_checksum(feature["prompt_ids"], ids) for ids in feature["completion_ids"]]
    trainer(tmp_path, rows=rows)
    for limits in ({"max_length": 9}, {"max_completion_length": 2}, {"max_prompt_length": 4}):
        with pytest.raises(ValueError, match=r"^record 0: reference_logps\[\d\]: expected the sum over the \d+ prompt"):
            trainer(tmp_path, rows=rows, **limits)
        assert trainer(tmp_path, rows=rows, reference="copy", **limits).reference.kind == "copy"
        assert trainer(tmp_path, rows=rows, objective="sft", **limits).reference.kind is None


def test_an_attached_model_says_log_probabilities(tmp_path: Path) -> None:
    model = make_model(len(TOKENIZER))
    batch = CandidateBatch.from_dict(RankedCollator(TOKENIZER)(make_rows(3)))
    with clha_fast.attach(model) as attached:
        found = attached.token_logps(batch)
        assert torch.equal(attached.token_logps(batch.as_dict()), found)
        assert not found.requires_grad
        torch.testing.assert_close(found.double(), exact(model, batch), rtol=0, atol=1e-5)
        model.train()
        assert model(**batch.as_dict()).loss.requires_grad
