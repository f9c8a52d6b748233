"""Rows of several candidates in two attention calls: through real models, and what falls back to masks."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch.autograd.graph import save_on_cpu

import clha_fast
from clha_fast.batching.collator import RankedCollator
from clha_fast.models import segment_attention, segment_masks, segment_plan, two_calls
from clha_fast.models.layout_probe import pack
from clha_fast.models.measure import measure_head
from clha_fast.models.segment_attention import UnsupportedAttentionError
from clha_fast.models.segment_masks import IN_TWO_CALLS, UnsupportedLayoutError
from clha_fast.objectives.sft import SFTOptions
from tests.support.architecture_configs import shrink
from tests.support.architectures import build
from tests.support.layouts import NATS, RELATIVE, compare, texts
from tests.support.tiny import make_model, make_rows, make_tokenizer
from tests.support.versions import lacks_type

TOKENIZER = make_tokenizer()


@pytest.fixture
def calls(monkeypatch):
    """Which way attention went: "two" or "blocks"."""
    found = []
    for name, function in (("two", two_calls._OnCPU.forward), ("blocks", two_calls._blockwise)):

        def noted(*args, name=name, function=function):
            found.append(name)
            return function(*args)

        if name == "two":
            monkeypatch.setattr(two_calls._OnCPU, "forward", staticmethod(noted))
        else:
            monkeypatch.setattr(two_calls, "_blockwise", noted)
    return found


# Windows of 16 tokens, shorter than the prompts: as the tiny models of the tables have them.
TYPES = {
    "llama": ("sdpa", {"two"}),
    "mistral": ("sdpa", {"blocks"}),
    "qwen2": ("sdpa", {"two"}),
    "qwen3_moe": ("sdpa", {"two"}),
    "deepseek_v3": ("sdpa", {"two"}),  # keys and values of different sizes
    "gemma3_text": ("sdpa", {"blocks"}),
    "cohere2": ("sdpa", {"blocks"}),
    "gpt2": ("sdpa", {"two"}),  # learned positions
    "opt": ("sdpa", {"two"}),
    "olmo2": ("sdpa", {"two"}),
    "llama4_text": ("sdpa", {"two"}),
    "gpt_oss": ("clha_fast", {"two", "blocks"}),  # sinks
    "gemma2": ("clha_fast", {"blocks"}),  # softcap
    "granite": ("clha_fast", {"two"}),
}


def model_of(kind):
    if lacks_type(kind):
        pytest.skip(f"this transformers has no model type {kind}")
    config = shrink(kind, False)
    for name in ("attention_dropout", "attn_pdrop"):
        if getattr(config, name, 0):
            setattr(config, name, 0.0)
    return build(config)


@pytest.mark.parametrize("kind", TYPES)
def test_values_and_gradients(kind, calls):
    """Against each candidate alone in a row; float32."""
    implementation, ways = TYPES[kind]
    model = model_of(kind)
    model.set_attn_implementation(implementation)
    clha_fast.attach(model, SFTOptions(), layout="shared").detach()
    assert model in IN_TWO_CALLS
    calls.clear()
    nats, relative = compare(model, measure_head(model), texts(), "shared")
    assert nats <= NATS
    assert relative <= RELATIVE
    assert ways <= set(calls)


@pytest.mark.parametrize(("kind", "windows"), [("llama", {None}), ("mistral", {16}), ("gemma3_text", {16, None})])
def test_windows_of_models_are_known(kind, windows, monkeypatch):
    """Their mask functions are transformers' own, by which an operator that has windows is given one."""
    found = []
    own = segment_attention.plan_for
    monkeypatch.setattr(segment_attention, "plan_for", lambda *given: found.append(own(*given)) or found[-1])
    model = model_of(kind)
    model.set_attn_implementation("sdpa")
    clha_fast.attach(model, SFTOptions(), layout="shared")
    assert {plan.window for plan in found} == windows


@pytest.mark.parametrize("kind", ["gpt_oss", "gemma2", "llama"])
def test_other_calls_of_the_own_name_are_eager(kind):
    """Padded rows, and generation with a cache."""
    model = model_of(kind).eval()
    ids = torch.randint(5, 70, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    found = {}
    for name in ("eager", "clha_fast"):
        model.set_attn_implementation(name)
        logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        first = model(input_ids=ids[:1, :20], use_cache=True)
        then = model(input_ids=ids[:1, 20:], past_key_values=first.past_key_values).logits
        found[name] = torch.cat([logits, then[0]])
    torch.testing.assert_close(found["clha_fast"], found["eager"], rtol=1e-4, atol=1e-5)


def batch_of(layout="shared", count=3):
    return RankedCollator(TOKENIZER, layout=layout)(make_rows(count))


def llama(**changes):
    return make_model(len(TOKENIZER), **changes)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_the_plan(reentrant, calls):
    """Layers are recomputed outside the forward, with no batch at work: as often as they ran, in two calls."""
    losses = {}
    for checkpointing in (False, True):
        model = llama().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        clha_fast.attach(model, layout="shared")
        model(**batch_of())  # the first batch is compared
        model.zero_grad()
        calls.clear()
        loss = model(**batch_of()).loss
        assert calls == ["two"] * 2
        loss.backward()
        assert calls == ["two"] * (4 if checkpointing else 2)
        losses[checkpointing] = loss, [p.grad for p in model.parameters()]
    torch.testing.assert_close(losses[True][0], losses[False][0])
    for one, other in zip(losses[True][1], losses[False][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_checkpoints_that_wait_elsewhere():
    """Copies of all that a checkpointed forward keeps, as offloading makes them: the same bits."""
    grads = []
    for copies in (False, True):
        model = llama().train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        clha_fast.attach(model, layout="shared", tiled_mlp=8)
        with save_on_cpu() if copies else contextlib.nullcontext():
            loss = model(**batch_of()).loss
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_no_mask_is_made(monkeypatch):
    """Rows whose mask would be too large run, and where layers take a mask they are refused."""
    model = llama()
    clha_fast.attach(model, layout="shared")
    expected = model(**batch_of()).loss
    monkeypatch.setattr(segment_masks, "MASK_BYTES", 100)

    def made(*args, **kwargs):
        raise AssertionError("a mask")

    monkeypatch.setattr(segment_masks, "by_position", made)
    torch.testing.assert_close(model(**batch_of()).loss, expected)
    other = copy.deepcopy(model)  # which nobody has probed: masks
    assert other not in IN_TWO_CALLS
    with pytest.raises(UnsupportedLayoutError, match="layout: expected a row of at most 10 tokens, whose mask takes"):
        other(**batch_of())


def test_what_an_earlier_attach_has_seen_does_not_stay():
    """Attached without masks, detached, given attention dropout, attached again: with masks, which runs."""
    model = llama()
    clha_fast.attach(model, layout="shared").detach()
    assert model in IN_TWO_CALLS
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model.train()
    clha_fast.attach(model, layout="shared")
    assert model not in IN_TWO_CALLS
    assert model(**batch_of()).loss.isfinite()


def test_a_planted_leak_is_caught(monkeypatch):
    """Candidates as one text: two calls are not taken, and the masks, which are right, are."""

    def leaking(self):
        found = [segment_plan.Calls([], []) for _ in range(self.segments.rows)]
        for row, prompt, candidates in self.segments.groups:
            last = (candidates or (prompt,))[-1]
            found[row].own.append((prompt[0], sum(last) - prompt[0]))
        return found

    monkeypatch.setattr(segment_plan.SegmentPlan, "rows", property(leaking))
    model = llama()
    clha_fast.attach(model, layout="shared")
    assert model not in IN_TWO_CALLS


def test_a_planted_wrong_merge_is_caught(monkeypatch):
    """Each call's own output in place of the merged one: values show it."""
    monkeypatch.setattr(two_calls, "merge", lambda out, lse, other, log: (out, lse))
    model = llama()
    clha_fast.attach(model, layout="shared")
    assert model not in IN_TWO_CALLS


def test_what_goes_through_masks(calls):
    """Attention dropout, eager attention, and layers that look into the mask."""
    dropping, eager, looking = llama(attention_dropout=0.1), llama(), llama()
    eager.set_attn_implementation("eager")

    def look(module, args, kwargs):
        if kwargs["attention_mask"] is not None:
            kwargs["attention_mask"].sum()

    looking.model.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    for model in (dropping, eager, looking):
        assert clha_fast.attach(model, layout="shared").layout == "shared"
        assert model not in IN_TWO_CALLS
        calls.clear()
        assert torch.isfinite(model(**batch_of()).loss)
        assert calls == []


def test_refusals_of_a_layer():
    plan = segment_attention.plan_for(pack(texts(), "shared").segments, None, torch.device("cpu"))
    q = torch.zeros(1, 1, 4, 2)
    with pytest.raises(UnsupportedAttentionError, match="attention_dropout: expected 0 where attention runs in two"):
        segment_attention.planned(torch.nn.Identity(), q, q, q, plan, dropout=0.1)
    with pytest.raises(UnsupportedAttentionError, match="got Identity with a bias"):
        segment_attention.planned(torch.nn.Identity(), q, q, q, plan, position_bias=q)
    with pytest.raises(UnsupportedAttentionError, match="got Identity with 3 keys"):
        segment_attention.planned(torch.nn.Identity(), q, q[:, :, :3], q[:, :, :3], plan)


def test_other_models_are_left_alone():
    """sdpa's function does what it did for any other mask, beside a model that runs in two calls."""
    clha_fast.attach(llama(), layout="shared")
    model = llama().eval()
    ids = torch.randint(5, 70, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    sdpa = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    model.set_attn_implementation("eager")
    eager = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(sdpa, eager, rtol=1e-4, atol=1e-5)
