"""What `wrappers.py` starts on every process of a group: one case after the other, results as JSON lines.

Every case gives the largest difference, on any process, between what a wrapped and attached model computes and one
process's eager loss (full logits, `reference.clha_loss`) of the same global batch. Holds no test.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import clha_fast
from clha_fast import reference
from clha_fast.batching.batch import CandidateBatch
from clha_fast.batching.collator import RankedCollator, RankedDataset
from clha_fast.models.attach import empty_batch
from clha_fast.types import STATISTICS, VocabShard
from tests.support.wrapper_common import (
    EXACT,
    INERT,
    OPTIONS,
    ROUNDED,
    ROWS,
    TOKENIZER,
    Measured,
    collate,
    compare,
    expect,
    gradients_of,
    mine,
    plain_name,
    step,
    tied,
    untied,
    whole,
)

# ---- DDP ----


def ddp(
    parts: Callable[[], list[CandidateBatch]] | None = None,
    *,
    after: bool = False,
    checkpointing: bool = False,
    compiled: bool = False,
    autocast: bool = False,
    backend: Any = "auto",
    everything: Sequence[Any] = ROWS,
) -> Measured:
    model = tied()
    batches = [collate(mine(ROWS))] if parts is None else parts()
    wanted = expect(model, [collate(everything)], autocast)
    if checkpointing:
        model.gradient_checkpointing_enable()
    attached = None if after else clha_fast.attach(model, OPTIONS, backend=backend)
    wrapped = DistributedDataParallel(model)
    attached = attached or clha_fast.attach(wrapped, OPTIONS)
    called = torch.compile(wrapped, backend="aot_eager") if compiled else wrapped
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = step(called, attached, batches)
    return compare(wanted, loss, gradients_of(model), ROUNDED if autocast else EXACT)


def ddp_accumulation() -> Measured:
    """Micro-batches of one prompt, and of three and none on the other process."""
    rank = dist.get_rank()
    splits = ([ROWS[:1], ROWS[1:2]], [ROWS[2:], INERT])
    return ddp(lambda: [collate(rows) for rows in splits[rank]], everything=ROWS + INERT)


def ddp_without_prompts() -> Measured:
    return ddp(lambda: [collate(ROWS) if dist.get_rank() == 0 else empty_batch()])


def ddp_inert() -> Measured:
    return ddp(lambda: [collate(ROWS if dist.get_rank() == 0 else INERT)], everything=ROWS + INERT)


def all_inert() -> Measured:
    """No process has anything to learn from: zeros, and all of them."""
    model = tied()
    attached = clha_fast.attach(model, OPTIONS)
    loss = step(DistributedDataParallel(model), attached, [collate(INERT)])
    worst = max(float(p.grad.abs().max()) if p.grad is not None else torch.inf for p in model.parameters())
    return Measured(abs(float(loss)), worst, 0.0)


# ---- FSDP2 ----


def fsdp(
    build: Callable[[], nn.Module],
    *,
    after: bool = False,
    checkpointing: bool = False,
    own_head: bool = False,
    compiled: bool = False,
    backend: Any = "auto",
    batches: Callable[[], list[CandidateBatch]] | None = None,
    tolerance: float = EXACT,
    **settings: Any,
) -> Measured:
    model = build()
    wanted = expect(model, [collate(ROWS)])
    if checkpointing:
        model.gradient_checkpointing_enable()
    attached = None if after else clha_fast.attach(model, OPTIONS, backend=backend)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **settings)
    if own_head:
        fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=True, **settings)
    fully_shard(model, mesh=mesh, **settings)
    attached = attached or clha_fast.attach(model, OPTIONS, backend=backend)
    if compiled:
        model.compile(backend="aot_eager")
    loss = step(model, attached, [collate(mine(ROWS))] if batches is None else batches())
    return compare(wanted, loss, gradients_of(model), tolerance)


def fsdp_optimizer_after_attaching() -> Measured:
    """SGD at rate 1 shows the gradients as the weights' change: of the shards, not of what the probe had gathered."""
    model = untied()
    wanted = expect(model, [collate(ROWS)])
    before = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    attached = clha_fast.attach(model, OPTIONS)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss = step(model, attached, [collate(mine(ROWS))])
    optimizer.step()
    pairs = zip(before.named_parameters(), model.parameters(), strict=True)
    return compare(wanted, loss, {name: old.detach() - whole(new).detach() for (name, old), new in pairs})


def fsdp_accumulation() -> Measured:
    return fsdp(untied, batches=lambda: [collate([row]) for row in mine(ROWS)])


def fsdp_without_prompts() -> Measured:
    return fsdp(untied, batches=lambda: [collate(ROWS) if dist.get_rank() == 0 else empty_batch()])


def fsdp_bfloat16() -> Measured:
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    return fsdp(untied, mp_policy=policy, tolerance=ROUNDED)


# ---- tensor parallel ----


def layer_plan() -> dict[str, Any]:
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan: dict[str, Any] = {f"model.layers.*.{name}": ColwiseParallel() for name in names}
    return {**plan, **{f"model.layers.*.{name}": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}}


def tensor_parallel(*, after: bool = False, gather: bool = True, **changes: Any) -> Measured:
    """The same batch on every process; the head's rows are spread."""
    model = untied(**changes)
    wanted = expect(model, [collate(ROWS)])
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if not after:
        clha_fast.attach(model, OPTIONS)
    head = ColwiseParallel(output_layouts=Replicate()) if gather else ColwiseParallel()
    parallelize_module(model, mesh, {**layer_plan(), "lm_head": head})
    if after:
        clha_fast.attach(model, OPTIONS)
    loss = model(**collate(ROWS).as_dict()).loss
    loss.backward()
    return compare(wanted, loss, gradients_of(model))


def vocabulary_parallel() -> Measured:
    """The operator alone: uneven shards, chunks of two tokens, rows read twice, an ignored token, a softcap."""
    generator = torch.Generator().manual_seed(0)
    rank, size = dist.get_rank(), dist.get_world_size()
    head = clha_fast.HeadOptions(scale=0.7, softcap=3.0, temperature=1.3, workspace_bytes=2 * 19 * 8)
    lengths, sizes = torch.tensor([3, 0, 4, 2, 5]), torch.tensor([3, 2])
    rewards = torch.tensor([6.0, 2.0, 1.0, 5.0, -1.0])
    tokens, vocabulary = int(lengths.sum()), 37

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    hidden, weight, bias = leaf(9, 5), leaf(vocabulary, 5), leaf(vocabulary)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[4] = head.ignore_index
    rows = torch.randint(9, (tokens,), generator=generator)
    upstream = torch.randn(tokens, generator=generator, dtype=torch.float64)
    logps = reference.token_logps(hidden, weight, bias, targets, rows, head)
    ranking = (lengths, sizes, rewards, torch.tensor([2, 0]), None, None)
    loss, metrics, scores = reference.clha_loss(logps, targets, *ranking, head, OPTIONS)
    exact = reference.token_statistics(hidden, weight, bias, targets, rows, head)
    wanted = [
        torch.autograd.grad(value, (hidden, weight, bias), retain_graph=True)
        for value in (loss, logps @ upstream, logps @ upstream + exact["entropy"].square().sum())
    ]

    own = slice(*(round(vocabulary * (rank + k) / size + 0.1) for k in (0, 1)))
    shard = VocabShard(own.start, vocabulary)
    inputs = (hidden, weight[own], targets)
    arguments = {"shard": shard, "bias": bias[own], "row_index": rows, "head": head}
    got_logps = clha_fast.token_logps(*inputs, **arguments)
    same_logps, statistics = clha_fast.token_logps(*inputs, **arguments, statistics=STATISTICS)
    given = clha_fast.RankingInputs(*ranking[:4])
    got_loss, got = clha_fast.linear_loss(*inputs, given, OPTIONS, **arguments)
    errors = [(got_logps - logps).abs().max(), (got_loss - loss).abs(), (got.scores - scores).abs().max()]
    errors += [(same_logps - logps).abs().max(), *((statistics[name] - exact[name]).abs().max() for name in exact)]
    values = torch.stack([*errors, (got.values - metrics).abs().max() / 1e6]).max()  # metrics are float32
    worst = torch.zeros((), dtype=torch.float64)
    both = same_logps @ upstream + statistics["entropy"].square().sum()
    for value, expected in zip((got_loss, got_logps @ upstream, both), wanted, strict=True):
        grads = list(torch.autograd.grad(value, (hidden, weight, bias), retain_graph=True))
        for grad in grads[1:]:  # each process fills its own rows
            dist.all_reduce(grad)
        for grad, want in zip(grads, expected, strict=True):
            worst = torch.maximum(worst, (grad - want).norm() / want.norm())
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return Measured(float(values.detach()), float(worst), 1e-12)


def transformers_plan(build: Callable[[], nn.Module]) -> Measured:
    """`from_pretrained(tp_plan="auto")`, attached afterwards."""
    model = build()
    wanted = expect(model, [collate(ROWS)])
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder, src=0)
    if dist.get_rank() == 0:
        model.save_pretrained(folder[0])
    dist.barrier()
    parallel = type(model).from_pretrained(folder[0], tp_plan="auto").train()
    assert isinstance(parallel.lm_head.weight, DTensor)
    with clha_fast.attach(parallel, OPTIONS):
        loss = parallel(**collate(ROWS).as_dict()).loss
        loss.backward()
    return compare(wanted, loss, gradients_of(parallel))


# ---- loops ----


def accelerate_loop() -> Measured:
    from accelerate import Accelerator

    model = untied()
    wanted = expect(model, [collate(ROWS)])
    attached = clha_fast.attach(model, OPTIONS)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    assert isinstance(wrapped, DistributedDataParallel)
    parts = [collate([row]) for row in mine(ROWS)]
    counts = attached.counts(parts)
    total = torch.zeros(())
    for part in parts:
        with accelerator.accumulate(wrapped):
            loss = wrapped(**part.as_dict(), **counts).loss
            accelerator.backward(loss)
            total += loss.detach() / len(parts)
    return compare(wanted, total, gradients_of(wrapped))


def accelerate_fsdp2() -> Measured:
    """What `accelerator.prepare` calls for FSDP2; it does so for GPUs only, hence the call by hand."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    model = untied()
    wanted = expect(model, [collate(ROWS)])
    attached = clha_fast.attach(model, OPTIONS)
    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    wrapped = fsdp2_prepare_model(accelerator, model)
    assert type(wrapped).__name__.startswith("FSDP")
    assert isinstance(wrapped.lm_head.weight, DTensor)
    loss = step(wrapped, attached, [collate(mine(ROWS))])
    return compare(wanted, loss, gradients_of(wrapped))


def plain_trainer() -> Measured:
    """transformers' own Trainer: SGD at rate 1 shows the gradient as the weights' change."""
    from transformers import Trainer, TrainingArguments

    model = tied()
    wanted = expect(model, [collate([row]) for row in ROWS])
    before = copy.deepcopy(model)
    clha_fast.attach(model, OPTIONS)
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        ddp_backend="gloo",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    collator = RankedCollator(TOKENIZER, OPTIONS)
    trainer = Trainer(model, args, data_collator=collator, train_dataset=RankedDataset(ROWS, collator))
    trainer.train()
    got = dict(
        zip(wanted[1], (a - b for a, b in zip(before.parameters(), model.parameters(), strict=True)), strict=True)
    )
    loss = torch.tensor(next(line["loss"] for line in trainer.state.log_history if "loss" in line))
    return compare(wanted, loss, {name: grad.detach() for name, grad in got.items()})


def deepspeed_zero(stage: int) -> Measured:
    """The reference backend keeps the weight for the backward, when ZeRO-3 must have gathered it again."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    model = untied()
    wanted = expect(model, [collate(ROWS)])
    attached = clha_fast.attach(model, OPTIONS, backend="reference")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    part = collate(mine(ROWS))
    loss = engine(**part.as_dict(), **attached.counts([part])).loss
    engine.backward(loss)
    got = {plain_name(name): safe_get_full_grad(parameter) for name, parameter in engine.module.named_parameters()}
    return compare(wanted, loss, got)


CASES: dict[str, Callable[[], Measured]] = {
    "DDP": ddp,
    "DDP, attached after wrapping": lambda: ddp(after=True),
    "DDP, gradient checkpointing": lambda: ddp(checkpointing=True),
    "DDP, autocast bfloat16": lambda: ddp(autocast=True),
    "DDP, torch.compile": lambda: ddp(compiled=True),
    "DDP, gradient accumulation, uneven": ddp_accumulation,
    "DDP, a process without prompts": ddp_without_prompts,
    "DDP, a process without a kept pair": ddp_inert,
    "DDP, nothing kept on any process": all_inert,
    "FSDP2, untied": lambda: fsdp(untied),
    "FSDP2, tied": lambda: fsdp(tied),
    "FSDP2, untied, gradient checkpointing": lambda: fsdp(untied, checkpointing=True),
    "FSDP2, tied, gradient checkpointing": lambda: fsdp(tied, checkpointing=True),
    "FSDP2, CPU offload, untied": lambda: fsdp(untied, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "FSDP2, CPU offload, tied": lambda: fsdp(tied, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    # The reference backend keeps the gathered weight for the backward, as backends do that recompute.
    "FSDP2, head sharded by itself": lambda: fsdp(untied, own_head=True, backend="reference"),
    "FSDP2, attached after sharding": lambda: fsdp(untied, after=True),
    "FSDP2, attached after sharding, then an optimizer": fsdp_optimizer_after_attaching,
    "FSDP2, mixed precision bfloat16": fsdp_bfloat16,
    "FSDP2, gradient accumulation": fsdp_accumulation,
    "FSDP2, a process without prompts": fsdp_without_prompts,
    "FSDP2, torch.compile": lambda: fsdp(untied, compiled=True),
    "Vocabulary-parallel operator, float64": vocabulary_parallel,
    "Tensor parallel (parallelize_module)": tensor_parallel,
    "Tensor parallel, logits left sharded": lambda: tensor_parallel(gather=False),
    "Tensor parallel, uneven vocabulary": lambda: tensor_parallel(more_tokens=3),
    "Tensor parallel, head with a bias": lambda: tensor_parallel(more_tokens=3, bias=True),
    "Tensor parallel, attached after sharding": lambda: tensor_parallel(after=True),
    "Tensor parallel, tp_plan of transformers, untied": lambda: transformers_plan(untied),
    "Tensor parallel, tp_plan of transformers, tied": lambda: transformers_plan(tied),
    "accelerate, DDP, accumulation": accelerate_loop,
    "accelerate, FSDP2": accelerate_fsdp2,
    "transformers.Trainer, DDP, accumulation": plain_trainer,
    "DeepSpeed ZeRO-2": lambda: deepspeed_zero(2),
    "DeepSpeed ZeRO-3": lambda: deepspeed_zero(3),
}


def main(out: str, names: Sequence[str]) -> None:
    """Appends a line to `out` when a case begins, and one with its result; the first process writes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    for name in names:
        begun = time.perf_counter()
        if dist.get_rank() == 0:
            with open(out, "a", encoding="utf-8") as file:
                file.write(json.dumps({"begun": name}) + "\n")
        measured = CASES[name]()
        torch._dynamo.reset()
        dist.barrier()
        line = {"name": name, **dataclasses.asdict(measured), "seconds": round(time.perf_counter() - begun, 2)}
        if dist.get_rank() == 0:
            with open(out, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    dist.barrier()
    # Not destroy_process_group: wrappers' leftovers wait for one another in it.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
