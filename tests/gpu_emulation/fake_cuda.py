"""A CUDA device that is not there: its tensors have shapes and no values, and every operator on
them is counted. Real CPU tensors stay real. Needs `guard.cpp`, preloaded (see conftest.py).

What this shows is what torch would be asked to do: which kernels, in which precision, how many
bytes are live at most, and where the host would wait for the device. It shows neither times nor
results.
"""

from __future__ import annotations

import traceback
import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

ROOMS = ("/services/", "/trainer/", "/rollout/", "/teacher/")
BYTES_A_S, PRODUCTS_A_S = 2.7e12, 620e12  # assumed of an H100: memory, bfloat16 matrices
_PRODUCTS = {"mm", "addmm", "bmm"}
_BLOCK = 512  # bytes, what torch's CUDA allocator rounds up to
_NAMED_ALONE = {"gather", "embedding"}  # of their first tensor they read what indices name alone
_WRITTEN_ALONE = {"copy_", "zero_", "fill_", "add_slope"}  # in place, whatever was there before
_READ_ALONE = {"grads"}  # which the optimizer would write only if it unscaled them
_NO_COPY = {"_unsafe_view", "empty_like", "new_empty"}
_THERE_ALONE = {"_fused_adamw_"}  # would read memory of the host by addresses of its own
_SYNCING = {"nonzero", "masked_select", "_unique2", "unique_dim"}  # sizes that the host must know


def pretend() -> None:
    """Makes torch believe in the device. For a process of its own: nothing is taken back."""
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.device_count = lambda: 1
    torch.cuda._lazy_init = lambda: None
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    Tensor.pin_memory = lambda self, *_, **__: self
    torch.nn.Module.to = lambda self, *_, **__: self  # all is made there: fakes cannot be moved
    torch._C._set_only_lift_cpu_tensors(True)


class FakeCuda(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        live, peak: bytes of the storages on the device, now and at most.
        calls: calls of each operator and the precision of its first tensor, `name dtype`.
        syncs: where the host waited for the device, `operator file:line`.
        moved: bytes read and written by each operator.
        seconds: what each operator takes of an H100 at assumed rates, by its bytes or its matrix
            products, whichever is more; attention, whose lengths are unknown here, by its bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._storages: dict[int, int] = {}
        self.live = self.peak = 0
        self.calls: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)]
        target = kwargs.get("device")
        if not given and (target is None or torch.device(target).type != "cuda"):
            return func(*args, **kwargs)
        space, _, name = func._schema.name.partition("::")
        if name == "_local_scalar_dense":
            if args[0].is_cuda:
                self._waited(name)
            return 1.0 if args[0].is_floating_point() else 1
        home = target or (args[0].device if name == "copy_" else None)
        to_host = given and home is not None and torch.device(home).type == "cpu"
        if name in _SYNCING or (
            to_host and not (kwargs.get("non_blocking") or args[2:] == (True,))
        ):
            self._waited(name)
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self._waited("index by a mask")
            return self._all_of(*args)
        if name in _THERE_ALONE:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            assert all(x.is_cuda for x in tensors), f"{name} is given memory of the host"
        lifted_args, lifted_kwargs = tree_map(self._lifted, (args, kwargs))
        with self._fake:
            out = func(*lifted_args, **lifted_kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, FakeTensor) and x.is_cuda]
        for tensor in made:
            self._hold(tensor)
        if given:
            self.calls[f"{name} {str(given[0].dtype).removeprefix('torch.')}"] += 1
        if not func.is_view and space != "prim" and name not in _NO_COPY:
            read = given[1:] if name in _NAMED_ALONE else given
            moved = sum(_bytes(x) for x in _different([*read, *made]))
            moved += sum(_bytes(x) for x in _changed(func, args, kwargs))
            self.moved[name] += moved
            work = flop_registry.get(func._overloadpacket, lambda *_, **__: 0)
            products = work(*args, **kwargs, out_val=out) if name in _PRODUCTS else 0
            self.seconds[name] += max(moved / BYTES_A_S, products / PRODUCTS_A_S)
        return out

    def _all_of(self, tensor: Tensor, indices: Any) -> Tensor:
        """What a mask that lets everything through takes out: how much it would be is unknown."""
        mask = next(i for i in indices if i is not None)
        with self._fake:
            shape = (mask.numel(), *tensor.shape[mask.ndim :])
            return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)

    def _lifted(self, x: Any) -> Any:
        if isinstance(x, FakeTensor):
            x.constant = None  # or torch would compute with the value that it had on the CPU
            return x
        return self._fake.from_tensor(x) if isinstance(x, Tensor) else x

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self._storages[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.live -= self._storages.pop(key)

    def _waited(self, operator: str) -> None:
        frames = (f for f in reversed(traceback.extract_stack()) if _of_a_room(f.filename))
        frame = next(frames, None)
        where = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" if frame else "autograd"
        self.syncs[f"{operator} {where}"] += 1


def _different(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(x): x for x in tensors if x.is_cuda}.values())


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _changed(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """What is read and written in place: moved twice."""
    if func._schema.name.partition("::")[2] in _WRITTEN_ALONE:
        return []
    named = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
    written = [
        named.get(a.name)
        for a in func._schema.arguments
        if a.alias_info is not None and a.alias_info.is_write and a.name not in _READ_ALONE
    ]
    return _different([x for x in tree_leaves(written) if isinstance(x, FakeTensor)])


def _of_a_room(file: str) -> bool:
    return any(room in file for room in ROOMS) and "/site-packages/" not in file
