"""Output embeddings of real (tiny, random) transformers models against eager logits."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from clha_fast import token_logps
from clha_fast.models.heads import UnsupportedHeadError, fused_head, inspect_head
from clha_fast.models.probe import UnsupportedTransform, fit_transform, probe_values
from tests.support.head_models import MODELS, Behind, V, assert_same, build, eager, fused, gradients, inputs

TRANSFORMS = {"gemma2": (1.0, 7.0), "cohere": (0.3, None), "granite": (1 / 13, None)}


@pytest.mark.parametrize("name", MODELS)
def test_like_eager(name: str) -> None:
    model = build(name)
    info = inspect_head(model)
    scale, softcap = TRANSFORMS.get(name, (1.0, None))
    assert info.scale == scale
    assert info.softcap == softcap
    assert info.vocab_size == V
    assert_same(model, 2e-5)
    assert_same(model.double(), 1e-11)


def test_tied_weight_gets_both_gradients() -> None:
    model = build("llama-tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = gradients(model, eager(model))["model.embed_tokens.weight"]
    with torch.no_grad():
        untied = copy.deepcopy(model)
        untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.clone())
    parts = gradients(untied, fused(untied))
    both = parts["model.embed_tokens.weight"] + parts["lm_head.weight"]
    torch.testing.assert_close(gradients(model, fused(model))["model.embed_tokens.weight"], expected)
    torch.testing.assert_close(both, expected)


def test_model_is_left_as_it_was() -> None:
    model = build("llama").train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    before = eager(model)
    fused(model)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.lm_head)
    assert torch.equal(eager(model), before)


def test_forward_is_put_back_after_an_error() -> None:
    model = build("llama")
    with pytest.raises(ZeroDivisionError), fused_head(model, lambda *tensors: 1 / 0):
        model(input_ids=inputs()[0])
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.lm_head)


def test_frozen_head_gets_no_gradient() -> None:
    model = build("llama")
    model.lm_head.weight.requires_grad_(False)
    fused(model).sum().backward()
    assert model.lm_head.weight.grad is None
    assert model.model.norm.weight.grad.any()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # its name changed during transformers 5
def test_bfloat16_weights_and_activation_checkpointing() -> None:
    model = build("llama").train()
    expected = gradients(model, fused(model))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, grad in gradients(model, fused(model)).items():
        assert torch.equal(grad, expected[name]), name
    model.bfloat16()
    logps = fused(model)
    assert logps.dtype == torch.float32
    assert (logps - eager(model).float()).abs().max() < 0.2


class AddBias(nn.Module):
    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(start)

    def forward(self, logits: Tensor) -> Tensor:
        return logits + self.shift


class Slice(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits[..., : V - 3]


class Both(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return 5.0 * torch.tanh(0.25 * logits / 5.0)


class Cube(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits + 1e-3 * logits**3


class Masked(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor([5]), float("-inf"))


class Trained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, logits: Tensor) -> Tensor:
        return logits * self.factor


@pytest.mark.parametrize("start", ["random", "zero"])
def test_bias_added_behind_the_head(start: str) -> None:
    model = Behind(AddBias(torch.randn(V) if start == "random" else torch.zeros(V)))
    assert inspect_head(model).bias_name == "behind.shift"
    assert_same(model, 2e-5)


def test_scale_and_softcap_together() -> None:
    info = inspect_head(Behind(Both()))
    assert (info.scale, info.softcap) == (0.25, 5.0)
    assert_same(Behind(Both()), 2e-5)


def test_sliced_vocabulary() -> None:
    model = Behind(Slice())
    assert inspect_head(model).vocab_size == V - 3
    rows, targets = torch.arange(6), torch.arange(6) + V - 9

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return token_logps(hidden[rows], weight, targets, bias=bias)

    ids = inputs()[0]
    expected = model(ids, torch.ones_like(ids)).logits.flatten(0, 1)[rows].log_softmax(-1)
    with fused_head(model, compute):
        logps = model(ids, torch.ones_like(ids)).logits
    torch.testing.assert_close(logps, expected.gather(1, targets[:, None])[:, 0])


@pytest.mark.parametrize("behind", [Cube(), Masked(), Trained()], ids=lambda m: type(m).__name__)
def test_unknown_transform_is_refused(behind: nn.Module) -> None:
    with pytest.raises(UnsupportedHeadError, match=r"got Behind with output embedding Linear: ") as caught:
        inspect_head(Behind(behind))
    expected = {"Cube": "->", "Masked": "NaN or infinity", "Trained": "behind.factor"}[type(behind).__name__]
    assert expected in str(caught.value)


class Wrapped(nn.Linear):
    """What LoRA does: `weight` is there, and is not what forward computes."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + hidden.sum(-1, keepdim=True)


class EncoderDecoder(nn.Module):
    config = SimpleNamespace(is_encoder_decoder=True)


def test_unknown_heads_are_refused() -> None:
    model = build("llama")
    plain = model.lm_head
    model.lm_head = Wrapped(32, V, bias=False)
    with pytest.raises(UnsupportedHeadError, match="LlamaForCausalLM with output embedding Wrapped"):
        inspect_head(model)
    model.lm_head = plain
    plain.forward = lambda hidden: hidden
    with pytest.raises(UnsupportedHeadError, match="replaced on the instance"):
        inspect_head(model)
    with pytest.raises(UnsupportedHeadError, match="LlamaModel with no output embedding"):
        inspect_head(model.model)
    with pytest.raises(UnsupportedHeadError, match="encoder-decoder"):
        inspect_head(EncoderDecoder())


def test_head_that_is_never_or_twice_called() -> None:
    model = build("llama")
    backbone = model.model.forward
    model.forward = lambda **kwargs: SimpleNamespace(logits=backbone(**kwargs).last_hidden_state)
    with pytest.raises(UnsupportedHeadError, match="never calls it"):
        inspect_head(model)
    model.forward = lambda **kwargs: SimpleNamespace(
        logits=model.lm_head(model.lm_head(backbone(**kwargs).last_hidden_state)[..., :32])
    )
    with pytest.raises(UnsupportedHeadError, match="not once with"):
        inspect_head(model)


@pytest.mark.parametrize("scale", [1.0, 0.0625, 1 / 3, 12.0, -1.0])
@pytest.mark.parametrize("cap", [None, 1.0, 7.0, 30.0, 50.0])
@pytest.mark.parametrize("rows", [5, 40, 1000])
def test_fitted_numbers(scale: float, cap: float | None, rows: int) -> None:
    raw = probe_values(rows)
    seen = raw * scale if cap is None else cap * torch.tanh(raw * scale / cap)
    if cap is not None and scale < 0:
        with pytest.raises(UnsupportedTransform):
            fit_transform(raw, seen, {}, {})
        return
    found = fit_transform(raw, seen, {}, {})
    assert found.vocab_size == rows
    assert found.scale == pytest.approx(scale, rel=3e-6)
    assert found.softcap == (None if cap is None else pytest.approx(cap, rel=1e-6))


def test_frozen_bias_is_found_by_its_values() -> None:
    raw = probe_values(12)
    shift = torch.linspace(-2, 2, 12)
    tensors = {"other": torch.zeros(12), "a.shift": shift}
    assert fit_transform(raw, raw + shift, {}, tensors).bias_name == "a.shift"
    with pytest.raises(UnsupportedTransform, match="no scale, softcap or added bias"):
        fit_transform(raw, raw + shift, {}, {"other": torch.zeros(12)})
