"""DPO at n = 2 on the records of `benchmarks.long`: this library's padded and shared rows beside TRL's `DPOTrainer`.

`python -m benchmarks.long --trl` measures and adds to the result; it needs trl 1.16. Each way is a forward and backward
of one pair, reference log-probabilities given, without gradient checkpointing; TRL's is what its trainer computes of a
batch of its own collator, the metrics that it logs included. Losses that differ stop the run.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import clha_fast
from clha_fast.batching.batch import pack_candidates
from clha_fast.models.loading import build_tokenizer

WAYS = ("trl", "padded", "shared")
# A reference's log-probability a token, nats, near that of random weights on 8,192 tokens: no loss is saturated.
REFERENCE = -9.0
SAME = 1e-4


def installed() -> bool:
    """Whether there is a trl to measure."""
    return importlib.util.find_spec("trl") is not None and importlib.util.find_spec("datasets") is not None


def about() -> str:
    """The version that is measured."""
    return f"trl {importlib.metadata.version('trl')}; reference log-probabilities given, no gradient checkpointing."


def trl_trainer(model: nn.Module, device: str, folder: str) -> Any:
    """TRL's trainer around `model`, as it sets itself up; its own data is one pair of a few tokens."""
    import datasets
    import trl

    text = ["a pair of answers"] * 4
    args = trl.DPOConfig(
        output_dir=folder,
        report_to=[],
        bf16=False,
        use_cpu=device == "cpu",
        disable_tqdm=True,
        gradient_checkpointing=False,
        max_length=None,
        per_device_train_batch_size=1,
        precompute_ref_log_probs=True,
        beta=0.1,
    )
    rows = datasets.Dataset.from_list([{"prompt": "a pair", "chosen": " of", "rejected": " answers"}])
    tokenizer = build_tokenizer(text, vocab_size=300)
    return trl.DPOTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)


class Ways:
    """The same weights three times; a call is a forward and backward of a pair, and returns the loss."""

    def __init__(self, model: nn.Module, device: str) -> None:
        self.device, self.objective = device, clha_fast.DPOOptions(beta=0.1)
        with tempfile.TemporaryDirectory() as folder:
            self.trainer = trl_trainer(copy.deepcopy(model), device, folder)
        self.model = model
        clha_fast.attach(model, self.objective, layout="shared")

    def step(self, feature: dict[str, Any], way: str) -> tuple[Callable[[], Tensor], nn.Module, dict[str, Any]]:
        """What is measured of a batch of the way's own, with its model and that batch."""
        prompt, (chosen, rejected) = feature["prompt_ids"], feature["completion_ids"]
        reference = [REFERENCE * len(chosen), REFERENCE * len(rejected)]
        if way == "trl":
            example = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
            example |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), reference, strict=True))
            inputs = {name: value.to(self.device) for name, value in self.trainer.data_collator([example]).items()}
            model: nn.Module = self.trainer.model

            def loss() -> Tensor:
                found: Tensor = self.trainer.compute_loss(model, inputs)
                return found
        else:
            told = [{**feature, "reference_logps": reference}]
            settings: dict[str, Any] = {"objective": self.objective, "drop_inert": False, "layout": way}
            inputs = pack_candidates(told, pad_token_id=0, **settings).to(self.device).as_dict()  # type: ignore[arg-type]
            model = self.model

            def loss() -> Tensor:
                found: Tensor = model(**inputs).loss
                return found

        def step() -> Tensor:
            value = loss()
            value.backward()
            model.zero_grad(set_to_none=False)
            return value.detach()

        return step, model, inputs


def run(
    model: nn.Module,
    device: str,
    rounds: int,
    records: dict[int, Any],
    seconds: Callable[..., float],
    peak: Callable[..., int],
) -> list[dict[str, Any]]:
    """A row a prompt's length and way: median seconds, peak bytes, medians of ratios to TRL within a round.

    Args:
        records: the pair by its prompt's length. seconds, peak: as `benchmarks.long` has them.
    """
    ways, found = Ways(model.train(), device), []
    for prompt, feature in records.items():
        steps = {way: ways.step(feature, way) for way in WAYS}
        # The first call of a length is compared with rows alone, which is part of no step.
        losses = {way: float(call()) for way, (call, _, _) in steps.items()}
        for way, loss in losses.items():
            if not abs(loss - losses["trl"]) <= SAME * max(1.0, abs(losses["trl"])):
                raise RuntimeError(f"{way}: expected TRL's loss {losses['trl']:.6f}, got {loss:.6f}")
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way, (call, _, _) in steps.items():
                times[way].append(seconds(call, device))
        memory = {way: peak(call, device, owner, inputs) for way, (call, owner, inputs) in steps.items()}
        for way in WAYS:
            ratios = [one / other for one, other in zip(times[way], times["trl"], strict=True)]
            row = {"prompt": prompt, "way": way, "loss": losses[way], "seconds": statistics.median(times[way])}
            row |= {"bytes": memory[way], "time_over_trl": statistics.median(ratios)}
            found.append(row | {"memory_over_trl": memory[way] / memory["trl"]})
            print(json.dumps(found[-1]), flush=True)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: time and memory over TRL's."""
    cells = {(row["prompt"], row["way"]): row for row in rows}
    lines = ["| prompt | TRL's DPO, s and MB | padded | shared |", "|---|---|---|---|"]
    for prompt in dict.fromkeys(row["prompt"] for row in rows):
        base = cells[prompt, "trl"]
        ours = [cells[prompt, way] for way in WAYS[1:]]
        parts = [f"{cell['time_over_trl']:.2f} x, {cell['memory_over_trl']:.2f} x" for cell in ours]
        lines.append(f"| {prompt} | {base['seconds']:.2f}, {base['bytes'] / 1e6:.0f} | {' | '.join(parts)} |")
    return "\n".join(lines)
