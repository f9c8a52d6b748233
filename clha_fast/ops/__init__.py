"""Custom operators, input checks and the choice of a backend."""

from clha_fast.ops.derivatives import OPERATORS
from clha_fast.ops.head import token_logps, token_logps_backward
from clha_fast.ops.loss import linear_loss
from clha_fast.ops.statistics import token_statistics

__all__ = ["OPERATORS", "linear_loss", "token_logps", "token_logps_backward", "token_statistics"]
