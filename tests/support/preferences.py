"""Ranked responses in which a word decides, whatever the prompt, the length and the other words; and a run on them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from tests.support.reward_models import write
from tests.support.tiny import WORDS

GOOD, BAD = "joy", "rain"
OTHERS = [word for word in WORDS if word not in (GOOD, BAD)]
SETTINGS: dict[str, Any] = {
    "model_config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "build_tokenizer": {"vocab_size": 300},
    "eval_fraction": 0.3,
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-3,
    "logging_steps": 2,
    "save_steps": 3,
    "use_cpu": True,
}


def keyword_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts with 2 or 3 responses, the best with GOOD in it, the others with BAD."""
    rng = random.Random(seed)

    def answer(word: str) -> str:
        words = rng.choices(OTHERS, k=rng.randint(2, 5))
        words.insert(rng.randrange(len(words) + 1), word)
        return " ".join(words)

    return [
        {
            "prompt": f"say {number}: {' '.join(rng.choices(OTHERS, k=2))}",
            "completions": [answer(GOOD), *(answer(BAD) for _ in range(rng.randint(1, 2)))],
        }
        for number in range(count)
    ]


def reward_command(folder: Path, *flags: str, rows: list[dict[str, Any]] | None = None, **changes: Any) -> list[str]:
    """`reward-model train` with a configuration file in `folder`; its run goes to `folder`/run."""
    data, config = folder / "ranked.jsonl", folder / "reward.yaml"
    if rows is not None or not data.exists():
        write(data, keyword_rows(40) if rows is None else rows)
    given = {name: value for name, value in {**SETTINGS, **changes}.items() if value is not None}
    config.write_text(yaml.safe_dump(given))
    words = ["--config", str(config), "--train_file", str(data), "--output_dir", str(folder / "run")]
    return ["reward-model", "train", *words, *flags]
