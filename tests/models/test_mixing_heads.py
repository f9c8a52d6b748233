"""Heads in which a token's logits depend on other tokens are refused, however little; all others stay, unchanged."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from clha_fast.hf import score
from clha_fast.models.heads import UnsupportedHeadError, inspect_head
from clha_fast.models.wrapped import unwrap
from tests.support.adapters import Int8, attach, base, collate, compare, eager_loss, four_bits, stir, with_head

Mix = Callable[[Tensor], Tensor]


def before(h: Tensor) -> Tensor:
    return nn.functional.pad(h, (0, 0, 1, 0))[:, :-1]


def after(h: Tensor) -> Tensor:
    return nn.functional.pad(h, (0, 0, 0, 1))[:, 1:]


def looks(h: Tensor) -> Tensor:
    return (h @ h.mT / h.shape[-1]).softmax(-1) @ h


MIXES: dict[str, Mix] = {
    "the mean of all tokens": lambda h: h.mean((0, 1), keepdim=True).expand_as(h),
    "the mean of a row": lambda h: h.mean(1, keepdim=True).expand_as(h),
    "the mean over rows": lambda h: h.mean(0, keepdim=True).expand_as(h),
    "the token before": before,
    "the token behind": after,
    "attention": looks,
    "a norm over all tokens": lambda h: h / h.norm(),
    "shares of the largest": lambda h: h * h.amax(1, keepdim=True).softmax(-1),
}


class Mixing(nn.Module):
    """An adapter beside the head, of `mix` of its hidden states; `gate` is 0 before training."""

    def __init__(self, plain: nn.Linear, mix: Mix, gate: float, bias: bool = False) -> None:
        super().__init__()
        self.base_layer, self.mix = plain, mix
        self.down = nn.Linear(plain.in_features, 4, bias=bias)
        self.up = nn.Linear(4, plain.out_features, bias=False)
        nn.init.constant_(self.up.weight, 0.0)
        with torch.no_grad():
            self.up.weight += gate * torch.randn(self.up.weight.shape, generator=torch.Generator().manual_seed(2))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base_layer(hidden) + self.up(self.down(self.mix(hidden)))


def state(model: nn.Module) -> dict[str, Any]:
    """All that a probe must leave as it was."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    seen = {name: (id(t), t.data_ptr(), t.clone(), t.grad, t.requires_grad) for name, t in tensors.items()}
    modes = {name: (module.training, sorted(vars(module))) for name, module in model.named_modules()}
    return {"tensors": seen, "modes": modes, "random": torch.get_rng_state()}


def assert_unchanged(model: nn.Module, was: dict[str, Any]) -> None:
    now = state(model)
    assert now["modes"] == was["modes"]
    assert torch.equal(now["random"], was["random"])
    for name, (which, where, values, grad, needs) in was["tensors"].items():
        assert now["tensors"][name][:2] == (which, where), name
        assert torch.equal(now["tensors"][name][2], values), name
        assert now["tensors"][name][3:] == (grad, needs), name


@pytest.mark.parametrize("gate", [0.0, 1e-4, 0.05], ids=["fresh", "barely trained", "trained"])
@pytest.mark.parametrize("mix", MIXES)
def test_a_head_that_mixes_tokens_is_refused_however_little(mix: str, gate: float) -> None:
    model = base().train()
    model.lm_head = Mixing(model.lm_head, MIXES[mix], gate)
    was, ids = state(model), collate().input_ids
    said = r"^model: expected a head .* embedding Mixing: its forward mixes tokens \(the logits of one depend on"
    with pytest.raises(UnsupportedHeadError, match=said):
        attach(model)
    for mode in (torch.no_grad, torch.inference_mode):
        with pytest.raises(UnsupportedHeadError, match=said), mode():
            score(model, ids, ids)
    assert_unchanged(model, was)


ROWWISE: dict[str, Mix] = {
    "nothing": lambda h: h,
    "a norm of each token": lambda h: h / h.norm(dim=-1, keepdim=True),
    "experts of each token": lambda h: h * h[..., :4].softmax(-1).amax(-1, keepdim=True),
    "common rounding": lambda h: h + ((h * 127 / h.abs().amax()).round() * h.abs().amax() / 127 - h).detach(),
}


@pytest.mark.parametrize("gate", [0.0, 0.05], ids=["fresh", "trained"])
@pytest.mark.parametrize("mix", ROWWISE)
def test_a_head_whose_tokens_are_apart_is_taken_and_left_as_it_was(mix: str, gate: float) -> None:
    model = base().train()
    model.lm_head = Mixing(model.lm_head, ROWWISE[mix], gate, bias=True)
    nn.init.zeros_(model.lm_head.down.bias)
    was = state(model)
    found = inspect_head(model, own_forward=True).own_forward
    assert found is not None
    assert found.differentiable
    assert_unchanged(model, was)
    if mix != "common rounding":
        assert compare(stir(model)).right


# Of those that peft 0.21 has for a linear layer; Lily is the one that mixes.
ADAPTERS: dict[str, dict[str, Any]] = {
    "LoraConfig": {},
    "IA3Config": {"feedforward_modules": []},
    "OFTConfig": {"r": 4, "oft_block_size": 0},
    "BOFTConfig": {},
    "LoKrConfig": {},
    "LoHaConfig": {},
    "HRAConfig": {},
    "VeraConfig": {"r": 4},
    "FourierFTConfig": {"n_frequency": 10},
    "RandLoraConfig": {"r": 4},
    "GraloraConfig": {},
    "MissConfig": {"r": 4},
    "DeloraConfig": {},
    "PsoftConfig": {},
    "HiraConfig": {},
    "WaveFTConfig": {},
    "PeanutConfig": {},
}


def adapter(kind: str, **settings: Any) -> nn.Module:
    make = getattr(peft, kind, None)
    if make is None:
        pytest.skip(f"peft {peft.__version__} has no {kind}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = make(task_type="CAUSAL_LM", target_modules=["lm_head"], **settings)
        return peft.get_peft_model(base(), config).train()


@pytest.mark.parametrize("stirred", [False, True], ids=["fresh", "stirred"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_on_the_head_stay(kind: str, stirred: bool) -> None:
    model = adapter(kind, **ADAPTERS[kind])
    if stirred:
        stir(model)
    was = state(model)
    found = inspect_head(unwrap(model), own_forward=True).own_forward
    assert found is not None
    assert found.differentiable
    assert_unchanged(model, was)


@pytest.mark.parametrize("amount", [0.0, 1e-3, 0.05, 1.0])
def test_lily_is_refused(amount: float) -> None:
    model = adapter("LilyConfig", r=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += amount * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    with pytest.raises(UnsupportedHeadError, match=r"embedding peft\.tuners\.lily\.layer\.Linear: its forward mixes"):
        attach(model)


class Ranged(Int8):
    """8-bit hidden states as well, by the range of all tokens, which has no gradient."""

    def __init__(self, plain: nn.Linear, symmetric: bool) -> None:
        super().__init__(plain)
        self.symmetric = symmetric

    def forward(self, hidden: Tensor) -> Tensor:
        low = hidden.detach().amin() if not self.symmetric else -hidden.detach().abs().amax()
        step = (hidden.detach().abs().amax() if self.symmetric else hidden.detach().amax()) / 255 - low / 255
        rounded = ((hidden - low) / step).round() * step + low
        return super().forward(hidden + (rounded - hidden).detach())


def torchao(config: str) -> Callable[[nn.Linear], nn.Module]:
    def make(plain: nn.Linear) -> nn.Module:
        quantization = pytest.importorskip("torchao.quantization")
        holder = nn.Sequential(plain)
        quantization.quantize_(holder, getattr(quantization, config)())
        head: nn.Module = holder[0]
        return head

    return make


def bits8(plain: nn.Linear) -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    # A threshold at which columns of these hidden states are outliers.
    head = bitsandbytes.nn.Linear8bitLt(
        plain.in_features, plain.out_features, bias=False, has_fp16_weights=False, threshold=1.5
    )
    head.load_state_dict(plain.state_dict())
    moved: nn.Module = head.to("cpu")
    return moved


QUANTISED: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "codes": Int8,
    "a symmetric range": lambda plain: Ranged(plain, True),
    "a range with a zero point": lambda plain: Ranged(plain, False),
    "bitsandbytes, 8 bits with outliers": bits8,
    "torchao, weights": torchao("Int8WeightOnlyConfig"),
    "torchao, weights and inputs": torchao("Int8DynamicActivationInt8WeightConfig"),
}
if importlib.util.find_spec("bitsandbytes") is not None:
    QUANTISED["bitsandbytes, 4 bits"] = four_bits


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_heads_stay(kind: str) -> None:
    model, batch = with_head(QUANTISED[kind]), collate()
    wanted = eager_loss(model, batch).item()
    # Without a gradient, which torchao's kernel for quantised inputs has not.
    with attach(model) as attached, torch.no_grad():
        assert attached.info.own_forward is not None
        assert attached.info.own_forward.differentiable is (kind != "torchao, weights and inputs")
        # One of its own roundings apart, where the range is that of the tokens it is given.
        assert model(**batch.as_dict()).loss.item() == pytest.approx(wanted, rel=3e-3)


class Wide(nn.Linear):
    """A head that computes in its weight's precision, whatever the body's."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("body", "head"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)],
    ids=["bfloat16 to float32", "float16 to float32", "float32 to bfloat16"],
)
def test_a_head_in_a_dtype_of_its_own_computes_in_it(body: torch.dtype, head: torch.dtype, bias: bool) -> None:
    model, batch = base().to(body), collate()
    wide = Wide(32, model.config.vocab_size, bias=bias, dtype=head)
    with torch.no_grad():
        wide.weight.copy_(model.lm_head.weight)
    model.lm_head = wide
    wanted = eager_loss(model, batch)
    wanted.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with attach(model) as attached:
        assert str(head) in attached.info.own_forward.reason
        loss = model(**batch.as_dict()).loss
        loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=2e-6)
    # Roundings of the body's own gradients, of chunks that are added up in another order.
    size = sum(float(grad.float().norm()) ** 2 for grad in grads.values()) ** 0.5
    worst = max(float((p.grad - grads[name]).float().norm()) for name, p in model.named_parameters())
    assert worst <= 2e-2 * size
    scores = score(model, batch.input_ids, batch.input_ids, attention_mask=batch.attention_mask)
    logits = model(**batch.model_inputs()).logits[:, :-1].float().log_softmax(-1)
    wanted = logits.gather(2, batch.input_ids[:, 1:, None])[..., 0].where(scores.scored[:, 1:], 0.0)
    torch.testing.assert_close(scores.logps[:, 1:], wanted.detach(), atol=5e-6, rtol=1e-5)


def test_a_head_of_another_class_in_the_models_dtype_is_still_read() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = base().to(dtype)
        model.lm_head = Wide(32, model.config.vocab_size, bias=False, dtype=dtype)
        assert inspect_head(model, own_forward=True).own_forward is None


def test_under_autocast_a_head_of_another_class_is_read_as_before() -> None:
    model, batch = base().bfloat16(), collate()
    model.lm_head = Wide(32, model.config.vocab_size, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = eager_loss(model, batch).item()
        with attach(model) as attached:
            assert attached.info.own_forward is None
            assert model(**batch.as_dict()).loss.item() == pytest.approx(wanted, rel=2e-3)


class FromZero(nn.Linear):
    """A head with a parameter that is zero, and for which other values than that are errors, or no numbers."""

    def __init__(self, plain: nn.Linear, how: str) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.weight, self.how = plain.weight, how
        self.gate = nn.Parameter(torch.zeros(plain.in_features))

    def forward(self, hidden: Tensor) -> Tensor:
        if self.how == "root":  # of no number where it is filled, with a slope without end where it is zero
            return nn.functional.linear(hidden + self.gate.sqrt(), self.weight)
        if self.gate.any():
            raise {"value": ValueError, "key": KeyError, "runtime": RuntimeError}[self.how]("not these")
        return nn.functional.linear(hidden + self.gate, self.weight)


@pytest.mark.parametrize("how", ["root", "value", "key", "runtime"])
def test_what_a_head_does_with_other_parameters_tells_nothing(how: str) -> None:
    model = base()
    model.lm_head = FromZero(model.lm_head, how)
    attach(model)
    assert not model.lm_head.gate.any()


class Once(torch.autograd.Function):
    """A product whose backward runs once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.kept = weight
        return hidden @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        weight, ctx.kept = ctx.kept, None
        if weight is None:
            raise RuntimeError("its context is gone")
        return grad @ weight, None


class OnceHead(nn.Linear):
    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.weight = plain.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return Once.apply(hidden, self.weight.detach())  # type: ignore[no-any-return]


def test_a_backward_that_runs_once_is_one() -> None:
    model = base()
    model.lm_head = OnceHead(model.lm_head)
    forward = inspect_head(model, own_forward=True).own_forward
    assert forward is not None
    assert forward.differentiable


def test_what_is_no_hidden_state_is_named() -> None:
    model = base()
    head = model.lm_head
    model.lm_head = nn.Identity()
    model.lm_head.weight, model.get_output_embeddings = head.weight, lambda: head

    def forward(input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Any:
        return head({"hidden": model.model(input_ids=input_ids).last_hidden_state})

    model.forward = forward
    with pytest.raises(UnsupportedHeadError, match=r"embedding Linear: it is called with a dict, no hidden states$"):
        attach(model)
