"""The head as equations: logits, the log-probabilities of target tokens, and statistics of their distributions.

Any floating dtype works, float64 included; probabilities are formed in float32 or better, as an eager training loop
would form them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clha_fast.options import HeadOptions


def logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, head: HeadOptions, temperature: Tensor | None = None
) -> Tensor:
    """z = softcap(scale * (hidden . weight^T + bias)) / temperature, [N, V] in float32 or better.

    temperature: [N], one for each row, in the place of the head's.
    """
    z = F.linear(hidden, weight, bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32)) * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z / head.temperature if temperature is None else z / temperature.to(z.dtype).unsqueeze(1)


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_index: Tensor | None = None,
    head: HeadOptions = HeadOptions(),  # noqa: B008 - frozen
    temperature: Tensor | None = None,
) -> Tensor:
    """logp_t = z_t[target_t] - logsumexp_v z_t[v]; 0 where the target is `head.ignore_index`.

    Args:
        hidden: [M, H]. weight: [V, H]. bias: [V] or None. targets: [N] int64.
        row_index: [N] int64, token t reads `hidden[row_index[t]]`; None when M == N.
        temperature: [N], in the place of the head's, or None.

    Returns:
        [N], float32 or better.
    """
    rows = hidden if row_index is None else hidden[row_index]
    logps = torch.log_softmax(logits(rows, weight, bias, head, temperature), dim=-1)
    scored = targets != head.ignore_index
    chosen = logps.gather(1, torch.where(scored, targets, 0).unsqueeze(1)).squeeze(1)
    return torch.where(scored, chosen, torch.zeros_like(chosen))


def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_index: Tensor | None = None,
    head: HeadOptions = HeadOptions(),  # noqa: B008 - frozen
    temperature: Tensor | None = None,
) -> dict[str, Tensor]:
    """Of p = softmax(z), for each token [N], 0 where it is ignored; arguments as in `token_logps`.

    entropy       H = -sum_v p_v log p_v, where 0 log 0 = 0
    sum_sq_probs  sum_v p_v^2
    mean_logit    sum_v z_v / V
    is_top1       1 where no logit is above the target's, else 0

    The entropy alone has a gradient: dH/dz_v = -p_v (log p_v + H).
    """
    rows = hidden if row_index is None else hidden[row_index]
    z = logits(rows, weight, bias, head, temperature)
    logps = torch.log_softmax(z, dim=-1)
    # Chosen before the product: 0 * -inf, and the slope of it, would be NaN.
    terms = torch.where(logps == -torch.inf, 0.0, logps)
    scored = targets != head.ignore_index
    chosen = z.gather(1, torch.where(scored, targets, 0).unsqueeze(1)).squeeze(1)
    top = (chosen >= z.amax(-1)).to(z.dtype)
    values = {
        "entropy": -(logps.exp() * terms).sum(-1),
        "sum_sq_probs": (logps.detach().exp() ** 2).sum(-1),
        "mean_logit": z.detach().mean(-1),
        "is_top1": torch.where(logps.detach().isnan().any(-1), torch.nan, top),
    }
    return {name: torch.where(scored, value, torch.zeros_like(value)) for name, value in values.items()}
