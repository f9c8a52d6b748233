"""The mathematics, in plain differentiable torch: the specification every other backend is tested against.

Nothing here is fast, and nothing here is shared with another backend.
"""

from clha_fast.reference.head import logits, token_logps, token_statistics
from clha_fast.reference.objectives import LOSSES, clha_loss, coh_loss, loss, pro_loss, sft_loss
from clha_fast.reference.policy import policy_loss
from clha_fast.reference.preference import (
    cpo_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    orpo_loss,
    rrhf_loss,
    simpo_loss,
)

__all__ = [
    "LOSSES",
    "clha_loss",
    "coh_loss",
    "cpo_loss",
    "dpo_loss",
    "hinge_loss",
    "ipo_loss",
    "logits",
    "loss",
    "orpo_loss",
    "policy_loss",
    "pro_loss",
    "rrhf_loss",
    "sft_loss",
    "simpo_loss",
    "token_logps",
    "token_statistics",
]
