"""One training step of a model on the meta device: its memory, part by part, in bytes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from clha_fast.backends.memory import Workspace
from clha_fast.models.adapters import active_module, import_peft, with_adapter
from clha_fast.models.embedding import head_of
from clha_fast.models.tiled import tile_mlps
from clha_fast.ops.dispatch import planned
from clha_fast.planning.live import LiveMemory

_ATTENTION = "clha_fast_counted"
WORKSPACE = 64 * 2**20  # of the Triton backend; the torch backend's least is a quarter, see `HeadOptions`
BACKENDS = ("auto", "triton", "workspace", "torch")
# What AdamW keeps of a trained weight, in weights: torch's own in the weight's dtype, bitsandbytes' in a byte each.
OPTIMIZERS = {"adamw": lambda size: 2 * size, "adamw_8bit": lambda size: 2, "sgd": lambda size: 0}


@dataclass(frozen=True)
class Rows:
    """Token ids [rows, width] of a forward and backward; `scored` are response tokens, `largest` those of a prompt."""

    rows: int
    width: int
    scored: int
    largest: int = 0


@dataclass(frozen=True)
class Switches:
    """How a step is run.

    Attributes:
        dtype: of weights and activations. lora_rank: adapters on every linear layer of the body train alone.
        adapter: a configuration of peft's, whose adapter trains alone. Without either all weights train.
        reward_model: a classifier with one label, in the place of the language model.
        checkpointing: each layer keeps its input and is recomputed. tiled_mlp: see `models.tiled`. offload: checkpoints
            wait in host memory. optimizer: a key of `OPTIMIZERS`.
        backend: of the loss, one of `BACKENDS`. memory: the device's bytes, on which "auto" depends.
        workspace_bytes: as `HeadOptions` has it.
    """

    dtype: torch.dtype = torch.bfloat16
    lora_rank: int | None = None
    adapter: Any = None
    reward_model: bool = False
    checkpointing: bool = True
    tiled_mlp: bool | int = False
    offload: bool = False
    optimizer: str = "adamw"
    backend: str = "auto"
    memory: int | None = None
    workspace_bytes: int | None = None

    @property
    def adapter_config(self) -> Any:
        """What peft makes the adapter of; None without one."""
        if self.adapter is not None or self.lora_rank is None:
            return copy.deepcopy(self.adapter)  # peft fills in what it has chosen
        kind = "SEQ_CLS" if self.reward_model else "CAUSAL_LM"
        return import_peft().LoraConfig(r=self.lora_rank, target_modules="all-linear", task_type=kind)


@dataclass(frozen=True)
class StepMemory:
    """Bytes on the device, and `host`, in the order in which they come to be.

    Attributes:
        weights: parameters and buffers. gradients: of what trains, all at once (as when micro-batches add up).
        optimizer: its state. kept: what the forward of all layers leaves for the backward; with checkpointing a layer's
            input each. layer: the most that stands beside it while a layer runs, or is recomputed and differentiated.
        head: the loss with its gradients, beside `kept`, and what stands between the last layer and the loss.
        host: checkpoints in host memory.
    """

    weights: int
    gradients: int
    optimizer: int
    kept: int
    layer: int
    head: int
    host: int

    @property
    def total(self) -> int:
        """The most at a time on the device: a layer and the head do not run together."""
        return self.weights + self.gradients + self.optimizer + self.kept + max(self.layer, self.head)


class _Attention(torch.autograd.Function):
    """What a fused attention allocates and keeps: its inputs, the output and a float32 log-sum-exp a row and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, tokens, _ = query.shape
        out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)  # as they lay it out
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _Loss(torch.autograd.Function):
    """What stands for the head: it keeps hidden states, and their gradient is new."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


def _no_mask(**_: Any) -> None:
    return None


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, _no_mask)


def build(config: PreTrainedConfig, switches: Switches) -> PreTrainedModel:
    """The model without values, as it would train."""
    for part in (config, config.get_text_config()):
        part._attn_implementation = _ATTENTION
        part.use_cache = False
    if switches.reward_model:
        config.num_labels = 1
    kind = AutoModelForSequenceClassification if switches.reward_model else AutoModelForCausalLM
    adapter = switches.adapter_config
    with torch.device("meta"):
        model: Any = kind.from_config(config, dtype=switches.dtype)
        if adapter is not None:
            _adapt(model, adapter)
    model.train()
    if switches.tiled_mlp is not False:
        tile_mlps(model, switches.tiled_mlp)
    if switches.checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def _adapt(model: PreTrainedModel, adapter: Any) -> None:
    """Puts the adapter's layers into the model."""
    if adapter.is_prompt_learning:
        raise ValueError(
            f"peft_config: expected an adapter in the model's layers, got {adapter.peft_type.value}, whose tokens in "
            "front of the text are not counted; plan the model alone, with a longer prompt"
        )
    adapter.inference_mode = False
    if isinstance(getattr(adapter, "init_lora_weights", None), str):
        adapter.init_lora_weights = True  # others take their first weights out of the model's values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        with_adapter(model, adapter)
    head = model.get_output_embeddings()
    if head is not None and hasattr(active_module(head), "base_layer"):
        raise ValueError(
            "peft_config: expected an adapter beside the output embedding, got one on it, whose logits run through the "
            "adapter a chunk at a time and are not counted; measure a short run instead"
        )


def _layers(model: nn.Module) -> nn.ModuleList:
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part)]
    if not lists:
        raise ValueError(f"model: expected layers in an nn.ModuleList, got {type(model).__name__} without one")
    return max(lists, key=lambda part: sum(p.numel() for p in part.parameters()))


def _alike(layers: nn.ModuleList) -> list[tuple[nn.Module, int]]:
    """A layer of each kind, by its modules and its parameters' shapes, and how many there are."""
    kinds: dict[Any, list[nn.Module]] = {}
    for layer in layers:
        shapes = [(name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters()]
        kinds.setdefault(repr((layer, shapes)), []).append(layer)
    return [(found[0], len(found)) for found in kinds.values()]


def _offloading(run: Callable[..., Any], host: list[int], *args: Any, **kwargs: Any) -> Any:
    """`run`, a checkpoint function, whose checkpoints leave the device; their bytes are added to `host`."""

    def pack(tensor: Tensor) -> Any:
        host.append(tensor.nbytes)
        return tensor.shape, tensor.dtype

    def unpack(held: Any) -> Tensor:
        return torch.empty(held[0], dtype=held[1], device="meta")

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return run(*args, **kwargs)


def loss_backend(model: nn.Module, rows: Rows, switches: Switches) -> str:
    """The loss's backend that is counted; "" for a reward model.

    "auto" is what it takes in training on an NVIDIA GPU of `switches.memory`; where that is not given, "workspace",
    which it takes on large ones.
    """
    if switches.reward_model or switches.backend != "auto":
        return "" if switches.reward_model else switches.backend
    if switches.memory is None:
        return "workspace"
    return planned(switches.memory, _workspace(model, switches), rows.scored)[0]


def _workspace(model: nn.Module, switches: Switches) -> Workspace:
    weight: Any = head_of(model).weight
    words, width = weight.shape
    return Workspace(words, width, weight.itemsize, switches.workspace_bytes, bool(weight.requires_grad))


def head_bytes(model: nn.Module, rows: Rows, switches: Switches) -> int:
    """The loss and its gradients beside hidden states and weight, counted as docs/kernels.md and `backends/torch` say.

    Rows of hidden [M, H], scored tokens N: sums of their gradients in float32, the gradient itself, the workspace, and
    the weight's gradient where it trains. A reward model's: a logit of each position, and gradients of both.

    Where "auto" takes "triton" for so many tokens, and "workspace" for a smaller step of the same run, the larger.
    """
    tokens, every, backend = rows.scored, rows.rows * rows.width, loss_backend(model, rows, switches)
    if not backend:
        config: Any = model.config
        return every * switches.dtype.itemsize * (int(config.get_text_config().hidden_size) + 2)
    if backend == "workspace":
        return _workspace(model, switches).peak(tokens, every, rows.largest)
    head: Any = head_of(model)
    weight: Tensor = head.weight
    words, width = weight.shape
    own = words * width * (4 if backend == "torch" else weight.itemsize) if weight.requires_grad else 0
    sums = 4 * width * tokens
    if backend == "triton":
        workspace = switches.workspace_bytes or WORKSPACE
        found = own + sums + width * weight.itemsize * max(tokens, every) + workspace
        return max(found, _smaller_step(model, rows, switches))
    later = width * (4 * every + (weight.itemsize * every if weight.itemsize < 4 else 0))
    store = switches.workspace_bytes or max(WORKSPACE // 4, words * width)
    return own + min(store, 4 * words * tokens) + sums + later


def _smaller_step(model: nn.Module, rows: Rows, switches: Switches) -> int:
    """The loss of a step of as many of the tokens as "auto" takes the workspace for; 0 where it takes it for none."""
    if switches.backend != "auto" or switches.memory is None:
        return 0
    size = _workspace(model, switches)
    limit = min(planned(switches.memory, size, rows.scored)[1], rows.scored)
    return size.peak(limit, rows.rows * rows.width * limit // rows.scored, min(rows.largest, limit)) if limit else 0


@dataclass
class _Run:
    """The body with one layer: bytes before it, what it keeps, the most beside that, and what is there at the loss."""

    base: int = 0
    kept: int = 0
    layer: int = 0
    after: int = 0
    host: int = 0


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def _run(model: PreTrainedModel, layer: Any, rows: Rows, offload: bool) -> _Run:
    trained = [p for p in model.parameters() if p.requires_grad]
    device = next(model.parameters()).device
    ids = torch.zeros(rows.rows, rows.width, dtype=torch.int64, device=device)
    ones = torch.ones_like(ids)  # given, so that nobody looks for packed texts in positions without values
    positions = torch.arange(rows.width, device=device).expand_as(ids)
    live, found = LiveMemory(), _Run()
    host: list[int] = []
    live.known(*model.parameters(), *model.buffers(), *(p.grad for p in trained), ids, ones, positions)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.base = live.now - _hidden(args, kwargs).nbytes

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        found.kept = live.now - found.base - _hidden(output if isinstance(output, tuple) else (output,), {}).nbytes
        if host:  # whoever called the layer still holds its input, for now
            found.kept -= _hidden(args, kwargs).nbytes

    checkpoint: Any = getattr(layer, "_gradient_checkpointing_func", None)
    offload = offload and checkpoint is not None
    if offload:
        layer._gradient_checkpointing_func = partial(_offloading, checkpoint, host)
    handles = [
        layer.register_forward_pre_hook(enter, with_kwargs=True),
        layer.register_forward_hook(leave, with_kwargs=True),
    ]
    try:
        with live:
            body = model.base_model(input_ids=ids, attention_mask=ones, position_ids=positions, use_cache=False)
            loss = _Loss.apply(body[0])
            del body
            found.after = live.now - found.base - found.kept
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        if offload:
            layer._gradient_checkpointing_func = checkpoint
    found.layer, found.host = live.peak - found.base - found.kept, sum(host)
    return found


def count_step(model: PreTrainedModel, rows: Rows, switches: Switches) -> StepMemory:
    """What a forward and backward of `rows` takes, counted operator by operator, a layer of each kind at a time.

    Attention counts as a fused one without a mask, the loss as `head_bytes` says.

    Args:
        model: of `build`; it is used up.

    Raises:
        ValueError: the model's own forward needs values of tensors, or a configuration that has none of these parts.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    each = OPTIMIZERS[switches.optimizer]
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    gradients, optimizer = sum(p.nbytes for p in trained), sum(p.numel() * each(p.itemsize) for p in trained)
    head = head_bytes(model, rows, switches)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    layers = _layers(model)
    runs = []
    for layer, count in _alike(layers):
        layers._modules = {"0": layer}
        try:
            runs.append((_run(model, layer, rows, switches.offload), count))
        except (NotImplementedError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"model: expected one that runs on shapes alone, got {type(model).__name__}, which does not "
                f"({str(error).splitlines()[0]}); measure a short run instead"
            ) from error
    return StepMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        kept=max(run.base for run, _ in runs) + sum(run.kept * count for run, count in runs),
        layer=max(run.layer for run, _ in runs),
        head=max(run.after for run, _ in runs) + head,
        host=sum(run.host * count for run, count in runs),
    )
