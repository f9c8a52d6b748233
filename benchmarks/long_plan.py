"""The table of docs/plan.md, an 8B model on 131,072 scored tokens: `python -m benchmarks.long_plan`."""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaConfig

from clha_fast.planning.plan import GIB, Load, plan
from clha_fast.planning.step import Switches

PAGE = Path(__file__).resolve().parent.parent / "docs" / "plan.md"
BEGIN, END = "<!-- plan-table: rendered by benchmarks/long_plan.py -->", "<!-- /plan-table -->"
MEMORY = 80 * GIB
COLUMNS = {
    "padded": ("padded", Switches(lora_rank=16, memory=MEMORY)),
    "shared": ("shared", Switches(lora_rank=16, memory=MEMORY)),
    "shared, tiled": ("shared", Switches(lora_rank=16, tiled_mlp=True, memory=MEMORY)),
    "shared, tiled, offloaded": ("shared", Switches(lora_rank=16, tiled_mlp=True, offload=True, memory=MEMORY)),
    "the same, all weights": ("shared", Switches(tiled_mlp=True, offload=True, memory=MEMORY)),
}
PARTS = ("weights", "gradients", "optimizer", "kept", "layer", "head", "total", "host")


def config() -> LlamaConfig:
    """Llama 3 8B's sizes."""
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
    )


def table() -> str:
    """Markdown, GiB."""
    found = {
        name: plan(config(), Load(1, 8, 16384, 16384, layout), switches).as_dict()["bytes"]
        for name, (layout, switches) in COLUMNS.items()
    }
    rows = [f"| | {' | '.join(found)} |", f"|---|{'---|' * len(found)}"]
    rows += [f"| {part} | {' | '.join(f'{sizes[part] / GIB:.1f}' for sizes in found.values())} |" for part in PARTS]
    return "\n".join(rows)


def main() -> None:
    """Writes the table into the page."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
