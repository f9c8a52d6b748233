"""SFT in closed form, by hand."""

from __future__ import annotations

import pytest
import torch

from clha_fast import RankingInputs, SFTOptions, ranking_loss


def test_sft_means_over_prompts_or_over_tokens():
    """Targets with scores -2 (two tokens) and -1 (one): (2 + 1) / 2 a prompt, (4 + 1) / 3 a token."""
    inputs = RankingInputs(torch.tensor([2, 3, 1]), torch.tensor([2, 1]))
    logps = torch.tensor([-1.0, -3.0, -9.0, -9.0, -9.0, -1.0], dtype=torch.float64)
    assert float(ranking_loss(logps, inputs, SFTOptions())[0]) == pytest.approx(1.5)
    loss, metrics = ranking_loss(logps, inputs, SFTOptions(form="token_mean"))
    assert float(loss) == pytest.approx(5 / 3)
    found = metrics.as_dict()
    assert found["target_nll"] == pytest.approx(1.5)
    assert found["active_pair_share"] == 0
    assert found["rewards/accuracies"] == 1
