"""Puts `services.layer_kernels` where a model computes the same plainly: norms, rotary embeddings
and gated activations, on a GPU with Triton.

Each is replaced only where what the model has gives, when it is loaded, what the kernel is written
to give; another norm, such as one that multiplies by 1 + weight, is left alone. Elsewhere than on a
GPU, and inside of `plainly`, the model's own is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.func import functional_call
from transformers import PreTrainedModel

_OWN = "scope_own_forward"
_plain = 0  # how many `plainly` are entered


@contextmanager
def plainly() -> Iterator[None]:
    """Inside, models compute as they do by themselves."""
    global _plain
    _plain += 1
    try:
        yield
    finally:
        _plain -= 1


@cache
def _with_triton() -> ModuleType | None:
    return import_module("services.layer_kernels") if find_spec("triton") else None


def kernels(x: Tensor) -> ModuleType | None:
    """`services.layer_kernels` where they run, now, on `x`."""
    return None if _plain or not x.is_cuda else _with_triton()


def fuse(model: PreTrainedModel) -> PreTrainedModel:
    """Prepares `model` for the kernels, wherever it may be moved."""
    for module in model.modules():
        if hasattr(module, _OWN):
            continue
        if _is_norm(module):
            _replace(module, _norm)
        elif _is_gated(module):
            _replace(module, _gated)
        _fuse_rotary(sys.modules[type(module).__module__])
    return model


def _replace(module: nn.Module, forward: Callable[[Any, Tensor], Tensor]) -> None:
    setattr(module, _OWN, module.forward)
    module.forward = forward.__get__(module)


# ------------------------------------------------------------------------------------- norms


def _norm(self: Any, x: Tensor, *more: Any) -> Tensor:
    fused = None if more else kernels(x)
    made: Tensor = (
        getattr(self, _OWN)(x, *more)
        if fused is None
        else fused.rms_norm(x, self.weight, self.variance_epsilon)
    )
    return made


def _is_norm(module: Any) -> bool:
    weight, epsilon = (getattr(module, name, None) for name in ("weight", "variance_epsilon"))
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or epsilon is None:
        return False
    x = _trial(weight, 2, len(weight))
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)
    other = _trial(weight, len(weight))  # norms of 1 + weight are the same where it happens to be 0
    return _same(module, {"weight": other}, x, other.float() * x.float() * scale)


# -------------------------------------------------------------------------- gated activations


def _gated(self: Any, x: Tensor) -> Tensor:
    if fused := kernels(x):
        made: Tensor = self.down_proj(fused.silu_product(self.gate_proj(x), self.up_proj(x)))
        return made
    own: Tensor = getattr(self, _OWN)(x)
    return own


def _is_gated(module: Any) -> bool:
    opened, up, down = (
        getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")
    )
    if not (
        isinstance(opened, nn.Linear) and isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
    ):
        return False
    x = _trial(opened.weight, 2, opened.in_features)
    with torch.no_grad():
        return _same(module, {}, x, down(nn.functional.silu(opened(x)) * up(x)))


# -------------------------------------------------------------------------- rotary embeddings


def _fuse_rotary(family: ModuleType) -> None:
    """`apply_rotary_pos_emb` is a function of the family's module, which its attention calls."""
    own: Any = getattr(family, "apply_rotary_pos_emb", None)
    if own is None or hasattr(own, _OWN) or not _is_rotary(own):
        return

    def rotary(  # some families turn queries alone
        q: Tensor, k: Any = None, cos: Any = None, sin: Any = None, *more: Any, **named: Any
    ) -> Any:
        fused = None if more or named or k is None else kernels(q)
        # One sequence, which a pack is; heads turned as a whole; cos and sin for each token.
        if fused is None or len(q) != 1 or cos.shape != (1, q.shape[2], q.shape[3]):
            return own(q, k, cos, sin, *more, **named)
        return fused.rotate(q, cos, sin), fused.rotate(k, cos, sin)

    setattr(rotary, _OWN, own)
    family.apply_rotary_pos_emb = rotary  # type: ignore[attr-defined]


def _is_rotary(own: Callable[..., tuple[Tensor, Tensor]]) -> bool:
    ones = torch.ones(1)
    q, k, cos, sin = (_trial(ones, 1, n, 3, 8) for n in (2, 1, 1, 1))

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    try:
        results = own(q, k, cos[:, 0], sin[:, 0])
    except (TypeError, RuntimeError):  # one of another kind, by other arguments
        return False
    return all(
        torch.allclose(r, turned(x), atol=1e-5) for r, x in zip(results, (q, k), strict=True)
    )


# ------------------------------------------------------------------------------------- trials


def _trial(like: Tensor, *shape: int) -> Tensor:
    """Numbers that are neither small nor alike."""
    count = torch.Size(shape).numel()
    made = torch.arange(count, dtype=torch.float32).mul(1.7).sin().mul(3.0).view(shape)
    return made.to(like.device, like.dtype)


@torch.no_grad()
def _same(module: nn.Module, changed: dict[str, Tensor], x: Tensor, expected: Tensor) -> bool:
    """Whether the module, with `changed` parameters, makes of x what is expected."""
    if expected.is_meta or isinstance(expected, FakeTensor):
        return True  # shapes alone, which are counted: nothing could be measured
    try:
        result = functional_call(module, changed, (x,)).float()
    except (TypeError, RuntimeError):  # it takes something else
        return False
    limit = 1e-4 if x.dtype == torch.float32 else 0.03
    return result.shape == expected.shape and bool(
        (result - expected.float()).norm() <= limit * expected.float().norm()
    )
