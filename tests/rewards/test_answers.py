"""Rewards of sampled answers: those that a file of the same responses gets, and of empty ones."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers
from transformers import XLNetConfig, XLNetForSequenceClassification

from clha_fast.data import rendering
from clha_fast.data.prompts import PromptRecord, begin_with_blank
from clha_fast.data.records import RankedRecord, RecordError
from clha_fast.evaluation.rewards import answer_rewards
from clha_fast.rewards.answers import AnswerRewards
from clha_fast.rewards.reward_model import RewardModel, load_reward_model
from clha_fast.rewards.rows import AnswerCollator
from clha_fast.rewards.scoring import score_file, score_records
from tests.support.chat_templates import SHAPES, Shape, chat_tokenizer
from tests.support.reward_models import TOKENIZER, alone, llama, plain_ids, spread, write


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
        ("How do I boil an egg?", "the cat sat"),
        ("<|assistant|>", "the cat sat"),
        ("\u56de\u7b54\uff1a", "\u732b"),
        ([{"role": "user", "content": "say 3"}], "the cat sat"),
    ],
)
def test_both_ways_read_an_answer_as_the_response_it_was_trained_on(prompt: Any, response: str) -> None:
    reward_model = RewardModel(llama(pad_token_id=2), TOKENIZER)
    other = " ran" if response.startswith(" ") else "ran"
    record = RankedRecord(prompt, (response, other))
    (scored,) = score_records([record], reward_model, progress=False)
    assert scored.rewards is not None
    for answer in (response, response.strip()):
        found = AnswerRewards(reward_model)([record], [[answer]])
        assert found == [pytest.approx(scored.rewards[:1], rel=1e-5)]
        assert answer_rewards([record], [answer], reward_model)[1] == pytest.approx(scored.rewards[:1], rel=1e-5)


MESSAGES = ({"role": "user", "content": "say 3"},)


@pytest.mark.parametrize(
    ("prompts", "responses", "expected"),
    [
        (["Assistant:", "TL;DR:"], (" a", " b"), True),
        (["What is it?", "Assistant:"], ("a", "b"), False),
        (["Assistant: ", "say\n"], ("a", "b"), None),  # the prompt has it
        ([MESSAGES], (" a", " b"), None),
        (["", MESSAGES, "Assistant:"], ("\na", " b"), True),
        (["Assistant:"], (" a", "b", " c"), True),
        (["Assistant:"], (" a", "b"), False),
        ([], (), None),
    ],
)
def test_which_form_the_responses_of_records_have(prompts: list[Any], responses: Any, expected: bool | None) -> None:
    assert begin_with_blank(RankedRecord(prompt, responses) for prompt in prompts) is expected


@pytest.mark.parametrize("prompt", ["say 3:", "How do I boil an egg?", "<|assistant|>"])
@pytest.mark.parametrize("form", [" {}", "{}"])
def test_behind_a_prompt_alone_an_answer_has_the_form_that_the_judge_was_trained_on(
    tmp_path: Path, prompt: str, form: str
) -> None:
    """Whatever the policy writes in front; a folder that says nothing is asked with a blank."""
    llama(pad_token_id=2).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    responses = tuple(form.format(text) for text in ("the cat sat", "ran"))
    blank = begin_with_blank([RankedRecord(prompt, responses)])
    for name, given in (("none", {}), ("said", {"responses_begin_with_blank": blank})):
        if name == "said":
            (tmp_path / "reward_model.json").write_text(json.dumps({"accuracy": 0.7, **given}))
        judge = load_reward_model(str(tmp_path), device="cpu")
        assert judge.blank is given.get("responses_begin_with_blank")
        (found,) = AnswerRewards(judge)([PromptRecord(prompt)], [["the cat sat", "ran"]])
        expected = [text if name == "said" else f" {text.strip()}" for text in responses]
        own = [alone(judge.model, plain_ids(prompt, text)) for text in expected]
        assert found == pytest.approx(own, rel=1e-5)
    (record,) = score_records([RankedRecord(prompt, responses)], judge, progress=False)
    assert found == pytest.approx(record.rewards, rel=1e-5)
    (messages,) = AnswerRewards(judge)([PromptRecord(MESSAGES)], [["ran"]])
    (record,) = score_records([RankedRecord(MESSAGES, ("ran",))], judge, progress=False)
    assert messages == pytest.approx(record.rewards, rel=1e-5)


@pytest.mark.parametrize("text", ["[1]", "null", "", '{"responses_begin_with_blank": "no"}', "\udcff"])
def test_another_file_of_that_name_says_nothing(tmp_path: Path, text: str) -> None:
    llama(pad_token_id=2).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "reward_model.json").write_bytes(text.encode(errors="surrogateescape"))
    assert load_reward_model(str(tmp_path), device="cpu").blank is None


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", "</s>"])
@pytest.mark.parametrize("lead", ["<|im_start|>assistant\n", "<|assistant|>"])
def test_answers_are_closed_as_rendered_responses_are(lead: str, end: str) -> None:
    """Generation leaves the end of turn out; it may be another token than EOS. Rewards are about 1, some are near 0."""
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    reward_model = RewardModel(spread(llama(pad_token_id=2, vocab_size=len(tokenizer))), tokenizer)
    texts = ("the cat sat", "ran")
    record = RankedRecord(f"<|im_start|>user\nsay 3<|im_end|>\n{lead}", tuple(text + end for text in texts))
    (scored,) = score_records([record], reward_model, progress=False)
    (found,) = AnswerRewards(reward_model)([record], [[*texts, texts[0] + end, ""]])
    assert found[:2] == pytest.approx(scored.rewards, abs=1e-5)
    assert found[2] == found[0]
    closed = tokenizer(record.prompt)["input_ids"] + tokenizer(end.strip(), add_special_tokens=False)["input_ids"]
    assert found[3] == pytest.approx(alone(reward_model.model, closed), abs=1e-5)
    for text, reward in zip(texts, found, strict=False):
        assert answer_rewards([record], [text], reward_model)[1] == pytest.approx([reward], abs=1e-5)


def test_responses_that_end_otherwise_leave_answers_as_they_are() -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|a|>", "<|b|>"]})
    collator = AnswerCollator(tokenizer, None)
    for completions in (("x<|a|>", "y"), ("x<|a|>", "y<|b|>"), ("x", "y")):
        assert collator.answered(RankedRecord("say ", completions), ["z", ""]).completions == ("z", "")
    assert collator.answered(PromptRecord("say "), ["z"]).completions == ("z",)
    turns = ({"role": "user", "content": "say"},)
    assert collator.answered(RankedRecord(turns, ("x<|a|>", "y<|a|>")), ["z"]).completions == ("z",)


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


def judge(shape: str) -> RewardModel:
    tokenizer = chat_tokenizer(SHAPES[shape])
    return RewardModel(llama(vocab_size=len(tokenizer), pad_token_id=None, eos_token_id=1), tokenizer)


def normalising(dropped: str) -> Any:
    """A tokenizer that has no token for some characters, as BERT's has none for control and zero-width ones."""
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(dropped, "")
    return tokenizer


@pytest.mark.parametrize("text", ["\u200b", "\ufffd", "~", "\x07\x07"])
def test_answers_without_a_token_count_as_empty(text: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing that a policy says ends its run."""
    model = RewardModel(llama(pad_token_id=2), normalising(text[0]))
    reward = AnswerRewards(model)
    (found,) = reward([PromptRecord("the cat")], [["", text, " " + text, "sat"]])
    assert found[0] == found[1] == found[2] != found[3]
    assert reward.metrics == {"judge_cut_share": 0.0, "judge_empty_share": 0.75}
    records = [RankedRecord("the cat", (" sat",))] * 3
    rewards, raw = answer_rewards(records, [text, "sat", ""], model)
    assert (raw[0], raw[2], rewards[0], rewards[2]) == (None, None, 0.0, 0.0)
    assert raw[1] == pytest.approx(found[3], rel=1e-5)
    assert "1 of 3 answers have no token that it reads" in caplog.text
    with pytest.raises(RecordError, match="a response with at least one token"):  # of data it is one
        score_records([RankedRecord("the cat", (text,))], model, progress=False)


THINKING = Shape(
    "{% for m in messages %}{% set content = m['content'] %}{% if m['role'] == 'assistant' %}"
    "{% if '!' in content %}{{ raise_exception('no shouting') }}{% endif %}"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n{{ content.split('</think>')[-1].lstrip() }}<|im_end|>\n"
    "{% else %}<|im_start|>user\n{{ content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "",
    "<|im_end|>",
    ("<|im_start|>", "<|im_end|>"),
    "<|endoftext|>",
)


@pytest.mark.parametrize("text", ["Hm.</think>Yes", "a</think>b</think>c", "I said no!", "<think>Hm</think>"])
def test_what_the_template_does_not_write_stands_as_it_is(text: str) -> None:
    tokenizer = chat_tokenizer(THINKING)
    model = RewardModel(llama(vocab_size=len(tokenizer), pad_token_id=None), tokenizer)
    record = PromptRecord(({"role": "user", "content": "Why?"},))
    whole = f"<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n{text}<|im_end|>"
    (found,) = AnswerRewards(model)([record], [["Yes", text, "", "<|im_end|>"]])
    assert found[1] == pytest.approx(alone(model.model, tokenizer(whole)["input_ids"]), rel=1e-4)
    ended = alone(model.model, tokenizer(whole.replace(text, ""))["input_ids"])
    assert found[2] == found[3] == pytest.approx(ended, rel=1e-4)
    assert answer_rewards([record.ranked("Yes")], [text], model)[1] == pytest.approx([found[1]], rel=1e-4)
    with pytest.raises(RecordError):
        score_records([RankedRecord(record.prompt, (text,))], model, progress=False)


def test_a_prompt_that_the_judge_cannot_read_is_named() -> None:
    record = PromptRecord(({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}), "in:7")
    with pytest.raises(RecordError, match=r"reward_model: it cannot read the answers \['Yes'\] to this.*in:7.*Sys"):
        AnswerRewards(judge("gemma"))([record], [["Yes"]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [3, 8])
def test_the_same_answer_has_the_same_reward(dtype: torch.dtype, batch_size: int) -> None:
    """Whatever it is padded to: what is left of a last bit would be an advantage."""
    model = RewardModel(llama(pad_token_id=2).to(dtype), TOKENIZER)
    records = [PromptRecord("the cat " * size) for size in range(1, 9)]
    for own in AnswerRewards(model, batch_size=batch_size)(records, [["sat on a mat"] * 4] * len(records)):
        assert len(set(own)) == 1


@pytest.mark.parametrize("limit", [9, 14])
def test_cut_answers_are_counted(limit: int, caplog: pytest.LogCaptureFixture) -> None:
    model = RewardModel(llama(pad_token_id=2), TOKENIZER)
    records = [PromptRecord("the cat"), PromptRecord("a dog")]
    answers = [["ran", "sat on a mat and fell over it with joy"], ["ran", "fell"]]
    reward = AnswerRewards(model, max_length=limit)
    reward(records, answers)
    assert 0.25 <= reward.metrics["judge_cut_share"] <= 0.5
    whole = AnswerRewards(model)
    whole(records, answers)
    assert whole.metrics["judge_cut_share"] == 0
    ranked = [RankedRecord(record.prompt, (" ran",)) for record in records]
    answer_rewards(ranked, [texts[1] for texts in answers], model)
    assert not caplog.text
    answer_rewards(ranked, [texts[1] for texts in answers], model, max_length=limit)
    assert f"1 of 2 prompts with what is scored behind them are cut to its {limit} tokens" in caplog.text


@pytest.mark.parametrize("variables", [{"enable_thinking": False}, {"documents": ["x"], "thinking": True}])
def test_variables_of_the_policys_template_are_not_the_judges(
    variables: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    rendering._say.cache_clear()
    messages = ({"role": "user", "content": "Why?"},)
    for model in (judge("chatml"), RewardModel(llama(pad_token_id=2), TOKENIZER)):
        given, plain = (PromptRecord(messages, template=own) for own in (variables, {}))
        expected = AnswerRewards(model)([plain], [["Yes", "No"]])
        assert AnswerRewards(model)([given], [["Yes", "No"]]) == expected
        (scored,) = score_records([RankedRecord(messages, ("Yes", "No"), template=variables)], model, progress=False)
        assert scored.rewards == pytest.approx(expected[0], rel=1e-5)
        assert answer_rewards([given.ranked("Yes")], ["No"], model)[1] == pytest.approx(expected[0][1:], rel=1e-5)
        tools = PromptRecord(messages, template={"tools": [{"type": "function", "function": {"name": "f"}}]})
        with pytest.raises(RecordError, match="tools: expected a"):
            AnswerRewards(model)([tools], [["Yes"]])
    said = [record.getMessage() for record in caplog.records]
    names = ", ".join(sorted(variables))
    assert said == [
        f"chat_template_kwargs: the reward model's chat template does not read {names}; it is asked without"
    ]
