"""flash-attn's operators in two calls, written out with its own signatures: values, gradients, and which one runs."""

from __future__ import annotations

import logging
import sys
from types import ModuleType

import pytest
import torch
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

import clha_fast
from clha_fast.cli.main import main
from clha_fast.models import two_calls, varlen
from clha_fast.models.layout_probe import pack
from clha_fast.models.two_calls import attend
from tests.models.test_two_calls import KINDS, SEGMENTS, TWO_ROWS, dense, inputs, plan_of
from tests.support.architecture_configs import shrink
from tests.support.architectures import build
from tests.support.flash_attn_stand_in import install, stand_in
from tests.support.layouts import texts


@pytest.fixture
def put(monkeypatch):
    """Has a module stand in for the package, and CPU tensors go the way of a GPU's."""

    def choose(query, value, plan, softcap):
        return varlen.choose(softcap) if plan.causal or plan.window is not None else None

    def found(module):
        install(monkeypatch, module)
        monkeypatch.setattr(two_calls, "choose", choose)
        # A torch that was built with its own, on a machine with a GPU, has it for GPUs' tensors alone.
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
        return module

    yield found
    varlen.flash_attn.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("segments", [SEGMENTS, TWO_ROWS], ids=["one row", "two rows"])
@pytest.mark.parametrize("mutates", [True, False])
def test_as_a_masked_softmax(kind, segments, mutates, put):
    """float64: outputs, and gradients with an arbitrary upstream gradient; windows, softcaps, sinks, unequal sizes."""
    module = put(stand_in(exact=True, mutates=mutates, more=", bool zero_tensors=False"))
    settings = dict(KINDS[kind])
    function = settings.pop("function", causal_mask_function)
    softcap, with_sinks = settings.pop("softcap", None), settings.pop("sinks", False)
    plan = plan_of(segments, function)
    given = inputs(segments, **settings)
    heads = given[0].shape[1]
    sinks = torch.linspace(-1, 2, heads, dtype=torch.float64).requires_grad_() if with_sinks else None
    leaves = [*given, *([sinks] if with_sinks else [])]
    out = attend(*given, plan, 0.6, softcap, sinks)
    assert {call[1:] for call in module.calls} == {(softcap or 0.0, -1 if plan.causal else plan.window - 1)}
    expected = dense(*given, plan, 0.6, softcap, sinks)
    there = (segments.tokens().group_ids >= 0)[:, None, :, None]
    torch.testing.assert_close(torch.where(there, out, 0), expected, rtol=1e-12, atol=1e-13)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * there
    ours = torch.autograd.grad(out, leaves, upstream)
    assert module.calls[-1][0] == "backward"
    theirs = torch.autograd.grad(expected, leaves, upstream)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", [causal_mask_function, sliding_window_causal_mask_function(12)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_in_16_bits(dtype, function, softcap, put):
    """What the kernels take: at most twice the error of a dense softmax in the same dtype."""
    put(stand_in())
    segments = SEGMENTS
    plan = plan_of(segments, function)
    exact = inputs(segments, heads=4, groups=2, size=20, values=16, seed=3)
    given = [t.detach().to(dtype).requires_grad_() for t in exact]
    exact = [t.detach().double().requires_grad_() for t in given]
    sinks = torch.linspace(-1, 1, 4)
    there = (segments.tokens().group_ids >= 0)[:, None, :, None]
    upstream = (torch.randn(1, 4, segments.width, 16, generator=torch.Generator().manual_seed(1)) * there).to(dtype)

    def all_of(function, tensors):
        out = torch.where(there, function(*tensors, plan, 0.25, softcap, sinks.to(tensors[0].dtype)), 0)
        return [out, *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]

    truth, ours, theirs = all_of(dense, exact), all_of(attend, given), all_of(dense, given)
    for right, one, other in zip(truth, ours, theirs, strict=True):
        assert one.dtype == dtype
        mine, eager = (float((t.double() - right).norm()) for t in (one, other))
        assert mine <= 2 * eager


def test_a_model_with_softcaps_and_windows(put):
    """Gemma 2 in shared rows: loss and gradients of padded rows, every layer through the package."""
    module = put(stand_in(exact=True))
    config = shrink("gemma2", False)
    results = []
    for layout in ("shared", "padded"):
        model = build(config)
        model.set_attn_implementation("clha_fast" if layout == "shared" else "eager")
        model = model.double().eval()
        clha_fast.attach(model, layout=layout)
        module.calls.clear()
        output = model(**pack(texts(), layout).as_dict())
        output.loss.backward()
        results.append((output.loss.item(), {name: p.grad for name, p in model.named_parameters()}))
        if layout == "shared":
            cap = float(config.attn_logit_softcapping)
            windows = {call[2] for call in module.calls}
            assert {call[1] for call in module.calls} == {cap}
            assert -1 in windows
            assert len(windows) == 2, "layers with a window as well"
        else:
            assert not module.calls
    (loss, ours), (expected, theirs) = results
    assert loss == pytest.approx(expected, rel=1e-6)
    whole = sum(float(gradient.norm()) ** 2 for gradient in theirs.values()) ** 0.5
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).norm()) <= 1e-5 * whole, name


def test_which_one_runs(put, monkeypatch):
    """torch's where it has what is asked for, the package for softcaps and where this torch has none, else blocks."""
    put(stand_in())
    for has, kinds in ((True, (varlen.OfTorch, varlen.OfFlashAttn)), (False, (varlen.OfFlashAttn,) * 2)):
        monkeypatch.setattr(varlen, "torch_has", lambda has=has: has)
        assert tuple(type(varlen.choose(softcap)) for softcap in (None, 30.0)) == kinds
    monkeypatch.setattr(varlen, "torch_has", lambda: True)
    gpu = torch.device("cuda")
    assert varlen.text(gpu) == "torch's varlen operator, softcaps by flash-attn's varlen operator"
    put(None)
    assert type(varlen.choose(None)) is varlen.OfTorch
    assert varlen.choose(30.0) is None
    assert varlen.text(gpu) == "torch's varlen operator, softcaps by blocks of queries"
    monkeypatch.setattr(varlen, "torch_has", lambda: False)
    assert varlen.choose(None) is None
    assert varlen.text(gpu) == "blocks of queries, softcaps by blocks of queries"


def _older(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
           window_size=(-1, -1), softcap=0.0, alibi_slopes=None, return_softmax=False):  # fmt: skip
    """As of 2.6."""


def _broken():
    module = ModuleType("flash_attn.flash_attn_interface")
    module._wrapped_flash_attn_varlen_forward = _older
    return module


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (lambda: stand_in(more=", Tensor? more_of_it=None"), ""),
        (lambda: stand_in(more=", *, int s_aux"), "one that needs s_aux"),
        (_broken, "one without window_size_left, window_size_right"),
        (lambda: ModuleType("flash_attn.flash_attn_interface"), "_wrapped_flash_attn_varlen_forward"),
    ],
    ids=["one more", "one more that is needed", "2.6", "none of them"],
)
def test_other_releases(module, said, put, caplog):
    """Arguments are looked at, not versions; what cannot be called is said once and left alone."""
    put(module())
    with caplog.at_level(logging.WARNING, "clha_fast"):
        found = [varlen.choose(1.0) for _ in range(2)]
    if not said:
        assert all(type(one) is varlen.OfFlashAttn for one in found)
        assert not caplog.records
        return
    assert found == [None, None]
    (record,) = caplog.records
    assert record.message.startswith("flash-attn: installed, and not used for rows of several responses (")
    assert said in record.message


def test_a_package_that_cannot_be_imported(put, monkeypatch, caplog):
    put(stand_in())
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", None)
    varlen.flash_attn.cache_clear()
    with caplog.at_level(logging.WARNING, "clha_fast"):
        assert varlen.choose(1.0) is None
    assert len(caplog.records) == 1


def test_env_says_which(capsys):
    main(["env"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("two calls"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert line.removeprefix("two calls").strip() == varlen.text(device)
