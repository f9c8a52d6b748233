"""`auto` where the trial passes and a batch of the run does not: padded rows from there on, said once."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clha_fast
from clha_fast.batching.batch import CandidateBatch
from clha_fast.batching.collator import RankedCollator
from clha_fast.models.frozen import FrozenModel
from clha_fast.models.layout_probe import pack
from clha_fast.models.layouts import DifferentRowsError, RowLayouts
from clha_fast.models.scoring import Scorer
from clha_fast.models.segment_masks import UnsupportedLayoutError
from clha_fast.models.unpacking import padded_batch
from clha_fast.objectives import CLHAOptions, CoHOptions, Objective, SFTOptions
from tests.models.test_layouts import TOKENIZER, neo
from tests.support.layouts import texts
from tests.support.tiny import make_model, make_rows

FAR = 520  # of the window, and of a layer that counts places


def llama() -> nn.Module:
    """A layer of it adds something to what stands behind a place of its row that no probe fills."""
    model = make_model(len(TOKENIZER), max_position_embeddings=2048).eval()

    def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        there = torch.arange(output.shape[1]) >= FAR
        return output + there[None, :, None] * output.flip(-1)

    model.model.layers[0].mlp.register_forward_hook(add)
    return model


def batches(layout: str) -> list[CandidateBatch]:
    """A short one, two that are computed otherwise, a long one after them, and a short one."""
    kinds = [((20,), (6, 11, 3)), ((FAR - 60, 30, 9), (90, 80, 7)), ((FAR - 30, 4), (9, 5, 40)), ((12, 9), (6, 11, 3))]
    return [pack(texts(prompts=prompts, sizes=sizes), layout) for prompts, sizes in kinds]


def ranked(group: Any) -> Tensor:
    return (group.scores**2).sum() / group.totals.prompts


@pytest.mark.parametrize("make", [llama, lambda: neo(FAR)])
def test_attached(make, caplog) -> None:
    """Losses and gradients are those of padded rows, whatever shared ones a loader has made by then."""
    found = {}
    for layout in ("padded", "auto"):
        model, rows = make().double(), batches("shared" if layout == "auto" else "padded")
        attached = clha_fast.attach(model, ranked, layout=layout)
        assert attached.layout == layout
        with caplog.at_level(logging.WARNING, logger="clha_fast"):
            losses = torch.stack([model(**batch.as_dict()).loss for batch in rows])
        losses.sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found[layout] = losses.detach(), gradient, torch.cat([attached.token_logps(batch) for batch in rows])
        assert attached.layout == "padded"
    said = [text for text in caplog.messages if text.startswith("layout auto: padded from here on")]
    assert len(said) == 1
    assert "log-probabilities differ" in said[0]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("taken", ["model", "token_logps"])
@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_padded_rows_that_are_not_computed_are_refused(
    layout: str, taken: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As spread over processes they may be: there is no other way for them to go, and nothing is said of one."""
    attached = clha_fast.attach(model := make_model(len(TOKENIZER)), layout=layout)

    def check(*_: Any) -> None:
        raise DifferentRowsError("log-probabilities differ")

    monkeypatch.setattr(RowLayouts, "check", check)
    batch = pack(texts(prompts=(5,), sizes=(4, 3)), "padded")
    with pytest.raises(UnsupportedLayoutError, match="log-probabilities differ"):
        attached.token_logps(batch) if taken == "token_logps" else model(**batch.as_dict())
    assert "padded from here on" not in caplog.text


def test_a_frozen_model_and_a_scorer(caplog) -> None:
    """Scores stand at the tokens' own places of the rows that were given, the prompts' as well."""
    frozen = FrozenModel(llama())
    frozen.layouts.settle("auto")
    with Scorer(llama(), layout="auto") as scorer, caplog.at_level(logging.WARNING, logger="clha_fast"):
        for shared, padded in zip(batches("shared"), batches("padded"), strict=True):
            expected = frozen(padded)
            torch.testing.assert_close(frozen(shared), expected, rtol=1e-4, atol=1e-5)
            ids, places = shared.input_ids, shared.segments
            assert places is not None
            own = ids.masked_fill(shared.segment_ids < 1, -100)
            got = scorer(ids, own, segments=places)
            torch.testing.assert_close(got.logps[got.scored], expected, rtol=1e-4, atol=1e-5)
            every = scorer(ids, ids, segments=places)
            assert torch.equal(every.scored, shared.position_ids > 0)
            prompt = scorer(padded.input_ids[:1], padded.input_ids[:1], attention_mask=padded.attention_mask[:1])
            size = places.groups[0].prompt[1]
            torch.testing.assert_close(every.logps[0, :size], prompt.logps[0, :size], rtol=1e-4, atol=1e-5)
        assert scorer.layout == frozen.layouts.layout == "padded"
    assert len([text for text in caplog.messages if "padded from here on" in text]) == 2


def test_what_is_no_refusal_of_autos() -> None:
    """A layout asked for by name, and what stands beside the tokens."""
    far = batches("shared")[1].as_dict()
    model = llama()
    with clha_fast.attach(model, ranked, layout="shared"), pytest.raises(UnsupportedLayoutError, match="differ by"):
        model(**far)
    with clha_fast.attach(model, ranked, layout="auto"):
        for _ in range(2):
            with pytest.raises(UnsupportedLayoutError, match="pixel_values: expected tokens alone"):
                model(**far, pixel_values=torch.zeros(1))
            model(**far)


@pytest.mark.parametrize("drop_inert", [True, False])
@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("objective", [CLHAOptions(), CoHOptions(), SFTOptions()])
def test_a_batch_as_padded_rows(objective: Objective, layout: str, drop_inert: bool) -> None:
    """Tokens, masks, targets and places are those of a collator's padded rows, without inert candidates and markers."""
    made = [
        RankedCollator(TOKENIZER, objective, layout=name, drop_inert=drop_inert)(make_rows(5))
        for name in ("padded", layout)
    ]
    expected, got = made[0], padded_batch(made[1])
    real = expected["attention_mask"].bool()
    assert torch.equal(got["attention_mask"], expected["attention_mask"])
    assert torch.equal(got["input_ids"][real], expected["input_ids"][real])
    for name in ("row_index", "targets", "candidate_lengths"):
        assert torch.equal(got[name], expected[name]), name
    assert got["segments"] is None
