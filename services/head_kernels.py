"""Triton kernels of `services.output_layer`: what it does with a chunk of logits, reading each
once. Written plainly in torch, a chunk is copied to float32, divided and
normalised in turn: 44 bytes moved for every logit and temperature of a step, here 6.

Each program has one row of the `V` logits, a block at a time. Sums are float32, kept relative to
the greatest logit so far (Milakov and Gimelshein, arXiv 1805.02867), so nothing can overflow.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def summarise(  # type: ignore[no-untyped-def]
    logits, normaliser, entropy, vocabulary, stride, sharpness, BLOCK: tl.constexpr
):
    """log Σ exp(z) and the entropy of softmax(z) of each row, with z = sharpness · logits."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    most = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)  # Σ exp(z − most)
    weighted = tl.zeros((), tl.float32)  # Σ exp(z − most) · (z − most)
    for start in range(0, vocabulary, BLOCK):
        inside = start + columns < vocabulary
        z = tl.load(logits + row * stride + start + columns, mask=inside, other=-float("inf"))
        z = z.to(tl.float32) * sharpness
        higher = tl.maximum(most, tl.max(z, 0))
        shrink = tl.where(most == -float("inf"), 0.0, tl.exp(most - higher))
        shifted = tl.where(z == -float("inf"), 0.0, z - higher)  # 0 · −∞ is no number
        parts = tl.where(z == -float("inf"), 0.0, tl.exp(shifted))
        moved = tl.where(total == 0.0, 0.0, most - higher)
        weighted = shrink * (weighted + total * moved) + tl.sum(parts * shifted, 0)
        total = shrink * total + tl.sum(parts, 0)
        most = higher
    tl.store(normaliser + row, most + tl.log(total))
    tl.store(entropy + row, tl.log(total) - weighted / total)


@triton.jit
def differentiate(  # type: ignore[no-untyped-def]
    logits, normaliser, targets, gradients, slope, vocabulary, stride, sharpness,
    TARGETS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """slope (+)= sharpness · Σ_m gradient_m · (1[column = target_m] − softmax(z)), by row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    z = tl.load(logits + row * stride + columns, mask=inside, other=-float("inf"))
    share = tl.exp(z.to(tl.float32) * sharpness - tl.load(normaliser + row))
    out = tl.zeros((BLOCK,), tl.float32)
    for m in range(TARGETS):
        gradient = tl.load(gradients + row * TARGETS + m) * sharpness
        hit = columns == tl.load(targets + row * TARGETS + m)
        out += gradient * (tl.where(hit, 1.0, 0.0) - share)
    at = slope + row * vocabulary + columns
    if ADD:
        out += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, out.to(slope.dtype.element_ty), mask=inside)


@torch.library.custom_op("scope::summarise", mutates_args=())
def summary(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """[C] log-normaliser and [C] entropy of softmax(logits / temperature), float32.

    Args:
        logits: [C, V], its rows contiguous.
    """
    rows, vocabulary = logits.shape
    normaliser = logits.new_empty(rows, dtype=torch.float32)
    entropy = torch.empty_like(normaliser)
    if rows:
        launch: Any = summarise[(rows,)]
        launch(
            logits, normaliser, entropy, vocabulary, logits.stride(0), 1 / temperature, BLOCK=_BLOCK
        )
    return normaliser, entropy


@summary.register_fake
def _(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    normaliser = logits.new_empty(len(logits), dtype=torch.float32)
    return normaliser, torch.empty_like(normaliser)


@torch.library.custom_op("scope::add_slope", mutates_args=("slope",))
def add_slope(
    logits: Tensor,
    normaliser: Tensor,
    targets: Tensor,
    gradients: Tensor,
    slope: Tensor,
    temperature: float,
    first: bool,
) -> None:
    """The gradient by the logits of the targets' log-probs at one temperature, into `slope`.

    Args:
        logits: [C, V]. normaliser: [C], of this temperature.
        targets: [C, M] int64. gradients: [C, M] float32, of the loss by their log-probs.
        slope: [C, V], contiguous; added to, or written where it is the `first`.
    """
    rows, vocabulary = logits.shape
    if rows:
        launch: Any = differentiate[(rows, math.ceil(vocabulary / _BLOCK))]
        launch(
            logits, normaliser, targets.contiguous(), gradients.contiguous(), slope, vocabulary,
            logits.stride(0), 1 / temperature,
            TARGETS=targets.shape[1], ADD=not first, BLOCK=_BLOCK,
        )  # fmt: skip


@add_slope.register_fake
def _(
    logits: Tensor,
    normaliser: Tensor,
    targets: Tensor,
    gradients: Tensor,
    slope: Tensor,
    temperature: float,
    first: bool,
) -> None:
    return None
