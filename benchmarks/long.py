"""A training step's time and memory by layout: n responses x prompt length, in one process, ways interleaved.

`python -m benchmarks.long` on a CPU, `--device cuda` on a GPU, `--model FOLDER` for a model of one's own.
`--rows` measures single long rows instead, `--trl` TRL's DPO at n = 2 on the same records. `--write` renders the table
and the picture of docs/long-inputs.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import clha_fast
from benchmarks import long_trl
from benchmarks.measure import cpu_environment, peak_bytes
from clha_fast.models.layout_probe import candidates_of, pack
from clha_fast.models.segment_masks import IN_TWO_CALLS
from clha_fast.objectives.sft import SFTOptions
from clha_fast.planning.live import LiveMemory

ROOT = Path(__file__).resolve().parent.parent
RESULT, PAGE, PICTURE = (
    ROOT / "benchmarks" / "results" / "long.json",
    ROOT / "docs" / "long-inputs.md",
    ROOT / "docs" / "long-inputs.png",
)
BEGIN, END = "<!-- long-table: rendered by benchmarks/long.py -->", "<!-- /long-table -->"
WAYS = ("padded", "packed", "shared", "shared, masks")
LAYOUT = {"shared, masks": "shared"}
RESPONSE = (16, 32)  # tokens, from and to
COUNTS, PROMPTS = (2, 4, 8), (32, 128, 512)


def small_llama() -> nn.Module:
    """H 256, 3 layers, V 8192, float32, random."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 3, "vocab_size": 8192}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4))


def texts(count: int, prompt: int, seed: int) -> list[Any]:
    """One prompt and its responses, of lengths drawn from `RESPONSE`."""
    draw = torch.Generator().manual_seed(seed)
    sizes = [prompt, *torch.randint(RESPONSE[0], RESPONSE[1] + 1, (count,), generator=draw).tolist()]
    ids = [torch.randint(10, 4096, (size,), generator=draw).tolist() for size in sizes]
    return [candidates_of(ids[0], ids[1:])]


class Step:
    """A model attached for one way; a call is a forward and backward."""

    def __init__(self, model: nn.Module, device: str) -> None:
        self.model, self.device = model, device
        self.attached = clha_fast.attach(model, SFTOptions(), layout="shared")
        self.two_calls = model in IN_TWO_CALLS

    def batch(self, features: list[Any], way: str) -> dict[str, Any]:
        return pack(features, LAYOUT.get(way, way)).to(self.device).as_dict()

    def __call__(self, batch: dict[str, Any], way: str) -> None:
        if self.two_calls:
            (IN_TWO_CALLS.discard if way.endswith("masks") else IN_TWO_CALLS.add)(self.model)
        self.model(**batch).loss.backward()
        self.model.zero_grad(set_to_none=False)


def seconds(call: Callable[[], Any], device: str) -> float:
    """Of this process's own CPU time on a CPU, which others that run there do not change; of a GPU's clock."""
    if device == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_alive(call: Callable[[], Any], device: str, model: nn.Module, inputs: dict[str, Any]) -> int:
    """Peak of tensors alive above the model's weights and gradients, and its inputs."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    live = LiveMemory()
    tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    live.known(*model.parameters(), *model.buffers(), *grads, *tensors)
    with live:
        call()
    return live.peak


def run(step: Step, rounds: int) -> list[dict[str, Any]]:
    """A row a cell and way: median seconds, bytes, and medians of ratios to padded within a round."""
    found = []
    for count in COUNTS:
        for prompt in PROMPTS:
            batches = {way: step.batch(texts(count, prompt, seed=1), way) for way in WAYS}
            for way, batch in batches.items():
                step(batch, way)  # the first of a length is compared with rows alone, which is part of no step
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(rounds):
                for way, batch in batches.items():
                    times[way].append(seconds(partial(step, batch, way), step.device))
            memory = {
                way: peak_alive(partial(step, batch, way), step.device, step.model, batch)
                for way, batch in batches.items()
            }
            for way in WAYS:
                ratios = [one / other for one, other in zip(times[way], times["padded"], strict=True)]
                cell = {"n": count, "prompt": prompt, "way": way, "tokens": batches[way]["input_ids"].numel()}
                cell |= {"seconds": statistics.median(times[way]), "bytes": memory[way]}
                cell |= {"time_over_padded": statistics.median(ratios)}
                found.append(cell | {"memory_over_padded": memory[way] / memory["padded"]})
                print(json.dumps(found[-1]), flush=True)
    return found


def long_rows(widths: tuple[int, ...] = (8192, 16384, 32768)) -> list[dict[str, Any]]:
    """Resident memory of a step on one row, half of it a prompt and half four responses, by width."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 512}
    config = LlamaConfig(**sizes, num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=max(widths))
    step, found = Step(LlamaForCausalLM(config).train(), "cpu"), []
    for width in (1024, *widths):
        ids = torch.randint(10, 500, (width,), generator=torch.Generator().manual_seed(1)).tolist()
        half, part = width // 2, width // 8
        features = [candidates_of(ids[:half], [ids[half + k * part : half + (k + 1) * part] for k in range(4)])]
        batch = step.batch(features, "shared")
        # The comparison with rows alone, forward alone, has a lower peak than the step.
        size = peak_bytes(lambda batch=batch: step(batch, "shared"), "cpu")
        if width != 1024:  # what a first step sets up is no part
            found.append({"width": width, "bytes": size, "bytes_a_token": size / width, "mask_bytes": width**2})
            print(json.dumps(found[-1]), flush=True)
    return found


def table(result: dict[str, Any]) -> str:
    """Markdown: time and memory over padded rows."""
    cells = {(cell["n"], cell["prompt"], cell["way"]): cell for cell in result["cells"]}
    lines = [
        "| n | prompt | padded, s and MB | packed | shared | shared through masks |",
        "|---|---|---|---|---|---|",
    ]
    for count in COUNTS:
        for prompt in PROMPTS:
            base = cells[count, prompt, "padded"]
            row = [str(count), str(prompt), f"{base['seconds']:.2f}, {base['bytes'] / 1e6:.0f}"]
            for way in WAYS[1:]:
                cell = cells[count, prompt, way]
                row.append(f"{cell['time_over_padded']:.2f} x, {cell['memory_over_padded']:.2f} x")
            lines.append(f"| {' | '.join(row)} |")
    lines += ["", result["about"]]
    if "rows" in result:
        rows = ", ".join(f"{row['width']:,}: {row['bytes_a_token']:,.0f}" for row in result["rows"])
        lines += [
            "",
            "Single shared rows (a prompt and four responses, H 64, one layer, float32), peak resident bytes of a step "
            f"and token, by tokens: {rows}. A mask of the last: {result['rows'][-1]['mask_bytes'] >> 30} GiB.",
        ]
    lines += ["", _beside_trl(result)]
    return "\n".join(lines)


def _beside_trl(result: dict[str, Any]) -> str:
    if "trl" not in result:
        return "Beside TRL's DPO at n = 2: not measured (`python -m benchmarks.long --trl`)."
    rows = long_trl.table(result["trl"])
    return f"Beside TRL's DPO at n = 2, over its time and memory:\n\n{rows}\n\n{result['trl_about']}"


def picture(result: dict[str, Any]) -> None:
    """Time and memory over padded rows by the prompt's length, a line for each n."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    for axis, key, title in zip(axes, ("time", "memory"), ("time", "peak memory"), strict=True):
        for count in COUNTS:
            for way, style in (("shared", "o-"), ("packed", "s:")):
                cells = [cell for cell in result["cells"] if cell["n"] == count and cell["way"] == way]
                xs, ys = ([cell[name] for cell in cells] for name in ("prompt", f"{key}_over_padded"))
                axis.plot(xs, ys, style, label=f"{way}, n = {count}", color=f"C{COUNTS.index(count)}")
        axis.set(xscale="log", xlabel="tokens of a prompt (responses 16 to 32)", title=f"{title} over padded rows")
        axis.minorticks_off()
        axis.set_xticks(PROMPTS, PROMPTS)
        axis.axhline(1, color="grey", linewidth=0.5)
    axes[0].set_ylim(0, 1.2)
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})


def _about(args: argparse.Namespace, model: str | None) -> str:
    device = torch.cuda.get_device_name() if args.device != "cpu" else f"{torch.get_num_threads()} thread(s)"
    clock = "CPU seconds of the process" if args.device == "cpu" else "seconds"
    kind = "tensors alive" if args.device == "cpu" else "the allocator's peak"
    return (
        f"{model or 'Llama, H 256, 3 layers, V 8192, float32'}; forward and backward of one prompt with n "
        f"responses of {RESPONSE[0]} to {RESPONSE[1]} tokens; {clock}, medians of {args.rounds} interleaved "
        f"rounds; memory above weights and gradients ({kind}). {cpu_environment()['cpu']}, {device}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, commit {args.commit}."
    )


def main() -> None:
    """Measures, or renders what has been measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", help="a folder or name; the small Llama of long prompts by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--commit", default="unknown", help="said in the result")
    parser.add_argument("--write", action="store_true", help="render the page from the result, and measure nothing")
    parser.add_argument("--trl", action="store_true", help="TRL's DPO at n = 2 beside padded and shared rows")
    parser.add_argument("--rows", action="store_true", help="memory of single rows of 8,192 to 32,768 tokens, on a CPU")
    args = parser.parse_args()
    if args.rows:
        result = json.loads(args.out.read_text(encoding="utf-8"))
        args.out.write_text(json.dumps(result | {"rows": long_rows()}, indent=1) + "\n", encoding="utf-8")
        return
    if args.trl:
        if not long_trl.installed():
            parser.error("--trl: expected trl and datasets, not installed (pip install trl==1.16.0)")
        pairs = {prompt: texts(2, prompt, seed=1)[0] for prompt in PROMPTS}
        rows = long_trl.run(small_llama().to(args.device), args.device, args.rounds, pairs, seconds, peak_alive)
        result = json.loads(args.out.read_text(encoding="utf-8"))
        result |= {"trl": rows, "trl_about": f"{_about(args, None)} {long_trl.about()}"}
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(_beside_trl(result))
        return
    if not args.write:
        model: Any = small_llama() if args.model is None else AutoModelForCausalLM.from_pretrained(args.model)
        cells = run(Step(model.train().to(args.device), args.device), args.rounds)
        args.out.write_text(
            json.dumps({"about": _about(args, args.model), "cells": cells}, indent=1) + "\n", encoding="utf-8"
        )
    result = json.loads(args.out.read_text(encoding="utf-8"))
    if args.write:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table(result)}\n{END}{rest.split(END)[1]}", encoding="utf-8")
        picture(result)
    else:
        print(table(result))


if __name__ == "__main__":
    main()
