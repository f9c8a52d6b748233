"""The mathematics, in plain differentiable torch: the specification every other backend is tested against.

Nothing here is fast, and nothing here is shared with another backend.
"""

from clha_fast.reference.head import logits, token_logps
from clha_fast.reference.objectives import LOSSES, clha_loss, coh_loss, loss, pro_loss, sft_loss

__all__ = ["LOSSES", "clha_loss", "coh_loss", "logits", "loss", "pro_loss", "sft_loss", "token_logps"]
