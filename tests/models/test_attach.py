"""`clha_fast.attach`: what a call returns, what it leaves alone, and that it can be undone."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

import clha_fast
from clha_fast import CLHAOptions, HeadOptions, reference
from clha_fast.batching.batch import CandidateBatch
from clha_fast.batching.collator import RankedCollator
from clha_fast.models.attach import empty_batch
from clha_fast.models.heads import UnsupportedHeadError
from tests.support import forked
from tests.support.tiny import make_model, make_rows, make_tokenizer

TOKENIZER = make_tokenizer()
OPTIONS = CLHAOptions(margin=0.5, sft_weight=0.1)
ROWS = make_rows(3, seed=3)
INERT = [{"prompt": "say: ", "completions": ["a cat", "a dog"], "rewards": [-1.0, -2.0]}]


def collate(rows: list[dict[str, Any]] = ROWS, options: CLHAOptions = OPTIONS) -> CandidateBatch:
    return CandidateBatch.from_dict(RankedCollator(TOKENIZER, options)(rows))


def eager(model: nn.Module, batch: CandidateBatch, options: CLHAOptions = OPTIONS, temperature: float = 1.0) -> Tensor:
    logits = model(**batch.model_inputs(), use_cache=False).logits.flatten(0, 1)[batch.row_index] / temperature
    logps = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    ranking = (batch.candidate_lengths, batch.candidates_per_prompt, batch.rewards, batch.sft_index, None, None)
    return reference.clha_loss(logps, batch.targets, *ranking, HeadOptions(), options)[0]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    size = sum(float(grad.norm()) ** 2 for grad in wanted.values()) ** 0.5
    assert size > 0
    for name, grad in wanted.items():
        assert float((got[name] - grad).norm()) <= tolerance * size, name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("preset", ["published", "paper"])
def test_loss_and_gradients_are_the_eager_ones(tied: bool, preset: str) -> None:
    options = CLHAOptions.preset(preset)
    model, batch = make_model(len(TOKENIZER), tie_word_embeddings=tied).train(), collate(options=options)
    wanted = eager(model, batch, options, temperature=1.7)
    wanted_gradients = gradients(model, wanted)
    clha_fast.attach(model, options, temperature=1.7)
    output = model(**batch.as_dict())
    assert output.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert output["loss"] is output.loss
    assert output.metrics.scores.shape == batch.candidate_lengths.shape
    assert output.metrics.as_dict()["num_tokens"] == batch.targets.numel()
    assert_same(gradients(model, output.loss), wanted_gradients)


def test_gradients_may_leave_mass_out() -> None:
    """0 leaves nothing out; 0.5 leaves the lightest of three blocks of words out, and the loss as it is."""
    for mass, exact in ((0.0, True), (0.5, False)):
        model, batch = make_model(len(TOKENIZER)).train(), collate()
        loss = eager(model, batch)
        wanted = gradients(model, loss)
        clha_fast.attach(model, OPTIONS, max_dropped_mass=mass)
        output = model(**batch.as_dict())
        assert output.loss.item() == pytest.approx(loss.item(), rel=1e-5)
        assert output.metrics.sum_of("routable_blocks") == 3 * batch.targets.numel()
        assert (output.metrics.kept_block_share == 1) == exact
        assert (output.metrics.dropped_mass == 0) == exact
        assert output.metrics.dropped_mass <= mass
        if exact:
            assert_same(gradients(model, output.loss), wanted)


def test_ordinary_calls_are_the_models_own() -> None:
    model = make_model(len(TOKENIZER)).eval()
    ids = torch.arange(6).reshape(2, 3)
    calls = ({"input_ids": ids}, {"input_ids": ids, "labels": ids})
    before = [model(**call) for call in calls]
    generated, signature = model.generate(ids, max_new_tokens=3, do_sample=False), inspect.signature(model.forward)
    clha_fast.attach(model)
    for call, wanted in zip(calls, before, strict=True):
        got = model(**call)
        assert torch.equal(got.logits, wanted.logits)
        assert type(got) is type(wanted)
    assert torch.equal(model(**calls[1]).loss, before[1].loss)
    assert torch.equal(model(ids).logits, before[0].logits)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), generated)
    assert inspect.signature(model.forward) == signature


def test_detach_leaves_no_trace() -> None:
    model = make_model(len(TOKENIZER))
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    state = set(model.state_dict())
    attached = clha_fast.attach(model)
    assert set(model.state_dict()) == state
    assert attached.detach() is model
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    attached.detach()  # a second time does nothing
    assert model(**collate().as_dict()).loss is None
    with clha_fast.attach(model) as again:
        assert model(**collate().as_dict()).loss.requires_grad
        again.options = OPTIONS
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_detach_restores_a_forward_that_was_replaced_before() -> None:
    model = make_model(len(TOKENIZER))
    calls: list[int] = []
    own = model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    model.forward = counting
    with clha_fast.attach(model, OPTIONS):
        calls.clear()
        model(**collate().as_dict())
        assert calls == [1]
    assert model.forward is counting


def test_detach_does_not_undo_what_others_did() -> None:
    model = make_model(len(TOKENIZER))
    attached = clha_fast.attach(model)
    model.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match=r"expected the forward that attach put there.*keep_fp32_wrapper"):
        attached.detach()


def test_a_deep_copy_has_its_own_weights_and_loss() -> None:
    model, batch = make_model(len(TOKENIZER)), collate()
    clha_fast.attach(model, OPTIONS)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert other(**batch.as_dict()).loss.item() == pytest.approx(eager(other, batch).item(), rel=1e-5)
    assert model(**batch.as_dict()).loss.item() == pytest.approx(eager(model, batch).item(), rel=1e-5)
    assert other(**batch.as_dict()).loss.item() != model(**batch.as_dict()).loss.item()


@pytest.mark.parametrize("losses", [None, 1])
def test_counts_make_the_split_invisible(losses: int | None) -> None:
    model = make_model(len(TOKENIZER)).train()
    rows = make_rows(5, seed=7)
    wanted = eager(model, collate(rows))
    wanted_gradients = gradients(model, wanted)
    attached = clha_fast.attach(model, OPTIONS)
    parts = [collate(rows[:1]), collate(rows[1:4]), collate(rows[4:])]
    counts = attached.counts(parts, losses=losses)
    outputs = [model(**part.as_dict(), **counts) for part in parts]
    divisor = len(parts) if losses is None else 1
    total = sum(output.loss for output in outputs) / divisor
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert_same(gradients(model, total), wanted_gradients)
    terms = sum(float(output.metrics.rank_loss + output.metrics.sft_loss) for output in outputs) / divisor
    assert terms == pytest.approx(wanted.item(), rel=1e-5)
    with pytest.raises(ValueError, match="batches: expected at least one micro-batch"):
        attached.counts([])


@pytest.mark.parametrize("batch", [empty_batch(), collate(INERT)], ids=["no prompt", "nothing kept"])
def test_nothing_to_learn_from_is_a_zero_with_gradients(batch: CandidateBatch) -> None:
    model = make_model(len(TOKENIZER), tie_word_embeddings=False).train()
    attached = clha_fast.attach(model, OPTIONS)
    output = model(**batch.as_dict(), **attached.counts([batch]))
    assert output.loss.item() == 0
    assert output.metrics.as_dict()["num_tokens"] == 0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in gradients(model, output.loss).values())


def test_sizes_changed_after_collating_are_believed() -> None:
    """The host's own copy is one of what was collated, and travels beside it in the dictionary."""
    model, fields = make_model(len(TOKENIZER)), collate().as_dict()
    fields["candidate_lengths"] = fields["candidate_lengths"].flip(0)
    wanted = eager(model, CandidateBatch.from_dict(fields))
    clha_fast.attach(model, OPTIONS)
    loss = model(**fields).loss.item()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    assert loss != pytest.approx(model(**collate().as_dict()).loss.item(), rel=1e-2)


def test_gradient_checkpointing() -> None:
    model, batch = make_model(len(TOKENIZER)).train(), collate()
    wanted = gradients(model, eager(model, batch))
    model.gradient_checkpointing_enable()
    clha_fast.attach(model, OPTIONS)
    assert_same(gradients(model, model(**batch.as_dict()).loss), wanted)


def test_autocast() -> None:
    model, batch = make_model(len(TOKENIZER)).train(), collate()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients(model, eager(model, batch))
        with clha_fast.attach(model, OPTIONS):
            loss = model(**batch.as_dict()).loss
    got, exact = gradients(model, loss), gradients(model, eager(model, batch))
    assert loss.dtype == torch.float32

    def error(grads: dict[str, Tensor]) -> float:
        return sum(float((grads[name] - grad).norm()) ** 2 for name, grad in exact.items()) ** 0.5

    assert error(got) <= 1.05 * error(rounded)


@pytest.mark.slow
def test_compiled_without_a_graph_break() -> None:
    model, batch = make_model(len(TOKENIZER)).train(), collate()
    ids = batch.model_inputs()
    logits, wanted = model(**ids).logits, eager(model, batch)
    wanted_gradients = gradients(model, wanted)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    attached = clha_fast.attach(compiled, OPTIONS)
    loss = compiled(**batch.as_dict(), **attached.counts([batch])).loss
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert_same(gradients(model, loss), wanted_gradients)
    assert torch.allclose(compiled(**ids).logits, logits, atol=1e-6)
    attached.detach()
    assert "forward" not in vars(model.lm_head)


def test_mixture_of_experts_keeps_its_auxiliary_loss() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
    )
    model, batch = MixtralForCausalLM(config).train(), collate()
    auxiliary = model(**batch.model_inputs(), use_cache=False).aux_loss
    wanted = eager(model, batch) + 0.5 * auxiliary
    clha_fast.attach(model, OPTIONS)
    output = model(**batch.as_dict(), loss_scale=torch.tensor(1.0))
    assert auxiliary.item() > 0
    assert output.aux_loss.item() == pytest.approx(auxiliary.item(), rel=1e-6)
    assert output.loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_bad_calls() -> None:
    model, fields = make_model(len(TOKENIZER)), collate().as_dict()
    clha_fast.attach(model)
    with pytest.raises(ValueError, match="labels: expected none beside a batch of candidates"):
        model(**fields, labels=fields["input_ids"])
    with pytest.raises(ValueError, match=r"use_cache: expected none beside .* \(no cache is kept\), got True"):
        model(**fields, use_cache=True)
    with pytest.raises(ValueError, match=r"logits_to_keep: expected none beside .* got 1$"):
        model(**fields, logits_to_keep=1)
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(
            ValueError, match=rf"^{name}: expected none beside .* \(its output is a loss and metrics\), got"
        ):
            model(**fields, **{name: True})
    with pytest.raises(ValueError, match=r"^return_dict: expected True beside a batch of candidates .* got False$"):
        model(**fields, return_dict=False)
    plain = model(**fields)
    nothing = {"logits_to_keep": 0, "labels": None, "output_hidden_states": False, "output_attentions": None}
    same = model(**fields, use_cache=False, return_dict=True, **nothing)
    torch.testing.assert_close(same.loss, plain.loss, rtol=0, atol=0)
    with pytest.raises(ValueError, match="expected a batch of candidates as keyword arguments, got 1 positional"):
        model(fields["input_ids"], candidate_lengths=fields["candidate_lengths"])
    with pytest.raises(ValueError, match="row_index: expected in a batch of candidates, got the keys attention_mask"):
        model(**{name: value for name, value in fields.items() if name != "row_index"})
    with pytest.raises(ValueError, match=r"already; detach\(\) that first, copy before attaching"):
        clha_fast.attach(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["rewards", "reference_logps", "pair_counts", "prompt_count"])
def test_numbers_that_a_wrapper_has_rounded_are_refused(name: str, dtype: torch.dtype) -> None:
    """Of 4.001 and 4.0 bfloat16 makes a tie, of 1001 prompts 1000; int64 and what is wide stay."""
    model = make_model(len(make_tokenizer()))
    clha_fast.attach(model, OPTIONS)
    batch = collate(make_rows(2))
    given = {**batch.as_dict(), name: torch.ones(2, dtype=dtype)}
    with pytest.raises(ValueError, match=rf"^{name}: expected float32 or float64, got {dtype}; a wrapper that casts"):
        model(**given)
    rewards = batch.rewards
    assert rewards is not None
    model(**{**batch.as_dict(), "rewards": rewards.double()})


def test_a_head_changed_afterwards_is_refused() -> None:
    model = make_model(len(TOKENIZER), tie_word_embeddings=False)
    clha_fast.attach(model)
    model.lm_head = nn.Sequential(model.lm_head)  # as an adapter on the head does: the old one is called within
    with pytest.raises(UnsupportedHeadError, match="expected the output embedding that was there"):
        model(**collate().as_dict())


def test_bad_models_and_settings() -> None:
    model = make_model(len(TOKENIZER))
    with pytest.raises(ValueError, match=r"got nn.DataParallel .*torchrun"):
        clha_fast.attach(nn.DataParallel(model))
    with pytest.raises(ValueError, match="backend: expected one of auto"):
        clha_fast.attach(model, backend="cuda")
    with pytest.raises(ValueError, match="temperature: expected a positive number"):
        clha_fast.attach(model, temperature=0.0)
    with pytest.raises(UnsupportedHeadError, match="LlamaModel"):
        clha_fast.attach(model.model)
    assert "forward" not in vars(model)
    clha_fast.attach(model)
    with pytest.raises(ValueError, match=r"got nn.DataParallel"):
        model._replicate_for_data_parallel()  # what nn.DataParallel calls for each of several GPUs


def test_zero_3_is_told_to_attach_earlier() -> None:
    model = make_model(len(TOKENIZER), tie_word_embeddings=False)
    model.lm_head.weight.data = torch.empty(0)  # what DeepSpeed leaves
    model.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match=r"attach before deepspeed\.initialize"):
        clha_fast.attach(model)


def test_flat_parameters_are_refused() -> None:
    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # its constructor wants a GPU
    nn.Module.__init__(wrapped)
    with pytest.raises(ValueError, match=r"not yet in FullyShardedDataParallel.*fully_shard"):
        clha_fast.attach(wrapped)


def test_wrapped_models_are_unwrapped(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = make_model(len(TOKENIZER))
        wrapped = DistributedDataParallel(model)
        with clha_fast.attach(wrapped, OPTIONS) as attached:
            assert attached.model is model
            assert wrapped(**collate().as_dict()).loss.requires_grad
    finally:
        torch.distributed.destroy_process_group()


def test_import_needs_no_transformers() -> None:
    code = "import sys, clha_fast; assert 'transformers' not in sys.modules; assert 'attach' in clha_fast.__all__"
    forked.output("bare", code)
    with pytest.raises(AttributeError, match="no attribute 'attachment'"):
        clha_fast.attachment  # noqa: B018 - the access is what is tested
