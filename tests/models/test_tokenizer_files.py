"""Folders with tekken.json: read from tokenizer.json whatever mistral-common would make of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from clha_fast.batching.collator import RankedCollator
from clha_fast.data import RankedRecord
from clha_fast.models.loading import load_tokenizer
from clha_fast.rewards.reward_model import load_reward_model
from tests.support.chat_templates import MESSAGES, SHAPES, chat_tokenizer


class MistralCommonBackend:
    """What AutoTokenizer gives in mistral-common's place, as far as a collator looks."""

    eos_token_id = 2


@pytest.fixture
def taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoTokenizer as it is where mistral-common is installed."""
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: MistralCommonBackend())


def mistral_folder(folder: Path) -> Path:
    """A model's folder with both kinds of files; transformers looks at config.json for the class."""
    chat_tokenizer(SHAPES["mistral"]).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    (folder / "tekken.json").write_text(json.dumps({"config": {}, "vocab": []}))
    return folder


def check(tokenizer: Any) -> None:
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    feature = RankedCollator(tokenizer).tokenize_record(RankedRecord(MESSAGES, ("Yes", "no")))
    assert tokenizer.decode(feature["prompt_ids"]) == SHAPES["mistral"].prompt


def test_tokenizer_json_is_read(tmp_path: Path, taken_over: None) -> None:
    check(load_tokenizer(str(mistral_folder(tmp_path))))


def test_beside_the_package_itself(tmp_path: Path) -> None:
    package = pytest.importorskip("mistral_common")
    folder = mistral_folder(tmp_path)
    shutil.copy(Path(package.__file__).parent / "data" / "tekken_240911.json", folder / "tekken.json")
    check(load_tokenizer(str(folder)))


def test_tekken_alone_is_refused_by_name(tmp_path: Path, taken_over: None) -> None:
    folder = mistral_folder(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    words = r"^model: .* \(tokenizer.json is expected beside tekken.json"
    with pytest.raises(ValueError, match=words):
        load_tokenizer(str(folder), "model")
    with pytest.raises(ValueError, match=r"^reward_model: .* \(tokenizer.json is expected beside tekken.json"):
        load_reward_model(str(folder))


def test_a_collator_refuses_the_class_by_name() -> None:
    with pytest.raises(ValueError, match=r"^tokenizer: expected .* MistralCommonBackend; load it with PreTrainedTok"):
        RankedCollator(MistralCommonBackend())  # type: ignore[arg-type]
