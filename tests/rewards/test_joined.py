"""Rewards in packed and shared rows: the classifier's own of each response alone, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BloomConfig,
    GPTNeoXConfig,
    LlamaForSequenceClassification,
    MistralConfig,
)
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from clha_fast.models import segment_masks
from clha_fast.models.segment_masks import UnsupportedLayoutError
from clha_fast.rewards.joined import JoinedRewards, join_texts
from clha_fast.rewards.reward_model import RewardModel, load_reward_model
from clha_fast.rewards.rows import pad_rows, padded_rewards
from clha_fast.rewards.run import Row
from clha_fast.rewards.scoring import ScoringError, score_file
from tests.support.architecture_configs import shrink
from tests.support.reward_models import SIZES, TOKENIZER, alone, bert, by_length, gpt2, llama, save_llama, spread
from tests.support.tiny import make_rows

LAYOUTS = ("packed", "shared")


def mistral() -> Any:
    """A window shorter than the prompts."""
    torch.manual_seed(3)
    config = MistralConfig(**{**SIZES, "num_hidden_layers": 3}, num_key_value_heads=2, sliding_window=8)
    return spread(AutoModelForSequenceClassification.from_config(config))


def neox() -> Any:
    torch.manual_seed(4)
    return spread(AutoModelForSequenceClassification.from_config(GPTNeoXConfig(**SIZES)))


def texts(pad: int = 1) -> list[list[tuple[list[int], list[int]]]]:
    draw = torch.Generator().manual_seed(7)

    def some(count: int) -> list[int]:
        return torch.randint(3, 290, (count,), generator=draw).tolist()

    prompt, other = some(20), some(13)
    ends = [some(6), [*some(9), pad], [*some(2), pad, *some(2)], [pad]]
    return [[(prompt, response) for response in ends], [(other, [*some(4), pad])]]


def test_where_texts_are_read() -> None:
    """Prompt 5 6 7; pad 1 is skipped from the end, into the prompt where a response is nothing else."""
    batch = join_texts([[([5, 6, 7], [8, 9]), ([5, 6, 7], [1, 1])], [([5, 1], [1]), ([5], [8, 1])]][:1], "shared", 1, 4)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 1, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4, 0]]
    assert batch["read"].tolist() == [4, 2]
    packed = join_texts([[([5, 6], [8]), ([5, 6], [1])], [([1, 1], [1])]], "packed", 1)
    assert packed["input_ids"].tolist() == [[5, 6, 8, 5, 6, 1, 1, 1, 1]]
    assert packed["read"].tolist() == [2, 4, 6]  # nothing but padding: the first token, as the classifiers have it


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [llama, gpt2, mistral, neox])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rewards_and_gradients_are_those_of_padded_rows(make: Any, layout: str, dtype: torch.dtype) -> None:
    model, pad = make().to(dtype), 1
    joined = JoinedRewards(model, pad)
    assert joined.settle(layout) == joined.layout == layout
    before = model.config.to_json_string()

    def gradients(rewards: Tensor) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        rewards.backward(torch.linspace(-1, 1.5, len(rewards), dtype=dtype))
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    rewards = joined(model, join_texts(texts(), layout, pad))
    rows = pad_rows([[*p, *r] for own in texts() for p, r in own], pad)
    expected = padded_rewards(model, model.config, *rows, pad)
    assert rewards.dtype == expected.dtype == dtype
    assert float(expected.detach().std()) > 0.05
    far = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(rewards, expected, rtol=far, atol=far)
    ours, theirs = gradients(rewards), gradients(expected)
    assert ours.keys() == theirs.keys()
    # Llama's norms compute in float32, whatever the dtype, and a prompt's gradients add up in another order.
    far = 1e-6 if make in (llama, mistral) and dtype == torch.float64 else far
    whole = sum(float(g.norm()) ** 2 for g in theirs.values()) ** 0.5
    assert whole > 0
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).norm()) <= far * whole, name
    assert model.config.to_json_string() == before


@pytest.mark.parametrize(
    ("kind", "right"),
    [
        *((kind, LAYOUTS) for kind in ("gemma2", "gpt_oss", "deepseek_v3", "qwen3_moe", "opt", "ctrl")),
        *((kind, ("packed",)) for kind in ("mpt", "falcon", "gpt_neo")),
        *((kind, ()) for kind in ("jamba", "qwen3_next", "openai-gpt", "roberta", "xlnet")),
    ],
)
def test_no_kind_is_silently_wrong(kind: str, right: tuple[str, ...]) -> None:
    """Softcaps, sinks, latent attention, experts, tables of positions; linear biases, recurrence, pooled rows."""
    torch.manual_seed(0)
    config = shrink(kind, False)
    config.num_labels = 1
    model, pad = AutoModelForSequenceClassification.from_config(config).eval(), 11
    if kind == "ctrl" and "create_causal_mask" not in vars(sys.modules[type(model).__module__]):
        right = ()  # releases in which it made its mask itself
    own = [
        [(range(20, 40), range(50, 56)), (range(20, 40), [*range(60, 69), pad])],
        [(range(70, 83), [20, 30, 40, 50])],
    ]
    for layout in LAYOUTS:
        joined = JoinedRewards(model, pad)
        if layout not in right:
            with pytest.raises(UnsupportedLayoutError, match=type(model).__name__):
                joined.settle(layout)
            continue
        joined.settle(layout)
        rows = pad_rows([[*prompt, *response] for texts in own for prompt, response in texts], pad)
        with torch.no_grad():
            expected = padded_rewards(model, model.config, *rows, pad)
            torch.testing.assert_close(
                joined(model, join_texts(own, layout, pad)), expected, rtol=1e-4, atol=1e-4 * float(expected.std())
            )


def test_one_label_of_several() -> None:
    model = RewardModel(llama(num_labels=3), TOKENIZER, label=2, layout="shared")
    rows = [Row([5, 6, 7], [8, 9]), Row([5, 6, 7], [10]), Row([11], [12, 13])]
    with torch.inference_mode():
        expected = [float(model.model(input_ids=torch.tensor([row.tokens])).logits[0, 2]) for row in rows]
    assert model.score_rows(rows).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("make", [llama, gpt2, by_length])
@pytest.mark.parametrize("layout", ["packed", "shared", "auto"])
def test_scoring_a_file(tmp_path: Path, make: Any, layout: str) -> None:
    model = make()
    rows = make_rows(8)
    expected = score_file(rows, tmp_path / "padded.jsonl", RewardModel(model, TOKENIZER), progress=False)
    joined = RewardModel(model, TOKENIZER, layout=layout)
    assert joined.layout == layout
    got = score_file(rows, tmp_path / "joined.jsonl", joined, batch_size=5, progress=False)
    for one, other in zip(got.records, expected.records, strict=True):
        assert one.rewards == pytest.approx(other.rewards, rel=1e-5, abs=1e-5)
        assert dataclasses.replace(one, rewards=other.rewards) == other
    kept = {tuple(json.loads(line)["rewards"]) for line in (tmp_path / "joined.jsonl").read_text().splitlines()}
    assert kept == {record.rewards for record in got.records}


def test_another_layout_is_another_run(tmp_path: Path) -> None:
    class Ends(RewardModel):
        calls = 0

        def score_rows(self, rows: Any) -> Tensor:
            type(self).calls += 1
            return super().score_rows(rows) if self.calls < 5 else torch.full((len(rows),), math.nan)

    rows, out = make_rows(8), tmp_path / "out.jsonl"
    with pytest.raises(ScoringError, match="finite"):
        score_file(rows, out, Ends(llama(), TOKENIZER, layout="shared"), batch_size=3, progress=False)
    again = {"batch_size": 3, "progress": False, "resume": True}
    with pytest.raises(ValueError, match="layout"):
        score_file(rows, out, RewardModel(llama(), TOKENIZER), **again)
    assert score_file(rows, out, RewardModel(llama(), TOKENIZER, layout="shared"), **again).resumed > 0


def test_a_folder(tmp_path: Path) -> None:
    path = save_llama(tmp_path)
    model = load_reward_model(path, layout="shared")
    row = Row([5, 6, 7], [8, 9])
    assert float(model.score_rows([row])) == pytest.approx(alone(model.model, row.tokens), rel=1e-5)
    with pytest.raises(ValueError, match="layout: expected one of padded, packed, shared, auto, got 'tree'"):
        load_reward_model(path, layout="tree")


def bloom() -> Any:
    config = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": len(TOKENIZER), "num_labels": 1}
    return spread(AutoModelForSequenceClassification.from_config(BloomConfig(**config)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            bert,
            r"that scores each token .*, got BertForSequenceClassification with scores of shape \(1, 1\)",
        ),
        (bloom, "BloomForSequenceClassification: .*hidden states differ"),
    ],
)
def test_models_that_are_refused(make: Any, message: str, caplog: Any) -> None:
    with pytest.raises(UnsupportedLayoutError, match=message):
        RewardModel(make(), TOKENIZER, layout="shared")
    with caplog.at_level("INFO", logger="clha_fast"):
        assert RewardModel(make(), TOKENIZER, layout="auto").layout == "padded"
    assert "layout auto: padded" in caplog.text


def test_a_planted_leak_is_caught(monkeypatch: Any) -> None:
    def leaking(own: Any, tokens: Any) -> Any:
        groups, positions = tokens.group_ids, tokens.position_ids

        def sees(row: Any, head: Any, query: Any, key: Any) -> Any:
            return (groups[row, query] == groups[row, key]) & own(row, head, positions[row, query], positions[row, key])

        return sees

    monkeypatch.setattr(segment_masks, "by_position", leaking)
    model = llama()
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedLayoutError, match="LlamaForSequenceClassification: LlamaAttention"):
        RewardModel(model, TOKENIZER, layout="shared")


def test_another_way_to_take_a_score_is_refused() -> None:
    class Mean(LlamaForSequenceClassification):
        def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            return SequenceClassifierOutputWithPast(logits=self.score(self.model(*args, **kwargs)[0]).mean(1))

    model = Mean(llama().config)
    with pytest.raises(UnsupportedLayoutError, match="got Mean with rewards of padded rows that are no"):
        RewardModel(spread(model), TOKENIZER, layout="packed")


def test_dropout_and_modes_stay() -> None:
    model = llama().train()
    model.model.layers[0].mlp.eval()
    JoinedRewards(model, 1).settle("shared")
    assert model.training
    assert not model.model.layers[0].mlp.training


def test_virtual_tokens_are_refused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    with pytest.raises(UnsupportedLayoutError, match=r"without virtual tokens .*got 3 in front of each row"):
        JoinedRewards(model, 1).settle("shared")
