"""A GPU that is not there: CUDA tensors are shapes without memory, launches end at the real compiler's result.

What is replaced are facts that a driver knows: that there is a device, its capability and size, addresses, the launch
itself. The code under test, torch's shape functions, autograd, and Triton's specialisation and compiler are the real
ones. Tensors on the CPU stay real, values and all.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from clha_fast import ops
from tests.support.no_gpu import refuse_nondeterministic, refuse_wide_product, told

# Multiprocessors and shared memory a program (bytes) of a T4, an A100, an H200, a B200 and an MI300X, AMD's gfx942.
DEVICES = {
    75: (40, 64 * 1024),
    80: (108, 163 * 1024),
    90: (132, 227 * 1024),
    100: (148, 227 * 1024),
    942: (304, 64 * 1024),
}
# What brings values to the host, or makes a shape of them.
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "bincount", "item")


class WaitError(AssertionError):
    """The host would wait for the GPU here."""


class LaunchError(AssertionError):
    """A GPU would refuse this launch, or read and write what is not its own."""


def _is_fake(value: Any) -> bool:
    return isinstance(value, FakeTensor)


def _round_up(size: int, block: int) -> int:
    return -(-size // block) * block


def _check_product(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """What the CUDA library demands of a matrix product and torch's shape functions let pass."""
    name = func.overloadpacket.__name__
    if name not in ("mm", "addmm", "addmm_"):
        return
    *added, a, b = [t for t in args if isinstance(t, Tensor)]
    wide = next((d for d in (*args, *kwargs.values()) if isinstance(d, torch.dtype)), None)
    out = kwargs.get("out")
    made = wide or a.dtype
    assert a.dtype == b.dtype, f"{func}: {a.dtype} by {b.dtype}"
    assert wide in (None, a.dtype) or (wide == torch.float32 and a.itemsize == 2), f"{func}: {a.dtype} to {wide}"
    if made != a.dtype:
        refuse_wide_product(a.dtype)
    assert all(t.dtype in (a.dtype, made) for t in added), f"{func}: adds to {added[0].dtype}"
    if out is not None:
        shape = (a.shape[0], b.shape[1])
        assert (out.shape, out.dtype) == (shape, made), f"{func}: {shape} {made} into {list(out.shape)} {out.dtype}"


class Memory:
    """Addresses and live bytes of the fake device; blocks are multiples of 512 bytes, as the caching allocator's are.

    Memory that an operator takes and returns inside (a sort's, a library's own workspace) is not seen.
    """

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._next = 1 << 40
        self._blocks: dict[int, tuple[int, Any]] = {}

    def note(self, tensor: Tensor) -> None:
        self._address(tensor.untyped_storage())

    def pointer(self, tensor: Tensor) -> int:
        return self._address(tensor.untyped_storage()) + tensor.storage_offset() * tensor.itemsize

    def _address(self, storage: Any) -> int:
        key = storage._cdata
        if key not in self._blocks:
            size = _round_up(storage.nbytes(), 512)
            self._blocks[key] = (self._next, weakref.ref(storage, lambda _: self._freed(key, size)))
            self._next += size + 512
            self.live += size
            self.peak = max(self.peak, self.live)
        return self._blocks[key][0]

    def _freed(self, key: int, size: int) -> None:
        del self._blocks[key]
        self.live -= size


class FakeGPU(TorchDispatchMode):
    """Inside, device "cuda" means memory that is counted but not there, and nothing may be read back from it.

    Attributes:
        memory: addresses and bytes. launches: (kernel's name, grid, compiled kernel or None) of every launch.
        variants: of every kernel's name what Triton compiles for: each argument's (type, what is known of its value).
    """

    def __init__(self, capability: int = 90, *, compiles: bool = True, memory: int = 80 * 2**30) -> None:
        super().__init__()
        self.capability, self.compiles, self.total_memory = capability, compiles, memory
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.memory = Memory()
        self.launches: list[tuple[str, tuple[int, ...], Any]] = []
        self.variants: dict[str, set[tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        with self:  # `Tensor.to` and its like are several operators; below autograd they arrive whole
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(t.is_meta for t in tensors):
            raise WaitError("torch.tensor(..., device='cuda') waits for its copy")
        place = kwargs.get("device")
        if place is not None and torch.device(place).type == "meta":  # the guard's answer to "cuda" without an index
            place = kwargs["device"] = torch.device("cuda", 0)
        if not any(map(_is_fake, tensors)) and (place is None or torch.device(place).type != "cuda"):
            return func(*args, **kwargs)
        if func.namespace == "clha_fast":
            return self._operator(func, args, kwargs)
        self._refuse_waits(func, tensors, args, kwargs)
        _check_product(func, args, kwargs)
        refuse_nondeterministic(func, args, kwargs)
        # A number on the CPU travels by value; anything larger that is left here is a mistake, and stays on the CPU.
        args, kwargs = tree_map(self._fake_of, (args, kwargs))
        with self.fake:
            result = func(*args, **kwargs)
        for tensor in filter(_is_fake, tree_leaves(result)):
            if tensor.device.type == "cuda":
                self.memory.note(tensor)
        return result

    def _fake_of(self, value: Any) -> Any:
        return self.fake.from_tensor(value) if isinstance(value, Tensor) and not _is_fake(value) else value

    def _refuse_waits(self, func: Any, tensors: list[Tensor], args: Any, kwargs: dict[str, Any]) -> None:
        name = func.overloadpacket.__name__
        if name in READS:
            raise WaitError(f"{func} reads values back")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise WaitError(f"{func} makes a shape of values")
        if name == "_to_copy":
            source, target = args[0].device.type, torch.device(kwargs.get("device") or args[0].device).type
            blocking = not kwargs.get("non_blocking", False)
        elif name == "copy_":
            source, target = args[1].device.type, args[0].device.type
            blocking = not (kwargs.get("non_blocking", False) or (len(args) > 2 and args[2]))
        else:
            if name in ("index", "index_put", "index_put_"):
                self._refuse_index(func, name, args)
            return
        if source == "cuda" and target == "cpu":
            raise WaitError(f"{func} copies to the host")
        if source == "cpu" and target == "cuda" and blocking:
            raise WaitError(f"{func} waits for a copy from the host")

    @staticmethod
    def _refuse_index(func: Any, name: str, args: Any) -> None:
        indices = [t for t in args[1] if t is not None]
        if any(not _is_fake(t) and t.dim() for t in indices):
            raise WaitError(f"{func} copies an index from the CPU")
        # One number into a mask's places is a fill.
        if any(t.dtype == torch.bool for t in indices) and (name == "index" or args[2].numel() != 1):
            raise WaitError(f"{func} makes a shape of a mask")

    def _operator(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A custom operator: its real function runs, and what it returns is held against its fake one's promise."""
        with self.fake:
            promised = func(*tree_map(self._fake_of, args), **tree_map(self._fake_of, kwargs))
        definition = next(d for d in ops.OPERATORS if d._opoverload is func)
        with self:
            made = definition._init_fn(*args, **kwargs)
        owned = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is_fake(t)}
        for index, (a, b) in enumerate(zip(tree_leaves(promised), tree_leaves(made), strict=True)):
            wanted, got = ((t.shape, t.dtype, t.device, t.stride()) for t in (a, b))
            assert wanted == got, f"{func}: result {index} promised as {wanted}, is {got}"
            storage = b.untyped_storage()._cdata
            assert storage not in owned, f"{func}: result {index} shares its memory with an input or another result"
            owned.add(storage)
        return made

    def run(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        """In place of `JITFunction.run`: checks, specialises, compiles; no launch."""
        name = kernel.fn.__name__
        if not all(1 <= size < limit for size, limit in zip(grid, (2**31, 2**16, 2**16), strict=False)):
            raise LaunchError(f"{name}: grid {grid}")
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, Tensor) and argument.device.type != "cuda":
                raise LaunchError(f"{name}: a tensor on {argument.device}")
            if isinstance(argument, int) and not isinstance(argument, bool) and not -(2**63) <= argument < 2**63:
                raise LaunchError(f"{name}: argument {argument}")
            if isinstance(argument, TensorDescriptor):
                self._check_descriptor(name, argument)
        *_, bind = kernel.device_caches[0]
        self.variants.setdefault(name, set()).add(tuple(bind(*args, **kwargs)[1]))
        compiled = None
        if self.compiles:
            compiled = self._compile(kernel, *args, grid=grid, warmup=True, **kwargs)
            limit = DEVICES[self.capability][1]
            if compiled.metadata.shared > limit:
                raise LaunchError(f"{name}: {compiled.metadata.shared} bytes of shared memory of {limit}")
            if getattr(compiled.metadata, "global_scratch_size", 0):
                raise LaunchError(f"{name}: wants scratch memory from triton.set_allocator")
        self.launches.append((name, tuple(grid), compiled))
        return compiled

    def _check_descriptor(self, name: str, descriptor: TensorDescriptor) -> None:
        """What cuTensorMapEncodeTiled demands, and that the box lies in its tensor's memory."""
        base, item = descriptor.base, descriptor.base.itemsize
        strides = [stride * item for stride in descriptor.strides[:-1]]
        reach = sum((n - 1) * s for n, s in zip(descriptor.shape, descriptor.strides, strict=True)) + 1
        rules = {
            "a base on 16 bytes": base.data_ptr() % 16 == 0,
            "strides of 16 bytes, below 2^40": all(s % 16 == 0 and 0 < s < 2**40 for s in strides),
            "sizes in [1, 2^32]": all(1 <= size <= 2**32 for size in descriptor.shape),
            "blocks in [1, 256]": all(1 <= size <= 256 for size in descriptor.block_shape),
            "its own memory": (base.storage_offset() + reach) * item <= base.untyped_storage().nbytes(),
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise LaunchError(f"{name}: a descriptor of {descriptor.shape} without {', '.join(broken)}")

    @contextlib.contextmanager
    def here(self) -> Iterator[FakeGPU]:
        """The device exists inside."""
        self._compile: Callable[..., Any] = JITFunction.run
        with contextlib.ExitStack() as stack:
            stack.enter_context(told(self.capability, DEVICES[self.capability][0], self.total_memory))
            stack.enter_context(mock.patch.object(FakeTensor, "data_ptr", lambda tensor: self.memory.pointer(tensor)))
            # Eager tensors, not those of a compiler's trace.
            stack.enter_context(mock.patch("clha_fast.ops.loss.Tensor", FakeTensor))
            stack.enter_context(
                mock.patch.object(JITFunction, "run", lambda kernel, *a, **k: self.run(kernel, *a, **k))
            )
            triton.runtime.driver.set_active(_Driver(self.capability))
            yield stack.enter_context(self)


class _Driver:
    """What the compiler and the launcher ask a Triton driver for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("hip", "gfx942", 64) if capability == 942 else GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0
