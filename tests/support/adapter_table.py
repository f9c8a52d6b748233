"""Runs the cases of `adapters.py` and renders the table of docs/adapters.md.

``python -m tests.support.adapter_table`` prints it; ``--write PATH`` renders it into a file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from transformers.integrations.peft import MIN_PEFT_VERSION

from tests.support.adapters import ADDED_BY_TRANSFORMERS, CASES, REFUSED, TOLERANCE, Measured, sentence
from tests.support.versions import older


def render(results: dict[str, Measured], refused: Sequence[str] = ()) -> str:
    """The table as Markdown; `refused` are cases that this transformers does not run with this peft."""
    versions = []
    for package in ("peft", "torch", "transformers", "bitsandbytes", "torchao"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    right = sum(result.right for result in results.values())
    rows = [
        f"| {name} | {'own forward' if got.chunks else 'fused'} | {got.loss:.1e} | {got.gradients:.1e} | "
        f"{'right' if got.right else '**wrong**'} |"
        for name, got in results.items()
    ]
    rows += [f"| {name} | | | | not run: transformers asks for peft {MIN_PEFT_VERSION} |" for name in refused]
    sentences = [f"| {name} | {sentence(name)} |" for name in REFUSED]
    text = HEADER.format(right=right, count=len(results), tolerance=TOLERANCE, python=platform.python_version())
    parts = [text.strip(), f"Seen with {', '.join(versions)}.", "", *TABLE, *rows, "", "## Refused", ""]
    parts += ["| case | what it says |", "|---|---|", *sentences, "", NOTES.strip()]
    return "\n".join(parts) + "\n"


TABLE = ("| case | head | loss error | gradient error | |", "|---|---|---|---|---|")

HEADER = """
# Adapters, quantised heads, virtual tokens

`clha_fast.attach(model)` on what peft makes of a model. Rendered by `python -m tests.support.adapter_table --write
docs/adapters.md` from real runs: a two-layer Llama in float32 on the CPU, three ranked prompts, adapters stirred so
that they matter, against the same PeftModel's own full logits and the reference loss. The errors are relative: of the
loss, and the largest of any trained parameter's gradient over the norm of all. Right is at most {tolerance:g}; merges
compare losses only.

**{right} of {count} right.** Python {python}.
"""

NOTES = """
## How the head is computed

- *fused*: the output embedding is one weight, which is read. Frozen, it gets no weight gradient and no buffer for one.
- *own forward*: the head is more than one weight (an adapter on it, or quantised), so its `.weight` is not what it
  computes with. Its own forward is called on a bounded chunk of scored tokens at a time, under a checkpoint that keeps
  the random state, and everything in it has the gradient that full logits would give. The price: a second forward of
  the head in the backward, and autograd's memory for one chunk (`workspace_bytes` bounds it). The log says once that
  this is taken. `backend="auto"` takes it, `backend="reference"` forms all logits at once, "torch" and "triton" refuse:
  a named backend never falls back. To stay on the fused path, train the head whole (`modules_to_save`) or leave it
  frozen.
- `modules_to_save` is seen through: the active copy is the head.
- Virtual tokens stand in front of the batch's own; the rows that a batch scores are counted behind them.

## How to use it

- `get_peft_model` first, then `attach` (then wrap: DDP, `fully_shard`, Trainer). The other order is right where the
  adapter leaves the head and the token positions alone, and is refused where it does not. For LLaMA-Adapter
  (`AdaptionPromptConfig`) it is the only one: peft keeps the forward that it found.
- After `merge_and_unload` a model attached before remains attached where the head was no adapter's. After switching to
  an adapter with another head, detach and attach again; the call says so.
- Dropout inside an adapter on the head is drawn for each chunk: as random as over all tokens, not the same draw.
- A head that quantises its *input* by the range of all tokens it is given (LLM.int8's outlier columns, dynamic
  quantisation) sees a chunk's range instead: the difference is one of its own roundings. Where that
  range has a gradient (torchao's float8 quantisation-aware training by tensor), tokens are mixed, and it is refused.
- An adapter on the head that mixes tokens (Lily's router takes a mean over all of them) is refused, trained or fresh:
  which tokens it would see depends on the chunk. What tells it is a gradient, which is zero to the last bit otherwise.
- A head that computes in a dtype of its own (a class whose forward casts hidden states in bfloat16 to a float32 weight)
  is called as it is, too.
- A head whose base layer tensor parallelism has spread over processes takes an adapter where the base layer gathers its
  logits (`ColwiseParallel(output_layouts=Replicate())`); peft raises where it does not, and so does attach.
- AdaLoRA adds its own regulariser to what an attached model returns, as it does to any loss of a model's; trainers,
  whose loss is no output of a model's, go without it, and say so.
- bitsandbytes on a CPU with AVX512-BF16 repacks 4-bit weights at their first forward in evaluation mode, which can be
  attach's probe: the model's own logits change by it, by 2e-4 of the loss in one run. QLoRA models of
  `from_pretrained(load_in_4bit or load_in_8bit)`, with and without `prepare_model_for_kbit_training`, were right there
  beside their own logits after that, body and head.
- Under DDP and FSDP2 in two processes: LoRA on the body and on the head (also tied, and with gradient checkpointing),
  `modules_to_save` and prompt tuning, to 5e-7 (`tests/models/test_adapter_processes.py`).
- What none of this shows: GPUs.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="render the table into this file")
    parser.add_argument("--only", nargs="*", help="names of cases")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    names = arguments.only or [*CASES]
    refused = [name for name in names if name == ADDED_BY_TRANSFORMERS and older("peft", MIN_PEFT_VERSION)]
    results = {name: CASES[name]() for name in names if name not in refused}
    table = render(results, refused)
    print(table)
    if arguments.write is not None:
        arguments.write.write_text(table, encoding="utf-8")
    return 0 if all(result.right for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
