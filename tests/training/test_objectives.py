"""Every objective of the table in a real trainer: its loss is attach's, whatever the batches, and it moves weights."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import HfArgumentParser

import clha_fast
from clha_fast import CLHAOptions, Objective, PROOptions, SFTOptions
from clha_fast.batching.batch import CandidateBatch
from clha_fast.batching.collator import RankedCollator
from clha_fast.batching.signals import signals_of
from clha_fast.objectives import OBJECTIVES
from clha_fast.training.config import CLHAConfig
from clha_fast.training.trainer import CLHATrainer
from tests.support.comparing import Comparing, add_to_table
from tests.support.tiny import make_model, make_rows
from tests.support.trainers import TOKENIZER, assert_same_gradients, config, eager_gradients, step_gradients, trainer

every_objective = pytest.mark.parametrize("name", [*OBJECTIVES, "comparing"])


@pytest.fixture(autouse=True)
def _one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    add_to_table(monkeypatch)


def rows_of(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with all that a file can hold for an objective, but reference log-probabilities."""
    rows = make_rows(count, seed)
    return [{**row, "advantages": [reward / 4 for reward in row["rewards"]]} for row in rows]


def attached_loss(model: nn.Module, rows: list[Any], objective: Objective, drop_inert: bool = True) -> Tensor:
    """The loss of one batch in a loop, compared with the model as it is now where the objective compares."""
    signals = [name for name in signals_of(objective) if name != "reference_logps"]
    batch = RankedCollator(TOKENIZER, objective, drop_inert=drop_inert, signals=signals)(rows)
    if "reference_logps" in objective.needs:
        with clha_fast.attach(copy.deepcopy(model).eval()) as frozen:
            batch["reference_logps"] = frozen.token_logps(batch)
    with clha_fast.attach(model, objective):
        loss: Tensor = model(**batch).loss
    return loss


def moved(model: nn.Module) -> nn.Module:
    """The same model a little further on, so that it differs from what it is compared with."""
    other = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
    return other


@every_objective
def test_it_trains_and_its_loss_is_that_of_an_attached_model(tmp_path: Path, name: str) -> None:
    rows = rows_of(8)
    ours = trainer(tmp_path, rows=rows, objective=name, max_steps=2, logging_steps=1)
    assert type(ours.loss_options) is OBJECTIVES[name]
    model = ours.model.train()
    expected = attached_loss(model, rows[:3], ours.loss_options)
    expected_grads = eager_gradients(model, expected)
    loss, outputs = ours.compute_loss(model, ours.data_collator(rows[:3]), return_outputs=True)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-7)
    assert_same_gradients(model, expected_grads)
    assert set(ours.loss_options.metric_names) <= outputs["metrics"].as_dict().keys()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ours.train()
    lines = [line for line in ours.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert math.isfinite(line["loss"])
        assert set(ours.loss_options.metric_names) <= line.keys()
    assert any(not torch.equal(value, before[key]) for key, value in ours.model.state_dict().items())


@every_objective
def test_accumulation_with_global_counts_is_one_batch(tmp_path: Path, name: str) -> None:
    rows = rows_of(6, seed=3)
    ours = trainer(tmp_path, rows=rows, objective=name, normalizer="global", gradient_accumulation_steps=3)
    expected = attached_loss(ours.model.train(), rows, ours.loss_options)
    expected_grads = eager_gradients(ours.model, expected)
    loss = step_gradients(ours, [rows[:1], rows[1:4], rows[4:]])
    assert loss == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert_same_gradients(ours.model, expected_grads)


@every_objective
def test_the_loss_of_an_evaluation_does_not_depend_on_its_batches(tmp_path: Path, name: str) -> None:
    rows = rows_of(7, seed=4)
    found = []
    for size in (3, 7):
        ours = trainer(tmp_path, rows=rows, objective=name, per_device_eval_batch_size=size)
        found.append(ours.evaluate(rows))
    expected = attached_loss(ours.model.eval(), rows, ours.loss_options, drop_inert=False)
    for metrics in found:
        assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
        assert metrics["eval_loss"] == pytest.approx(metrics["eval_rank_loss"] + metrics["eval_sft_loss"])
        assert {f"eval_{own}" for own in ours.loss_options.metric_names} <= metrics.keys()


@every_objective
def test_settings_stay_the_same_in_files(tmp_path: Path, name: str) -> None:
    made = OBJECTIVES[name]()
    for given in (name, {"name": name}, made, json.dumps({"name": name})):
        args = config(tmp_path, objective=given)
        assert args.objective == name
        assert args.loss_options() == made
    plain = json.loads(args.to_json_string())
    again = CLHAConfig(**{key: plain[key] for key in ("output_dir", "objective", "preset", "use_cpu", "report_to")})
    assert again.loss_options() == made


def test_settings_in_a_mapping_and_of_clha(tmp_path: Path) -> None:
    args = config(tmp_path, objective={"name": "pro", "sft_weight": "1e-3", "form": "paper"})
    assert args.loss_options() == PROOptions("paper", 1e-3)
    assert args.objective == {"name": "pro", "form": "paper", "sft_weight": 1e-3}
    assert config(tmp_path, objective=PROOptions("paper")).objective == {"name": "pro", "form": "paper"}
    assert config(tmp_path, objective=None).loss_options() == CLHAOptions()
    # CLHA's settings go where they have always stood.
    for given in ({"name": "clha", "margin": 1.5, "preset": "paper"}, CLHAOptions(1.5, reduction="sum", sft="mean")):
        args = config(tmp_path, objective=given)
        assert args.objective == "clha"
        assert args.margin == 1.5
        assert args.loss_options() == CLHAOptions.preset("paper").replace(margin=1.5)
    args = config(tmp_path, objective=CLHAOptions.preset("sft_only"))
    assert (args.preset, args.margin, args.reward_floor) == ("sft_only", None, None)
    assert args.loss_options() == CLHAOptions.preset("sft_only")


def test_transformers_own_parser_takes_a_name_and_json(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--objective"]
    for text, made in (("sft", SFTOptions()), ('{"name": "sft", "form": "token_mean"}', SFTOptions("token_mean"))):
        (args,) = HfArgumentParser(CLHAConfig).parse_args_into_dataclasses([*words, text])
        assert args.loss_options() == made


class Own(Objective):
    name = "own"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "por"}, r"^objective: expected one of clha, .*, got 'por'; did you mean 'pro'\?"),
        (
            {"objective": {"name": "sft", "fomr": 1}},
            r"^objective: unknown setting 'fomr'; did you mean 'form'\? \('sft'",
        ),
        ({"objective": {"form": "paper"}}, "^objective: expected a name or a mapping with a name and settings, got"),
        ({"objective": 3}, "^objective: expected a name or a mapping with a name and settings, got 3"),
        ({"objective": '{"name": '}, "^objective: expected a name, or a mapping as JSON"),
        ({"objective": {"name": "pro", "form": "x"}}, r"^objective\.form: expected one of paper, published, got 'x'"),
        ({"objective": {"name": "pro", "sft_weight": "x"}}, r"^objective\.sft_weight: expected .*, got 'x'"),
        ({"objective": Own()}, r"^objective: expected one of clha, .*, got 'own', a loss of your own.*attach\(model"),
        (
            {"objective": "sft", "margin": 1.0},
            r"^margin: expected none with objective='sft', .*, got 1.0; leave it out, or objective='clha' \('sft' has",
        ),
        (
            {"objective": "pro", "sft_weight": 0.1},
            r"^sft_weight: expected none with .*'sft_weight': 0.1\} sets its own \(--objective.sft_weight 0.1\)$",
        ),
        ({"objective": "pro", "preset": "paper"}, "^preset: expected none with objective='pro'"),
        ({"objective": {"name": "clha", "margin": 1}, "margin": 2.0}, "^margin: expected one value, got 2.0, and 1 in"),
        ({"objective": CLHAOptions(), "preset": "paper"}, r"^preset: expected none beside objective=CLHAOptions"),
        ({"reference": "copy"}, "^reference: expected None with the objective 'clha', which reads no reference log-pr"),
    ],
)
def test_objectives_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


@pytest.mark.parametrize("signal", ["rewards", "advantages"])
def test_records_without_what_an_objective_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal: str) -> None:
    monkeypatch.setattr(Comparing, "needs", (signal,))
    rows = rows_of(4)
    bare = [{key: value for key, value in row.items() if key != signal} for row in rows]
    for train, held_out, name in ((bare, rows, "train_dataset"), (rows, bare, "eval_dataset")):
        with pytest.raises(ValueError, match=f"^{name}: expected records with {signal}, which the objective 'compar"):
            CLHATrainer(
                make_model(len(TOKENIZER)),
                config(tmp_path, objective="comparing"),
                train_dataset=train,
                eval_dataset=held_out,
                processing_class=TOKENIZER,
            )


def test_what_data_hold_and_nobody_reads_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**row, "reference_logps": [-1.0] * len(row["completions"])} for row in rows_of(6)]
    with caplog.at_level("WARNING"):
        with_them = trainer(tmp_path, rows=rows)
        batch = with_them.data_collator(rows[:2])
        with_them.evaluate(rows)
    for signal in ("advantages", "reference_logps"):
        said = f"records: their {signal} are left out, for the objective 'clha' does not read them"
        assert caplog.text.count(said) == 1
        assert signal not in batch
    without = trainer(tmp_path, rows=make_rows(6))
    for ours in (with_them, without):
        ours.train()
    assert with_them.state.log_history[0]["loss"] == without.state.log_history[0]["loss"]


def test_what_was_dropped_for_another_objective_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "say: ", "completions": ["a cat", "a dog", "a hat"], "rewards": [2.0, 1.0, 0.5]}]
    ours = trainer(tmp_path, rows=rows_of(4), objective="pro")
    batch = RankedCollator(TOKENIZER)(rows)
    assert batch["num_inert"] == 2
    with pytest.raises(ValueError, match=r"objective 'pro' does not depend on, got candidate 1 .*dropped for 'clha'"):
        ours.compute_loss(ours.model, batch)


def test_a_copy_is_what_training_started_from(tmp_path: Path) -> None:
    """The loss of a model that has moved, against the eager one of both models."""
    rows = rows_of(4, seed=5)
    start = make_model(len(TOKENIZER))
    ours = trainer(tmp_path, copy.deepcopy(start), rows=rows, objective={"name": "comparing", "beta": 0.7})
    now = moved(start)
    ours.model.load_state_dict(now.state_dict())
    batch = CandidateBatch.from_dict(ours.data_collator(rows))

    def sums(model: nn.Module) -> Tensor:
        with torch.no_grad():
            logits = model(**batch.model_inputs(), use_cache=False).logits.double().flatten(0, 1)[batch.row_index]
        logps = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
        return torch.stack([part.sum() for part in logps.split(batch.candidate_lengths.tolist())])

    x = 0.7 * (sums(now.eval()) - sums(start.eval()))
    expected = 0.0
    for part in x.split(batch.candidates_per_prompt.tolist()):
        n = len(part)
        leads = [part[i] - part[j] for i in range(n) for j in range(i + 1, n)]
        expected += sum(float(torch.log1p(torch.exp(-lead))) for lead in leads) / len(rows)
    loss = ours.compute_loss(ours.model.eval(), batch.as_dict())
    assert loss.item() == pytest.approx(expected, rel=1e-5)
