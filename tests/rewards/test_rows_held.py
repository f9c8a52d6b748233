"""What scoring holds of a file while it runs: four bytes a token, and a prompt once for all of its responses."""

from __future__ import annotations

import random
import tracemalloc
from typing import Any

import pytest

from clha_fast.data import RankedRecord
from clha_fast.rewards.policy import Policy
from clha_fast.rewards.ranking import _run
from clha_fast.rewards.reward_model import RewardModel
from tests.support.reward_models import llama
from tests.support.tiny import WORDS, make_model, make_tokenizer

TOKENIZER = make_tokenizer()
NO_LIMITS = {"max_length": None, "max_prompt_length": None, "max_completion_length": None}
A_ROW = 500  # bytes beside its tokens


@pytest.mark.parametrize(("prompt", "response", "responses"), [(200, 2, 12), (5, 300, 3)])
@pytest.mark.parametrize("judge", ["policy", "reward_model"])
def test_four_bytes_a_token(judge: str, prompt: int, response: int, responses: int) -> None:
    positions: dict[str, Any] = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 4096, "pad_token_id": 2}
    made: Policy | RewardModel = RewardModel(llama(**positions), TOKENIZER)
    if judge == "policy":
        made = Policy(make_model(**positions), TOKENIZER)
    draw = random.Random(prompt)
    records = [
        RankedRecord(
            f"{number} {' '.join(draw.choices(WORDS, k=prompt))}",
            tuple(f"{k} {' '.join(draw.choices(WORDS, k=response))}" for k in range(responses)),
        )
        for number in range(6)
    ]
    _run(records[:1], made, 8, NO_LIMITS, False, "")
    tracemalloc.start()
    try:
        run = _run(records, made, 8, NO_LIMITS, False, "")
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(run.rows) == len(records) * responses
    tokens = sum(len(run.rows[rows[0]].prompt) + sum(len(run.rows[k].response) for k in rows) for rows in run.rows_of)
    assert tokens > 6 * (prompt + responses * response)
    assert held < 4.5 * tokens + A_ROW * len(run.rows), "bytes"
