"""One attached model called from several threads: each has its own loss, and plain calls are the model's own."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clha_fast
from clha_fast import CLHAOptions, PROOptions
from clha_fast.batching.batch import CandidateBatch
from clha_fast.batching.collator import RankedCollator
from clha_fast.models.adapters import base_model
from clha_fast.models.heads import UnsupportedHeadError
from tests.support.adapters import lora
from tests.support.tiny import make_model, make_rows, make_tokenizer
from tests.support.trainers import trainer

TOKENIZER = make_tokenizer()
OPTIONS = CLHAOptions(margin=0.5, sft_weight=0.1)
THREADS, CALLS = 5, 4


@pytest.fixture(autouse=True)
def _often() -> Iterator[None]:
    """Threads take turns every few bytecodes, not every 5 ms."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def batch(seed: int) -> dict[str, Any]:
    rows = make_rows(1 + seed % 4, seed=seed)
    return CandidateBatch.from_dict(RankedCollator(TOKENIZER, OPTIONS, drop_inert=False)(rows)).as_dict()


def run(work: Callable[[int], Any]) -> list[Any]:
    """work(0), work(1), ... in threads that begin together."""
    barrier = threading.Barrier(THREADS)

    def begin(number: int) -> Any:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS)))


def results(model: nn.Module, number: int) -> list[tuple[Tensor, ...]]:
    found = []
    parameters = [p for p in model.parameters() if p.requires_grad]
    for call in range(CALLS):
        fields = batch(number * CALLS + call)
        output = model(**fields)
        grads = torch.autograd.grad(output.loss, parameters, allow_unused=True)
        logits = model(input_ids=fields["input_ids"], attention_mask=fields["attention_mask"]).logits
        known = [torch.zeros(()) if grad is None else grad for grad in grads]
        found.append((output.loss.detach(), output.metrics.scores, logits.detach(), *known))
    return found


def untied() -> nn.Module:
    return make_model(len(TOKENIZER), tie_word_embeddings=False)


def tied() -> nn.Module:
    return make_model(len(TOKENIZER))


def adapted() -> nn.Module:
    """Its head is called as a function, and again in the backward."""
    return lora(["lm_head", "q_proj"])


# The head's kind and the objective's do not meet: the loss is given log-probabilities' gradients.
@pytest.mark.parametrize(("make", "objective"), [(untied, OPTIONS), (tied, PROOptions()), (adapted, OPTIONS)])
def test_threads_with_batches_of_their_own(make: Callable[[], nn.Module], objective: Any) -> None:
    model = make().train()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    attached = clha_fast.attach(model, objective)
    wanted = [results(model, number) for number in range(THREADS)]
    for got, expected in zip(run(lambda number: results(model, number)), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    attached.detach()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    fields = {name: batch(0)[name] for name in ("input_ids", "attention_mask")}
    assert model(**fields).loss is None


def test_a_call_that_fails_harms_no_other() -> None:
    model = untied()
    attached = clha_fast.attach(model, OPTIONS)
    wanted = [results(model, number) for number in range(THREADS)]

    def work(number: int) -> Any:
        if number % 2:
            return results(model, number)
        for call in range(CALLS):
            fields = batch(call)
            fields["targets"] = fields["targets"] + 10_000
            with pytest.raises(ValueError, match="targets: expected tokens below"):
                model(**fields)
            fields = batch(call)
            fields["candidate_lengths"] = fields["candidate_lengths"] + 1
            with pytest.raises(ValueError, match="candidate_lengths: expected a sum"):
                model(**fields)
        return wanted[number]

    for got, expected in zip(run(work), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    assert attached.detach() is model
    assert "forward" not in vars(model.lm_head)


def test_two_models_in_turns() -> None:
    """A thread's loss belongs to the head that it is in, not to any head that has a switch."""
    models = [untied(), make_model(len(TOKENIZER), hidden_size=16, tie_word_embeddings=False)]
    for model in models:
        clha_fast.attach(model, OPTIONS)
    wanted = [results(models[number % 2], number) for number in range(THREADS)]
    for got, expected in zip(run(lambda number: results(models[number % 2], number)), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_a_model_that_calls_another_in_between() -> None:
    outer, inner = untied(), make_model(len(TOKENIZER))
    clha_fast.attach(inner, OPTIONS)
    wanted = inner(**batch(3)).loss
    seen = []
    outer.model.norm.register_forward_hook(lambda *_: seen.append(inner(**batch(3)).loss))
    clha_fast.attach(outer, OPTIONS)
    seen.clear()
    alone = untied()
    clha_fast.attach(alone, OPTIONS)
    assert torch.equal(outer(**batch(1)).loss, alone(**batch(1)).loss)
    assert torch.equal(seen[0], wanted)


@pytest.mark.parametrize("make", [untied, tied, adapted], ids=lambda make: make.__name__)
def test_a_model_in_training_is_itself_in_another_thread(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """The trainer's step has the head replaced; a plain call beside it, in the midst of a forward, has its logits."""
    model, fields = make().eval(), batch(1)
    plain = {name: fields[name] for name in ("input_ids", "attention_mask")}
    wanted = model(**plain).logits.detach()
    ours = trainer(tmp_path, model)
    loss = ours.compute_loss(ours.model, fields)
    refused, seen = [], []

    def beside() -> None:
        seen.append(model(**plain).logits.detach())
        for call in (ours.evaluate, lambda: ours.compute_loss(ours.model, fields)):
            with pytest.raises(RuntimeError, match=r"^model: expected one call at a time where its forward or its"):
                call()
            refused.append(call)
        with pytest.raises(UnsupportedHeadError, match="its forward has been replaced on the instance"):
            clha_fast.attach(model)

    def hook(*_: Any) -> None:
        if not entered:
            entered.append(threading.get_ident())
            with ThreadPoolExecutor(1) as pool:
                pool.submit(beside).result()

    entered: list[int] = []
    handle = base_model(model).model.norm.register_forward_hook(hook)
    again = ours.compute_loss(ours.model, fields)
    handle.remove()
    assert torch.equal(loss, again)
    assert torch.equal(seen[0], wanted)
    assert len(refused) == 2
    assert torch.equal(model(**plain).logits, wanted), "and afterwards"
    assert ours.evaluate()["eval_loss"] > 0


def test_a_head_that_another_thread_calls_is_said() -> None:
    """A model that hands its head to a thread of its own would return logits in the loss's place."""
    model = untied()
    clha_fast.attach(model, OPTIONS)
    own = type(model).forward

    class Elsewhere(type(model)):  # type: ignore[misc]
        def forward(self, **kwargs: Any) -> Any:
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(own, self, **kwargs).result()

    model.__class__ = Elsewhere
    with pytest.raises(UnsupportedHeadError, match="to call its head"):
        model(**batch(0))
