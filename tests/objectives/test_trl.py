"""Two responses a prompt against TRL's own code: value, and gradient with respect to the logits.

TRL's methods are called on trainers that were never built, with logits from a table in the model's place; they are
private, so that another version of TRL may need another call.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from clha_fast import (
    CPOOptions,
    DPOOptions,
    HingeOptions,
    IPOOptions,
    Objective,
    ORPOOptions,
    PolicyOptions,
    RankingInputs,
    SimPOOptions,
    ranking_loss,
)

trl = pytest.importorskip("trl", reason="TRL is not installed")
if not trl.__version__.startswith(("1.15.", "1.16.")):
    pytest.skip(f"written for TRL 1.15 and 1.16, got {trl.__version__}", allow_module_level=True)

PROMPTS, PROMPT, WIDTH, WORDS = 3, 2, 7, 11
# Tokens of the chosen responses, then of the rejected ones.
LENGTHS = [3, 5, 1, 4, 2, 5]


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [2P, T, V], ids [2P, T], mask [2P, T] of responses), chosen before rejected, as TRL stacks them."""
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2 * PROMPTS, WIDTH, WORDS, generator=draw, dtype=torch.float64)
    ids = torch.randint(WORDS, (2 * PROMPTS, WIDTH), generator=draw)
    place = torch.arange(WIDTH)
    mask = (place >= PROMPT) & (place < PROMPT + torch.tensor(LENGTHS)[:, None])
    return logits.requires_grad_(), ids, mask


def token_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """[2P, T - 1] of the tokens from the second on."""
    return logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]


# Rows in our order: chosen and rejected of the first prompt, of the second, ...
OURS = torch.arange(2 * PROMPTS).reshape(2, PROMPTS).T.flatten()
GIVEN = RankingInputs(torch.tensor(LENGTHS)[OURS], torch.full((PROMPTS,), 2))


def packed(values: Tensor, mask: Tensor) -> Tensor:
    """[2P, T - 1] as [N], candidate after candidate, prompt after prompt."""
    return values[OURS][mask[OURS, 1:]]


def ours(logits: Tensor, ids: Tensor, mask: Tensor, objective: Objective, **signals: Any) -> Tensor:
    logps = packed(token_logps(logits, ids), mask)
    return ranking_loss(logps, GIVEN._replace(**signals), objective)[0]


def check(found: Tensor, wanted: Tensor, logits: Tensor, rtol: float = 1e-12) -> None:
    assert found.item() == pytest.approx(wanted.item(), rel=rtol)
    slopes = [torch.autograd.grad(loss, logits)[0] for loss in (found, wanted)]
    assert slopes[1].abs().max() > 1e-3
    torch.testing.assert_close(*slopes, rtol=10 * rtol, atol=rtol)


class Accelerator:
    device = torch.device("cpu")
    num_processes = 1

    def gather_for_metrics(self, values: Tensor) -> Tensor:
        return values

    gather = gather_for_metrics

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        return values


class Lists(dict[str, Any]):
    """A trainer's metrics: whatever is asked for is a list."""

    def __missing__(self, name: str) -> list[float]:
        return self.setdefault(name, [])


def bare(kind: Any, **attributes: Any) -> Any:
    """A trainer that was never built."""
    trainer = kind.__new__(kind)
    common = {"accelerator": Accelerator(), "aux_loss_enabled": False, "_metrics": {"train": Lists(), "eval": Lists()}}
    vars(trainer).update(common | attributes)
    return trainer


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize(
    ("loss_type", "beta", "objective"),
    [
        ("sigmoid", 0.1, DPOOptions()),
        ("sigmoid", 0.5, DPOOptions(beta=0.5, form="pairs")),
        ("ipo", 0.1, IPOOptions()),
        ("ipo", 0.4, IPOOptions(beta=0.4)),
        ("hinge", 0.1, HingeOptions()),
        ("hinge", 0.7, HingeOptions(beta=0.7)),
    ],
)
def test_dpo_trainer(loss_type: str, beta: float, objective: Objective, per_token: bool) -> None:
    from trl.trainer.dpo_trainer import DPOTrainer

    logits, ids, mask = inputs()
    reference = token_logps(inputs(seed=1)[0].detach(), ids) * mask[:, 1:]
    logps = token_logps(logits, ids) * mask[:, 1:]
    zeros = torch.zeros_like(logps)
    outputs = SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=mask[:, 1:])
    trainer = bare(
        DPOTrainer,
        model=SimpleNamespace(training=False),
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        use_weighting=False,
        beta=beta,
        _total_train_tokens=0,
    )
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": mask.long(),
        "ref_chosen_logps": reference.sum(1)[:PROMPTS],
        "ref_rejected_logps": reference.sum(1)[PROMPTS:],
    }
    wanted = trainer._compute_loss(lambda **_: outputs, batch, False)
    signal = packed(reference, mask) if per_token else reference.sum(1)[OURS]
    check(ours(logits, ids, mask, objective, reference_logps=signal), wanted, logits)


def preference_trainer(kind: Any, logits: Tensor, ids: Tensor, mask: Tensor, **attributes: Any) -> Any:
    """(trainer, model, batch) of TRL's CPO and ORPO, which take logits."""
    trainer = bare(
        kind, is_encoder_decoder=False, pad_token_id=0, padding_value=0, label_pad_token_id=-100, **attributes
    )
    labels = ids.masked_fill(~mask, -100)
    # What lies behind a response is padding.
    lives = (torch.arange(WIDTH) < PROMPT + torch.tensor(LENGTHS)[:, None]).long()
    batch = {}
    for name, rows in (("chosen", slice(0, PROMPTS)), ("rejected", slice(PROMPTS, None))):
        parts = {"input_ids": ids[rows], "attention_mask": lives[rows], "labels": labels[rows]}
        batch |= {f"{name}_{key}": value for key, value in parts.items()}
    return trainer, lambda *_, **__: SimpleNamespace(logits=logits), batch


@pytest.mark.parametrize(
    ("settings", "objective"),
    [
        ({"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0}, CPOOptions()),
        ({"loss_type": "sigmoid", "beta": 0.3, "cpo_alpha": 0.5}, CPOOptions(beta=0.3, alpha=0.5)),
        ({"loss_type": "sigmoid", "beta": 0.3, "cpo_alpha": 0.0}, CPOOptions(beta=0.3, alpha=0.0)),
        ({"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}, SimPOOptions()),
        ({"loss_type": "simpo", "beta": 5.0, "simpo_gamma": 0.3, "cpo_alpha": 0.0}, SimPOOptions(beta=5.0, gamma=0.3)),
        ({"loss_type": "hinge", "beta": 0.2, "cpo_alpha": 0.0}, HingeOptions(beta=0.2, reference_free=True)),
    ],
)
def test_cpo_trainer(settings: dict[str, Any], objective: Objective) -> None:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    logits, ids, mask = inputs(seed=2)
    trainer, model, batch = preference_trainer(
        CPOTrainer, logits, ids, mask, alpha=0.0, label_smoothing=0.0, **settings
    )
    wanted, _ = trainer.get_batch_loss_metrics(model, batch)
    check(ours(logits, ids, mask, objective), wanted, logits)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo_trainer(beta: float) -> None:
    """Its odds ratio, in float32 there. Its first term means over prompt tokens too: ours is put in its place."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    logits, ids, mask = inputs(seed=3)
    trainer, model, batch = preference_trainer(ORPOTrainer, logits, ids, mask, beta=beta)
    whole, _ = trainer.get_batch_loss_metrics(model, batch)
    first = trainer.concatenated_forward(model, batch)[4]
    own = -(token_logps(logits, ids) * mask[:, 1:]).sum(1)[:PROMPTS] / torch.tensor(LENGTHS)[:PROMPTS]
    check(ours(logits, ids, mask, ORPOOptions(beta=beta)), whole - first + own.mean(), logits, rtol=1e-6)


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("high", [0.2, 0.28])
@pytest.mark.parametrize("kl_weight", [0.0, 0.04])
@pytest.mark.parametrize(("loss_type", "reduction"), [("grpo", "sequence_mean"), ("dapo", "token_mean")])
def test_grpo_trainer(loss_type: str, reduction: Any, kl_weight: float, high: float, on_policy: bool) -> None:
    from trl.trainer.grpo_trainer import GRPOTrainer

    logits, ids, mask = inputs(seed=4)
    draw = torch.Generator().manual_seed(5)
    logps = token_logps(logits, ids)[:, PROMPT - 1 :]
    old = logps.detach() + 0.4 * torch.randn(logps.shape, generator=draw, dtype=torch.float64)
    reference = logps.detach() + torch.randn(logps.shape, generator=draw, dtype=torch.float64)
    advantages = torch.randn(len(ids), generator=draw, dtype=torch.float64)
    trainer = bare(
        GRPOTrainer,
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=False),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=kl_weight,
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=high,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
    )
    lives = mask[:, PROMPT:].long()
    batch = {
        "prompt_ids": ids[:, :PROMPT],
        "prompt_mask": torch.ones_like(ids[:, :PROMPT]),
        "completion_ids": ids[:, PROMPT:],
        "completion_mask": lives,
        "advantages": advantages,
        "ref_per_token_logps": reference,
        "num_items_in_batch": lives.sum(),
        **({} if on_policy else {"old_per_token_logps": old}),
    }
    wanted = trainer._compute_loss(None, batch)

    def signal(values: Tensor) -> Tensor:
        return values[OURS][lives[OURS].bool()]

    objective = PolicyOptions(advantages="given", clip_high=high, reduction=reduction, kl_weight=kl_weight)
    signals = {"advantages": advantages[OURS]}
    if kl_weight:
        signals["reference_logps"] = signal(reference)
    if not on_policy:
        signals["old_logps"] = signal(old)
    check(ours(logits, ids, mask, objective, **signals), wanted, logits)


def test_advantages_of_a_group_are_trls() -> None:
    """With its own deviation, two rewards a prompt: (r - mean) / (std + 1e-4)."""
    from trl.trainer.utils import nanstd

    rewards = torch.tensor([[1.0, 0.0], [2.5, 2.5], [-1.0, 7.0]], dtype=torch.float64)
    wanted = (rewards - rewards.mean(1, keepdim=True)) / (nanstd(rewards, dim=1)[:, None] + 1e-4)
    logps = torch.full((6,), -1.0, dtype=torch.float64, requires_grad=True)
    given = RankingInputs(torch.ones(6, dtype=torch.long), torch.full((3,), 2), rewards.flatten())
    loss, _ = ranking_loss(logps, given, PolicyOptions())
    (slope,) = torch.autograd.grad(loss, logps)
    torch.testing.assert_close(-6 * slope, wanted.flatten(), rtol=1e-12, atol=1e-15)
    assert wanted[0, 0] == pytest.approx(0.5 / (math.sqrt(0.5) + 1e-4))
