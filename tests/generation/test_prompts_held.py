"""What answering holds of a file of ranked records: the prompts' tokens, eight bytes each, and none of the answers'."""

from __future__ import annotations

import itertools
import random
import tracemalloc

import pytest

from clha_fast.data import RankedRecord
from clha_fast.generation.backend import GenerationSettings
from clha_fast.generation.prompts import encode_prompts
from tests.support.tiny import WORDS, make_tokenizer

TOKENIZER = make_tokenizer()
EACH = 1200  # bytes of a prompt beside its tokens


def record(number: int, prompt: int, response: int) -> RankedRecord:
    draw = random.Random(number)
    texts = (f"{number} {k} {' '.join(draw.choices(WORDS, k=response))}" for k in range(2))
    return RankedRecord(f"{number} {' '.join(draw.choices(WORDS, k=prompt))}", tuple(texts))


@pytest.mark.parametrize(("prompt", "response"), [(3, 300), (100, 200)])
def test_answers_that_a_record_has_are_not_held(prompt: int, response: int) -> None:
    peaks, tokens = [], []
    for count in (4, 12):
        records = [record(number, prompt, response) for number in range(count)]
        encode_prompts(records[:1], TOKENIZER, GenerationSettings(max_prompt_length=None))
        tracemalloc.start()
        try:
            found = encode_prompts(records, TOKENIZER, GenerationSettings(max_prompt_length=None))
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        tokens.append(sum(len(one.ids) for one in found.prompts))
    assert peaks[1] - peaks[0] < 2 * 8 * (tokens[1] - tokens[0]) + 8 * EACH


def test_a_token_is_one_number() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"token{k}" for k in range(400)])
    text = " ".join(f"token{k}" for k in range(300, 400))
    records = [RankedRecord(f"{number} {text}", ("a", "b")) for number in range(3)]
    prompts = encode_prompts(records, tokenizer, GenerationSettings()).prompts
    ids = list(itertools.chain.from_iterable(one.ids for one in prompts))
    assert max(ids) > 500, "not among those that Python has once"
    assert len({id(token) for token in ids}) == len(set(ids))
