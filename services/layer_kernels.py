"""Triton kernels of what stands between a layer's matrices: norms, rotary embeddings and gated
activations. Each reads its inputs once and computes in float32; written plainly in torch they move
more bytes than the matrices do.

Axes: `R` rows (tokens, or heads of tokens), `D` width, `T` tokens, `H` heads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # elements of a program at a time
_PROGRAMS = 1024  # among which the rows are divided where each adds up a part of a gradient


@triton.jit
def normalise(  # type: ignore[no-untyped-def]
    x, weight, out, scales, rows, width, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """out = weight · x / √(mean(x²) + eps), by row; the factors 1 / √… are kept as `scales`."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < width)
    at = row * width + column
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 1) / width + eps)[:, None]
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out + at, (values * scale * factor).to(out.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale, mask=row < rows)


@triton.jit
def normalise_back(  # type: ignore[no-untyped-def]
    pull, x, weight, scales, slope, parts, rows, width, turns,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of `normalise` by x, and by the weight as sums of each program's own rows."""
    column = tl.arange(0, WIDTH)[None, :]
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    part = tl.zeros((1, WIDTH), tl.float32)
    for turn in range(turns):
        block = turn * tl.num_programs(0) + tl.program_id(0)
        row = (block.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (row < rows) & (column < width)
        at = row * width + column
        scale = tl.load(scales + row, mask=row < rows, other=0.0)
        normal = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale
        pulled = tl.load(pull + at, mask=inside, other=0.0).to(tl.float32)
        weighted = pulled * factor
        along = tl.sum(weighted * normal, 1)[:, None] / width
        made = scale * (weighted - normal * along)
        tl.store(slope + at, made.to(slope.dtype.element_ty), mask=inside)
        part += tl.sum(pulled * normal, 0)[None, :]
    tl.store(parts + tl.program_id(0) * width + column, part, mask=column < width)


@triton.jit
def gate(a, b, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out = a · sigmoid(a) · b."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(b + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (x * tl.sigmoid(x) * y).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_back(pull, a, b, for_a, for_b, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gradients of `gate` by a and b."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    pulled = tl.load(pull + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(b + at, mask=inside, other=0.0).to(tl.float32)
    open_ = tl.sigmoid(x)
    slope = open_ * (1.0 + x * (1.0 - open_))
    tl.store(for_a + at, (pulled * y * slope).to(for_a.dtype.element_ty), mask=inside)
    tl.store(for_b + at, (pulled * x * open_).to(for_b.dtype.element_ty), mask=inside)


@triton.jit
def turn(  # type: ignore[no-untyped-def]
    x, cos, sin, out, tokens, heads, half, token_stride, head_stride, sign,
    ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Turns each pair (x_i, x_{i + half}) of a token's heads by the token's angles; back where
    `sign` is −1. `out` is [tokens, heads, 2 · half], contiguous."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    token, head = row // heads, row % heads
    column = tl.arange(0, HALF)[None, :]
    inside = (token < tokens) & (column < half)
    at = x + token * token_stride + head * head_stride + column
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    angle = token * 2 * half + column
    c, d = cos + angle, sin + angle
    cos_1 = tl.load(c, mask=inside, other=0.0).to(tl.float32)
    cos_2 = tl.load(c + half, mask=inside, other=0.0).to(tl.float32)
    sin_1 = tl.load(d, mask=inside, other=0.0).to(tl.float32) * sign
    sin_2 = tl.load(d + half, mask=inside, other=0.0).to(tl.float32) * sign
    # Backwards it is the transpose: each sine belongs to the place that it is added to.
    left = tl.where(sign > 0, sin_1, sin_2)
    right = tl.where(sign > 0, sin_2, sin_1)
    to = out + row * 2 * half + column
    tl.store(to, (first * cos_1 - second * left).to(out.dtype.element_ty), mask=inside)
    tl.store(to + half, (second * cos_2 + first * right).to(out.dtype.element_ty), mask=inside)


def _launch(kernel: Any, programs: int, *arguments: Any, **sizes: int) -> None:
    if programs:
        kernel[(programs,)](*arguments, **sizes)


# ------------------------------------------------------------------------------------- norms


@torch.library.custom_op("scope::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    out, scales = torch.empty_like(x, dtype=dtype), x.new_empty(rows, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    several = max(1, _BLOCK // block)
    arguments = (x, weight, out, scales, rows, width, eps)
    _launch(normalise, triton.cdiv(rows, several), *arguments, ROWS=several, WIDTH=block)
    return out, scales


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=dtype), x.new_empty(
        x.numel() // x.shape[-1], dtype=torch.float32
    )


@torch.library.custom_op("scope::rms_norm_back", mutates_args=())
def _rms_norm_back(
    pull: Tensor, x: Tensor, weight: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    block = triton.next_power_of_2(width)
    several = max(1, _BLOCK // block)
    blocks = triton.cdiv(rows, several)
    programs = min(_PROGRAMS, blocks)
    slope, parts = torch.empty_like(x), x.new_empty(programs, width, dtype=torch.float32)
    turns = triton.cdiv(blocks, max(1, programs))
    arguments = (pull, x, weight, scales, slope, parts, rows, width, turns)
    _launch(normalise_back, programs, *arguments, ROWS=several, WIDTH=block)
    return slope, parts.sum(0).to(weight.dtype)


@_rms_norm_back.register_fake
def _(pull: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _norm_gradient(ctx: Any, pull: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_rms_norm_back(pull.contiguous(), *ctx.saved_tensors), None, None


_rms_norm.register_autograd(_norm_gradient, setup_context=_norm_context)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x / √(mean(x²) + eps) over the last axis, in the precision of autocast, or else in
    that which torch would promote to.

    Args:
        x: [..., D]. weight: [D].
    """
    dtype = torch.promote_types(x.dtype, weight.dtype)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    out: Tensor = _rms_norm(x.contiguous(), weight, eps, dtype)[0]
    return out


# -------------------------------------------------------------------------- gated activations


@torch.library.custom_op("scope::silu_product", mutates_args=())
def _silu_product(a: Tensor, b: Tensor) -> Tensor:
    out, count = torch.empty_like(a), a.numel()
    _launch(gate, triton.cdiv(count, _BLOCK), a, b, out, count, BLOCK=_BLOCK)
    return out


@_silu_product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return torch.empty_like(a)


@torch.library.custom_op("scope::silu_product_back", mutates_args=())
def _silu_product_back(pull: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    for_a, for_b, count = torch.empty_like(a), torch.empty_like(b), a.numel()
    arguments = (pull, a, b, for_a, for_b, count)
    _launch(gate_back, triton.cdiv(count, _BLOCK), *arguments, BLOCK=_BLOCK)
    return for_a, for_b


@_silu_product_back.register_fake
def _(pull: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(b)


_silu_product.register_autograd(
    lambda ctx, pull: _silu_product_back(pull.contiguous(), *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def silu_product(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) · b, of one shape and precision."""
    out: Tensor = _silu_product(a.contiguous(), b.contiguous())
    return out


# -------------------------------------------------------------------------- rotary embeddings


@torch.library.custom_op("scope::rotate", mutates_args=())
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    tokens, heads, width = x.shape
    out = x.new_empty(tokens, heads, width)
    half = width // 2
    block = triton.next_power_of_2(half)
    several = max(1, _BLOCK // 2 // block)
    sign = -1.0 if back else 1.0
    arguments = (x, cos, sin, out, tokens, heads, half, x.stride(0), x.stride(1), sign)
    programs = triton.cdiv(tokens * heads, several)
    _launch(turn, programs, *arguments, ROWS=several, HALF=block)
    return out


@_rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return x.new_empty(x.shape)


def _rotate_gradient(ctx: Any, pull: Tensor) -> tuple[Tensor | None, ...]:
    pull = pull if pull.stride(-1) == 1 else pull.contiguous()
    return _rotate(pull, *ctx.saved_tensors, True), None, None, None


_rotate.register_autograd(
    _rotate_gradient,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1], inputs[2]),
)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x · cos + rotate_half(x) · sin, where rotate_half makes (−b, a) of the halves (a, b) of the
    last axis; in x's precision, laid out [T, H, D].

    Args:
        x: [1, H, T, D], its last axis contiguous. cos, sin: [1, T, D]; no gradient reaches them.
    """
    # Squeezed and not indexed, whose gradient would be a copy.
    laid = x.squeeze(0).transpose(0, 1)
    turned: Tensor = _rotate(laid, cos[0].contiguous(), sin[0].contiguous(), False)
    return turned.transpose(0, 1)[None]
