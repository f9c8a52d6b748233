"""Templates that write today's date: an error about other tokens says so, and how to hold the date still."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from clha_fast.batching.collator import RankedCollator
from clha_fast.batching.dates import date_hint
from clha_fast.batching.signals import token_checksum
from clha_fast.data import RankedRecord, RecordError
from clha_fast.data.prompts import PromptRecord
from clha_fast.generation import (
    GenerationInterrupted,
    GenerationSettings,
    TransformersBackend,
    generate_answers,
)
from clha_fast.objectives import DPOOptions
from clha_fast.rewards.policy import Policy, score_policy
from tests.support.chat_templates import CHATML, IM, MESSAGES, Shape, chat_tokenizer
from tests.support.tiny import make_model

DAY = "Today: {{ SHOWN }}\n" + CHATML
NAMED = "{% if not day is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}" + DAY.replace("SHOWN", "day")
OTHER = "{% if date_text is not defined %}{%- set date_text = strftime_now('%d') -%}{% endif %}" + DAY.replace(
    "SHOWN", "date_text"
)
ALWAYS = DAY.replace("SHOWN", "strftime_now('%d %b %Y')")
SET = "{% set day = strftime_now('%d %b %Y') %}" + DAY.replace("SHOWN", "day")
RECORD = RankedRecord(MESSAGES, ("Yes.", "no"), source="f:1")


class Tomorrow(datetime.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return datetime.datetime.now(tz) + datetime.timedelta(days=1)


def dated(template: str) -> Any:
    return chat_tokenizer(Shape(template, "", "", IM, "<|endoftext|>"))


def today() -> str:
    return datetime.datetime.now().strftime("%d %b %Y")


def test_which_templates_write_it() -> None:
    assert date_hint(dated(CHATML)) == ""
    assert date_hint(object()) == ""
    assert date_hint(dated(NAMED)).endswith('as chat_template_kwargs {"day": ...}')
    assert date_hint(dated(OTHER)).endswith('as chat_template_kwargs {"date_text": ...}')
    for template in (ALWAYS, SET):
        assert date_hint(dated(template)).endswith("no variable for it: give prompts as rendered texts")
    tokenizer = dated(CHATML)
    tokenizer.chat_template = {"default": CHATML, "tool_use": NAMED}
    assert '"day"' in date_hint(tokenizer)


@pytest.mark.parametrize(("template", "named"), [(NAMED, True), (ALWAYS, False)])
def test_answers_of_yesterday(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, named: bool) -> None:
    tokenizer = dated(template)
    backend = TransformersBackend(make_model(len(tokenizer)), tokenizer)
    records = [PromptRecord(({"role": "user", "content": f"Hi {k}"},)) for k in range(4)]
    settings, day = GenerationSettings(max_new_tokens=3), today()
    real, calls = backend.answer, []

    def stops(*given: Any, **more: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given, **more)

    monkeypatch.setattr(backend, "answer", stops)
    out = tmp_path / "answers.jsonl"
    with pytest.raises(GenerationInterrupted):
        generate_answers(records, backend, out, settings, batch_size=2, progress=False)
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    monkeypatch.setattr(backend, "answer", real)
    with pytest.raises(ValueError, match=r"tokenizer or template changed.*; the chat template writes today's date"):
        generate_answers(records, backend, out, settings, batch_size=2, progress=False, resume=True)
    monkeypatch.setattr(chat_template_utils, "datetime", datetime.datetime)
    with pytest.raises(ValueError, match=r"\(batch_size was 2, is 3\); give the same settings and files.*True$"):
        generate_answers(records, backend, out, settings, batch_size=3, progress=False, resume=True)
    if named:
        monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
        settings = GenerationSettings(max_new_tokens=3, chat_template_kwargs={"day": day})
        assert generate_answers(records, backend, out, settings, batch_size=2, progress=False, resume=True).resumed == 2


def test_references_of_yesterday(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for template, variables in ((NAMED, {"day": today()}), (ALWAYS, {})):
        tokenizer = dated(template)
        feature = RankedCollator(tokenizer).tokenize_record(RECORD)
        sums = tuple(token_checksum(feature["prompt_ids"], ids) for ids in feature["completion_ids"])
        signals = {"reference_logps": (-1.0, -2.0), "reference_tokens": sums}
        collator = RankedCollator(tokenizer, DPOOptions())
        monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
        with pytest.raises(RecordError, match=r"^f:1: reference_logps\[0\]: .*; the chat template writes today's date"):
            collator.tokenize_record(RankedRecord(MESSAGES, RECORD.completions, source="f:1", signals=signals))
        if variables:
            held = RankedRecord(MESSAGES, RECORD.completions, template=variables, signals=signals)
            assert collator.tokenize_record(held)["reference_logps"] == [-1.0, -2.0]
        monkeypatch.setattr(chat_template_utils, "datetime", datetime.datetime)
    plain = RankedRecord("Why?", ("a", "b"), signals={"reference_logps": (-1.0, -2.0), "reference_tokens": (1, 2)})
    with pytest.raises(RecordError, match=r"or take another reference$"):
        collator.tokenize_record(plain)


def test_scores_of_yesterday(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = dated(NAMED)
    policy = Policy(make_model(len(tokenizer)), tokenizer)
    run: Any = {"batch_size": 2, "progress": False}
    others = RankedRecord(MESSAGES[-1:], ("Yes, I think.", "no"), source="f:2")
    real, calls = Policy.sums, []

    def stops(self: Policy, rows: Any) -> Any:
        calls.append(rows)
        if len(calls) == 4:  # behind the first batch, and what a trial of padding runs
            raise KeyboardInterrupt
        return real(self, rows)

    monkeypatch.setattr(Policy, "sums", stops)
    with pytest.raises(KeyboardInterrupt):
        score_policy([RECORD, others], tmp_path / "out.jsonl", policy, **run)
    monkeypatch.setattr(Policy, "sums", real)
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    with pytest.raises(ValueError, match=r"tokenizer or template changed.*chat_template_kwargs \{\"day\": ...\}$"):
        score_policy([RECORD, others], tmp_path / "out.jsonl", policy, resume=True, **run)
