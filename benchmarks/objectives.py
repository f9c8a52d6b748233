"""Time of every objective beside CLHA's on the same batch: what the seam between objective and head costs, on a CPU.

    python -m benchmarks.objectives [--workload small-vocabulary] [--rounds 7]

All objectives are interleaved in one run, CLHA twice: the second row's ratio is what noise alone makes of 1. Tokens
without a slope cost no backward, so the fair base for an objective that pushes all candidates is CLHA without noise and
with a margin that keeps every pair active. `objective_ms` is the objective alone, on log-probabilities that are there.
Loss and gradients of every objective are compared with the reference's first, and one that is wrong is not timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from typing import Any

import torch

from benchmarks.inputs import WORKLOADS, Batch, Workload, shrink, workload_batch
from benchmarks.measure import Clock, Deadline, Step, cpu_environment, interleaved
from clha_fast import CLHAOptions, Objective, PROOptions, RankingInputs, SFTOptions, linear_loss
from clha_fast.objectives.ranked import RankedBatch

ALL = "clha, all push"
OBJECTIVES: dict[str, Objective] = {
    "clha": CLHAOptions(),
    "clha, again": CLHAOptions(),
    ALL: CLHAOptions(noise_rule="none", margin=50.0, reward_floor=-math.inf),
    "pro, published": PROOptions(),
    "pro, paper": PROOptions(form="paper"),
    "sft, prompt_mean": SFTOptions(),
    "sft, token_mean": SFTOptions(form="token_mean"),
}


def step(batch: Batch, objective: Objective, backend: str = "torch") -> Step:
    """Forward and backward of a loss, its gradients left in the batch."""
    given = RankingInputs(batch.candidate_lengths, batch.candidates_per_prompt, batch.rewards)

    def run() -> torch.Tensor:
        batch.clear()
        arguments = (batch.hidden, batch.weight, batch.targets, given, objective)
        loss = linear_loss(*arguments, row_index=batch.row_index, backend=backend)[0]
        loss.backward()
        return loss.detach()

    return run


def check(workload: Workload, objective: Objective) -> float:
    """The largest error (norm over norm) of loss and gradients on a small workload, against the reference."""
    batch = workload_batch(shrink(workload, 8))
    found = [step(batch, objective)(), *batch.gradients()]
    wanted = [step(batch, objective, "reference")(), *batch.gradients()]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


def alone(batch: Batch, objective: Objective, rounds: int) -> tuple[float, float]:
    """(milliseconds of the objective without a head, share of the tokens that get a slope)."""
    given = RankingInputs(batch.candidate_lengths, batch.candidates_per_prompt, batch.rewards)
    draw = torch.Generator().manual_seed(0)
    logps = -10 - torch.rand(batch.targets.shape, generator=draw)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        ranked = RankedBatch(objective, given, batch.targets >= 0, torch.float32)
        slopes = ranked.rank(0, ranked.layout.num_prompts, logps)
        ranked.finish(logps)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times), float((slopes != 0).double().mean())


def _text(value: float | list[float]) -> str:
    """A median, or quartiles."""
    return f"[{', '.join(f'{end:.3f}' for end in value)}]" if isinstance(value, list) else f"{value:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=list(WORKLOADS), default="small-vocabulary")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    workload = WORKLOADS[args.workload]
    print(json.dumps(cpu_environment()))
    for name, objective in OBJECTIVES.items():
        error = check(workload, objective)
        if not error < 1e-5:
            raise SystemExit(f"{name}: off by {error:.1e} from the reference, not timed")
    batch = workload_batch(workload)
    steps = {name: step(batch, objective) for name, objective in OBJECTIVES.items()}

    def before() -> None:
        batch.clear()
        gc.collect()

    deadline = Deadline(math.inf)
    rows: dict[str, Any] = interleaved(
        steps, Clock("cpu"), args.rounds, deadline, ("clha", ALL), before=before, failures=(), progress=True
    )
    for name, row in rows.items():
        own, share = alone(batch, OBJECTIVES[name], 9)
        ratios = "  ".join(f"{key} {_text(value)}" for key, value in row.items() if key != "rounds")
        print(f"{name:18} {ratios}  objective_ms {own:.2f}  tokens_with_slope {share:.3f}")


if __name__ == "__main__":
    main()
