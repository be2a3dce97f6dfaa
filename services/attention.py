"""Attention over packed sequences, registered with transformers: any causal model that supports its
attention interface works unchanged.

Axes: `T` tokens of the pack, `S_b` segments of a bucket, `L_b` tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import signature
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

ATTENTION = "scope_packed"
BUCKET_RATIO = 1.5  # longest to shortest of the sequences whose attention is computed in one batch


@dataclass(frozen=True, slots=True)
class Buckets:
    """Sequences of like length side by side, for attention without a variable-length kernel.
    Padding stands on the right, where causality already hides it from every real token."""

    places: tuple[Tensor, ...]  # [S_b, L_b] int64, place in the pack of each token of a bucket
    real: tuple[Tensor, ...]  # [S_b, L_b] bool, False on padding
    back: Tensor  # [T] int64, where each token of the pack is among the real ones, in turn

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
        places = [
            np.where(r, starts[part, None] + c, 0)
            for part, c, r in zip(parts, columns, real, strict=True)
        ]
        turns = [p[r] for p, r in zip(places, real, strict=True)]
        return Buckets(
            places=tuple(torch.from_numpy(p) for p in places),
            real=tuple(torch.from_numpy(r) for r in real),
            back=torch.from_numpy(np.argsort(np.concatenate(turns or [np.empty(0, np.int64)]))),
        )

    def to(self, device: torch.device | str) -> Buckets:
        """The same buckets on `device`."""
        return Buckets(
            places=tuple(on_device(p, device) for p in self.places),
            real=tuple(on_device(r, device) for r in self.real),
            back=on_device(self.back, device),
        )


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
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of the pack (transformers' attention interface)."""
    if dropout or (sliding_window and sliding_window < max_length_q):
        raise ValueError("packed attention has no dropout and no sliding window")
    if prefixes:
        return _cascaded(query, key, value, buckets, prefixes, scaling), None
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.is_cuda and half and find_spec("torch.nn.attention.varlen"):  # from torch 2.10 on
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling), None
    return _bucketed(query, key, value, buckets, scaling), None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, cu: Tensor, longest: int, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    known = signature(varlen_attn).parameters  # they differ from one torch to the next
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    causal: Any = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    out = varlen_attn(q, k, v, cu, cu, longest, longest, scale=scale, **causal)
    assert isinstance(out, Tensor)  # a tuple only when the log-sum-exp is asked for
    return out[None]


def _bucketed(
    query: Tensor, key: Tensor, value: Tensor, buckets: Buckets, scale: float | None
) -> Tensor:
    """[1, T, heads, D]; spreads the sequences over rows, a bucket at a time."""
    if len(buckets.places) == 1 and buckets.places[0].numel() == query.shape[2]:
        # All of one length: their rows lie in the pack as they are.
        shape = buckets.places[0].shape
        q, k, v = (
            x[0].reshape(x.shape[1], *shape, x.shape[3]).transpose(0, 1)
            for x in (query, key, value)
        )
        out = _causal(q, k, v, scale)
        return out.transpose(1, 2).flatten(0, 1)[None]
    outputs = []
    for places, real in zip(buckets.places, buckets.real, strict=True):
        q, k, v = (x[0][:, places].transpose(0, 1) for x in (query, key, value))
        outputs.append(_causal(q, k, v, scale).transpose(1, 2)[real])
    return torch.cat(outputs)[buckets.back][None]


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _cascaded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    buckets: Buckets,
    prefixes: tuple[tuple[int, int, int], ...],
    scale: float | None,
) -> Tensor:
    """[1, T, heads, D]; each segment on itself, then all that follows a prefix on that, at once.
    The two are parts of one softmax, and weigh as their normalisers do, which have no gradient."""
    if torch.is_grad_enabled() and query.requires_grad:
        raise ValueError("sequences that share a prefix can be scored, not trained on")
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    heads = query.shape[1] // key.shape[1]  # of the query to one of the key
    outputs, normalisers = [], []
    for places, real in zip(buckets.places, buckets.real, strict=True):
        q, k, v = (x[0][:, places].transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(heads, 1) for x in (k, v))
        out, normaliser = flash(q, k, v, is_causal=True, scale=scale)
        outputs.append(out.transpose(1, 2)[real])
        normalisers.append(normaliser.transpose(1, 2)[real])
    output, own = torch.cat(outputs)[buckets.back], torch.cat(normalisers)[buckets.back]
    for start, middle, end in prefixes:
        q = query[0, :, middle:end].reshape(1, key.shape[1], -1, query.shape[3])
        out, shared = flash(q, key[:, :, start:middle], value[:, :, start:middle], scale=scale)
        out, shared = (
            x.reshape(query.shape[1], end - middle, -1).transpose(0, 1) for x in (out, shared)
        )
        weight = torch.sigmoid(shared - own[middle:end, :, None])
        output[middle:end].lerp_(out, weight.to(out.dtype))
    return output[None]


AttentionInterface.register(ATTENTION, _packed_attention)
