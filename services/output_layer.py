"""Log-probs of given tokens out of hidden states and the output matrix. The `[tokens, vocab]`
matrix of logits never exists as a whole: it is made in chunks, again in the backward.

Axes: `C` scored tokens, `H` hidden, `V` vocabulary, `K` temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from services.layouts import LogitMap

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}  # of float32 logits that exist at once


def output_head(model: PreTrainedModel) -> torch.nn.Linear:
    """The output matrix, which is used by itself, outside the model's forward.

    Raises:
        ValueError: the model's output is more than one matrix.
    """
    head: torch.nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, torch.nn.Linear):
        raise ValueError(f"an output layer of type {type(head).__name__} is not supported")
    return head


class TargetLogProbs(NamedTuple):
    """What `linear_logprobs` gives; all float32."""

    logprobs: Tensor  # [K, C] or [K, C, M] of the targets, one row a temperature
    entropy: Tensor  # [C] nats, at the last temperature; no gradient; [0] unless asked for


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Sequence[float] = (1.0,),
    *,
    entropy: bool = True,
    detached: int = 0,
    logit_map: LogitMap = LogitMap(),  # noqa: B008 (frozen)
) -> TargetLogProbs:
    """Log-probs of `targets` under `softmax((hidden @ weight.T + bias) / temperature)`.

    The logits exist for a chunk of `CHUNK_BYTES` at a time: of some tokens in the forward and, when
    there are more chunks than one, of a part of the vocabulary in the backward, which computes them
    again. With autocast, matrix products run in its precision; all else is float32.

    Args:
        hidden: [C, H]. weight: [V, H]. bias: [V] or None.
        targets: [C] int64, or [C, M] for several tokens at each place.
        temperatures: K of them.
        entropy: whether it is wanted; it takes one more look at the logits.
        detached: the log-probs at so many of the first temperatures have no gradient, which
            spares their part of the backward.
        logit_map: what is done to the logits before the temperature.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    apply: Any = _LinearLogProbs.apply
    columns = targets if targets.ndim == 2 else targets[:, None]
    *rows, spread = apply(hidden, weight, bias, columns, tuple(temperatures), entropy, logit_map)
    rows = [*(row.detach() for row in rows[:detached]), *rows[detached:]]
    return TargetLogProbs(torch.stack(rows).view(len(rows), *targets.shape), spread)


class _LinearLogProbs(torch.autograd.Function):
    """One output a temperature, so that those which no gradient reaches cost no backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,  # [C, M]
        temperatures: tuple[float, ...],
        want_entropy: bool,
        logit_map: LogitMap,
    ) -> tuple[Tensor, ...]:
        logprobs = hidden.new_empty(len(temperatures), *targets.shape, dtype=torch.float32)
        entropy = hidden.new_empty(len(targets) if want_entropy else 0, dtype=torch.float32)
        normalisers = hidden.new_empty(len(temperatures), len(targets), dtype=torch.float32)
        parts = chunks(len(hidden), len(weight), hidden.device)
        for part in parts:
            logits = F.linear(hidden[part], weight, bias)
            mapped = logit_map(logits)
            for row, temperature in enumerate(temperatures):
                spread_too = want_entropy and row == len(temperatures) - 1
                normaliser, spread = _summary(mapped, temperature, spread_too)
                chosen = mapped.gather(1, targets[part]).float() / temperature
                logprobs[row, part] = chosen - normaliser[:, None]
                normalisers[row, part] = normaliser
            if want_entropy:
                entropy[part] = spread
        # One chunk is what may exist at any time, so it may as well be kept.
        kept = logits if len(parts) == 1 else None
        ctx.save_for_backward(hidden, weight, bias, targets, kept, normalisers)
        ctx.temperatures, ctx.logit_map = temperatures, logit_map
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(entropy)
        return (*logprobs.unbind(), entropy)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, kept, normalisers = ctx.saved_tensors
        wanted = [
            (temperature, gradient, normaliser)
            for temperature, gradient, normaliser in zip(
                ctx.temperatures, gradients[:-1], normalisers, strict=True
            )
            if gradient is not None
        ]
        needs = ctx.needs_input_grad
        for_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs[0] else None
        for_weight = torch.zeros_like(weight) if needs[1] else None
        for_bias = torch.zeros_like(bias) if needs[2] else None
        # Chunks of the vocabulary, for all tokens: each part of the weight's gradient is one
        # product, and what is added up over chunks is the smaller gradient of the hidden states.
        parts = [slice(0, len(weight))]
        if kept is None:
            parts = chunks(len(weight), len(hidden), hidden.device)
        for part in parts if wanted else ():
            offset = None if bias is None else bias[part]
            logits = F.linear(hidden, weight[part], offset) if kept is None else kept
            slope = _slope(ctx.logit_map(logits), targets - part.start, wanted)
            if ctx.logit_map != LogitMap():
                slope = slope * ctx.logit_map.slope(logits)
            narrow = slope.to(weight.dtype)
            if for_hidden is not None:
                _add_product(for_hidden, narrow, weight[part])
            if for_weight is not None:
                torch.mm(narrow.T, hidden, out=for_weight[part])
            if for_bias is not None:
                for_bias[part] = slope.sum(0, dtype=torch.float32)
        if for_hidden is not None:
            for_hidden = for_hidden.to(hidden.dtype)
        return for_hidden, for_weight, for_bias, None, None, None, None


def _summary(logits: Tensor, temperature: float, want_entropy: bool) -> tuple[Tensor, Tensor]:
    """[C] log-normaliser and, if wanted, [C] entropy of softmax(logits / temperature), float32."""
    if fused := _kernels(logits):
        both: tuple[Tensor, Tensor] = fused.summary(logits, temperature)
        return both
    scaled = _at(logits, temperature).float()
    normaliser = torch.logsumexp(scaled, 1)
    if not want_entropy:
        return normaliser, normaliser.new_empty(0)
    return normaliser, torch.special.entr((scaled - normaliser[:, None]).exp_()).sum(1)


def _slope(
    logits: Tensor, targets: Tensor, wanted: Sequence[tuple[float, Tensor, Tensor]]
) -> Tensor:
    """[C, W], of the loss by W neighbouring logits: float32, or the logits' own precision where
    nothing is added to it.

    Args:
        targets: [C, M], counted from the first of these logits; others are not among them.
        wanted: for each temperature, the gradients [C, M] that reach the targets' log-probs, and
            the log-normalisers [C].
    """
    if fused := _kernels(logits):
        slope = torch.empty_like(logits, dtype=torch.float32 if len(wanted) > 1 else logits.dtype)
        for index, (temperature, gradient, normaliser) in enumerate(wanted):
            fused.add_slope(logits, normaliser, targets, gradient, slope, temperature, not index)
        return slope
    inside = (targets >= 0) & (targets < logits.shape[1])
    total: Tensor | None = None
    for temperature, gradient, normaliser in wanted:
        scaled = gradient / temperature
        slope = (_at(logits, temperature) - normaliser[:, None]).exp_()
        slope.mul_(-scaled.sum(1, keepdim=True))
        slope.scatter_add_(1, targets.where(inside, 0), scaled.where(inside, 0.0))
        total = slope if total is None else total.add_(slope)
    assert total is not None  # asked for at one temperature at least
    return total


def _kernels(logits: Tensor) -> ModuleType | None:
    """`services.head_kernels` where they run: on a GPU with Triton."""
    return with_triton() if logits.is_cuda else None


@cache
def with_triton() -> ModuleType | None:
    """`services.head_kernels`, where Triton is installed."""
    return import_module("services.head_kernels") if find_spec("triton") else None


def _at(logits: Tensor, temperature: float) -> Tensor:
    """The logits themselves at temperature 1, which spares a copy of them."""
    return logits if temperature == 1.0 else logits.float().div(temperature)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in place where the precisions agree."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def chunks(count: int, each: int, device: torch.device) -> list[slice]:
    """Parts of `count` rows with `each` logits that take `CHUNK_BYTES`, all of about one size."""
    limit = max(1, CHUNK_BYTES[device.type] // (4 * max(1, each)))
    size = -(-count // max(1, -(-count // limit))) if count else 1
    return [slice(at, min(count, at + size)) for at in range(0, count, size)]
