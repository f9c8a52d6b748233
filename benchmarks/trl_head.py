"""This library's head beside the one of TRL's trainers: memory and time of what `DPOTrainer` asks for, on any device.

    python -m benchmarks.trl_head [--tokens 1024] [--hidden 512] [--vocabulary 128256] [--rounds 5]

Forward and backward of log-probabilities and the statistics that are logged (entropy, mean logit, top-1), all tokens
scored, with gradients for hidden states and weight; random inputs, float32 on a CPU and bfloat16 on a GPU. `logits` is
the same from full logits. Times are ratios within interleaved rounds, memory is each method's peak above inputs in a
process of its own, gradients included. A method whose log-probabilities are not those of the others stops the run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import Clock, Deadline, Step, cpu_environment, gpu_environment, interleaved, peak_bytes
from clha_fast import token_logps

METHODS = ("clha-fast", "trl", "logits")
STATISTICS = ("entropy", "mean_logit", "is_top1")


def build(name: str, sizes: list[int], device: str) -> Step:
    """Forward and backward; returns the log-probabilities."""
    tokens, width, words = sizes
    draw = torch.Generator(device).manual_seed(0)
    settings: dict[str, Any] = {"device": device, "dtype": torch.float32 if device == "cpu" else torch.bfloat16}
    hidden = torch.randn(tokens, width, generator=draw, **settings).requires_grad_()
    weight = torch.randn(words, width, generator=draw, **settings).mul_(width**-0.5).requires_grad_()
    targets = torch.randint(words, (tokens,), generator=draw, device=device)

    def scored() -> Tensor:
        if name == "clha-fast":
            return token_logps(hidden, weight, targets, statistics=STATISTICS)[0]
        if name == "trl":
            from trl.kernels.chunked_logprob import ChunkedLogProbFunction
            from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

            asked = ("log_probs", "entropy", "mean_logits", "is_top1")
            chunk = _CHUNKED_LOGPROB_CHUNK_SIZE
            return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, asked)[0]
        logits = F.linear(hidden, weight).float()
        logs = logits.log_softmax(-1)
        with torch.no_grad():
            _ = -(logs.exp() * logs).sum(-1), logits.mean(-1), logits.argmax(-1) == targets
        return logs.gather(1, targets[:, None])[:, 0]

    def step() -> Tensor:
        hidden.grad = weight.grad = None
        logps = scored()
        logps.sum().backward()
        return logps.detach()

    return step


def memory(name: str, sizes: list[int], device: str) -> int:
    command = [sys.executable, "-m", "benchmarks.trl_head", "--peak", name, *map(str, sizes), device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def main(argv: list[str]) -> int:
    if argv[:1] == ["--peak"]:
        name, *sizes, device = argv[1:]
        build(name, [64, 64, 512], device)()  # the libraries' own threads and buffers
        print(peak_bytes(build(name, [int(size) for size in sizes], device), device))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option, value in (("tokens", 1024), ("hidden", 512), ("vocabulary", 128256), ("rounds", 5)):
        parser.add_argument(f"--{option}", type=int, default=value)
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = [options.tokens, options.hidden, options.vocabulary]
    steps = {name: build(name, sizes, device) for name in METHODS}
    expected = steps["logits"]()
    for name, step in steps.items():
        error = float((step() - expected).norm() / expected.norm())
        if error > (1e-5 if device == "cpu" else 1e-2):
            raise SystemExit(f"{name}: log-probabilities are off by {error:.1e}, not timed")
    found = interleaved(steps, Clock(device), options.rounds, Deadline(3600), ("trl",))
    for name, row in found.items():
        row["peak_bytes"] = memory(name, sizes, device)
    about = cpu_environment() if device == "cpu" else gpu_environment(device)
    gradients = 4 * options.hidden * (options.tokens + options.vocabulary) // (1 if device == "cpu" else 2)
    print(json.dumps({"sizes": vars(options), "gradient_bytes": gradients, "methods": found, "environment": about}))
    print("| head, forward and backward | time over TRL's | peak memory above inputs |\n|---|---|---|")
    for name, row in found.items():
        print(f"| {name} | {row.get('over_trl', float('nan')):.2f} x | {row['peak_bytes'] / 2**20:.0f} MiB |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
