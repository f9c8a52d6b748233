"""The mathematics, in plain differentiable torch: the specification every other backend is tested against.

Nothing here is fast, and nothing here is shared with another backend.
"""

from clha_fast.reference.head import logits, token_logps
from clha_fast.reference.objectives import clha_loss

__all__ = ["clha_loss", "logits", "token_logps"]
