"""What `test_trainer_processes` starts in one process or two: one run of CLHATrainer under a wrapper; no test.

`python -m tests.support.two_processes WRAPPER FOLDER OUT` trains four steps with a checkpoint after two, evaluates, and
where the wrapper can be resumed trains the last two again from the checkpoint. The first process writes weights and
metrics to OUT.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from clha_fast.models.sharding import reshard
from clha_fast.objectives import OBJECTIVES
from clha_fast.training.config import CLHAConfig
from clha_fast.training.trainer import CLHATrainer
from tests.support.comparing import Comparing
from tests.support.helpers import ROOT
from tests.support.tiny import make_model, make_rows, make_tokenizer

TOKENIZER = make_tokenizer()
GLOBAL_BATCH = 4
FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


def zero(stage: int) -> dict[str, Any]:
    with open(ROOT / "examples" / "zero3.json", encoding="utf-8") as file:
        given: dict[str, Any] = json.load(file)
    # 0: or all of so small a model would be held whole everywhere.
    given["zero_optimization"] |= {"stage": stage, "stage3_param_persistence_threshold": 0}
    return given


def settings(wrapper: str, folder: str, world: int) -> dict[str, Any]:
    sharing = int(os.environ.get("SEQUENCE_PARALLEL", "1"))
    given: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": 4,
        # The processes of a tensor-parallel group share a batch.
        "per_device_train_batch_size": GLOBAL_BATCH // 2 // (1 if wrapper == "tp" else world // sharing),
        "sequence_parallel_size": sharing,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 2,
        "normalizer": "global",
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 2,
        "eval_samples": 2,
        "eval_sample_tokens": 5,
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": False,
        "layout": os.environ.get("ROW_LAYOUT", "padded"),
        **json.loads(os.environ.get("MORE_SETTINGS", "{}")),
    }
    if wrapper.startswith("zero"):
        return {
            **given,
            "deepspeed": zero(int(wrapper[4])),
            "accelerator_config": {"use_configured_state": True},
        }
    given |= {"use_cpu": True, "ddp_backend": "gloo"}
    if wrapper.startswith("fsdp") and wrapper != "fsdp-environment":
        sharded = {"state_dict_type": "SHARDED_STATE_DICT"} if wrapper.endswith("sharded") else {}
        given |= {"fsdp": True, "fsdp_config": {**FSDP, **sharded}}
    if wrapper in ("native", "tp"):
        given |= {"save_strategy": "no"}
    return given


def build(wrapper: str, folder: str) -> nn.Module:
    whole = make_model(len(TOKENIZER), tie_word_embeddings=False)
    if wrapper not in ("native", "tp", "zero3-loaded"):
        return whole
    from transformers.distributed import DistributedConfig

    if dist.get_rank() == 0:
        whole.save_pretrained(f"{folder}-start")
    dist.barrier()
    if wrapper == "zero3-loaded":  # in parts, since there are settings with ZeRO-3 in them by now
        loaded = type(whole).from_pretrained(f"{folder}-start")
        assert all(parameter.numel() == 0 for parameter in loaded.parameters())
        return loaded
    size = dist.get_world_size()
    config = DistributedConfig(fsdp_size=size) if wrapper == "native" else DistributedConfig(tp_size=size)
    return type(whole).from_pretrained(f"{folder}-start", distributed_config=config)


def weights(trainer: CLHATrainer) -> dict[str, Tensor]:
    """All of them, whole; every process must call."""
    if trainer.is_deepspeed_enabled:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(trainer.model.parameters())):
            return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    reshard(trainer.model)
    found = {}
    for name, p in trainer.model.named_parameters():
        found[name] = (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
    return found


def compare(folder: str) -> tuple[dict[str, Any], str]:
    """(settings of an objective that compares with a copy, what is said where a model is spread over processes)."""
    OBJECTIVES["comparing"] = Comparing
    given = {"objective": {"name": "comparing", "beta": 2.0}}
    if int(os.environ["WORLD_SIZE"]) == 1:
        return given, ""
    try:
        make("native", f"{folder}-spread", **given)
    except ValueError as error:
        return given, str(error)
    return given, "nothing"


def make(wrapper: str, folder: str, **changes: Any) -> CLHATrainer:
    from accelerate import DistributedType, PartialState
    from accelerate.state import AcceleratorState

    world = int(os.environ["WORLD_SIZE"])
    if wrapper.startswith("zero"):
        # Trainer asks accelerate for DeepSpeed without naming a backend, and that finds one for GPUs alone.
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
    args = CLHAConfig(**{**settings(wrapper, folder, world), **changes})
    if wrapper.startswith(("fsdp", "tp")):
        # accelerate's list of what FSDP and tensor parallelism can run on lacks processes on CPUs; the rest of its
        # road does not mind them.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return CLHATrainer(
        build(wrapper, folder),
        args,
        train_dataset=make_rows(16),
        eval_dataset=make_rows(7, seed=5),  # 7: the last round of batches is filled up
        processing_class=TOKENIZER,
        # Its steps are proportional to the gradients, and its state has to be saved.
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.05, "momentum": 0.5}),
    )


def main(wrapper: str, folder: str, out: str) -> None:
    torch.set_num_threads(1)
    changes, said = compare(folder) if wrapper == "compare" else ({}, "")
    trainer = make(wrapper, folder, **changes)
    if wrapper == "ddp":  # accelerate would hold the model for prepared, and leave it without its wrapper
        trainer.evaluate()
    trainer.train()
    metrics = trainer.evaluate()
    after = weights(trainer)
    keep = ("loss", "rank_loss", "rewards/accuracies", "num_tokens", "inert_candidates", "grad_norm")
    lines = [{k: line[k] for k in keep} for line in trainer.state.log_history if "loss" in line]
    skip = ("runtime", "per_second", "epoch", "preparation")
    result = {
        "model": type(trainer.model_wrapped).__name__,
        "sharded": any(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "weights": after,
        "eval": {k: v for k, v in metrics.items() if not any(word in k for word in skip)},
        "logs": lines,
        "said": said,
    }
    trainer.save_model()
    if trainer.args.save_strategy != "no":
        again = make(wrapper, folder, **changes)
        again.train(resume_from_checkpoint=os.path.join(folder, "checkpoint-2"))
        result["resumed"] = weights(again)
    if trainer.is_world_process_zero():
        result["files"] = sorted(os.listdir(folder))
        torch.save(result, out)
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # wrappers' leftovers wait for one another in destroy_process_group


if __name__ == "__main__":
    main(*sys.argv[1:])
