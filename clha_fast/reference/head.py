"""The head as equations: logits, and the log-probabilities of target tokens.

Any floating dtype works, float64 included; probabilities are formed in float32 or better, as an eager training loop
would form them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clha_fast.options import HeadOptions


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, head: HeadOptions) -> Tensor:
    """z = softcap(scale * (hidden . weight^T + bias)) / temperature, [N, V] in float32 or better."""
    z = F.linear(hidden, weight, bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32)) * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z / head.temperature


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_index: Tensor | None = None,
    head: HeadOptions = HeadOptions(),  # noqa: B008 - frozen
) -> Tensor:
    """logp_t = z_t[target_t] - logsumexp_v z_t[v]; 0 where the target is `head.ignore_index`.

    Args:
        hidden: [M, H]. weight: [V, H]. bias: [V] or None. targets: [N] int64.
        row_index: [N] int64, token t reads `hidden[row_index[t]]`; None when M == N.

    Returns:
        [N], float32 or better.
    """
    rows = hidden if row_index is None else hidden[row_index]
    logps = torch.log_softmax(logits(rows, weight, bias, head), dim=-1)
    scored = targets != head.ignore_index
    chosen = logps.gather(1, torch.where(scored, targets, 0).unsqueeze(1)).squeeze(1)
    return torch.where(scored, chosen, torch.zeros_like(chosen))
