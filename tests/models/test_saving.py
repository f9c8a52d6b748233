"""An attached model through pickle, torch.save and copies: it comes back attached, or saving says why not."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import clha_fast
from clha_fast import CLHAOptions, PROOptions, SFTOptions
from clha_fast.batching.batch import CandidateBatch
from clha_fast.batching.collator import RankedCollator
from clha_fast.models.attach import CLHAOutput
from tests.support.tiny import make_model, make_rows, make_tokenizer

TOKENIZER = make_tokenizer()
SETTINGS = [
    (CLHAOptions(margin=0.5), {"temperature": 1.5, "backend": "torch"}),
    (PROOptions(), {"max_dropped_mass": 0.1}),
    (SFTOptions(), {"ignore_index": -7}),
]


def batch(objective: Any) -> dict[str, Any]:
    return CandidateBatch.from_dict(RankedCollator(TOKENIZER, objective)(make_rows(3, seed=5))).as_dict()


def pickled(protocol: int) -> Callable[[nn.Module], Any]:
    return lambda model: pickle.loads(pickle.dumps(model, protocol))


def torch_saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def inside(model: nn.Module) -> Any:
    """As a part of something larger, which is what checkpoints hold."""
    return torch_saved(nn.ModuleDict({"a": nn.Linear(2, 2), "b": model}))["b"]


WAYS = {"torch.save": torch_saved, "inside another": inside, "deepcopy": copy.deepcopy}
WAYS |= {f"pickle {protocol}": pickled(protocol) for protocol in (2, 4, 5)}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
# Every way meets each objective's settings, and weights that are tied and not.
@pytest.mark.parametrize(
    ("objective", "settings", "tied"),
    [(*SETTINGS[0], True), (*SETTINGS[1], False), (*SETTINGS[2], True)],
    ids=[o.name for o, _ in SETTINGS],
)
def test_it_comes_back_attached(way: Callable[[nn.Module], Any], objective: Any, settings: Any, tied: bool) -> None:
    model = make_model(len(TOKENIZER), tie_word_embeddings=tied)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    attached, fields = clha_fast.attach(model, objective, **settings), batch(objective)
    other = way(model)
    for _ in range(2):
        wanted, got = model(**fields), other(**fields)
        assert isinstance(got, CLHAOutput)
        assert torch.equal(got.loss, wanted.loss)
        assert torch.equal(got.metrics.values, wanted.metrics.values)
        other = way(other)  # and a second time
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(2.0)
    assert not torch.equal(other(**fields).loss, wanted.loss)
    assert torch.equal(model(**fields).loss, wanted.loss)
    with pytest.raises(ValueError, match="attached already"):
        clha_fast.attach(other)
    for one in (attached, other._clha_attached):
        one.detach()
    for one in (model, other):
        assert {name: set(vars(module)) for name, module in one.named_modules()} == before
        assert not isinstance(one(input_ids=fields["input_ids"]), CLHAOutput)


def test_a_forward_of_somebody_elses_is_refused_at_saving() -> None:
    model = make_model(len(TOKENIZER))
    own = model.forward
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    clha_fast.attach(model)
    for save in (pickle.dumps, lambda model: torch.save(model, io.BytesIO())):
        with pytest.raises(ValueError, match=r"expected a forward of its class's to save an attached model"):
            save(model)


def test_weights_alone_are_what_they_were() -> None:
    model = make_model(len(TOKENIZER))
    keys = list(model.state_dict())
    clha_fast.attach(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert list(torch.load(file, weights_only=True)) == keys
