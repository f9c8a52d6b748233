"""What `test_loading_processes` starts under torch.distributed.run; holds no test.

Every case is a way of loading data that must not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

import datasets
import torch
from torch import Tensor

from clha_fast.training.config import CLHAConfig
from clha_fast.training.trainer import CLHATrainer
from tests.support.power_cuts import CutAfter, PowerCut
from tests.support.tiny import make_model, make_rows, make_tokenizer

WORLD = int(os.environ["WORLD_SIZE"])
TOKENIZER = make_tokenizer()
# One step an epoch, each prompt being larger than a batch may be.
OWN_BATCHES = {"max_tokens_per_batch": 1, "gradient_accumulation_steps": 100}
# Prompts in batches of 4, or of 2 in each process; of those that divide by their own, as many in all.
SHORT: list[tuple[int, dict[str, Any]]] = [
    (7, {}),
    (5, {"layout": "shared", "objective": "rrhf"}),
    (1, {"layout": "packed"}),
    (9, {"gradient_accumulation_steps": 2, "objective": "dpo", "reference": "copy"}),
    (6, {"train_sampling_strategy": "sequential", "dataloader_num_workers": 1}),
    (5, {"accelerator_config": {"split_batches": True}, "per_device_train_batch_size": 4}),
    (7, {"dataloader_drop_last": True}),
    *((rows, {**OWN_BATCHES, "normalizer": name}) for rows, name in ((1, "global"), (3, "global"), (3, "batch"))),
    *(
        (rows, {"normalizer": "batch", "per_device_train_batch_size": 2, "gradient_accumulation_steps": steps // WORLD})
        for rows, steps in ((1, 2), (5, 2), (7, 4), (9, 4))
    ),
]
ROWS, HELD_OUT = make_rows(26), make_rows(7, seed=5)
BAD = {"prompt": "p", "completions": ["a", ""], "rewards": [1.0, 0.0]}


def trainer(folder: str, rows: Any, cut: int | None = None, eval_dataset: Any = None, **changes: Any) -> CLHATrainer:
    settings: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": True,
        "ddp_backend": "gloo",
        "max_steps": 6,
        "per_device_train_batch_size": 4 // WORLD,
        "per_device_eval_batch_size": 2,
        "normalizer": "global",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": False,
    }
    return CLHATrainer(
        make_model(len(TOKENIZER)),
        CLHAConfig(**{**settings, **changes}),
        train_dataset=rows,
        eval_dataset=eval_dataset,
        processing_class=TOKENIZER,
        callbacks=[] if cut is None else [CutAfter(cut)],
    )


def result(ours: CLHATrainer, held_out: Any) -> dict[str, Any]:
    names = ("num_tokens", "kendall_tau", "rewards/accuracies", "rewards/margins", "kept_pair_share")
    metrics = ours.evaluate(held_out)
    return {
        "weights": weights(ours),
        "losses": [line["loss"] for line in ours.state.log_history if "loss" in line],
        "eval": {name: metrics[f"eval_{name}"] for name in names},
    }


def weights(ours: CLHATrainer) -> list[float]:
    return [parameter.detach().double().norm().item() for parameter in ours.model.parameters()]


def stream(folder: str) -> dict[str, Any]:
    """10 rows, 24 wanted: three passes; 7 rows to evaluate, the last batches are filled up."""
    rows = [*ROWS[:4], BAD, *ROWS[4:10]]
    table = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=3)
    ours = trainer(folder, table, skip_bad_records=True)
    ours.train()
    return result(ours, datasets.Dataset.from_list(HELD_OUT).to_iterable_dataset())


def stream_with_workers(folder: str) -> dict[str, Any]:
    """Evaluated by workers that have a shard each; one prompt less than fills the batches of both."""
    ours = trainer(folder, ROWS, max_steps=1, dataloader_num_workers=2)
    ours.train()
    return result(ours, datasets.Dataset.from_list(HELD_OUT).to_iterable_dataset(num_shards=2))


def split_batches(folder: str) -> dict[str, Any]:
    changes = {"accelerator_config": {"split_batches": True}, "per_device_train_batch_size": 4}
    ours = trainer(folder, ROWS, per_device_eval_batch_size=4, **changes)
    ours.train()
    return result(ours, HELD_OUT)


def last_batches(folder: str) -> dict[str, Any]:
    """Epochs whose last batches have room for more prompts than are left, for one process or for both."""
    found: dict[str, Any] = {"weights": [], "losses": [], "tokens": []}
    for number, (rows, changes) in enumerate(SHORT):
        given = {"max_steps": -1, "num_train_epochs": 2, **changes}
        ours = trainer(f"{folder}-{number}", ROWS[:rows], **given)
        ours.train()
        found["weights"] += weights(ours)
        lines = [line for line in ours.state.log_history if "loss" in line]
        found["losses"] += [line["loss"] for line in lines]
        found["tokens"] += [line["num_tokens"] for line in lines]
    return found


def best(folder: str) -> dict[str, Any]:
    """The weights at the end are an earlier step's, in every process."""
    given = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "load_best_model_at_end": True}
    ours = trainer(folder, ROWS, learning_rate=3.0, max_steps=3, save_steps=1, eval_dataset=HELD_OUT, **given)
    ours.train()
    of_each: list[Any] = [weights(ours)] * WORLD
    if WORLD > 1:
        torch.distributed.all_gather_object(of_each, weights(ours))
    return {"of each": of_each, "step": ours.restored_step, **result(ours, HELD_OUT)}


def budget(folder: str) -> dict[str, Any]:
    """One step over all prompts, put together in other ways by one process and by two."""
    ours = trainer(folder, ROWS, max_tokens_per_batch=200, max_steps=1, gradient_accumulation_steps=100)
    ours.train()
    return result(ours, HELD_OUT)


class Prompts:
    """Sources of the prompts that a collator was given."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.seen: list[str] = []

    def __call__(self, examples: Any) -> Any:
        self.seen += [example["source"] for example in examples]
        return self.collator(examples)


def epochs(folder: str) -> dict[str, Any]:
    """Two epochs under a budget: every prompt twice, as many steps on both."""
    ours = trainer(folder, ROWS, max_tokens_per_batch=150, max_steps=-1, num_train_epochs=2)
    ours.data_collator = Prompts(ours.data_collator)
    ours.train()
    seen: list[Any] = [None] * WORLD
    if WORLD > 1:
        torch.distributed.all_gather_object(seen, ours.data_collator.seen)
    else:
        seen = [ours.data_collator.seen]
    return {"prompts": sorted(source for part in seen for source in part)}


def resumed(folder: str, streamed: bool = False, **changes: Any) -> dict[str, Any]:
    """Whether a run cut inside its second epoch (of a stream: pass) ends with the weights of one that was not."""

    def rows() -> Any:
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset(num_shards=2) if streamed else ROWS

    whole = trainer(f"{folder}-whole", rows(), max_steps=12, **changes)
    whole.train()
    half = trainer(folder, rows(), cut=9, max_steps=12, save_strategy="steps", save_steps=9, **changes)
    with contextlib.suppress(PowerCut):
        half.train()
    rest = trainer(folder, rows(), max_steps=12, **changes)
    rest.train(resume_from_checkpoint=True)
    inside = half.state.epoch is not None and (half.state.epoch > 1 or streamed) and half.state.epoch % 1 > 0
    same = all(map(torch.equal, tensors(rest), tensors(whole)))
    return {
        "inside a later epoch": inside,
        "same": same,
        "moved": not all(map(torch.equal, tensors(half), tensors(rest))),
    }


def tensors(ours: CLHATrainer) -> list[Tensor]:
    return [parameter.detach() for parameter in ours.model.parameters()]


def refused(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for changes in ({"accelerator_config": {"even_batches": False}}, {"auto_find_batch_size": True}):
        name = next(iter(changes))
        found[name] = None
        try:
            trainer(folder, ROWS, **changes)
        except ValueError as error:
            found[name] = str(error)
    return found


def main(folder: str, out: str) -> None:
    cases = (stream, stream_with_workers, budget, split_batches, last_batches, best, epochs, refused)
    results: dict[str, Any] = {case.__name__: case(f"{folder}-{case.__name__}") for case in cases}
    if WORLD > 1:
        ways: dict[str, dict[str, Any]] = {
            "random": {},
            "budget": {"max_tokens_per_batch": 220},
            "like lengths": {"train_sampling_strategy": "group_by_length"},
            "stream": {"streamed": True},
            "stream, each its own": {"streamed": True, "accelerator_config": {"dispatch_batches": False}},
        }
        results |= {f"resumed, {name}": resumed(f"{folder}-{name}", **way) for name, way in ways.items()}
    if int(os.environ["RANK"]) == 0:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
