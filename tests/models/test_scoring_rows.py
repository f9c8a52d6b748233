"""Scores of rows that hold several candidates against each candidate in a row of its own, and what is refused there."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTNeoConfig, GPTNeoForCausalLM, LlamaConfig, LlamaForCausalLM

import clha_fast
from clha_fast.batching.collator import RankedCollator
from clha_fast.batching.segments import SegmentGroup, Segments, place
from clha_fast.hf import Scorer, score
from clha_fast.models.segment_masks import UnsupportedLayoutError
from tests.models.test_scoring import ADAPTERS, adapted, model_of
from tests.support.head_models import V
from tests.support.tiny import make_model, make_rows, make_tokenizer

# (tokens of the prompt, tokens of each of its candidates): one alone, empty ones, one of a single token.
SIZES = [(5, [4, 1, 6]), (3, [2]), (4, [0, 3, 0]), (2, [])]
Text = tuple[slice, slice]  # prompt and candidate in their row


def row(sizes: list[tuple[int, list[int]]], seed: int = 3, multiple: int = 1) -> tuple[Tensor, Segments, list[Text]]:
    segments = place(sizes, multiple)
    ids = torch.randint(3, V - 3, (1, segments.width), generator=torch.Generator().manual_seed(seed))
    spans = [
        (slice(at, at + length), slice(start, start + size))
        for _, (at, length), own in segments.groups
        for start, size in own
    ]
    return ids, segments, spans


def alone(model: nn.Module, ids: Tensor, spans: list[Text], name: str = "logps", **given: Any) -> list[Tensor]:
    """Of each candidate the tokens' values, in a row of its own behind its prompt."""
    found = []
    for prompt, own in spans:
        text = torch.cat([ids[0, prompt], ids[0, own]])[None]
        size = own.stop - own.start
        labels = text.clone()
        labels[:, : text.shape[1] - size] = -100
        found.append(getattr(score(model, text, labels, **given), name)[0, text.shape[1] - size :])
    return found


def test_closed_form() -> None:
    """Without attention's and the MLP's output a token is predicted by its own embedding: first tokens by the prompt's
    last, wherever their candidates stand."""
    config = LlamaConfig(
        vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, use_cache=False
    )
    model = LlamaForCausalLM(config).double()
    with torch.no_grad():
        # Normalised, the embedding of token k is sqrt(8) e_k, and its logits are row k of log(table).
        model.model.embed_tokens.weight.copy_(torch.eye(4, 8))
        table = torch.tensor([[1.0, 1, 1, 1], [4, 2, 1, 1], [1, 5, 1, 1], [2, 2, 2, 4]], dtype=torch.float64)
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :4] = (table / table.sum(1, keepdim=True)).log().T / math.sqrt(8)
        # A little of attention stays, for a probe that finds no trace of other tokens learns nothing.
        model.model.layers[0].self_attn.o_proj.weight.mul_(1e-12)
        model.model.layers[0].mlp.down_proj.weight.zero_()
    #                    prompt  | first | second | third
    ids = torch.tensor([[3, 1, 0, 2, 2, 1, 1, 3]])
    segments = place([(2, [2, 3, 1])])
    found = score(model, ids, ids, segments=segments)
    eps = 8e-6  # of RMSNorm, in embeddings whose mean square is 1/8
    expected = [0, 1 / 5, 4 / 8, 1 / 4, 1 / 8, 5 / 8, 2 / 8, 1 / 8]
    logs = torch.tensor([0.0, *(math.log(share) for share in expected[1:])], dtype=torch.float64)
    assert found.scored.tolist() == [[False] + [True] * 7]
    torch.testing.assert_close(found.logps[0], logs, rtol=0, atol=10 * eps)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "llama-bias"])
def test_as_alone(kind: str) -> None:
    model = model_of(kind).train()
    ids, segments, spans = row(SIZES, multiple=8)
    statistics = ("entropy", "is_top1")
    # transformers' eager softmax, which gemma2's softcap needs, is in float32.
    near = 1e-5 if kind == "gemma2" else 1e-12
    for temperature in (1.0, 0.7):
        given: Any = {"temperature": temperature, "statistics": statistics}
        found = score(model, ids, ids, segments=segments, **given)
        for name in ("logps", *statistics):
            for (_, own), expected in zip(spans, alone(model, ids, spans, name, **given), strict=True):
                assert found.scored[0, own].all()
                torch.testing.assert_close(getattr(found, name)[0, own], expected, rtol=0, atol=near)
    # Prompts are scored where labels say so, but for their first tokens; padding is not.
    assert found.scored.sum() == ids.numel() - 4 - (segments.width - 30)
    assert model.training


@pytest.mark.parametrize("name", ["body", "head"])
def test_adapters_with_gradients(name: str) -> None:
    assert name in ADAPTERS
    model = adapted(name)
    ids, segments, spans = row(SIZES)
    labels = ids.masked_fill(segments.tokens().segment_ids < 1, -100)
    labels[0, 6] = -100
    trained = [p for p in model.parameters() if p.requires_grad]
    upstream = torch.linspace(-1, 1, ids.numel(), dtype=torch.float64)
    found = score(model, ids, labels, segments=segments, gradient=True)
    assert found.scored.sum() == 15
    got = torch.autograd.grad((found.logps[0] * upstream).sum(), trained)
    kept = upstream.masked_fill(labels[0] == -100, 0.0)
    values = alone(model, ids, spans, gradient=True)
    total = sum((kept[own] * value).sum() for (_, own), value in zip(spans, values, strict=True))
    for mine, theirs in zip(got, torch.autograd.grad(total, trained), strict=True):
        # Llama's norms are in float32: what candidates owe to their prompt is rounded there once, or once for each.
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm()


def test_batches_of_a_collator_and_an_attached_model() -> None:
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer)).double().eval()
    batches = {}
    for layout in ("padded", "packed", "shared"):
        batch = RankedCollator(tokenizer, layout=layout, drop_inert=False)(make_rows(3))
        with clha_fast.attach(model, layout=layout):
            if layout == "padded":
                labels = torch.full_like(batch["input_ids"], -100).flatten()
                labels[batch["row_index"] + 1] = batch["targets"]
                found = score(
                    model,
                    batch["input_ids"],
                    labels.reshape(batch["input_ids"].shape),
                    attention_mask=batch["attention_mask"],
                )
            else:
                labels = batch["input_ids"].masked_fill(batch["segment_ids"] < 1, -100)
                found = score(model, batch["input_ids"], labels, segments=batch["segments"])
        batches[layout] = found.logps[found.scored]
    for layout in ("packed", "shared"):
        torch.testing.assert_close(batches[layout], batches["padded"], rtol=0, atol=1e-12)


def test_temperatures_are_those_of_the_labels_places() -> None:
    model = model_of("llama")
    ids, segments, spans = row([(3, [2, 4])])
    each = torch.linspace(0.5, 2, ids.numel(), dtype=torch.float64)[None]
    found = score(model, ids, ids, segments=segments, temperature=each)
    for prompt, own in spans:
        text = torch.cat([ids[0, prompt], ids[0, own]])[None]
        wide = torch.cat([each[0, prompt], each[0, own]])[None]
        expected = score(model, text, text, temperature=wide).logps[0, prompt.stop :]
        torch.testing.assert_close(found.logps[0, own], expected, rtol=0, atol=1e-12)


def test_several_rows() -> None:
    model = model_of("llama")
    ids, segments, _ = row([(3, [2, 4])])
    other, _, _ = row([(3, [2, 4])], seed=8)
    groups = tuple(SegmentGroup(number, *segments.groups[0][1:]) for number in range(2))
    both = torch.cat([ids, other])
    model.set_attn_implementation("eager")
    found = score(model, both, both, segments=Segments(2, segments.width, groups))
    for number, single in enumerate((ids, other)):
        expected = score(model, single, single, segments=segments).logps[0]
        torch.testing.assert_close(found.logps[number], expected, rtol=0, atol=1e-6)


def test_one_scorer_in_threads() -> None:
    model = model_of("llama")
    rows = [row([(4 + number, [3, 2 * number + 1])], seed=number) for number in range(4)]
    found: list[Tensor | None] = [None] * 4
    with Scorer(model, layout="auto") as scorer:
        assert scorer.layout == "auto"

        def run(number: int) -> None:
            ids, segments, _ = rows[number]
            for _ in range(3):
                found[number] = scorer(ids, ids, segments=segments).logps

        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for got, (ids, _, spans) in zip(found, rows, strict=True):
        assert got is not None
        for (_, own), expected in zip(spans, alone(model, ids, spans), strict=True):
            torch.testing.assert_close(got[0, own], expected, rtol=0, atol=1e-12)


def test_a_model_that_does_not_compute_such_rows() -> None:
    """GPT-Neo's local layers have a mask of their own, which counts places in the row."""
    config = GPTNeoConfig(
        vocab_size=V,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        attention_dropout=0.0,
        embed_dropout=0.0,
        resid_dropout=0.0,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = GPTNeoForCausalLM(config).eval()
    ids, segments, _ = row([(3, [2, 4])])
    with pytest.raises(UnsupportedLayoutError, match="layout: expected a model that computes shared rows"):
        score(model, ids, ids, segments=segments)
    with Scorer(model, layout="auto") as scorer:
        assert scorer.layout == "padded"
        with pytest.raises(UnsupportedLayoutError, match=r"expected padded rows, got shared ones.*Scorer\(model"):
            scorer(ids, ids, segments=segments)


REFUSED = {
    "mask": ({"attention_mask": None}, "attention_mask: expected none beside segments"),
    "positions": ({"position_ids": None}, "position_ids: expected none beside segments"),
    "shifted": ({"labels": None, "shift_labels": None}, "shift_labels: expected none beside segments.*give labels"),
    "tokens": ({"segments": {"rows": 1}}, "segments: expected Segments, .*got dict"),
    "width": ({"segments": place([(3, [2])])}, r"segments: expected those of input_ids, \[1, 9\], got 1 rows of 5"),
    "gap": (
        {"segments": Segments(1, 9, (SegmentGroup(0, (0, 3), ((3, 2), (6, 3))),))},
        "segments: expected prompts of a token or more.*got 3 tokens at 6 of row 0 behind 5 others",
    ),
    "no prompt": ({"segments": Segments(1, 9, (SegmentGroup(0, (0, 0), ((0, 2),)),))}, "segments: expected prompts"),
    "beyond": (
        {"segments": Segments(1, 9, (SegmentGroup(0, (0, 3), ((3, 2), (5, 5))),))},
        "segments: expected at most 9 tokens in a row, got 10",
    ),
    "media": ({"pixel_values": None}, "pixel_values: expected tokens alone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    given, message = REFUSED[case]
    ids, segments, _ = row([(3, [2, 4])])
    settings: dict[str, Any] = {"labels": ids, "segments": segments}
    settings |= {name: ids if value is None else value for name, value in given.items()}
    if case == "shifted":
        settings["labels"] = None
    with pytest.raises(ValueError, match=message):
        score(model_of("llama"), ids, **settings)


def test_a_layout_of_no_name() -> None:
    with pytest.raises(ValueError, match="layout: expected one of padded, packed, shared, auto"):
        Scorer(model_of("llama"), layout="joined")
