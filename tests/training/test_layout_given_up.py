"""`auto` of trainers and reward models where the trial passes and a later batch does not: padded rows from there on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clha_fast.models.segment_masks import UnsupportedLayoutError
from clha_fast.rewards.reward_model import RewardModel
from clha_fast.rewards.run import Row
from clha_fast.rewards.scoring import score_file
from clha_fast.training.trainer import CLHATrainer
from tests.support import reward_models
from tests.support.preferences import keyword_rows
from tests.support.tiny import make_model, make_rows
from tests.support.trainers import TOKENIZER, config
from tests.training import test_layouts, test_reward_layouts, test_reward_trainer, test_rollout

FAR = 200  # no probe of these models fills a row so far, and no text is so long


def spoiled(model: Any) -> Any:
    """A layer adds something to what stands behind a place of its row."""

    def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        there = torch.arange(output.shape[1]) >= FAR
        return output + there[None, :, None] * output.flip(-1)

    model.model.layers[0].mlp.register_forward_hook(add)
    return model


def long_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Every third prompt is much longer: alone in a shared row it stays below `FAR`, with another it does not."""
    rows = make_rows(count, seed=seed)
    return [{**row, "prompt": row["prompt"] + " the cat sat" * (30 if k % 3 else 4)} for k, row in enumerate(rows)]


def causal() -> Any:
    return spoiled(make_model(len(TOKENIZER), max_position_embeddings=2048))


def given_up(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if text.startswith("layout auto: padded from here on")]


def trained(folder: Path, layout: str, **changes: Any) -> CLHATrainer:
    return CLHATrainer(
        causal(),
        config(folder, layout=layout, **{**test_layouts.SETTINGS, **changes}),
        train_dataset=long_rows(12),
        eval_dataset=long_rows(8, seed=3),
        processing_class=TOKENIZER,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "dpo", "gradient_checkpointing": True},  # the frozen copy has the layer, too
        {"objective": "pro", "normalizer": "global", "gradient_accumulation_steps": 2},
        {"max_tokens_per_batch": 600, "drop_inert": False},
    ],
)
def test_curves_are_those_of_padded_rows(
    tmp_path: Path, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    ours = trained(tmp_path / "auto", "auto", **changes)
    assert ours.layout == ours.data_collator.layout == "shared"
    if "max_tokens_per_batch" in changes:  # other batches than padded rows make: the same ones, as rows of their own
        theirs = trained(tmp_path / "padded", "shared", **changes)
        theirs.data_collator.layout = theirs.eval_collator.layout = "padded"
    else:
        theirs = trained(tmp_path / "padded", "padded", **changes)
    with caplog.at_level(logging.WARNING, logger="clha_fast"):
        lines = test_layouts.curve(ours)
    assert lines == test_layouts.like(test_layouts.curve(theirs))
    assert len(given_up(caplog)) == 1
    assert ours._layouts.layout == "padded"
    assert "log-probabilities differ" in given_up(caplog)[0]


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_a_layout_asked_for_by_name_is_refused(tmp_path: Path, layout: str) -> None:
    with pytest.raises(UnsupportedLayoutError, match="log-probabilities differ"):
        trained(tmp_path, layout).train()
    with pytest.raises(UnsupportedLayoutError, match="hidden states differ"):
        reward_trainer(tmp_path, layout).train()
    with pytest.raises(UnsupportedLayoutError, match="hidden states differ"):
        scored(layout).score_rows(rows(6))


def test_rollouts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also the log-probabilities of the policy that sampled, which are asked for before a loss."""
    found = {}
    for layout in ("padded", "auto"):
        ours = test_rollout.trainer(
            tmp_path / layout,
            causal(),
            layout=layout,
            answers_per_prompt=12,
            max_completion_length=12,
            per_device_train_batch_size=4,
            max_steps=3,
        )
        with caplog.at_level(logging.WARNING, logger="clha_fast"):
            ours.train()
        found[layout] = [
            {name: line[name] for name in ("loss", "ratio", "reward", "grad_norm")}
            for line in ours.state.log_history
            if "loss" in line
        ]
        assert all(line["ratio"] == pytest.approx(1, abs=1e-5) for line in found[layout])
    assert len(given_up(caplog)) == 1
    assert found["auto"] == [pytest.approx(line, rel=1e-3, abs=1e-4) for line in found["padded"]]


# ---- reward models ----


def classifier() -> Any:
    return spoiled(reward_models.llama(max_position_embeddings=2048))


def reward_trainer(folder: Path, layout: str, **changes: Any) -> Any:
    more = [
        {**row, "prompt": row["prompt"] + " the cat sat" * (30 if k % 3 else 4)}
        for k, row in enumerate(keyword_rows(6))
    ]
    given = {**test_reward_layouts.SETTINGS, **changes}
    return test_reward_trainer.trainer(folder, classifier(), rows=more, layout=layout, **given)


@pytest.mark.parametrize(
    "changes",
    [{}, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}],
)
def test_curves_of_reward_models(tmp_path: Path, changes: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    expected = test_reward_layouts.curve(reward_trainer(tmp_path / "padded", "padded", **changes))
    ours = reward_trainer(tmp_path / "auto", "auto", **changes)
    assert ours.layout == ours.data_collator.layout == "shared"
    with caplog.at_level(logging.WARNING, logger="clha_fast"):
        assert test_reward_layouts.lines(ours) == expected
    assert len(given_up(caplog)) == 1
    assert ours._joined.layout == "padded"


def scored(layout: str, pad: int | None = None) -> RewardModel:
    model = classifier()
    model.config.pad_token_id = pad
    return RewardModel(model, TOKENIZER, layout=layout)


def rows(prompts: int) -> list[Row]:
    """Three responses behind each prompt; one ends with token 0, which stands for padding where a model names none."""
    draw = torch.Generator().manual_seed(3)

    def some(count: int) -> list[int]:
        return torch.randint(3, 290, (count,), generator=draw).tolist()

    found = []
    for _ in range(prompts):
        prompt = some(30)
        found += [Row(prompt, response) for response in (some(5), [*some(3), 0], some(9))]
    return found


@pytest.mark.parametrize("pad", [None, 2])
def test_rows_of_a_reward_model(pad: int | None, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = scored("auto", pad), scored("padded", pad)
    assert ours.layout == "auto"
    with caplog.at_level(logging.WARNING, logger="clha_fast"):
        for count in (2, 7, 1, 8):
            given = rows(count)
            torch.testing.assert_close(ours.score_rows(given), theirs.score_rows(given), rtol=1e-4, atol=1e-5)
            assert ours.layout == ("auto" if count == 2 else "padded") or count in (1, 8)
    assert ours.layout == "padded"
    assert len(given_up(caplog)) == 1


def test_a_scored_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="clha_fast"):
        found = [
            score_file(long_rows(9), tmp_path / layout, scored(layout, 2), progress=False).records
            for layout in ("auto", "padded")
        ]
    assert len(given_up(caplog)) == 1
    for ours, theirs in zip(*found, strict=True):
        assert ours.rewards == pytest.approx(theirs.rewards, rel=1e-4, abs=1e-5)
