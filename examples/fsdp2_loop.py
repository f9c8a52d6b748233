"""FSDP2 without a trainer: attach, `fully_shard`, and the counts of the whole step, on a file of ranked responses.

    torchrun --nproc_per_node 2 examples/fsdp2_loop.py --config examples/alpacaeval.yaml \
        --train-file TRAIN.jsonl --eval-file TEST.jsonl --write result.json

The model, the lengths and the training settings are those of the YAML file of `clha-fast train`; its batch sizes
count the prompts of all processes together, so one process and several take the same steps.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

import clha_fast
from clha_fast import CLHAMetrics
from clha_fast.batching.collator import RankedCollator, RankedDataset
from clha_fast.cli.options import read_config
from clha_fast.data.readers import read_records
from clha_fast.models.attach import empty_batch
from clha_fast.models.loading import build_model, build_tokenizer, texts_of
from clha_fast.models.sharding import reshard


def evaluate(model, dataset, collator, batch_size, device):
    """The held-out metrics, pooled over batches and processes; a process without a batch left runs an empty one."""
    rank, world = dist.get_rank(), dist.get_world_size()
    starts = list(range(0, len(dataset), batch_size))
    parts = []
    model.eval()
    for first in range(0, len(starts), world):
        mine = starts[first + rank] if first + rank < len(starts) else len(dataset)
        rows = [dataset[k] for k in range(mine, min(mine + batch_size, len(dataset)))]
        batch = collator(rows) if rows else empty_batch().as_dict()
        with torch.no_grad():
            metrics = model(**to(batch, device)).metrics
        parts.append(CLHAMetrics(metrics.values, metrics.scores[:0]))
    model.train()
    values = CLHAMetrics.merge(parts).values
    dist.all_reduce(values)
    return CLHAMetrics(values, values[:0], len(starts)).as_dict()


def to(batch, device):
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


def main(given):
    on_gpu = torch.cuda.is_available() and not given.cpu
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    run = read_config(given.config)
    seed, batch_size = run.get("seed", 42), run.get("per_device_train_batch_size", 4)
    epochs = given.epochs or run.get("num_train_epochs", 1)
    if batch_size % world:
        raise ValueError(f"per_device_train_batch_size: expected a multiple of {world} processes, got {batch_size}")

    records, held_out = read_records(given.train_file), read_records(given.eval_file)
    tokenizer = build_tokenizer(texts_of(records), **run["build_tokenizer"])
    model = build_model(run["model_config"], tokenizer, seed).to(device, getattr(torch, given.dtype))
    options = clha_fast.CLHAOptions.preset(run.get("preset", "published"))
    lengths = {name: run.get(name) for name in ("max_length", "max_prompt_length", "max_completion_length")}
    collator = RankedCollator(tokenizer, options, **lengths)
    whole = RankedCollator(tokenizer, options, **lengths, drop_inert=False)
    dataset, eval_dataset = RankedDataset(records, collator), RankedDataset(held_out, whole)

    attached = clha_fast.attach(model, options)  # first: the head is measured on whole weights
    mesh = init_device_mesh(device.type, (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())

    optimizer = torch.optim.AdamW(model.parameters(), lr=run.get("learning_rate", 5e-5), weight_decay=0.0)
    steps = epochs * (len(dataset) // batch_size)
    steps = min(steps, given.steps or steps)
    schedule = get_scheduler(run.get("lr_scheduler_type", "linear"), optimizer, run.get("warmup_steps", 0), steps)
    order = torch.Generator().manual_seed(seed)

    eval_size = run.get("per_device_eval_batch_size", 4)
    before = evaluate(model, eval_dataset, whole, eval_size, device)
    losses, started = [], time.perf_counter()
    model.train()
    while len(losses) < steps:
        shuffled = torch.randperm(len(dataset), generator=order).tolist()
        for first in range(0, len(dataset) - batch_size + 1, batch_size):
            mine = shuffled[first : first + batch_size][rank::world]
            batch = to(collator([dataset[k] for k in mine]), device)
            loss = model(**batch, **attached.counts([batch])).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            losses.append(float(mean) / world)
            if rank == 0 and (len(losses) % given.log_every == 0 or len(losses) == steps):
                print(f"step {len(losses)} loss {losses[-1]:.4f} ({time.perf_counter() - started:.0f} s)", flush=True)
            if len(losses) == steps:
                break
    seconds = time.perf_counter() - started
    after = evaluate(model, eval_dataset, whole, eval_size, device)
    reshard(model)  # after a forward without a backward the outermost module is still whole
    norm = sum(float(p.detach().full_tensor().double().norm()) ** 2 for p in model.parameters()) ** 0.5
    if rank == 0:
        for name in ("rewards/accuracies", "kendall_tau", "rewards/margins"):
            print(f"held out {name}: {before[name]:.4f} before, {after[name]:.4f} after")
        if given.write:
            result = {"processes": world, "steps": steps, "epochs": epochs, "seconds": round(seconds, 1)}
            result |= {"before": before, "after": after, "weight_norm": norm, "losses": losses}
            Path(given.write).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="examples/alpacaeval.yaml")
    parser.add_argument("--train-file", required=True)
    parser.add_argument("--eval-file", required=True)
    parser.add_argument("--epochs", type=int, help="instead of the file's")
    parser.add_argument("--steps", type=int, help="stop after as many")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float64"))
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--write", metavar="JSON", help="metrics before and after, and every step's loss")
    parser.add_argument("--cpu", action="store_true", help="even where a GPU is there")
    main(parser.parse_args())
