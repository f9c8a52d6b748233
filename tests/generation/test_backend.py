"""The transformers backend: what it reads is what training reads, what it writes is the model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AddedToken,
    CamembertConfig,
    CamembertForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from clha_fast.batching.collator import RankedCollator
from clha_fast.data import RankedRecord
from clha_fast.data.prompts import PromptRecord
from clha_fast.generation import GenerationSettings, TransformersBackend, backend, encode_prompts
from clha_fast.generation.backend import Generated, cut_answer
from clha_fast.generation.prompts import PLAIN_STOPS, TEXT_STOPS
from clha_fast.generation.tokens import generate_tokens
from clha_fast.training.rollout import RolloutConfig, RolloutTrainer
from tests.support.chat_templates import MESSAGES, SHAPES, chat_tokenizer
from tests.support.reward_models import spread
from tests.support.scripted import saying, scripted
from tests.support.tiny import make_model, make_rows, make_tokenizer

TOKENIZER = make_tokenizer()
EOS, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id


def prompt_records(count: int) -> list[PromptRecord]:
    return [PromptRecord(row["prompt"]) for row in make_rows(count)]


def ask(model: Any, records: Any, batch: int = 8, tokenizer: Any = TOKENIZER, **settings: Any) -> list[Generated]:
    backend = TransformersBackend(model, tokenizer)
    encoded = encode_prompts(records, tokenizer, GenerationSettings(**settings), backend.max_positions)
    found = []
    for start in range(0, len(records), batch):
        found += backend.answer(encoded.prompts[start : start + batch], encoded.settings)
    return found


def by_hand(model: Any, prompt: list[int], count: int) -> list[int]:
    """The greedy tokens, one full forward each."""
    found: list[int] = []
    while len(found) < count and EOS not in found:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *found]])).logits[0, -1]
        found.append(int(logits.argmax()))
    return found


@pytest.mark.parametrize("rollout", [False, True])
@pytest.mark.parametrize(
    ("written", "text", "said"),
    [
        ("a <tool> cat", "a  cat", ["<tool>"]),
        ("<think>a dog</think><tool>", "a dog", ["<think>", "</think>", "<tool>"]),
        ("a <plain> cat", "a <plain> cat", []),
        ("a <pad> cat<s>", "a  cat", []),
        ("a cat", "a cat", []),
    ],
)
def test_special_tokens_that_a_text_is_without_are_said(
    tmp_path: Path, written: str, text: str, said: list[str], rollout: bool, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(name, special=True) for name in ("<think>", "</think>", "<tool>")])
    tokenizer.add_tokens([AddedToken("<plain>", special=False)])
    record = PromptRecord("the cat")
    model = saying(tokenizer, written, len(tokenizer("the cat")["input_ids"]))
    backend._say_left_out.cache_clear()
    if rollout:
        seen: list[str] = []

        def reward(records: Any, answers: Any) -> list[list[float]]:
            seen.extend(answers[0])
            return [[0.0]]

        args = RolloutConfig(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
        RolloutTrainer(model, args, reward, [record], [record], tokenizer).evaluate()
    else:
        seen = [found.text for found in ask(model, [record] * 2, tokenizer=tokenizer)][:1]
    assert seen == [text]
    lines = [line for line in caplog.messages if "a special token" in line]
    assert len(lines) == len(said)
    assert all(repr(token) in "".join(lines) for token in said)


def test_a_tokenizer_is_asked_once_an_answer_for_the_tokens_added_to_it() -> None:
    asked = []
    tokenizer = make_tokenizer()

    class Counting(type(tokenizer)):  # type: ignore[misc]
        @property
        def added_tokens_decoder(self) -> Any:
            asked.append(self)
            return super().added_tokens_decoder

    tokenizer.add_tokens([AddedToken("<tool>", special=True)])
    tokenizer.__class__ = Counting
    for text in ("a <tool>", "a <tool> cat", "the cat and a <tool> dog on a mat", "a cat"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        before = len(asked)
        backend.read_answer(ids, tokenizer, [EOS], ())
        assert len(asked) - before == ("<tool>" in text), text


def test_greedy_is_the_largest_logit_whatever_the_company() -> None:
    model = spread(make_model(len(TOKENIZER)))
    records = prompt_records(9)
    wanted = [by_hand(model, TOKENIZER(str(record.prompt))["input_ids"], 12) for record in records]
    texts = [TOKENIZER.decode(ids, skip_special_tokens=True).strip() for ids in wanted]
    assert len(set(texts)) > 4
    for batch in (1, 4, 9):
        assert [found.text for found in ask(model, records, batch, max_new_tokens=12)] == texts
    finishes = [found.finish for found in ask(model, records, max_new_tokens=12)]
    assert finishes == ["stop" if ids[-1] == EOS else "length" for ids in wanted]


def test_draws_depend_on_seed_and_prompt_alone() -> None:
    model = spread(make_model(len(TOKENIZER)))
    records = prompt_records(8)
    settings = {"max_new_tokens": 10, "temperature": 1.5, "top_p": 0.95}
    state = torch.random.get_rng_state()
    alone = ask(model, records, 1, **settings)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert ask(model, records, 8, **settings) == alone
    assert ask(model, records[::-1], 3, **settings) == alone[::-1]
    assert ask(model, records, 8, seed=1, **settings) != alone


def test_draws_follow_the_softmax() -> None:
    """Two thousand draws of one token: total variation to the softmax, and nothing outside the nucleus."""
    model = scripted(TOKENIZER, {})
    logits = torch.full((len(TOKENIZER),), -30.0)
    logits[[5, 6, 7]] = torch.tensor([0.6, 0.3, 0.1]).log()
    with torch.no_grad():
        unit = model.transformer.ln_f(model.transformer.wpe.weight)[2]
        model.lm_head.weight.copy_(logits[:, None] * unit / unit.square().sum())
    for temperature, top_p, wanted in (
        (1.0, 1.0, (0.6, 0.3, 0.1)),
        (0.5, 1.0, (0.783, 0.196, 0.022)),
        (1, 0.85, (2 / 3, 1 / 3, 0)),
    ):
        rows = generate_tokens(
            model,
            [[5, 5, 5]] * 2000,
            ends=[EOS],
            pad=PAD,
            max_new_tokens=1,
            temperature=temperature,
            top_p=top_p,
            seeds=range(2000),
        )
        drawn = [row[0] for row in rows]
        shares = [drawn.count(token) / 2000 for token in (5, 6, 7)]
        assert sum(shares) == pytest.approx(1)
        assert shares == pytest.approx(wanted, abs=0.03)


def test_the_model_s_own_generation_settings_play_no_part() -> None:
    model = spread(make_model(len(TOKENIZER)))
    records = prompt_records(3)
    plain = ask(model, records, max_new_tokens=12)
    own = model.generation_config
    own.repetition_penalty, own.min_new_tokens, own.suppress_tokens = 5.0, 11, [10, 11, 12]
    assert ask(model, records, max_new_tokens=12) == plain
    assert model.generation_config is own
    assert own.repetition_penalty == 5.0


@pytest.mark.parametrize(
    ("said", "text", "finish"),
    [
        (" a mat", "a mat", "stop"),
        (" a mat\n\nHuman: and then", "a mat", "stop"),
        (" a mat Assistant: and then", "a mat", "stop"),
        ("Human: hi", "", "stop"),
        ("", "", "stop"),
        (" ", "", "stop"),
        (" cat" * 50, " ".join(["cat"] * 40), "length"),
        (" naïve 猫 🐈", "naïve 猫 🐈", "stop"),
    ],
)
def test_what_ends_an_answer_to_a_text(said: str, text: str, finish: str) -> None:
    prompt = "Human: a dog\n\nAssistant:"
    size = len(TOKENIZER(prompt)["input_ids"])
    model = saying(TOKENIZER, said, size, positions=128)
    assert ask(model, [PromptRecord(prompt)], max_new_tokens=40) == [(text, finish)]


def test_stopped_rows_leave_the_others_alone() -> None:
    """Prompts of three lengths read the same script from three places: one stops at once, one later, one never."""
    ids = TOKENIZER("Human: the cat sat on a mat", add_special_tokens=False)["input_ids"]
    place = 10 + ids.index(TOKENIZER(" the", add_special_tokens=False)["input_ids"][0])
    script = dict(enumerate(ids, 10)) | dict.fromkeys(
        range(3, 10), TOKENIZER(" a", add_special_tokens=False)["input_ids"][0]
    )
    model = scripted(TOKENIZER, script)
    backend = TransformersBackend(model, TOKENIZER)
    settings = GenerationSettings(max_new_tokens=30)
    prompts = encode_prompts([PromptRecord("x")], TOKENIZER, settings).prompts
    prompts = [prompts[0]._replace(ids=(0,) + (9,) * size) for size in (10, 3, place)]
    found = backend.answer(prompts, settings)
    assert found == [("", "stop"), ("a a a a a a a", "stop"), ("the cat sat on a mat", "stop")]
    assert [backend.answer([prompt], settings)[0] for prompt in prompts] == found


def test_stops_of_one_s_own() -> None:
    prompt = "a dog"
    model = saying(TOKENIZER, " a mat. Human: no", len(TOKENIZER(prompt)["input_ids"]))
    assert ask(model, [PromptRecord(prompt)], stop=(".", "!"), max_new_tokens=20)[0] == ("a mat", "stop")
    assert ask(model, [PromptRecord(prompt)], stop=[".", "!"], max_new_tokens=20)[0] == ("a mat", "stop")
    assert ask(model, [PromptRecord(prompt)], stop=(), max_new_tokens=20)[0] == ("a mat. Human: no", "stop")
    assert cut_answer(" x ! y . z", (".", "!")) == ("x", True)
    assert cut_answer(" x ", ()) == ("x", False)


@pytest.mark.parametrize("name", SHAPES)
def test_chat_templates(name: str) -> None:
    shape = SHAPES[name]
    tokenizer = chat_tokenizer(shape)
    record = RankedRecord(MESSAGES, ("Yes.", "no"))
    prompt = RankedCollator(tokenizer).tokenize_record(record)["prompt_ids"]
    for given in (record, PromptRecord(MESSAGES)):
        if name == "empty thoughts" and given is not record:
            continue  # a server asks without them: test_asking.py
        encoded = encode_prompts([given], tokenizer, GenerationSettings())
        assert list(encoded.prompts[0].ids) == prompt, "not what training reads"
    model = saying(tokenizer, f"{shape.before}Be kind.{shape.closing}user again", len(prompt), positions=256)
    found = ask(model, [record], tokenizer=tokenizer, max_new_tokens=60)
    assert found == [("Be kind.", "stop")]


def test_a_turn_closed_by_plain_text() -> None:
    """No special token: the text itself ends the answer."""
    shape = SHAPES["no end of turn"]
    tokenizer = chat_tokenizer(shape)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[/]\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    record = PromptRecord(MESSAGES)
    encoded = encode_prompts([record], tokenizer, GenerationSettings()).prompts[0]
    assert encoded.stops == ("[/]",)
    model = saying(tokenizer, "Be kind.[/]\n[user]", len(encoded.ids), positions=128)
    assert ask(model, [record], tokenizer=tokenizer, max_new_tokens=40) == [("Be kind.", "stop")]
    tokenizer.chat_template = None
    assert encode_prompts([record], tokenizer, GenerationSettings()).prompts[0].stops == PLAIN_STOPS
    assert encode_prompts([PromptRecord("a")], tokenizer, GenerationSettings()).prompts[0].stops == TEXT_STOPS


def test_a_long_prompt_is_cut_on_the_left_behind_its_bos() -> None:
    record = PromptRecord("dog " * 200 + "the cat")
    whole = TOKENIZER(record.prompt)["input_ids"]
    encoded = encode_prompts([record, PromptRecord("a")], TOKENIZER, GenerationSettings(max_prompt_length=10))
    assert list(encoded.prompts[0].ids) == [TOKENIZER.bos_token_id, *whole[-9:]]
    assert (encoded.cut, encoded.settings.max_new_tokens) == (1, 128)
    # 128 positions: a quarter stays the prompt's, so an answer has 96; 100 of 128 leave 28.
    for asked, prompt, new in ((128, 32, 96), (100, 32, 96), (28, 100, 28)):
        found = encode_prompts([record], TOKENIZER, GenerationSettings(max_new_tokens=asked), 128)
        assert (found.settings.max_prompt_length, found.settings.max_new_tokens) == (prompt, new)
        assert list(found.prompts[0].ids) == [TOKENIZER.bos_token_id, *whole[-prompt + 1 :]]
    model = spread(make_model(len(TOKENIZER), max_position_embeddings=24))
    assert ask(model, [record, PromptRecord("a")], max_new_tokens=50)[0].finish in ("stop", "length")
    with pytest.raises(ValueError, match=r"answer_prefix: expected one that leaves an answer .* 8 positions"):
        encode_prompts([record], TOKENIZER, GenerationSettings(answer_prefix="the cat sat on a mat with joy"), 8)


def test_the_prefix_is_read_and_not_returned() -> None:
    prefix = "A helpful answer:"
    ids = TOKENIZER(f"a dog{prefix}")["input_ids"]
    model = saying(TOKENIZER, " the cat", len(ids))
    assert ask(model, [PromptRecord("a dog")], answer_prefix=prefix) == [("the cat", "stop")]
    shape = SHAPES["mistral"]  # a blank stands between prompt and response
    tokenizer = chat_tokenizer(shape)
    plain, behind = (
        encode_prompts([RankedRecord(MESSAGES, ("Yes", "no"))], tokenizer, GenerationSettings(answer_prefix=text))
        for text in ("", prefix)
    )
    added = behind.prompts[0].ids[len(plain.prompts[0].ids) :]
    assert tokenizer.decode(added) == f" {prefix}"
    assert behind.prompts[0].ends == plain.prompts[0].ends


class Deaf(LlamaForCausalLM):
    """Reads padding as text, as some architectures do."""

    def forward(self, *args: Any, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_padding_that_is_read_as_text_is_refused() -> None:
    model = spread(Deaf(make_model(len(TOKENIZER)).config))
    records = prompt_records(4)
    with pytest.raises(ValueError, match=r"batch_size: expected 1 for Deaf, which reads padding as text .*, got 4"):
        ask(model, records, 4, max_new_tokens=2)
    assert len(ask(model, records, 1, max_new_tokens=2)) == 4


_SMALL = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": TOKENIZER.bos_token_id,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_EXPERTS = {**_SMALL, "num_experts_per_tok": 2, "num_key_value_heads": 2, "output_router_logits": True}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        # Positions that do not begin at 0.
        (RobertaForCausalLM, RobertaConfig(**_SMALL, is_decoder=True)),
        (CamembertForCausalLM, CamembertConfig(**_SMALL, is_decoder=True)),
        # Trained with the routers' loss, which has no meaning here.
        (MixtralForCausalLM, MixtralConfig(**_EXPERTS, num_local_experts=4)),
        (Qwen3MoeForCausalLM, Qwen3MoeConfig(**_EXPERTS, num_experts=4, moe_intermediate_size=24, head_dim=8)),
    ],
)
def test_answers_are_those_of_the_model_s_own_forward(kind: Any, config: Any) -> None:
    torch.manual_seed(1)
    model, routers = spread(kind(config)), getattr(config, "output_router_logits", None)
    prompts = [[0, *range(3, 3 + count)] for count in (9, 2, 5)]
    expected = [by_hand(model, prompt, 4) for prompt in prompts]
    assert len({tuple(row) for row in expected}) > 1
    settings: dict[str, Any] = {"ends": [EOS], "pad": PAD, "max_new_tokens": 4}
    assert generate_tokens(model, prompts, **settings) == expected
    assert [generate_tokens(model, [prompt], **settings)[0] for prompt in prompts] == expected
    assert getattr(model.config, "output_router_logits", None) == routers


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected a positive whole number, got 0"),
        ({"max_prompt_length": True}, "max_prompt_length: expected a positive whole number"),
        ({"temperature": -1}, "temperature: expected a finite number of at least 0, got -1"),
        ({"temperature": float("nan")}, "temperature: expected"),
        ({"top_p": 0.5}, "top_p: expected 1 with temperature 0"),
        ({"top_p": 0, "temperature": 1}, "top_p: expected a number above 0"),
        ({"seed": 1.5}, "seed: expected a whole number"),
        ({"stop": ("",)}, "stop: expected a list of texts that are not empty"),
        ({"stop": "end"}, "stop: expected a list of texts that are not empty, got 'end'"),
        ({"stop": 3}, "stop: expected a list of texts that are not empty, got 3"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GenerationSettings(**settings)
