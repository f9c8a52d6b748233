"""What `test_sequence_parallel` of the trainer starts in two processes; no test.

A run whose two processes share each row is held to one in which they have batches of their own, half as large: the same
prompts in each optimiser step.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import IterableDataset

import clha_fast
from clha_fast.models.layout_probe import candidates_of, pack
from clha_fast.models.segment_masks import UnsupportedLayoutError
from clha_fast.objectives.sft import SFTOptions
from clha_fast.training.config import CLHAConfig
from clha_fast.training.trainer import CLHATrainer
from tests.support.tiny import WORDS, make_model, make_rows, make_tokenizer

TOKENIZER = make_tokenizer()


class Rows(IterableDataset[dict[str, Any]]):
    def __init__(self, count: int, seed: int = 0) -> None:
        self.rows = make_rows(count, seed=seed)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


def trainer(sharing: int, model: nn.Module, data: Any, held_out: Any, more: Any = None, **changes: Any) -> CLHATrainer:
    folder = [tempfile.mkdtemp() if dist.is_initialized() and dist.get_rank() == 0 else ""]
    if dist.is_initialized():
        dist.broadcast_object_list(folder)
    args = CLHAConfig(
        **{
            "output_dir": folder[0] or tempfile.mkdtemp(),
            "use_cpu": True,
            "ddp_backend": "gloo",
            "max_steps": 3,
            "per_device_train_batch_size": 2 * sharing,
            "per_device_eval_batch_size": 2,
            "normalizer": "global",
            "sequence_parallel_size": sharing,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "report_to": "none",
            "dataloader_pin_memory": False,
            **changes,
        }
    )
    return CLHATrainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=held_out,
        processing_class=TOKENIZER,
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.05, "momentum": 0.5}),
        **(more or {}),
    )


def same(make: Callable[[int], CLHATrainer]) -> None:
    """Log, evaluation and weights of both runs."""
    found: list[tuple[dict[str, Tensor], list[dict[str, float]], dict[str, float]]] = []
    for sharing in (2, 1):
        run = make(sharing)
        before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        run.train()
        metrics = {k: v for k, v in run.evaluate().items() if not k.endswith(("runtime", "per_second", "epoch"))}
        after = {name: p.detach() - before[name] for name, p in run.model.named_parameters()}
        logs = [line for line in run.state.log_history if "loss" in line]
        found.append((after, [{k: v for k, v in line.items() if k != "epoch"} for line in logs], metrics))
    (ours, lines, metrics), (theirs, expected, others) = found
    moved = sum(float(t.norm()) ** 2 for t in theirs.values()) ** 0.5
    apart = sum(float((ours[name] - t).norm()) ** 2 for name, t in theirs.items()) ** 0.5
    assert moved > 0.01
    assert apart < 1e-5 * moved, (apart, moved)
    assert lines == [pytest.approx(line, rel=1e-5, abs=1e-6) for line in expected]
    assert metrics == pytest.approx(others, rel=1e-5, abs=1e-6)


def adapter() -> None:
    """A reference that is the model without its adapter: both are spread, by turns."""
    lora = importlib.import_module("peft").LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    changes = {"objective": "dpo", "layout": "shared"}
    same(
        lambda sharing: trainer(
            sharing, make_model(len(TOKENIZER)), make_rows(16), make_rows(5, seed=5), {"peft_config": lora}, **changes
        )
    )


def streams() -> None:
    """Data without a length, also held out: seven prompts fill no round of batches."""
    same(lambda sharing: trainer(sharing, make_model(len(TOKENIZER)), Rows(16), Rows(7, 5), layout="shared"))


def unequal() -> None:
    """One held-out prompt: what fills up the other process's batch does not count."""
    same(lambda sharing: trainer(sharing, make_model(len(TOKENIZER)), make_rows(8), make_rows(1, seed=5)))


def refused(what: str, call: Callable[[], Any], kind: type[Exception] = UnsupportedLayoutError) -> None:
    with pytest.raises(kind) as error:
        call()
    assert what in str(error.value), str(error.value)


def refusals() -> None:
    def spread(model: nn.Module, rows: Any = None, **changes: Any) -> CLHATrainer:
        return trainer(2, model, make_rows(4) if rows is None else rows, None, **changes)

    def llama(**changes: Any) -> nn.Module:
        return make_model(len(TOKENIZER), **changes)

    three = {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 24}
    refused("divides the 3 attention heads of LlamaAttention (1, 3), got 2", lambda: spread(llama(**three)))
    refused("attention dropout", lambda: spread(llama(attention_dropout=0.1), layout="auto"))
    eager = llama()
    eager.set_attn_implementation("eager")  # type: ignore[operator]
    refused("attn_implementation is 'eager'", lambda: spread(eager))
    # The first rows that show it are met in training.
    long = [{"prompt": " ".join(WORDS * 12), "completions": ["a cat", "a dog", "on a mat"]} for _ in range(4)]
    for layout in ("padded", "shared"):
        model = llama(max_position_embeddings=1024)
        misplace(model, 160)  # the rows that every model is tried on are shorter
        made = spread(model, long, layout=layout)
        refused("sequence_parallel: layout: expected a model that computes", made.train)


def given_up(**more: Any) -> None:
    """`auto`, where slices of the shared rows are wrong: padded ones from there on, said once."""
    rows = [{"prompt": " ".join(WORDS[k:] * 5), "completions": ["a cat", "a dog", "on a mat"]} for k in range(12)]
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("clha_fast").addHandler(handler)

    def make(sharing: int, **changes: Any) -> CLHATrainer:
        model = make_model(len(TOKENIZER), max_position_embeddings=1024)
        misplace(model, 160, 2)
        layout = "auto" if sharing == 2 else "padded"
        return trainer(sharing, model, rows, rows[:3], layout=layout, **changes)

    same(lambda sharing: make(sharing, **more))
    assert sum(text.startswith("layout auto: padded from here on") for text in said) == 1, said
    logging.getLogger("clha_fast").removeHandler(handler)


def other_slices() -> None:
    """Shared rows that are right say nothing of padded ones as long: a frozen copy meets those once the policy has."""
    ids = torch.randint(3, 250, (700,), generator=torch.Generator().manual_seed(0)).tolist()
    model = make_model(len(TOKENIZER), max_position_embeddings=1024).double()
    misplace(model, 150, only=lambda rows: rows > 1)
    clha_fast.attach(model, SFTOptions(), layout="shared", sequence_parallel=dist.group.WORLD)
    for count, width in ((300, 400), (500, 650)):
        prompts = [candidates_of(ids[:count], [ids[count : width - 40], ids[width - 40 : width]])]  # the longest first
        model(**pack(prompts, "shared").as_dict())
        padded = pack(prompts, "padded").as_dict()
        refused("sequence_parallel: layout: expected a model that computes", lambda: model(**padded))  # noqa: B023


def misplace(model: Any, length: int, times: float = 20, only: Callable[[int], bool] = lambda rows: True) -> None:
    """Has a model take positions from 0 on in slices of more than `length` tokens of a longer row, and mind them.

    Args:
        only: of batches of how many rows.
    """
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data *= times

    def shift(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        given = kwargs["position_ids"]
        if given.shape[1] > length and only(len(given)):
            kwargs["position_ids"] = torch.arange(given.shape[1])[None].expand_as(given)
        return args, kwargs

    model.model.rotary_emb.register_forward_pre_hook(shift, with_kwargs=True)


CASES: dict[str, Callable[[], None]] = {
    "adapter": adapter,
    "streams": streams,
    "unequal": unequal,
    "refusals": refusals,
    "given up": given_up,
    "given up, of a frozen copy too": lambda: given_up(objective="dpo"),
    "other slices": other_slices,
}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names or CASES:
        try:
            CASES[name]()
        except BaseException:
            print(f"--- {name}, process {os.environ['RANK']}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            os._exit(1)  # the other process waits for this one
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # the threads of a process whose peer has left may abort it


if __name__ == "__main__":
    main(sys.argv[1:])
