"""Rewards of sampled answers: those that a file of the same responses gets, and of empty ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import XLNetConfig, XLNetForSequenceClassification

from clha_fast.data.prompts import PromptRecord
from clha_fast.data.records import RankedRecord
from clha_fast.evaluation.rewards import answer_rewards
from clha_fast.rewards.answers import AnswerRewards
from clha_fast.rewards.reward_model import RewardModel
from clha_fast.rewards.scoring import score_file, score_records
from tests.support.reward_models import TOKENIZER, alone, llama, write


def test_as_a_file_is_scored(tmp_path: Path) -> None:
    reward_model = RewardModel(llama(pad_token_id=2), TOKENIZER)
    rows = [
        {"prompt": "the cat", "completions": [" sat on a mat", " ran", " ran"]},
        {"prompt": [{"role": "user", "content": "a dog"}], "completions": ["fell over it with some joy"]},
    ]
    source = write(tmp_path / "in.jsonl", rows)
    expected = score_file(source, tmp_path / "out.jsonl", reward_model, progress=False).records
    records = [PromptRecord(row["prompt"]) for row in rows]
    found = AnswerRewards(reward_model, batch_size=2)(records, [row["completions"] for row in rows])
    for own, record in zip(found, expected, strict=True):
        assert own == pytest.approx(record.rewards, rel=1e-5)
    # Generation gives them without outer blanks.
    stripped = AnswerRewards(reward_model)(records, [[text.strip() for text in row["completions"]] for row in rows])
    assert [value for own in stripped for value in own] == pytest.approx(
        [value for own in found for value in own], rel=1e-5
    )


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("\n\nHuman: say 3\n\nAssistant:", " the cat sat"),
        ("POST: a dog\n\nTL;DR:", " it fell over"),
        ("say 3: ", "the cat sat"),
        ("<|assistant|>\n", "the cat sat"),
        ([{"role": "user", "content": "say 3"}], "the cat sat"),
    ],
)
def test_both_ways_read_an_answer_as_the_response_it_was_trained_on(prompt: Any, response: str) -> None:
    reward_model = RewardModel(llama(pad_token_id=2), TOKENIZER)
    record = RankedRecord(prompt, (response, " ran"))
    (scored,) = score_records([record], reward_model, progress=False)
    assert scored.rewards is not None
    for answer in (response, response.strip()):
        found = AnswerRewards(reward_model)([record], [[answer]])
        assert found == [pytest.approx(scored.rewards[:1], rel=1e-5)]
        assert answer_rewards([record], [answer], reward_model)[1] == pytest.approx(scored.rewards[:1], rel=1e-5)


def test_empty_answers() -> None:
    reward_model = RewardModel(llama(pad_token_id=2), TOKENIZER)
    prompt = TOKENIZER("the cat")["input_ids"]
    (found,) = AnswerRewards(reward_model)([PromptRecord("the cat")], [["", "sat", ""]])
    empty = alone(reward_model.model, [*prompt, 1])
    assert found[0] == found[2] == pytest.approx(empty, rel=1e-5)
    assert found[1] != pytest.approx(empty, rel=1e-3)
    assert AnswerRewards(reward_model)([PromptRecord("the cat")], [[""]])[0] == pytest.approx([empty], rel=1e-5)


def test_refused() -> None:
    model = llama(pad_token_id=2)
    with torch.no_grad():
        model.score.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="reward_model: expected finite rewards, got"):
        AnswerRewards(RewardModel(model, TOKENIZER))([PromptRecord("the cat")], [["sat"]])
    size = {"vocab_size": len(TOKENIZER), "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "num_labels": 1}
    xlnet = RewardModel(XLNetForSequenceClassification(XLNetConfig(**size)), TOKENIZER)
    with pytest.raises(ValueError, match="reward_model: expected one that leaves padding out, got XLNet"):
        AnswerRewards(xlnet)([PromptRecord("the cat")], [["sat", "sat on a mat and then"]])
