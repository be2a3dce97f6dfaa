"""Log-probs of given tokens under a model: packed, so that no time goes to padding.

All sequences of a batch lie one after another in one row of `T` tokens. Linear layers see just
those tokens; attention alone looks at the boundaries, through an attention function registered
with transformers, so any causal model that supports its attention interface works unchanged.
The `[tokens, vocab]` matrix never exists as a whole: log-probs come out of the hidden states in
chunks, each recomputed in the backward pass.

Axes: `T` tokens of the pack, `S` sequences, `H` hidden, `V` vocabulary, `C` scored tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel

ATTENTION = "scope_packed"
CHUNK = 1024  # scored tokens whose logits exist at once


@dataclass(frozen=True, slots=True)
class Pack:
    """Sequences laid end to end, and which of their tokens are to be scored."""

    token_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, from 0 in each sequence
    cu_seqlens: Tensor  # [S + 1] int32, where each sequence starts
    max_seqlen: int
    sources: Tensor  # [C] place in the pack of the token before each scored one
    targets: Tensor  # [C] the scored token ids
    lengths: tuple[int, ...]  # scored tokens of each sequence, sums to C

    def to(self, device: torch.device | str) -> Pack:
        """The same pack on `device`."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("token_ids", "position_ids", "cu_seqlens", "sources", "targets")
        }
        return Pack(**moved, max_seqlen=self.max_seqlen, lengths=self.lengths)


def pack(sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Pack:
    """Packs token id sequences; tokens from `starts[i]` on are scored in sequence `i`.

    Raises:
        ValueError: a start is 0 (the first token has nothing before it) or past the end.
    """
    for ids, start in zip(sequences, starts, strict=True):
        if not 1 <= start <= len(ids):
            raise ValueError(f"cannot score from token {start} of a sequence of {len(ids)}")
    lengths = torch.tensor([len(ids) for ids in sequences], dtype=torch.int32)
    cu_seqlens = F.pad(torch.cumsum(lengths, 0, dtype=torch.int32), (1, 0))
    token_ids = torch.tensor([t for ids in sequences for t in ids], dtype=torch.int64)
    positions = [torch.arange(len(ids)) for ids in sequences]
    sources = [
        torch.arange(int(offset) + start - 1, int(offset) + len(ids) - 1)
        for offset, ids, start in zip(cu_seqlens, sequences, starts, strict=False)
    ]
    source = torch.cat(sources) if sources else torch.empty(0, dtype=torch.int64)
    return Pack(
        token_ids=token_ids,
        position_ids=torch.cat(positions) if positions else torch.empty(0, dtype=torch.int64),
        cu_seqlens=cu_seqlens,
        max_seqlen=int(lengths.max()) if len(sequences) else 0,
        sources=source,
        targets=token_ids[source + 1],
        lengths=tuple(len(s) for s in sources),
    )


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Switches `model` to packed attention. Its `generate` must not be used afterwards.

    Raises:
        ValueError: the model does something to its logits or its attention that this module
            would silently leave out.
    """
    config = model.config.get_text_config()
    for name in ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale"):
        if getattr(config, name, None):
            raise ValueError(f"{config.model_type} models are not supported: they use {name}")
    if getattr(config, "logits_scaling", 1.0) not in (None, 1, 1.0):
        raise ValueError(f"{config.model_type} models are not supported: they use logits_scaling")
    if any("linear" in kind for kind in getattr(config, "layer_types", None) or ()):
        raise ValueError(f"{config.model_type} models are not supported: linear attention layers")
    model.set_attn_implementation(ATTENTION)
    return model


def hidden_states(model: PreTrainedModel, pack: Pack) -> Tensor:
    """[C, H] final hidden states from which the scored tokens are predicted."""
    output = model.base_model(
        input_ids=pack.token_ids[None],
        position_ids=pack.position_ids[None],
        use_cache=False,
        cu_seq_lens_q=pack.cu_seqlens,
        max_length_q=pack.max_seqlen,
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden[pack.sources]


def token_logprobs(model: PreTrainedModel, pack: Pack, temperatures: Sequence[float]) -> Tensor:
    """[len(temperatures), C] float32 log-probs of the scored tokens, one row a temperature.

    Differentiable; the logits of at most `CHUNK` tokens exist at any time.
    """
    hidden = hidden_states(model, pack)
    head: torch.nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    chunks = zip(torch.split(hidden, CHUNK), torch.split(pack.targets, CHUNK), strict=True)
    if torch.is_grad_enabled() and len(pack.targets) > CHUNK:
        rows = [
            checkpoint(_chunk_logprobs, head, h, t, temperatures, use_reentrant=False)
            for h, t in chunks
        ]
    else:
        rows = [_chunk_logprobs(head, h, t, temperatures) for h, t in chunks]
    return torch.cat(rows, dim=1)


def _chunk_logprobs(
    head: torch.nn.Module, hidden: Tensor, targets: Tensor, temperatures: Sequence[float]
) -> Tensor:
    logits = head(hidden).float()
    chosen = logits.gather(1, targets[:, None]).squeeze(1)
    return torch.stack(
        [chosen / t - torch.logsumexp(logits / t if t != 1.0 else logits, 1) for t in temperatures]
    )


@torch.no_grad()
def score(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], starts: Sequence[int]
) -> list[list[float]]:
    """Log-probs (temperature 1) of each sequence's tokens from its start on."""
    batch = pack(sequences, starts).to(model.device)
    flat = token_logprobs(model, batch, [1.0])[0].cpu()
    return [part.tolist() for part in torch.split(flat, list(batch.lengths))]


@torch.no_grad()
def score_top(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], starts: Sequence[int], top: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """As `score`, with the `top` most likely tokens at each place: log-probs [t], token ids
    [t, top] and their log-probs [t, top] of each sequence, on the CPU."""
    batch = pack(sequences, starts).to(model.device)
    hidden = hidden_states(model, batch)
    head: torch.nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    chunks = zip(torch.split(hidden, CHUNK), torch.split(batch.targets, CHUNK), strict=True)
    found = [_chunk_top(head, h, t, top) for h, t in chunks]
    flat = [torch.cat(parts).cpu() for parts in zip(*found, strict=True)]
    split = [torch.split(part, list(batch.lengths)) for part in flat]
    return list(zip(*split, strict=True))


def _chunk_top(
    head: torch.nn.Module, hidden: Tensor, targets: Tensor, top: int
) -> tuple[Tensor, Tensor, Tensor]:
    logits = head(hidden).float()
    normaliser = torch.logsumexp(logits, 1, keepdim=True)
    chosen = logits.gather(1, targets[:, None])
    best = torch.topk(logits, top, dim=1)
    return (chosen - normaliser).squeeze(1), best.indices, best.values - normaliser


# ------------------------------------------------------------------------------ attention


def _packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, T, D]
    key: Tensor,  # [1, kv_heads, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of the pack (transformers' attention interface)."""
    if dropout or (sliding_window and sliding_window < max_length_q):
        raise ValueError("packed attention has no dropout and no sliding window")
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling), None
    return _padded(query, key, value, cu_seq_lens_q, max_length_q, scaling), None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, cu: Tensor, longest: int, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = varlen_attn(
        q, k, v, cu, cu, longest, longest,
        scale=scale, window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(out, Tensor)  # a tuple only when the log-sum-exp is asked for
    return out[None]


def _padded(
    query: Tensor, key: Tensor, value: Tensor, cu: Tensor, longest: int, scale: float | None
) -> Tensor:
    """Spreads the sequences over rows for the attention alone. Padding stands on the right,
    where causality already hides it from every real token, so no mask is needed."""
    starts, lengths = cu[:-1].long(), cu.diff().long()
    total = query.shape[2]
    place = torch.arange(longest, device=query.device)
    gather = (starts[:, None] + place).clamp_(max=total - 1)  # [S, longest]
    q, k, v = (x[0][:, gather].transpose(0, 1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    ).transpose(1, 2)  # [S, longest, heads, D]
    return out[torch.arange(longest, device=cu.device) < lengths[:, None]][None]


AttentionInterface.register(ATTENTION, _packed_attention)
