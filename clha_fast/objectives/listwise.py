"""What is said of a whole list at once: each candidate against all that are ranked below it in its prompt."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clha_fast.objectives.base import Group


def later(group: Group) -> Tensor:
    """bool [prompts, k, i]: both candidates have a token, and i is ranked below k."""
    here = group.rectangle(torch.ones_like(group.lengths), 0.0) > 0
    most = here.shape[1]
    below = torch.ones(most, most, dtype=torch.bool, device=here.device).triu(1)
    return below & here[:, :, None] & here[:, None, :]


def plackett_luce(group: Group, values: Tensor) -> Tensor:
    """-log( exp x_k / sum_{i >= k} exp x_i ) of values x [candidates], as [prompts, most candidates of a prompt].

    The last term of a prompt is log(exp x / exp x) = 0, as is one of an absent candidate.
    """
    below = later(group)
    ranked = below.any(2)
    x = group.rectangle(values, 0.0)
    own = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    entries = torch.where(below | own, x[:, None, :], -math.inf)
    return torch.where(ranked, torch.where(ranked[:, :, None], entries, 0.0).logsumexp(2) - x, 0.0)
