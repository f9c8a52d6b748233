"""A command of `clha-fast train` over a folder of its own, and the one sentence that an error is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.tiny import make_rows

SETTINGS: dict[str, Any] = {
    "model_config": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_dropout": 0.1,
    },
    "build_tokenizer": {"vocab_size": 300},
    "eval_fraction": 0.25,
    "max_steps": 8,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 2,
    "save_steps": 3,
    "max_length": 64,
    "use_cpu": True,
}


def write_rows(path: Path, count: int = 16, **changes: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(count, **changes)))
    return path


def command(folder: Path, *flags: str, **changes: Any) -> list[str]:
    """`train` with a configuration file in `folder`; its run goes to `folder`/run, unless `flags` say otherwise."""
    settings = {**SETTINGS, **changes}
    data = folder / "train.jsonl"
    if not data.exists():
        write_rows(data)
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump({name: value for name, value in settings.items() if value is not None}))
    own = {"--train_file": str(data), "--output_dir": str(folder / "run")}
    return [
        *("train", "--config", str(config)),
        *(word for name, path in own.items() if name not in flags for word in (name, path)),
        *flags,
    ]


def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err
