"""Output embeddings that are no plain torch.nn.Linear, or are not called as one: right, or refused in a sentence."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import MusicgenDecoderConfig, MusicgenForCausalLM

from clha_fast.models.heads import UnsupportedHeadError, fused_head, inspect_head
from tests.support.head_models import Behind, V, assert_same, build, inputs


class OwnLinear(nn.Module):
    """A linear head under another name."""

    def __init__(self, plain: nn.Linear, bias: bool = True) -> None:
        super().__init__()
        self.weight = plain.weight
        self.bias = nn.Parameter(torch.linspace(-1, 1, V)) if bias else None

    def forward(self, hidden: Tensor) -> Tensor:
        logits = hidden.float() @ self.weight.float().T
        return logits if self.bias is None else logits + self.bias


class OneTooMuch(OwnLinear):
    def forward(self, hidden: Tensor) -> Tensor:
        return 1.001 * super().forward(hidden)


class Detached(OwnLinear):
    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.weight.detach(), self.bias)


class Dropping(OwnLinear):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(hidden, 0.2, self.training))


class WithRanges(OwnLinear):
    """What a quantised layer keeps beside its weight."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain)
        self.register_buffer("ranges", torch.ones(V))


class FreshAdapter(OwnLinear):
    """LoRA as it starts: the second factor is zero, so that the result is the base weight's."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain)
        self.down, self.up = nn.Linear(32, 2, bias=False), nn.Linear(2, V, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + self.up(self.down(hidden))


class TwoInputs(OwnLinear):
    def forward(self, hidden: Tensor, scale: Tensor) -> Tensor:
        return scale * super().forward(hidden)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_heads_of_any_class(bias: bool, dtype: torch.dtype) -> None:
    model = build("llama-tied").to(dtype)
    model.lm_head = OwnLinear(model.lm_head, bias).to(dtype)
    model.lm_head.train()
    assert inspect_head(model).module is model.lm_head
    assert model.lm_head.training
    assert model.lm_head.weight.grad is None
    if dtype == torch.float32:
        assert_same(model, 2e-5)


@pytest.mark.parametrize("kind", [OneTooMuch, Detached, Dropping, WithRanges, FreshAdapter, TwoInputs])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_that_only_look_linear_are_refused(kind: type[OwnLinear], dtype: torch.dtype) -> None:
    model = build("llama").to(dtype)
    model.lm_head = kind(model.lm_head).to(dtype)
    state = torch.get_rng_state()
    with pytest.raises(UnsupportedHeadError, match=f"embedding {kind.__name__}: its forward is not that of"):
        inspect_head(model)
    assert torch.equal(torch.get_rng_state(), state)


class Coded(nn.Parameter):
    """Stands for the parameter classes of quantisation libraries: floating outside, codes inside."""


def test_weights_of_unknown_tensor_classes_are_refused() -> None:
    model = build("llama")
    model.lm_head.weight = Coded(model.lm_head.weight.detach())
    with pytest.raises(UnsupportedHeadError, match="its weight is a Coded"):
        inspect_head(model)


def test_several_heads_are_refused() -> None:
    config = MusicgenDecoderConfig(
        vocab_size=V, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2, num_codebooks=3
    )
    model = MusicgenForCausalLM(config)
    with pytest.raises(UnsupportedHeadError, match=r"MusicgenForCausalLM .* it holds 3 heads"):
        inspect_head(model)


class Streams(Behind):
    """A Llama that calls its head on K streams at once, as ProphetNet does, and returns one of them, or their sum."""

    def __init__(self, count: int, chosen: int | None) -> None:
        super().__init__(nn.Identity())
        self.count, self.chosen = count, chosen

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> SimpleNamespace:
        flags = {"attention_mask": attention_mask, "use_cache": use_cache}
        hidden = self.inner.model(input_ids=input_ids, **flags).last_hidden_state
        factors = torch.arange(1, self.count + 1)[:, None, None]
        logits = self.inner.lm_head(hidden[:, None] * factors)
        logits = logits.sum(1) if self.chosen is None else logits[:, self.chosen]
        return SimpleNamespace(logits=5.0 * torch.tanh(logits / 5.0))


@pytest.mark.parametrize(("count", "chosen"), [(1, 0), (2, 0), (2, 1), (4, 2)])
def test_one_of_several_streams(count: int, chosen: int) -> None:
    model = Streams(count, chosen)
    info = inspect_head(model)
    assert (info.stream, info.softcap) == (chosen, 5.0)
    assert_same(model, 2e-5)


def test_streams_that_are_mixed_are_refused() -> None:
    with pytest.raises(UnsupportedHeadError, match="no scale, softcap or added bias"):
        inspect_head(Streams(2, None))


def test_a_forward_that_needs_more_than_ids_is_refused() -> None:
    model = build("llama")

    def forward(input_ids: Tensor, attention_mask: Tensor, use_cache: bool, states: Tensor | None = None) -> Tensor:
        raise ValueError("states cannot be None")

    model.forward = forward
    with pytest.raises(UnsupportedHeadError, match=r"does not run on token ids alone \(states cannot be None\)"):
        inspect_head(model)


def test_hidden_states_of_another_shape_are_refused() -> None:
    model = build("llama")
    info = inspect_head(model)
    ids = inputs()[0]
    hidden = model.model(input_ids=ids).last_hidden_state
    with (
        pytest.raises(UnsupportedHeadError, match=r"of another shape, \(27, 32\)"),
        fused_head(model, lambda *tensors: tensors[0], info),
    ):
        model.lm_head(hidden.flatten(0, 1))
