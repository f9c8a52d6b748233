"""Whether a training step fits a memory, and which switches would make it fit."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import PreTrainedConfig, TrainingArguments

from clha_fast.batching.segments import LAYOUTS
from clha_fast.options import count
from clha_fast.planning.step import Rows, StepMemory, Switches, build, count_step, loss_backend

GIB = 2**30


@dataclass(frozen=True)
class Load:
    """One micro-batch of prompts alike: `candidates` responses of `response` tokens each, behind `prompt` tokens.

    sequence_parallel_size: processes that share the tokens of its rows.
    """

    prompts: int
    candidates: int
    prompt: int
    response: int
    layout: str = "padded"
    sequence_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name in ("prompts", "candidates", "response", "prompt", "sequence_parallel_size"):
            object.__setattr__(self, name, count(name, getattr(self, name), "a positive whole number"))
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {self.layout!r}")

    @property
    def rows(self) -> Rows:
        """What the model runs; rows of one length have no padding."""
        every, largest = self.prompts * self.candidates, self.candidates * self.response
        scored = self.prompts * largest
        if self.layout == "padded":
            return Rows(every, self.prompt + self.response, scored, largest)
        once = self.prompts if self.layout == "shared" else every
        return Rows(1, once * self.prompt + scored, scored, largest)

    @property
    def slices(self) -> Rows:
        """What of them one process has. Attention has all tokens there, of so much fewer heads: as many numbers."""
        whole, size = self.rows, self.sequence_parallel_size
        width = -(-whole.width // size)
        # Responses are the last tokens of a row: a process may have nothing else.
        scored = min(whole.scored, whole.rows * width)
        return Rows(whole.rows, width, scored, min(whole.largest, scored))


@dataclass(frozen=True)
class Plan:
    """A step's memory. parameters, trained: numbers of weights. load, switches: what was counted.

    backend: of the loss, where `switches.backend` may be "auto"; "" for a reward model.
    """

    load: Load
    switches: Switches
    memory: StepMemory
    parameters: int
    trained: int
    backend: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values, memory in bytes; what `clha-fast plan --json` prints."""
        adapter = None if self.switches.adapter is None else self.switches.adapter.peft_type.value
        switches = dataclasses.asdict(dataclasses.replace(self.switches, adapter=adapter))
        switches |= {"dtype": str(self.switches.dtype).removeprefix("torch."), "counted_backend": self.backend or None}
        return {
            "load": dataclasses.asdict(self.load) | {"tokens": self.load.rows.rows * self.load.rows.width},
            "scored_tokens": self.load.rows.scored,
            "switches": switches,
            "parameters": self.parameters,
            "trained": self.trained,
            "bytes": dataclasses.asdict(self.memory) | {"total": self.memory.total},
        }


def plan(config: PreTrainedConfig, load: Load, switches: Switches) -> Plan:
    """Counts a training step of the model that `config` describes; no weight is made or read.

    Raises:
        ValueError: processes of `sequence_parallel_size` that do not divide the heads, or a reward model for them;
            `offload` where the installed transformers cannot train with it.
        ValueError, ImportError, UnsupportedHeadError: as `models.tiled.tile_mlps`, peft and the loss refuse a model.
    """
    _check_slices(config, load, switches)
    if switches.offload and not offloads():
        raise ValueError(
            f"offload: expected False with transformers {transformers.__version__}, which has no "
            "activation_checkpointing_kwargs to train with it (5.23 has), got True"
        )
    model = build(copy.deepcopy(config), switches)
    numbers = [(p.numel(), p.requires_grad) for p in model.parameters()]
    counted = switches
    if load.sequence_parallel_size > 1 and switches.backend == "auto":
        # Log-probabilities cross processes before there is a loss: "auto" has no sweep to take the workspace for.
        counted = dataclasses.replace(switches, backend="triton")
    backend = loss_backend(model, load.slices, counted)
    memory = count_step(model, load.slices, counted)
    trained = sum(n for n, trains in numbers if trains)
    return Plan(load, switches, memory, sum(n for n, _ in numbers), trained, backend)


def offloads() -> bool:
    """Whether training with the installed transformers can keep layer checkpoints in host memory."""
    return "activation_checkpointing_kwargs" in TrainingArguments.__dataclass_fields__


def _check_slices(config: Any, load: Load, switches: Switches) -> None:
    size, heads = load.sequence_parallel_size, getattr(config.get_text_config(), "num_attention_heads", None)
    if size > 1 and switches.reward_model:
        raise ValueError(f"sequence_parallel_size: expected 1 for a reward model, got {size}")
    if size > 1 and isinstance(heads, int) and heads % size:
        raise ValueError(f"sequence_parallel_size: expected a divisor of the {heads} attention heads, got {size}")


# In the order in which they are tried: the option, whether it is there to be taken, and how.
_Change = Callable[[Load, Switches], tuple[Load, Switches]]
_WAYS: dict[str, tuple[Callable[[Load, Switches], bool], _Change]] = {
    "layout=shared": (
        lambda load, switches: load.layout != "shared" and load.candidates > 1,
        lambda load, switches: (dataclasses.replace(load, layout="shared"), switches),
    ),
    "checkpointing": (
        lambda load, switches: not switches.checkpointing,
        lambda load, switches: (load, dataclasses.replace(switches, checkpointing=True)),
    ),
    "tiled_mlp": (
        # The trainer of reward models has no such setting.
        lambda load, switches: not switches.tiled_mlp and not switches.reward_model,
        lambda load, switches: (load, dataclasses.replace(switches, tiled_mlp=True)),
    ),
    "offload": (
        lambda load, switches: not switches.offload,
        lambda load, switches: (load, dataclasses.replace(switches, offload=True)),
    ),
    "lora_rank=16": (
        lambda load, switches: switches.lora_rank is None and switches.adapter is None,
        lambda load, switches: (load, dataclasses.replace(switches, lora_rank=16)),
    ),
}


def ways_to_fit(config: PreTrainedConfig, load: Load, switches: Switches, memory: int) -> tuple[list[str], Plan]:
    """Switches to turn on until the step fits `memory` bytes, and the plan with them.

    They are turned on one by one, those that change nothing of what is learned first, and then each that is not needed
    is left out again, the last first. All of them, and a plan that does not fit, where nothing helps.
    """

    def counted(names: list[str]) -> Plan | None:
        now = load, switches
        for name in names:
            now = _WAYS[name][1](*now)
        if now[1].offload and not now[1].checkpointing:
            return None
        try:
            return plan(config, *now)
        except ValueError:  # a model without MLPs to tile
            return None

    chosen: list[str] = []
    best = plan(config, load, switches)
    for name, (there, _) in _WAYS.items():
        if best.memory.total <= memory:
            break
        found = counted([*chosen, name]) if there(load, switches) else None
        if found is not None:
            chosen, best = [*chosen, name], found
    if best.memory.total <= memory:
        for name in reversed(list(chosen)):
            rest = [other for other in chosen if other != name]
            found = counted(rest)
            if found is not None and found.memory.total <= memory:
                chosen, best = rest, found
    return chosen, best


_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer ({optimizer})",
    "kept": "{kept}",
    "layer": "a layer at work{again}",
    "head": "the loss{backend}",
    "total": "at the most",
    "host": "in host memory",
}


def table(found: Plan) -> str:
    """The plan's memory in GiB, a line a part."""
    switches, memory = found.switches, found.memory
    words = {
        "optimizer": switches.optimizer,
        "kept": "layer checkpoints" if switches.checkpointing else "activations of all layers",
        "again": ", recomputed" if switches.checkpointing else "",
        "backend": f" ({found.backend})" if found.backend else "",
    }
    values = dataclasses.asdict(memory) | {"total": memory.total}
    names = [name for name in _PARTS if name != "host" or memory.host]
    return "\n".join(f"{_PARTS[name].format(**words):<32} {values[name] / GIB:9.2f} GiB" for name in names)
