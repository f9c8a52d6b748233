"""Rows that are compared again where a model's own numbers begin to act, and rotary positions by the longest text."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import clha_fast
from clha_fast.models.layout_probe import pack
from clha_fast.models.lengths import numbers_of, rope_by_length, tells_more
from clha_fast.models.segment_masks import UnsupportedLayoutError
from clha_fast.objectives.sft import SFTOptions
from tests.models.test_layouts import TOKENIZER, llama, neo
from tests.support.layouts import texts
from tests.support.tiny import make_model
from tests.support.versions import lacks_type

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(kind: str, **more: object) -> nn.Module:
    if lacks_type(kind):
        pytest.skip(f"this transformers has no model type {kind}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **more})).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def minimax(block: int) -> nn.Module:
    indexer = {"index_n_heads": 2, "index_head_dim": 8, "index_block_size": block}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16}
    dense = {"dense_intermediate_size": 48, "mlp_layer_types": ["dense"] * 2, "layer_types": ["minimax_m3_sparse"] * 2}
    return build("minimax_m3_vl_text", head_dim=8, rotary_dim=4, **indexer, **experts, **dense)


def llama4(floor: int) -> nn.Module:
    """Its second layer has no rotation, and scales queries by their places in the row."""
    more = {"intermediate_size_mlp": 48, "num_local_experts": 2, "moe_layers": [], "no_rope_layers": [1, 0]}
    return build("llama4_text", head_dim=8, floor_scale=floor, attn_scale=0.5, **more)


def counting(place: int) -> nn.Module:
    """A layer that adds something to what stands behind a place of its row, which a number nested in lists tells."""
    model = make_model(len(TOKENIZER), max_position_embeddings=2048).eval()
    model.config.somebodys_own = {"of": [3, float(place)]}

    def add(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        there = torch.arange(output.shape[1]) >= place
        return output + there[None, :, None] * output.flip(-1)

    model.model.layers[0].mlp.register_forward_hook(add)
    return model


@pytest.mark.parametrize(
    ("make", "number", "layout"),
    [(minimax, 600, "shared"), (llama4, 700, "packed"), (counting, 800, "shared")],
)
def test_a_row_just_past_a_number_of_the_configuration_is_compared(make, number: int, layout: str) -> None:
    """Far from twice the row that was compared before, whose values are right."""
    model = make(number)
    with clha_fast.attach(model, SFTOptions(), layout=layout):
        prompt = (number - 80) // (3 if layout == "packed" else 1)
        for more in (0, 60):
            batch = pack(texts(prompts=(prompt + more,), sizes=(20, 25, 30)), layout)
            assert (batch.input_ids.shape[1] > number) == bool(more)
            if more:
                with pytest.raises(UnsupportedLayoutError, match="log-probabilities differ"):
                    model(**batch.as_dict())
            else:
                model(**batch.as_dict())


@pytest.mark.parametrize(("make", "number"), [(minimax, 64), (minimax, 128), (counting, 200), (counting, 130)])
def test_small_numbers_are_filled_at_the_start(make, number: int) -> None:
    with pytest.raises(UnsupportedLayoutError, match="log-probabilities differ"):
        clha_fast.attach(make(number), SFTOptions(), layout="shared")


def test_the_longest_candidate_is_looked_at() -> None:
    """Not the first ones, nor the last: the only text beyond its window."""
    model = neo(600)
    clha_fast.attach(model, SFTOptions(), layout="packed")
    place = 4

    def add(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        there = (torch.arange(output.shape[1]) == 250) & (output.shape[1] > 300)
        return output + there[None, :, None] * output.flip(-1)

    model.transformer.h[0].mlp.register_forward_hook(add)
    sizes = [9, 9, 9, 9, 9, 9]
    sizes[place - 1] = 80
    with pytest.raises(UnsupportedLayoutError, match="log-probabilities differ"):
        model(**pack(texts(prompts=(40,), sizes=tuple(sizes)), "packed").as_dict())


def test_numbers() -> None:
    assert {3, 640} <= set(numbers_of(counting(640)))
    assert True not in [number is True for number in numbers_of(llama())]
    assert numbers_of(nn.Linear(2, 2)) == ()


@pytest.mark.parametrize(
    ("seen", "now", "more"),
    [
        (0, 2, True),
        (50, 100, True),
        (50, 99, False),
        (600, 639, False),
        (600, 641, True),
        (641, 700, True),
        (720, 900, False),
        (700, 690, False),
        (650, 650, False),
    ],
)
def test_what_tells_more(seen: int, now: int, more: bool) -> None:
    assert tells_more(seen, now, (8, 640)) is more


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}


def phi3(original: int) -> nn.Module:
    rope = {**LONG, "original_max_position_embeddings": original}
    return build("phi3", original_max_position_embeddings=original, rope_parameters=rope)


def dynamic(positions: int) -> nn.Module:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    return build("llama", max_position_embeddings=positions, rope_parameters=rope)


@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize(("make", "number"), [(phi3, 100), (phi3, 256), (dynamic, 64), (dynamic, 150)])
def test_rotary_positions_by_the_longest_text(make, number: int, layout: str) -> None:
    """Of the batch, in padded rows as well: short texts beside a long one, and alone again."""
    model = make(number)
    assert rope_by_length(model) in ("longrope", "dynamic")
    with clha_fast.attach(model, SFTOptions(), layout=layout) as attached:
        for prompts in ((20,), (number + 10, 9), (14, 12)):
            features = texts(prompts=prompts, sizes=(8, 6))
            got, expected = (attached.token_logps(pack(features, name)) for name in (layout, "padded"))
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rest", [0, 2])
def test_a_text_as_long_as_the_table_of_positions(rest: int) -> None:
    """The row with padding behind it, which tells what rounding is, ends with the table."""
    model = neo(16)
    clha_fast.attach(model, SFTOptions(), layout="packed")
    longest = 1024 - rest
    batch = pack(texts(prompts=(longest - 9,), sizes=(9,)), "packed")
    assert torch.isfinite(model(**batch.as_dict()).loss)


def test_old_names_of_remote_code() -> None:
    for kind, found in (("su", "su"), ("longrope", "longrope"), ("linear", None)):
        model = llama()
        model.config.rope_scaling = None
        model.config.rope_parameters = {"type": kind}
        assert rope_by_length(model) == found
