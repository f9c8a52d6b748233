"""Scores of any model's tokens against its own logits: padded and packed rows, adapters, threads, what is refused."""

from __future__ import annotations

import copy
import math
import threading
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import clha_fast
from clha_fast.batching.segments import SegmentGroup, Segments
from clha_fast.hf import Scorer, UnsupportedHeadError, score
from clha_fast.models.heads import inspect_head
from tests.support.head_models import MODELS, Behind, V, build

B, T = 3, 11
KINDS = (*MODELS, "llama-bias")


def model_of(name: str) -> PreTrainedModel:
    model = build(name.removesuffix("-bias"))
    if name == "llama-bias":
        model.lm_head = nn.Linear(32, V, bias=True)
    if name != "gemma2":
        # transformers' eager attention gives NaN for left padding in float64: its softmax is in float32.
        model.set_attn_implementation("sdpa")
    return model.double()


def rows(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, mask, labels): one row padded on the right, one on the left, some labels ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V - 3, (B, T), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    mask[2, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    labels[0, 6] = -100
    return ids, mask, labels


def eager(model: nn.Module, ids: Tensor, labels: Tensor, temperature: float = 1.0, **inputs: Any) -> Tensor:
    """[B, T], 0 where nothing is scored; what stands in front of the tokens (virtual ones) is cut off."""
    logits = model(input_ids=ids, use_cache=False, **inputs).logits[:, -ids.shape[1] :] / temperature
    wanted = labels[:, 1:]
    chosen = logits[:, :-1].log_softmax(-1).gather(2, wanted.clamp(min=0)[..., None])[..., 0]
    out = torch.zeros(ids.shape, dtype=logits.dtype)
    out[:, 1:] = torch.where(wanted == -100, 0.0, chosen)
    return out


def test_closed_form() -> None:
    """A model that has forgotten everything gives each of 4 tokens log(1/4)."""
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).double()
    nn.init.zeros_(model.lm_head.weight)
    ids = torch.tensor([[1, 2, 3], [3, 0, 1]])
    labels = torch.tensor([[1, 2, 3], [-100, -100, 1]])
    found = score(model, ids, labels)
    quarter = math.log(0.25)
    assert found.scored.tolist() == [[False, True, True], [False, False, True]]
    expected = torch.tensor([[0, quarter, quarter], [0, 0, quarter]], dtype=torch.float64)
    torch.testing.assert_close(found.logps, expected, rtol=0, atol=1e-15)
    moved = score(model, ids, shift_labels=torch.tensor([[2, 3, -100], [-100, 1, 0]]))
    expected = torch.tensor([[quarter, quarter, 0], [0, quarter, quarter]], dtype=torch.float64)
    torch.testing.assert_close(moved.logps, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_like_logits(name: str, temperature: float) -> None:
    model = model_of(name).train()
    ids, mask, labels = (part[: 2 if name == "gemma2" else 3] for part in rows())
    expected = eager(model, ids, labels, temperature, attention_mask=mask)
    found = score(model, ids, labels, attention_mask=mask, temperature=temperature)
    assert not found.logps.requires_grad
    assert found.scored.sum(1).tolist() == [8, 5, 6][: len(ids)]
    torch.testing.assert_close(found.logps, torch.where(found.scored, expected, 0.0), rtol=0, atol=1e-11)
    assert model.training
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.get_output_embeddings())


def test_a_sliced_vocabulary_and_a_transform_behind_the_head() -> None:
    class Half(nn.Module):
        def forward(self, logits: Tensor) -> Tensor:
            return 0.5 * logits[..., : V - 3]

    model = Behind(Half())
    model.inner.set_attn_implementation("sdpa")
    model.double()
    ids, mask, labels = rows()
    expected = eager(model, ids, labels, attention_mask=mask)
    found = score(model, ids, labels, attention_mask=mask)
    assert inspect_head(model).vocab_size == V - 3
    torch.testing.assert_close(found.logps, torch.where(found.scored, expected, 0.0), rtol=0, atol=1e-11)


STATISTICS = ("is_top1", "entropy", "sum_sq_probs", "mean_logit")


def eager_statistics(z: Tensor, labels: Tensor) -> dict[str, Tensor]:
    p = z.softmax(-1)
    return {
        "entropy": -(p * p.log()).sum(-1),
        "sum_sq_probs": (p**2).sum(-1),
        "mean_logit": z.mean(-1),
        "is_top1": (z.argmax(-1) == labels).to(z.dtype),
    }


@pytest.mark.parametrize("name", ["gemma2", "head"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_none(name: str, value: float) -> None:
    """Also on a head that is called in chunks."""
    model: nn.Module = adapted("head") if name == "head" else model_of(name)
    ids, mask, labels = (part[:2] for part in rows())
    with pytest.raises(ValueError, match="temperature: expected positive finite numbers in float64, got"):
        score(model, ids, labels, attention_mask=mask, temperature=torch.tensor([1.0, value]))


@pytest.mark.parametrize("name", ["gemma2", "cohere", "head"])
def test_statistics_and_temperatures(name: str) -> None:
    """On a head of one weight, and on one that is called in chunks; entropy with a gradient."""
    model: nn.Module = adapted("head") if name == "head" else model_of(name)
    ids, mask, labels = (part[:2] for part in rows())
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    labels[0, 5] = logits[0, 4].argmax()
    every = torch.linspace(0.5, 2, labels.numel(), dtype=torch.float64).reshape(labels.shape)
    for temperature, wide in (
        (1.3, torch.tensor(1.3, dtype=torch.float64)),
        (every[:, 0], every[:, :1]),
        (every, every),
    ):
        settings: Any = {"attention_mask": mask, "temperature": temperature, "statistics": STATISTICS}
        settings |= {"workspace_bytes": 30000, "gradient": True}
        found = score(model, ids, labels, **settings)
        z = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        z = z / wide.expand(labels.shape)[:, 1:, None]
        expected = eager_statistics(z, labels[:, 1:])
        for statistic, values in expected.items():
            got = getattr(found, statistic)
            want = torch.where(found.scored[:, 1:], values, 0.0)
            torch.testing.assert_close(got[:, 1:], want, rtol=0, atol=1e-10)
        assert found.is_top1 is not None
        assert found.is_top1[0, 5] == 1
        upstream = torch.linspace(-1, 1, found.logps.numel(), dtype=torch.float64).reshape(found.logps.shape)
        trained = [p for p in model.parameters() if p.requires_grad]
        wanted = torch.autograd.grad(
            (torch.where(found.scored, upstream, 0.0)[:, 1:] * expected["entropy"]).sum(), trained
        )
        assert found.entropy is not None
        for mine, theirs in zip(torch.autograd.grad((found.entropy * upstream).sum(), trained), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_packed_rows_are_as_alone() -> None:
    model = model_of("llama")
    generator = torch.Generator().manual_seed(2)
    parts = [torch.randint(3, V, (1, size), generator=generator) for size in (4, 1, 6)]
    ids = torch.cat(parts, dim=1)
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    found = score(model, ids, ids, position_ids=positions)
    alone = torch.cat([score(model, part, part).logps for part in parts], dim=1)
    torch.testing.assert_close(found.logps, alone, rtol=0, atol=1e-12)
    assert found.scored.int().tolist() == [[0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1]]
    with pytest.raises(ValueError, match="attention_mask: expected None beside position_ids that restart"):
        score(model, ids, ids, position_ids=positions, attention_mask=torch.ones_like(ids))


def test_left_padding_with_positions_is_not_packed() -> None:
    model = model_of("llama")
    ids, mask, labels = rows()
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    found = score(model, ids, labels, attention_mask=mask, position_ids=positions)
    row = score(model, ids[2:, 4:], labels[2:, 4:])
    torch.testing.assert_close(found.logps[2:, 4:], row.logps, rtol=0, atol=1e-12)


ADAPTERS = {
    "body": {"target_modules": ["q_proj", "down_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "dora head": {"target_modules": ["lm_head"], "use_dora": True},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def adapted(name: str) -> nn.Module:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, **ADAPTERS[name])
    model = peft.get_peft_model(model_of("llama"), config).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model.train()


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_with_gradients(name: str) -> None:
    model = adapted(name)
    ids, mask, labels = rows()
    upstream = torch.linspace(-1, 1, B * T, dtype=torch.float64).reshape(B, T)
    trained = [p for p in model.parameters() if p.requires_grad]
    known = score(model, ids, labels, attention_mask=mask).scored
    expected = torch.where(known, eager(model, ids, labels, attention_mask=mask), 0.0)
    wanted = torch.autograd.grad((expected * upstream).sum(), trained)
    found = score(model, ids, labels, attention_mask=mask, gradient=True)
    torch.testing.assert_close(found.logps, expected, rtol=0, atol=1e-11)
    for got, want in zip(torch.autograd.grad((found.logps * upstream).sum(), trained), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_prompt_tuning_scores_the_tokens_behind_the_virtual_ones() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(model_of("llama"), config).double()
    ids, mask, labels = rows()
    expected = eager(model, ids, labels, attention_mask=mask)
    found = score(model, ids, labels, attention_mask=mask)
    torch.testing.assert_close(found.logps, torch.where(found.scored, expected, 0.0), rtol=0, atol=1e-11)


def test_attached_models_and_wrappers() -> None:
    model = model_of("llama")
    ids, mask, labels = rows()
    expected = score(model, ids, labels, attention_mask=mask).logps
    with clha_fast.attach(model):
        torch.testing.assert_close(score(model, ids, labels, attention_mask=mask).logps, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"got nn\.DataParallel"):
        score(nn.DataParallel(model), ids, labels)


def test_nothing_to_score() -> None:
    model = build("llama")
    ids, mask, _ = rows()
    none = torch.full_like(ids, -100)
    found = score(model, ids, none, attention_mask=mask, gradient=True)
    assert not found.logps.any()
    assert not found.scored.any()
    found.logps.sum().backward()
    assert model.lm_head.weight.grad is not None
    assert not model.lm_head.weight.grad.any()
    empty = torch.empty(2, 0, dtype=torch.int64)
    assert score(model, empty, empty).logps.shape == (2, 0)
    single = torch.tensor([[5]])
    assert score(model, single, single).scored.tolist() == [[False]]


def test_threads_call_one_scorer_at_a_time_or_several() -> None:
    model = model_of("cohere")
    batches = [rows(seed) for seed in range(6)]
    expected = [score(model, ids, labels, attention_mask=mask).logps for ids, mask, labels in batches]
    found: list[Tensor | None] = [None] * 6

    with Scorer(model) as scorer:

        def run(number: int) -> None:
            ids, mask, labels = batches[number]
            for _ in range(3):
                once = score(model, ids, labels, attention_mask=mask) if number % 2 else None
                found[number] = (once or scorer(ids, labels, attention_mask=mask)).logps

        threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for got, want in zip(found, expected, strict=True):
        assert got is not None
        assert torch.equal(got, want)
    assert "forward" not in vars(model.lm_head)
    scorer.detach()


def test_dropout_is_the_modes() -> None:
    model = build("llama", attention_dropout=0.5).train()
    ids, mask, labels = rows()
    first, second = (score(model, ids, labels, attention_mask=mask).logps for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    first, second = (score(model, ids, labels, attention_mask=mask).logps for _ in range(2))
    assert torch.equal(first, second)


REFUSED = {
    "neither": ({}, "labels: expected labels or shift_labels"),
    "both": ({"labels": None, "shift_labels": None}, "got both"),
    "shape": (
        {"labels": torch.zeros(B, T + 1, dtype=torch.int64)},
        r"labels: expected the shape of input_ids",
    ),
    "cache": ({"labels": None, "use_cache": True}, "use_cache: expected nothing of this name"),
    "temperature": ({"labels": None, "temperature": 0.0}, "temperature"),
    "temperatures": ({"labels": None, "temperature": torch.ones(B + 1)}, "temperature: expected a number"),
    "statistics": ({"labels": None, "statistics": ["top5"]}, "statistics: expected a sequence of entropy"),
    "backend": ({"labels": None, "backend": "cuda"}, "backend"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    given, message = REFUSED[case]
    ids, _, labels = rows()
    given = {name: labels if value is None else value for name, value in given.items()}
    with pytest.raises(ValueError, match=message):
        score(build("llama"), ids, **given)


def test_a_head_that_is_not_understood_is_refused_by_name() -> None:
    class Bent(nn.Module):
        def forward(self, logits: Tensor) -> Tensor:
            return logits + 0.1 * logits**2

    ids, mask, labels = rows()
    model = Behind(Bent())
    before = copy.deepcopy(list(vars(model.inner.lm_head)))
    with pytest.raises(UnsupportedHeadError, match="got Behind with output embedding Linear"):
        score(model, ids, labels, attention_mask=mask)
    assert list(vars(model.inner.lm_head)) == before


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize("token", [V, V + 300, -1, -99])
def test_a_token_beyond_the_vocabulary(name: str, token: int) -> None:
    ids, mask, labels = rows()
    labels[0, 4] = token
    said = rf"^{name}: expected tokens below the 67 rows of .* output embedding, or -100 .* got {token} at \[0, 4\]"
    with pytest.raises(ValueError, match=said):
        score(build("llama"), ids, **{name: labels}, attention_mask=mask)
    if name == "labels":  # a row's first token and padding are not scored, whatever stands there
        labels[0, 4] = -100
        wanted = score(build("llama"), ids, labels, attention_mask=mask).logps
        labels[:, 0], labels[1, 9] = token, token
        assert torch.equal(score(build("llama"), ids, labels, attention_mask=mask).logps, wanted)


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.tolist(), r"expected a tensor \[B, T\], got list"),
        (lambda t: t.numpy(), r"expected a tensor \[B, T\], got ndarray"),
        (lambda t: t.int(), r"expected int64, got torch\.int32"),
        (lambda t: t.float(), r"expected int64, got torch\.float32"),
        (lambda t: t != -100, r"expected int64, got torch\.bool"),
        (lambda t: t[0], rf"expected the shape of input_ids, \[{B}, {T}\], got \[{T}\]"),
    ],
    ids=["list", "numpy", "int32", "float32", "bool", "one row"],
)
def test_labels_are_named_as_they_were_given(name: str, change: Any, message: str) -> None:
    ids, mask, labels = rows()
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        score(build("llama"), ids, **{name: change(labels)}, attention_mask=mask)


def test_masks_and_positions_are_looked_at_too() -> None:
    ids, mask, labels = rows()
    for name, given in (("attention_mask", mask.numpy()), ("position_ids", mask.tolist())):
        with pytest.raises(
            ValueError, match=rf"^{name}: expected a tensor \[B, T\], got (ndarray|list); torch.as_tensor"
        ):
            score(build("llama"), ids, labels, **{name: given})
    with pytest.raises(ValueError, match=rf"^attention_mask: expected the shape of input_ids, .* got \[{B}, {T - 1}\]"):
        score(build("llama"), ids, labels, attention_mask=mask[:, 1:])


def test_a_dict_of_masks_beside_shift_labels_is_the_models_own() -> None:
    ids, mask, labels = rows()
    model, sees = model_of("gemma2"), (mask[:, None, None, :] * torch.ones(T, T).tril()).bool()
    wide = torch.zeros(sees.shape, dtype=torch.float64).masked_fill(~sees, -1e9)
    shifted = {"shift_labels": labels.roll(-1, 1).index_fill(1, torch.tensor([T - 1]), -100)}
    wanted = score(model, ids, **shifted, attention_mask=wide)
    found = score(model, ids, **shifted, attention_mask={"full_attention": wide, "sliding_attention": wide})
    torch.testing.assert_close(found.logps, wanted.logps)
    with pytest.raises(ValueError, match=r"^attention_mask: expected a tensor \[B, T\], got dict"):
        score(model, ids, labels, attention_mask={"full_attention": wide})


@pytest.mark.parametrize("name", ["labels", "shift_labels", "segments"])
@pytest.mark.parametrize("statistics", [(), ("entropy",)])
def test_a_graph_is_there_if_asked_for_under_no_grad_too(name: str, statistics: tuple[str, ...]) -> None:
    model = model_of("llama")
    ids, mask, labels = rows()
    given = {"labels": labels, "attention_mask": mask}
    if name == "shift_labels":
        given = {"shift_labels": labels, "attention_mask": mask}
    elif name == "segments":
        groups = tuple(SegmentGroup(row, (0, 3), ((3, 4), (7, 4))) for row in range(B))
        given = {"labels": ids, "segments": Segments(B, T, groups)}

    def gradient() -> Tensor:
        found = score(model, ids, **given, statistics=statistics, gradient=True)
        with torch.enable_grad():
            total = found.logps.sum() if found.entropy is None else found.logps.sum() + found.entropy.sum()
            (grad,) = torch.autograd.grad(total, [model.lm_head.weight])
        return grad

    wanted = gradient()
    assert wanted.any()
    with torch.no_grad():
        torch.testing.assert_close(gradient(), wanted, rtol=0, atol=0)
        assert not score(model, ids, **given).logps.requires_grad
    with torch.inference_mode():
        assert not score(model, ids, **given).logps.requires_grad
        with pytest.raises(ValueError, match=r"gradient: expected False under torch\.inference_mode.* got True$"):
            score(model, ids, **given, gradient=True)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_what_the_result_has_no_place_for_is_refused(name: str) -> None:
    ids, mask, labels = rows()
    model = build("llama")
    wanted = score(model, ids, labels, attention_mask=mask).logps
    for no in (False, None):
        assert torch.equal(score(model, ids, labels, attention_mask=mask, **{name: no}).logps, wanted)
    with pytest.raises(ValueError, match=f"^{name}: expected False .* got True"):
        score(model, ids, labels, attention_mask=mask, **{name: True})
    with pytest.raises(ValueError, match=r"^return_dict: expected True .* got False"):
        score(model, ids, labels, attention_mask=mask, return_dict=False)
