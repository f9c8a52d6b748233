"""What `test_adapter_processes` starts twice under torch.distributed.run: adapters in wrappers; holds no test."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import clha_fast
from clha_fast import HeadOptions
from clha_fast.models.attach import empty_batch
from clha_fast.models.head_loss import head_loss
from clha_fast.models.heads import HeadForward
from tests.support.adapters import BODY, HEAD, OPTIONS, collate, eager_loss, lora, virtual
from tests.support.tiny import make_rows
from tests.support.wrapper_common import Measured, compare, mine, plain_name, step, whole

ROWS = make_rows(4, seed=3)


def expect(model: nn.Module) -> Any:
    """The eager loss of all rows and the gradients of what is trained, on a copy."""
    model = copy.deepcopy(model)
    loss = eager_loss(model, collate(ROWS))
    loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return float(loss.detach()), {name: grad for name, grad in named.items() if grad is not None}


def gradients_of(model: nn.Module) -> Any:
    named = {plain_name(name): p.grad for name, p in model.named_parameters()}
    return {name: whole(grad).detach() for name, grad in named.items() if grad is not None}


def ddp(build: Callable[[], nn.Module], idle: bool = False) -> Measured:
    """`idle`: the second process has no prompt."""
    model = build()
    wanted = expect(model)
    attached = clha_fast.attach(model, OPTIONS)
    part = collate(mine(ROWS))
    if idle:
        part = collate(ROWS) if dist.get_rank() == 0 else empty_batch()
    loss = step(DistributedDataParallel(model), attached, [part])
    return compare(wanted, loss, gradients_of(model))


def fsdp(build: Callable[[], nn.Module], checkpointing: bool = False) -> Measured:
    model = build()
    wanted = expect(model)
    inner = model.get_base_model()
    if checkpointing:
        inner.gradient_checkpointing_enable({"use_reentrant": False})
        inner.enable_input_require_grads()
    attached = clha_fast.attach(model, OPTIONS)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss = step(model, attached, [collate(mine(ROWS))])
    return compare(wanted, loss, gradients_of(model))


def head_spread() -> Measured:
    """LoRA on a head whose base layer has its rows spread over the processes, and gathers its logits."""
    model = lora(HEAD)
    wanted = expect(model)
    clha_fast.attach(model, OPTIONS)
    plan = {"lm_head.base_layer": ColwiseParallel(output_layouts=Replicate())}
    parallelize_module(model.get_base_model(), init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    loss = model(**collate(ROWS).as_dict()).loss
    loss.backward()
    return compare(wanted, loss, gradients_of(model))


CASES: dict[str, Callable[[], Measured]] = {
    "DDP, LoRA on the body": lambda: ddp(lambda: lora(BODY)),
    "DDP, LoRA on the head": lambda: ddp(lambda: lora(HEAD)),
    "DDP, LoRA on the head, a process without prompts": lambda: ddp(lambda: lora(HEAD), idle=True),
    "DDP, modules_to_save": lambda: ddp(lambda: lora(BODY, modules_to_save=["lm_head"])),
    "DDP, prompt tuning": lambda: ddp(lambda: virtual("PromptTuningConfig")),
    "FSDP2, LoRA on the body": lambda: fsdp(lambda: lora(BODY)),
    "FSDP2, LoRA on the head": lambda: fsdp(lambda: lora(HEAD)),
    "FSDP2, LoRA on the head, tied embeddings": lambda: fsdp(lambda: lora(HEAD, tied=True)),
    "FSDP2, LoRA on the head, gradient checkpointing": lambda: fsdp(lambda: lora(HEAD), checkpointing=True),
    "Tensor parallel, LoRA on a head with gathered logits": head_spread,
    "FSDP2, modules_to_save": lambda: fsdp(lambda: lora(BODY, modules_to_save=["lm_head"])),
}


def bad_counts() -> str:
    """One process's micro-batch lacks a field; what each process is told."""
    with clha_fast.attach(lora(BODY), OPTIONS) as attached:
        batch = collate(ROWS).as_dict()
        if dist.get_rank() == 1:
            del batch["candidate_lengths"]
        try:
            attached.counts([batch])
        except ValueError as error:
            return str(error)
    return "no error"


class Spread(nn.Linear):
    """A head whose own forward leaves its logits sharded."""

    def forward(self, hidden: Tensor) -> Tensor:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return DTensor.from_local(super().forward(hidden), mesh, [Shard(-1)])


def sharded_logits() -> list[str]:
    """What is said of a head that no process has all logits of, and of hidden states that are a DTensor."""
    forward = HeadForward(Spread(4, 6), "spread", 12, True)
    ones = torch.ones(2, dtype=torch.int64)
    batch = {"targets": ones, "candidate_lengths": ones, "candidates_per_prompt": 2 * ones[:1]}
    hidden = torch.randn(2, 4)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    said = []
    for given in (hidden, DTensor.from_local(hidden, mesh, [Replicate()])):
        try:
            head_loss(given, forward, None, batch, head=HeadOptions(), objective=OPTIONS)
        except ValueError as error:
            said.append(str(error))
    return said


def bad_batch() -> None:
    """One process's batch is wrong while the other one is in DDP's collectives: its error ends the run."""
    model = DistributedDataParallel(lora(BODY))
    clha_fast.attach(model, OPTIONS)
    batch = collate(ROWS).as_dict()
    if dist.get_rank() == 1:
        batch["targets"] = batch["targets"] + 1000
    model(**batch).loss.backward()


def main(out: str, what: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=90))
    rank = dist.get_rank()
    if what == "bad batch":
        bad_batch()
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        measured = case()
        results[name] = {**dataclasses.asdict(measured)}
        if rank == 0:
            print(name, measured, flush=True)
    begun = time.monotonic()
    said = [bad_counts()]
    seconds = time.monotonic() - begun
    said += sharded_logits()
    with open(f"{out}.{rank}", "w", encoding="utf-8") as file:
        json.dump({"cases": results, "said": said, "seconds": seconds}, file)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # wrappers' leftovers wait for one another in destroy_process_group


if __name__ == "__main__":
    main(*sys.argv[1:])
