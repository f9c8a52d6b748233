"""Where weights are fetched from other processes call by call, what runs a varying number of calls is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import clha_fast
from clha_fast.batching.collator import RankedCollator
from clha_fast.models.tiled import tile_mlps
from tests.support.helpers import ROOT
from tests.support.tiny import make_model, make_rows, make_tokenizer

SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from tests.models.test_spread_weights import batch, lora, marked, said, tiled
from clha_fast.models.head_loss import head_loss
from clha_fast.objectives import CLHAOptions
from clha_fast.options import HeadOptions
from clha_fast.models.sharding import reshard

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, found = dist.get_rank(), {}
mesh = init_device_mesh("cpu", (2,))
# The first process has few tokens: one tile.
part = batch(1 + 3 * rank)
for units in ("linears", "mlps", "layers"):
    model, attached = tiled()
    for layer in model.model.layers:
        if units == "linears":
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                fully_shard(linear, mesh=mesh)
        fully_shard(layer.mlp if units == "mlps" else layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found[f"tiles, fsdp over {units}"] = said(lambda: model(**part).loss.backward())
    reshard(model)
    dist.barrier()
for name, make in (("tiles, zero3", tiled), ("head, zero3", lora)):
    model, attached = make()
    found[name.replace("zero3", "whole")] = said(lambda: model(**part).loss.backward())
    marked(model)
    found[name] = said(lambda: model(**part).loss.backward())
given = {
    "targets": torch.zeros(4, dtype=torch.int64),
    "candidate_lengths": torch.tensor([2, 2]),
    "candidates_per_prompt": torch.tensor([2]),
}
for words in (1, 2, 3, 33):
    weight = distribute_tensor(torch.randn(words, 4), mesh, [Shard(0)])
    settings = {"head": HeadOptions(), "objective": CLHAOptions()}
    found[f"{words} words over 2"] = said(lambda: head_loss(torch.randn(4, 4), weight, None, given, **settings))
with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
    json.dump(found, file)
dist.barrier()
__import__("os")._exit(0)
"""


def said(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def batch(prompts: int) -> dict[str, torch.Tensor]:
    collator = RankedCollator(make_tokenizer())
    found: dict[str, torch.Tensor] = collator([collator.tokenize_record(row) for row in make_rows(prompts)])
    return found


def tiled():
    model = make_model(len(make_tokenizer()))
    return model, clha_fast.attach(model, tiled_mlp=64)


def lora():
    model = make_model(len(make_tokenizer()))
    model = get_peft_model(model, LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    return model, clha_fast.attach(model)


def marked(model: nn.Module) -> None:
    """As DeepSpeed marks parameters that it spreads."""
    for place, parameter in enumerate(model.parameters()):
        parameter.ds_id = place


@pytest.mark.slow
def test_every_process_says_the_same(tmp_path: Path) -> None:
    script = tmp_path / "spread.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    refused = {name: message for name, message in first.items() if message is not None}
    assert refused.keys() == {"tiles, fsdp over linears", "tiles, zero3", "head, zero3", "1 words over 2"}
    start = "tiled_mlp: expected weights that are whole where an MLP runs, got a LlamaMLP"
    assert refused["tiles, zero3"].startswith(start)
    assert refused["tiles, fsdp over linears"] == refused["tiles, zero3"]
    assert refused["head, zero3"].startswith("model: expected a head whose weights are whole where it runs, got peft")
    assert refused["1 words over 2"].startswith(
        "weight: expected rows of the output embedding on each of 2 processes, got 1 in shares of 1"
    )


def test_one_process_fetches_from_nobody() -> None:
    for make in (tiled, lora):
        model, _ = make()
        marked(model)
        model(**batch(3)).loss.backward()
    assert tile_mlps(model, False) == []
