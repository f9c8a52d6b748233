"""`tiled_mlp` of the trainer's settings: the same curve, and refused values."""

from __future__ import annotations

import pytest

from clha_fast.cli.options import CONFIG_HINTS, coerce
from clha_fast.hf import CLHAConfig, CLHATrainer
from clha_fast.models.tiled import is_tiled
from tests.support.tiny import make_model, make_rows, make_tokenizer


def losses(folder, **settings):
    tokenizer = make_tokenizer()
    args = CLHAConfig(
        output_dir=str(folder), use_cpu=True, max_steps=4, logging_steps=1, per_device_train_batch_size=2,
        report_to=[], save_strategy="no", learning_rate=1e-3, disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = CLHATrainer(make_model(len(tokenizer)), args, make_rows(8), processing_class=tokenizer)
    trainer.train()
    assert is_tiled(trainer.model.model.layers[0].mlp) is bool(args.tiled_mlp)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_the_curve_is_the_same(tmp_path):
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "tiled", tiled_mlp=5) == pytest.approx(whole, rel=1e-4)
    checkpointed = losses(tmp_path / "both", tiled_mlp=True, gradient_checkpointing=True)
    assert checkpointed == pytest.approx(whole, rel=1e-4)


def test_values(tmp_path):
    """From a command line and YAML: true, false, or a number of tokens."""
    found = [coerce("tiled_mlp", value, CONFIG_HINTS["tiled_mlp"]) for value in (True, False, 64, "64")]
    assert [CLHAConfig(str(tmp_path), use_cpu=True, tiled_mlp=value).tiled_mlp for value in found] == [
        True, False, 64, 64,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="tiled_mlp: expected True, False or a positive number of tokens a tile"):
        CLHAConfig(str(tmp_path), use_cpu=True, tiled_mlp="all")
