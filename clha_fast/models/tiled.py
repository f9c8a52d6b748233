"""MLPs a tile of tokens at a time: the same outputs and gradients, inner activations of one tile.

An MLP works on each token by itself, so its [tokens, intermediate] activations, several of them and the largest of a
layer, need not exist for all tokens at once. A tile is run, its inner activations dropped, and recomputed when its
gradient comes (`torch.utils.checkpoint`): one more forward of the MLP, unless the layer is recomputed anyway.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from clha_fast.options import count

_ROWS = "_clha_tile_rows"


def find_mlps(model: nn.Module) -> dict[str, nn.Module]:
    """Modules, outermost first and by name, that are MLPs by their structure.

    One is a module with a forward of one argument, whose parameters are those of at least two matrices [out, in] (and
    their biases or adapters), the first of which reads what the last one writes; nothing in it convolves, mixes tokens
    or has parameters of its own. Experts that keep their weights in one tensor are none; a shared expert is.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not any(name.startswith(f"{outer}.") for outer in found) and _is_mlp(module):
            found[name] = module
    return found


def _is_mlp(module: nn.Module) -> bool:
    if any(True for _ in module.parameters(recurse=False)) or isinstance(module, (nn.Sequential, nn.ModuleList)):
        return False
    matrices = list(_matrices(module))
    if len(matrices) < 2 or len(_arguments(module)) != 1:
        return False
    leaves = [part for part in module.modules() if not any(True for _ in part.children())]
    if any(isinstance(part, (nn.Embedding, nn.modules.conv._ConvNd)) for part in leaves):
        return False
    if any(parameter.dim() > 2 for parameter in module.parameters()):
        return False
    (reads, inner), (last_reads, writes) = matrices[0], matrices[-1]
    return reads == writes and inner == last_reads


def _matrices(module: nn.Module) -> Iterator[tuple[int, int]]:
    """(in, out) of each linear layer, in the order of registration; an adapter's own matrices are its layer's."""
    for part in module.children():
        sizes = _sizes(part)
        if sizes is not None:
            yield sizes
        else:
            yield from _matrices(part)


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    layer: Any = getattr(module, "base_layer", module)  # peft's
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if type(layer).__name__ == "Conv1D":  # transformers': a linear layer with its weight transposed
        return layer.nx, layer.nf
    return None


def _arguments(module: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(type(module).forward).parameters.values())[1:]


def _gathers(module: nn.Module) -> bool:
    """Whether each call of a layer in it fetches weights from other processes, which then must make as many calls."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    inside = (part for part in module.modules() if part is not module)
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters()) or any(
        isinstance(part, FSDPModule) for part in inside
    )


def _forward(self: nn.Module, hidden: Tensor) -> Tensor:
    if _gathers(self):
        # Before the number of tiles is looked at: it differs over processes, and none may wait for another.
        raise ValueError(
            f"tiled_mlp: expected weights that are whole where an MLP runs, got a {type(self).__name__} whose layers "
            "fetch theirs call by call (ZeRO-3, or FSDP2 over single layers) while processes have different numbers "
            "of tiles; let FSDP2 shard whole MLPs or blocks, or leave tiled_mlp out"
        )
    own = type(self).forward
    rows: int = getattr(self, _ROWS)
    flat = hidden.reshape(-1, hidden.shape[-1])
    if flat.shape[0] <= rows:
        return own(self, hidden)
    if torch.is_grad_enabled():
        tiles = [checkpoint(own, self, tile, use_reentrant=False) for tile in flat.split(rows)]
    else:
        tiles = [own(self, tile) for tile in flat.split(rows)]
    return torch.cat(tiles).view(*hidden.shape[:-1], -1)


def is_tiled(module: nn.Module) -> bool:
    """Whether it runs a tile of tokens at a time, after `tile_mlps`."""
    return getattr(vars(module).get("forward"), "func", None) is _forward


def check_rows(rows: Any) -> bool | int:
    """`tiled_mlp` as it was given, a number in a text as that number.

    Raises:
        ValueError: it is neither a switch nor a positive number of tokens.
    """
    if isinstance(rows, str) and rows.isdecimal():
        rows = int(rows)
    expected = "True, False or a positive number of tokens a tile"
    return rows if isinstance(rows, bool) else count("tiled_mlp", rows, expected)


def tile_mlps(model: nn.Module, rows: int | bool) -> list[nn.Module]:
    """Makes the model's MLPs run a tile of tokens at a time, from now on, in training and evaluation; returns them.

    Outputs and gradients are those of whole MLPs, but for the order in which a weight's gradient is summed: in the
    weight's dtype, tile by tile. Dropout inside draws anew for each tile.

    Args:
        rows: tokens a tile, positive; True is as many as the MLP's input is wide (a tile's activations are then as
            large as the weights). False does nothing.

    Raises:
        ValueError: no MLP is found, one has a forward of somebody else's, or `rows` is out of range.
    """
    rows = check_rows(rows)
    if rows is False:
        return []
    found = find_mlps(model)
    if not found:
        raise ValueError(
            f"tiled_mlp: expected MLPs that work on each token by itself, got {type(model).__name__} without a module "
            "of at least two linear layers and a forward of one argument (experts behind a router are not tiled); "
            "leave tiled_mlp out"
        )
    for name, module in found.items():
        if "forward" in vars(module) and not is_tiled(module):
            raise ValueError(
                f"tiled_mlp: expected {name} with its class's forward, got one that something else has put there; "
                "set tiled_mlp before, or leave it out"
            )
    for module in found.values():
        setattr(module, _ROWS, next(_matrices(module))[0] if rows is True else rows)
        module.forward = partial(_forward, module)  # not a method, which pickle looks up on the class
    return list(found.values())


def untile(modules: list[nn.Module]) -> None:
    """Undoes `tile_mlps` on the modules it returned."""
    for module in modules:
        if is_tiled(module):
            del module.forward
            delattr(module, _ROWS)
