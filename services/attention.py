"""Attention over packed sequences, registered with transformers: any causal model that supports its
attention interface works unchanged.

Axes: `T` tokens of the pack, `S_b` segments of a bucket, `L_b` tokens of the longest of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from inspect import signature
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

ATTENTION = "scope_packed"
BUCKET_RATIO = 1.5  # longest to shortest of the sequences whose attention is computed in one batch
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Buckets:
    """Sequences of like length side by side, for attention without a variable-length kernel.
    Padding stands on the right, where causality already hides it from every real token."""

    indices: tuple[Tensor, ...]  # [S_b, L_b] int64, index in the pack of each token of a bucket
    real: tuple[Tensor, ...]  # [S_b, L_b] bool, False on padding
    # [T] int64, where each token of the pack is among all places of the buckets, one after another.
    # Positions and no mask: what a mask lets through is a number that the host would wait for.
    back: Tensor

    @staticmethod
    def of(lengths: Sequence[int]) -> Buckets:
        """Cuts the sorted lengths wherever one is `BUCKET_RATIO` times its bucket's first."""
        sizes = np.asarray(lengths, np.int64)
        starts = np.cumsum(sizes) - sizes
        parts: list[list[int]] = []
        for sequence in np.argsort(sizes, kind="stable").tolist():
            if not parts or sizes[sequence] > BUCKET_RATIO * sizes[parts[-1][0]]:
                parts.append([])
            parts[-1].append(sequence)
        columns = [np.arange(sizes[part].max()) for part in parts]
        real = [c < sizes[part, None] for part, c in zip(parts, columns, strict=True)]
        indices = [
            np.where(r, starts[part, None] + c, 0)
            for part, c, r in zip(parts, columns, real, strict=True)
        ]
        turns = [p[r] for p, r in zip(indices, real, strict=True)] or [np.empty(0, np.int64)]
        places = np.flatnonzero(np.concatenate([r.ravel() for r in real] or [np.empty(0, bool)]))
        return Buckets(
            indices=tuple(torch.from_numpy(p) for p in indices),
            real=tuple(torch.from_numpy(r) for r in real),
            back=torch.from_numpy(places[np.argsort(np.concatenate(turns))]),
        )

    def filled_up(self, count: int) -> Buckets:
        """With idle ones, of one token that is nobody's, so that there are `count`."""
        idle = (self.back.new_zeros(1, 1),) * (count - len(self.indices))
        return replace(
            self, indices=self.indices + idle, real=self.real + tuple(one.bool() for one in idle)
        )

    def to(self, device: torch.device | str) -> Buckets:
        """The same buckets on `device`."""
        return Buckets(
            indices=tuple(on_device(p, device) for p in self.indices),
            real=tuple(on_device(r, device) for r in self.real),
            back=on_device(self.back, device),
        )

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """[T, …] in the pack's order, of [S_b, L_b, …] from each bucket."""
        return torch.cat([part.flatten(0, 1) for part in parts])[self.back]


@dataclass(frozen=True, slots=True)
class Keys:
    """What each segment of a pack sees, where some stand behind a shared prefix: that, then itself.
    For kernels that know keys from queries by their bounds alone."""

    places: Tensor  # [T_k] int64, in the pack: a prefix once for each segment behind it
    cu_seqlens: Tensor  # [S + 1] int32, where the keys of each segment start

    @staticmethod
    def of(bounds: Sequence[int], prefixes: Sequence[tuple[int, int, int]]) -> Keys:
        """Of segments with these bounds; `prefixes` as in `services.packed.Pack`."""
        begins, middles, ends = np.asarray(prefixes, np.int64).T
        last = np.searchsorted(middles, bounds[:-1], side="right") - 1
        parts = []
        for (start, end), prefix in zip(pairwise(bounds), last.tolist(), strict=True):
            behind = prefix >= 0 and start < ends[prefix]
            before = np.arange(begins[prefix], middles[prefix]) if behind else np.empty(0, np.int64)
            parts.append(np.concatenate([before, np.arange(start, end)]))
        return Keys(
            places=torch.from_numpy(np.concatenate(parts)),
            cu_seqlens=torch.tensor([0, *np.cumsum([*map(len, parts)])], dtype=torch.int32),
        )

    def to(self, device: torch.device | str) -> Keys:
        """The same keys on `device`."""
        return Keys(on_device(self.places, device), on_device(self.cu_seqlens, device))


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """What a layer's attention does besides being causal."""

    scale: float | None
    window: int | None = None  # keys that a token sees, its own among them
    sinks: Tensor | None = None  # [heads] logits of a key that gives nothing

    @property
    def plain(self) -> bool:
        """Whether it is causal, and nothing else."""
        return self.window is None and self.sinks is None


def on_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """To `device`; from page-locked memory where that lets the copy run beside the compute."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, T, D]
    key: Tensor,  # [1, kv_heads, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    buckets: Buckets,
    prefixes: tuple[tuple[int, int, int], ...] = (),
    keys: Keys | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of the pack (transformers' attention interface)."""
    if dropout or softcap:  # transformers' own attention leaves soft caps out, but when eager
        raise ValueError("packed attention has no dropout and no soft cap")
    window = sliding_window if sliding_window and sliding_window < max_length_q else None
    rule = Rule(scaling, window, s_aux)
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings leave queries and keys in float32, which no such kernel takes.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    if keys is not None and not rule.plain:
        raise ValueError("shared prefixes have no window and no sinks")
    if _takes_varlen(query, rule):
        return _varlen(query, key, value, cu_seq_lens_q, keys, max_length_q, rule), None
    if keys is None:
        return _bucketed(query, key, value, buckets, rule), None
    if query.is_cuda:
        return _one_by_one(query, key, value, cu_seq_lens_q, keys, rule), None
    shared: Any = _Cascaded.apply
    return shared(query, key, value, buckets, prefixes, scaling), None


def computes(rule: Rule, varlen: bool) -> str:
    """What attends by this rule, where a kernel of variable lengths may run (`varlen`) or not."""
    if varlen and _has_kernel(rule):
        return "one kernel over all lengths, fused"
    if rule.sinks is not None:
        return "plain products for its sinks, not fused"
    window = "" if rule.window is None else " with a mask for its window"
    return f"PyTorch's fused one{window}, sequences of like length at a time"


def takes_prefixes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention behind shared prefixes is fast where `device` computes it in `dtype`."""
    if device.type == "cpu":
        return True
    return dtype in _HALF and _has_kernel(Rule(None)) and _aligns_ends(device)


@cache
def _aligns_ends(device: torch.device) -> bool:
    """Whether the kernel of variable lengths lets the last of fewer queries see the last key, as
    flash attention does from 2.1 on and torch does not promise: measured."""
    random = torch.Generator(device).manual_seed(0)  # of its own: training's stays where it is
    shape = (3, 1, 1, 40, 64)
    q, k, v = torch.randn(shape, generator=random, device=device, dtype=torch.bfloat16)
    whole = _causal(q, k, v, Rule(None))[:, :, -16:].transpose(1, 2)
    places = torch.arange(40, device=device)
    ends = [torch.tensor([0, n], dtype=torch.int32, device=device) for n in (16, 40)]
    found = _varlen(q[:, :, -16:], k, v, ends[0], Keys(places, ends[1]), 40, Rule(None))
    return torch.allclose(found, whole, atol=0.05)


def _takes_varlen(query: Tensor, rule: Rule) -> bool:
    """Whether a kernel of variable lengths runs where this lies, in its precision."""
    return query.is_cuda and query.dtype in _HALF and _has_kernel(rule)


def _has_kernel(rule: Rule) -> bool:
    """Whether torch has a kernel of variable lengths for it: from 2.10 on, and windows later."""
    if rule.sinks is not None or not find_spec("torch.nn.attention.varlen"):
        return False
    from torch.nn.attention.varlen import varlen_attn

    return rule.window is None or "window_size" in signature(varlen_attn).parameters


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu: Tensor,
    keys: Keys | None,
    longest: int,
    rule: Rule,
) -> Tensor:
    """[1, T, heads, D]. A prefix is copied in front of the keys of all that stand behind it: beside
    the linear layers that it is spared, that is little."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    cu_keys = cu
    if keys is not None:
        copied: Any = _Copied.apply
        k, v, cu_keys = copied(k, keys.places), copied(v, keys.places), keys.cu_seqlens
    known = signature(varlen_attn).parameters  # they differ from one torch to the next
    before = -1 if rule.window is None else rule.window - 1
    more: Any = {"window_size": (before, 0)} if "window_size" in known else {"is_causal": True}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            more["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = varlen_attn(q, k, v, cu, cu_keys, longest, longest, scale=rule.scale, **more)
    assert isinstance(out, Tensor)  # a tuple only when the log-sum-exp is asked for
    return out[None]


class _Copied(torch.autograd.Function):
    """[T_k, heads, D] of [T, heads, D]: what lies at `places`. Backward, all that one place was
    copied to adds up in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.tokens = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        total = gradient.new_zeros(ctx.tokens, *gradient.shape[1:], dtype=torch.float32)
        return total.index_add_(0, places, gradient.float()).to(gradient.dtype), None


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, cu: Tensor, keys: Keys, rule: Rule
) -> Tensor:
    """[1, T, heads, D], a segment after the other: slow, for the trial of a model that lies on a
    GPU in a precision that no kernel takes."""
    outputs, grouped = [], query.shape[1] > key.shape[1]
    bounds = (pairwise(x.tolist()) for x in (cu, keys.cu_seqlens))
    for (start, end), (first, last) in zip(*bounds, strict=True):
        k, v = (x[:, :, keys.places[first:last]] for x in (key, value))
        seen = torch.ones(end - start, last - first, dtype=torch.bool, device=query.device)
        seen = seen.tril(last - first - end + start)
        q = query[:, :, start:end]
        out = F.scaled_dot_product_attention(q, k, v, seen, scale=rule.scale, enable_gqa=grouped)
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, 1)


def _bucketed(query: Tensor, key: Tensor, value: Tensor, buckets: Buckets, rule: Rule) -> Tensor:
    """[1, T, heads, D]; spreads the sequences over rows, a bucket at a time."""
    if len(buckets.indices) == 1 and buckets.indices[0].numel() == query.shape[2]:
        # All of one length: their rows lie in the pack as they are.
        shape = buckets.indices[0].shape
        q, k, v = (
            x[0].reshape(x.shape[1], *shape, x.shape[3]).transpose(0, 1)
            for x in (query, key, value)
        )
        out = _causal(q, k, v, rule)
        return out.transpose(1, 2).flatten(0, 1)[None]
    outputs = []
    for indices in buckets.indices:
        q, k, v = (_rows(x[0], indices) for x in (query, key, value))
        outputs.append(_causal(q, k, v, rule).transpose(1, 2))
    return buckets.joined(outputs)[None]


def _causal(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """[S_b, heads, L_b, D]"""
    grouped, length = q.shape[1] // k.shape[1], q.shape[2]
    if rule.sinks is None and (rule.window is None or rule.window >= length):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=rule.scale, enable_gqa=grouped > 1
        )
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    seen = seen if rule.window is None else seen.triu(1 - rule.window)
    if rule.sinks is None:
        return F.scaled_dot_product_attention(
            q, k, v, seen, scale=rule.scale, enable_gqa=grouped > 1
        )
    k, v = (x.repeat_interleave(grouped, 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)) * (q.shape[3] ** -0.5 if rule.scale is None else rule.scale)
    # A sink is one more key, whose value is nothing.
    sinks = rule.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
    scores = torch.cat([scores.masked_fill(~seen, -math.inf), sinks], 3)
    return scores.softmax(3, dtype=torch.float32).to(v.dtype)[..., :length] @ v


class _Cascaded(torch.autograd.Function):
    """[1, T, heads, D]; each segment on itself, then all that follows a prefix on that, at once.

    The two are parts of one softmax, and weigh as their normalisers do. Backward, each part is
    given the output and the normaliser of the whole: with them its probabilities are those of the
    one softmax, and so are its gradients, which add up (as in ring attention, arXiv 2310.01889).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        buckets: Buckets,
        prefixes: tuple[tuple[int, int, int], ...],
        scale: float | None,
    ) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        outputs, normalisers = [], []
        for indices in buckets.indices:
            q, k, v = (_rows(x[0], indices) for x in (query, key, value))
            out, normaliser = flash(q, k, v, is_causal=True, scale=scale)
            outputs.append(out.transpose(1, 2))
            normalisers.append(normaliser.transpose(1, 2))
        output, total = buckets.joined(outputs), buckets.joined(normalisers)
        for start, middle, end in prefixes:
            after = slice(middle, end)
            q = _folded(query[0, :, after], key.shape[1])
            out, shared = flash(q, key[:, :, start:middle], value[:, :, start:middle], scale=scale)
            out, shared = (x.reshape(query.shape[1], end - middle, -1) for x in (out, shared))
            own, shared = total[after], shared[..., 0].T
            weight = torch.sigmoid(shared - own)[..., None]
            output[after].lerp_(out.transpose(0, 1), weight.to(out.dtype))
            total[after] = torch.logaddexp(own, shared)
        ctx.save_for_backward(query, key, value, output, total)
        ctx.layout = buckets, prefixes, scale
        return output[None]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        query, key, value, output, total = ctx.saved_tensors
        buckets, prefixes, scale = ctx.layout
        # [heads, T, D] and [heads, T]
        by_head = [x.transpose(0, 1) for x in (gradient[0], output, total)]
        parts: list[list[Tensor]] = [[], [], []]
        for indices, real in zip(buckets.indices, buckets.real, strict=True):
            q, k, v, slope, out, normaliser = (
                _rows(x, indices) for x in (query[0], key[0], value[0], *by_head)
            )
            normaliser = normaliser.masked_fill(~real[:, None], math.inf)  # padding sees nothing
            gradients = flash(slope, q, k, v, out, normaliser, 0.0, True, scale=scale)
            for kept, x in zip(parts, gradients, strict=True):
                kept.append(x.transpose(1, 2))
        for_query, for_key, for_value = (buckets.joined(kept) for kept in parts)
        for start, middle, end in prefixes:
            after = slice(middle, end)
            k, v = (x[:, :, start:middle] for x in (key, value))
            slope, q, out = (
                _folded(x[:, after], key.shape[1]) for x in (by_head[0], query[0], by_head[1])
            )
            normaliser = by_head[2][:, after].reshape(1, key.shape[1], -1)
            gradients = flash(slope, q, k, v, out, normaliser, 0.0, False, scale=scale)
            for_query[after] += (
                gradients[0].reshape(query.shape[1], end - middle, -1).transpose(0, 1)
            )
            for_key[start:middle] += gradients[1][0].transpose(0, 1)
            for_value[start:middle] += gradients[2][0].transpose(0, 1)
        return *(x.transpose(0, 1)[None] for x in (for_query, for_key, for_value)), None, None, None


def _rows(x: Tensor, indices: Tensor) -> Tensor:
    """[S_b, heads, L_b, …] of [heads, T, …]."""
    return x[:, indices].transpose(0, 1)


def _folded(x: Tensor, kv_heads: int) -> Tensor:
    """[1, kv_heads, heads / kv_heads · n, D] of [heads, n, D]: the heads that look at one key
    stand in its row."""
    return x.reshape(1, kv_heads, -1, x.shape[-1])


AttentionInterface.register(ATTENTION, _packed_attention)
