"""The hash that stands for a model: the same for the same weights, another one for any single one that differs."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from clha_fast.models import loading
from clha_fast.models.loading import fingerprint
from tests.support.tiny import make_model, make_tokenizer


def model_of(*tensors: torch.Tensor) -> Any:
    """As much of a model as is hashed."""
    weights = {f"w{number}": tensor for number, tensor in enumerate(tensors)}
    return SimpleNamespace(config=SimpleNamespace(to_dict=dict), state_dict=lambda: weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_changed_weight_is_seen(dtype: torch.dtype) -> None:
    model = make_model(len(make_tokenizer())).to(dtype)
    before = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == before
    drawn = random.Random(3)
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for place in {0, len(flat) - 1, *(drawn.randrange(len(flat)) for _ in range(3))}:
            kept = flat[place].clone()
            # The next number that the dtype has.
            flat[place] = torch.nextafter(kept.float(), torch.tensor(9e9)) if dtype == torch.float32 else kept * 1.02
            if flat[place] == kept:  # a zero
                flat[place] = 1e-6
            assert fingerprint(model) != before
            flat[place] = kept
    assert fingerprint(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_changed_places_are_seen(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = fingerprint(model_of(weight))
    other = weight.clone()
    other[3], other[40] = weight[40], weight[3]
    assert fingerprint(model_of(other)) != before
    assert fingerprint(model_of(weight.T)) != before
    assert fingerprint(model_of(weight.T.contiguous().T)) == before  # how it lies in memory is no matter


def test_checksums_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits times 1, 3, 5, ..., anew in each part; 1.0 is 0x3F80 in bfloat16 and 0x3F800000 in float32."""
    one, two = 0x3F80, 0x4000
    monkeypatch.setattr(loading, "_PART", 2)
    found = loading._checksum(torch.tensor([1.0, 2.0, 2.0], dtype=torch.bfloat16))
    assert found == [one + 3 * two, two]
    assert loading._checksum(torch.tensor([[1.0], [0.0]])) == [one << 16]
    assert loading._checksum(torch.tensor([-1, 5])) == [-1 + 15]
    assert loading._checksum(torch.tensor([2**62, 2**62])) == [0]  # modulo 2^64
    assert loading._checksum(torch.tensor([True, True])) == [4]
    assert loading._checksum(torch.tensor(7, dtype=torch.int8)) == [7]
    assert sum(loading._checksum(torch.empty(0, 3))) == 0


def test_threads_and_folders_are_no_matter(tmp_path: Path) -> None:
    model = make_model(len(make_tokenizer()))
    before = fingerprint(model)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert fingerprint(model) == before
    finally:
        torch.set_num_threads(threads)
    model.save_pretrained(tmp_path)
    assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == fingerprint(model)
