"""The public face's gradients: upstream ones, frozen inputs, graphs that are walked twice."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from clha_fast import token_logps
from tests.support.helpers import make_case

BACKENDS = pytest.mark.parametrize("backend", ["torch", "reference"])


def small(**settings):
    """Two prompts of two candidates, 8 tokens, H = 4, V = 7."""
    return make_case([2, 1, 3, 2], [2, 2], hidden_size=4, vocab_size=7, **settings)


@BACKENDS
@pytest.mark.parametrize("upstream", [0.0, 1.0, -2.5])
def test_upstream_gradient_of_the_loss(backend, upstream):
    _, unit = small(bias=True).gradients(backend)
    _, gradients = small(bias=True).gradients(backend, upstream)
    for gradient, expected in zip(gradients, unit, strict=True):
        torch.testing.assert_close(gradient, upstream * expected, rtol=1e-12, atol=1e-15)


@BACKENDS
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_inputs_get_no_gradient(backend, frozen):
    case = small(bias=True)
    _, expected = case.gradients(backend)
    case.leaves()
    getattr(case, frozen).requires_grad_(False)
    case.loss(backend)[0].backward()
    for name, gradient in zip(("hidden", "weight", "bias"), expected, strict=True):
        got = getattr(case, name).grad
        if name == frozen:
            assert got is None
        else:
            torch.testing.assert_close(got, gradient, rtol=1e-12, atol=1e-15)
    upstream = torch.ones(8, dtype=torch.float64)
    for name in ("hidden", "weight", "bias"):
        getattr(case, name).grad = None
    token_logps(case.hidden, case.weight, case.targets, bias=case.bias, backend=backend).backward(upstream)
    assert [n for n in ("hidden", "weight", "bias") if getattr(case, n).grad is None] == [frozen]


@BACKENDS
def test_no_grad_is_forward_only(backend):
    case = small()
    expected = case.loss(backend)[0]
    case.leaves()
    with torch.no_grad():
        loss, _ = case.loss(backend)
        logps = token_logps(case.hidden, case.weight, case.targets, backend=backend)
    with torch.inference_mode():
        inferred, _ = case.loss(backend)
    assert not loss.requires_grad
    assert not logps.requires_grad
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    torch.testing.assert_close(inferred, expected, rtol=0, atol=0)


def test_a_graph_can_be_walked_twice_with_upstream_one():
    case = small()
    _, expected = case.gradients()
    leaves = case.leaves()
    loss, _ = case.loss()
    for _ in range(2):
        torch.testing.assert_close(list(torch.autograd.grad(loss, leaves, retain_graph=True)), expected, rtol=0, atol=0)


def test_a_gradient_in_somebodys_hands_stays_as_it_is():
    case = small()
    leaves = case.leaves()
    loss, _ = case.loss()
    held = torch.autograd.grad(loss, leaves, retain_graph=True)
    copies = [gradient.clone() for gradient in held]
    tripled = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    for gradient, copy, triple in zip(held, copies, tripled, strict=True):
        torch.testing.assert_close(gradient, copy, rtol=0, atol=0)
        torch.testing.assert_close(triple, 3 * copy, rtol=1e-12, atol=0)


def test_accumulated_gradients_add_up():
    """loss.backward() and then (3 loss).backward() into the same .grad: four times the gradient."""
    case = small()
    _, expected = case.gradients()
    leaves = case.leaves()
    loss, _ = case.loss()
    loss.backward(retain_graph=True)
    (3 * loss).backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, 4 * gradient, rtol=1e-12, atol=1e-15)


def test_a_scaled_graph_says_that_it_is_spent():
    case = small()
    leaves = case.leaves()
    loss, _ = case.loss()
    torch.autograd.grad(2 * loss, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match=r"linear_loss: .*scaled in place by an earlier backward pass"):
        torch.autograd.grad(loss, leaves)


CHANGES = {
    "normalised": lambda gradient: gradient.div_(gradient.norm()),
    "zeroed": lambda gradient: gradient.zero_(),
    "a row of it": lambda gradient: gradient[0].mul_(2),
}


@pytest.mark.parametrize("which", [0, 1, 2], ids=["hidden", "weight", "bias"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_gradient_that_somebody_changes_is_told_when_it_is_wanted_again(change, which):
    case = small(bias=True)
    leaves = case.leaves()
    loss, _ = case.loss()
    held = torch.autograd.grad(loss, leaves, retain_graph=True)
    CHANGES[change](held[which])
    with pytest.raises(RuntimeError, match=r"^linear_loss: .* got them changed in place; change a copy \(g = g / n\)"):
        torch.autograd.grad(loss, leaves)
    loss, _ = case.loss()
    held = [CHANGES[change](gradient.clone()) for gradient in torch.autograd.grad(loss, leaves, retain_graph=True)]
    loss.backward()  # copies are nobody's but theirs
    assert all(leaf.grad.any() for leaf in leaves)


def test_a_hook_that_changes_a_gradient_in_place_is_told_too():
    case = small()
    leaves = case.leaves()
    inner = case.hidden * 1.0
    inner.register_hook(lambda gradient: gradient.mul_(2))
    loss, _ = dataclasses.replace(case, hidden=inner).loss()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"^linear_loss: .* got them changed in place"):
        torch.autograd.grad(loss, leaves)


def test_a_graph_that_is_gone_is_torchs_own_word():
    case = small()
    leaves = case.leaves()
    loss, _ = case.loss()
    torch.autograd.grad(loss, leaves)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)
