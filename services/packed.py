"""Log-probs of given tokens under a model: packed, so that no time goes to padding.

All sequences of a batch lie one after another in one row of `T` tokens. Linear layers see just
those tokens; attention alone looks at the boundaries (`services.attention`).
Samples of one prompt may share it: it lies there once, in front of what follows it in each.
The `[tokens, vocab]` matrix never exists as a whole: log-probs come out of the hidden states in
chunks, each recomputed in the backward pass.

Axes: `T` tokens of the pack, `S` segments (mostly whole sequences), `H` hidden, `V` vocabulary,
`C` scored tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from services.attention import ATTENTION, Buckets, on_device

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}  # of float32 logits that exist at once
MIN_PREFIX = 16  # tokens; a shorter beginning costs more to share than to compute again


@dataclass(frozen=True, slots=True)
class Pack:
    """Segments laid end to end, and which tokens are to be scored."""

    token_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, from 0 in each sequence
    cu_seqlens: Tensor  # [S + 1] int32, where each segment starts
    max_seqlen: int  # of whole sequences
    sources: Tensor  # [C] place in the pack of the token before each scored one
    targets: Tensor  # [C] the scored token ids
    lengths: tuple[int, ...]  # scored tokens of each sequence, sums to C
    buckets: Buckets
    # Where each shared beginning starts and ends, and where the last of those that follow it ends.
    prefixes: tuple[tuple[int, int, int], ...] = ()

    def to(self, device: torch.device | str) -> Pack:
        """The same pack on `device`; the copy does not wait for what the device works on."""
        return replace(
            self,
            token_ids=on_device(self.token_ids, device),
            position_ids=on_device(self.position_ids, device),
            cu_seqlens=on_device(self.cu_seqlens, device),
            sources=on_device(self.sources, device),
            targets=on_device(self.targets, device),
            buckets=self.buckets.to(device),
        )


def pack(
    sequences: Sequence[Sequence[int] | npt.NDArray[np.int32]],
    starts: Sequence[int],
    *,
    families: Sequence[Sequence[int]] | None = None,
) -> Pack:
    """Packs token id sequences; tokens from `starts[i]` on are scored in sequence `i`. `families`
    are the places of all sequences: those in one have the same tokens before their starts, and
    these lie in the pack once. None shares nothing.

    Raises:
        ValueError: a start is 0 (the first token has nothing before it) or past the end.
    """
    for ids, start in zip(sequences, starts, strict=True):
        if not 1 <= start <= len(ids):
            raise ValueError(f"cannot score from token {start} of a sequence of {len(ids)}")
    none = np.empty(0, np.int64)
    tokens, positions, bounds = [none], [none], [0]
    sources, prefixes = [none] * len(sequences), []

    def lay(ids: Sequence[int] | npt.NDArray[np.int32], first: int) -> int:
        """Adds a segment, if `ids` are any, whose first token has position `first`; where it is."""
        if not len(ids):
            return bounds[-1]
        tokens.append(np.asarray(ids, np.int64))
        positions.append(np.arange(first, first + len(ids)))
        bounds.append(bounds[-1] + len(ids))
        return bounds[-2]

    for family in [[i] for i in range(len(sequences))] if families is None else families:
        start = starts[family[0]]
        if len(family) == 1:
            at = lay(sequences[family[0]], 0)
            sources[family[0]] = np.arange(at + start - 1, bounds[-1] - 1)
            continue
        at = lay(sequences[family[0]][:start], 0)
        for place in family:  # nothing is predicted from the last token
            after = lay(sequences[place][start:-1], start)
            scored = np.arange(after - 1, after + len(sequences[place]) - start - 1)
            scored[:1] = at + start - 1
            sources[place] = scored
        prefixes.append((at, at + start, bounds[-1]))
    targets = (np.asarray(ids[at:], np.int64) for ids, at in zip(sequences, starts, strict=True))
    return Pack(
        token_ids=torch.from_numpy(np.concatenate(tokens)),
        position_ids=torch.from_numpy(np.concatenate(positions)),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=max(map(len, sequences), default=0),
        sources=torch.from_numpy(np.concatenate([none, *sources])),
        targets=torch.from_numpy(np.concatenate([none, *targets])),
        lengths=tuple(len(s) for s in sources),
        buckets=Buckets.of(np.diff(bounds).tolist()),
        prefixes=tuple(p for p in prefixes if p[1] < p[2]),
    )


def same_beginnings(
    sequences: Sequence[Sequence[int] | npt.NDArray[np.int32]], starts: Sequence[int]
) -> list[list[int]]:
    """Places of sequences with the same tokens before their starts, together; short ones alone."""
    found: dict[object, list[int]] = {}
    for place, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        key = tuple(ids[:start]) if start >= MIN_PREFIX else place
        found.setdefault(key, []).append(place)
    return list(found.values())


def can_share(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether sequences of a `pack` may share prefixes where `device` computes: the attention for
    it exists on the CPU only."""
    return device.type == "cpu" and not hasattr(model.config.get_text_config(), "v_head_dim")


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
        buckets=pack.buckets,
        prefixes=pack.prefixes,
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden[pack.sources]


def token_logprobs(
    model: PreTrainedModel,
    pack: Pack,
    temperatures: Sequence[float],
    others: Tensor | None = None,
) -> Tensor:
    """[K, C] float32 log-probs of the scored tokens, one row a temperature. Differentiable. With
    `others`, [C, M] more token ids at each place, [K, C, 1 + M]: the scored token comes first."""
    hidden = hidden_states(model, pack)
    head = output_head(model)
    targets = pack.targets
    if others is not None:
        targets = torch.cat([targets[:, None], others], 1)
    return linear_logprobs(
        hidden, head.weight, head.bias, targets, temperatures, entropy=False
    ).logprobs


def output_head(model: PreTrainedModel) -> torch.nn.Linear:
    """The output matrix, which is used by itself, outside the model's forward.

    Raises:
        ValueError: the model's output is more than one matrix.
    """
    head: torch.nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, torch.nn.Linear):
        raise ValueError(f"an output layer of type {type(head).__name__} is not supported")
    return head


class LogProbs(NamedTuple):
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
) -> LogProbs:
    """Log-probs of `targets` under `softmax((hidden @ weight.T + bias) / temperature)`.

    The logits exist for a chunk of `CHUNK_BYTES` at a time: in the forward and, when there are
    more chunks than one, computed again in the backward, which writes the gradient of the weight
    into one buffer. With autocast, matrix
    products run in its precision; all else is float32.

    Args:
        hidden: [C, H]. weight: [V, H]. bias: [V] or None.
        targets: [C] int64, or [C, M] for several tokens at each place.
        temperatures: K of them.
        entropy: whether it is wanted; it takes one more look at the logits.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    apply: Any = _LinearLogProbs.apply
    columns = targets if targets.ndim == 2 else targets[:, None]
    *rows, spread = apply(hidden, weight, bias, columns, tuple(temperatures), entropy)
    return LogProbs(torch.stack(rows).view(len(rows), *targets.shape), spread)


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
    ) -> tuple[Tensor, ...]:
        logprobs = hidden.new_empty(len(temperatures), *targets.shape, dtype=torch.float32)
        entropy = hidden.new_empty(len(targets) if want_entropy else 0, dtype=torch.float32)
        chunks = _chunks(hidden, weight)
        for part in chunks:
            logits = F.linear(hidden[part], weight, bias)
            for row, temperature in enumerate(temperatures):
                table = torch.log_softmax(_at(logits, temperature), 1, dtype=torch.float32)
                logprobs[row, part] = table.gather(1, targets[part])
            if want_entropy:
                entropy[part] = -torch.linalg.vecdot(table.exp(), table)
        # One chunk is what may exist at any time, so it may as well be kept.
        kept = logits if len(chunks) == 1 else None
        ctx.save_for_backward(hidden, weight, bias, targets, kept)
        ctx.temperatures = temperatures
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(entropy)
        return (*logprobs.unbind(), entropy)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, kept = ctx.saved_tensors
        wanted = [
            (temperature, gradient)
            for temperature, gradient in zip(ctx.temperatures, gradients[:-1], strict=True)
            if gradient is not None
        ]
        for_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        for_weight = (
            torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        for_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for part in _chunks(hidden, weight):
            logits = F.linear(hidden[part], weight, bias) if kept is None else kept
            slope = None  # of the loss by the logits
            for temperature, gradient in wanted:
                scaled = gradient[part] / temperature
                power = torch.softmax(_at(logits, temperature), 1, dtype=torch.float32)
                power.mul_(-scaled.sum(1, keepdim=True)).scatter_add_(1, targets[part], scaled)
                slope = power if slope is None else slope.add_(power)
            if slope is None:
                break
            narrow = slope.to(weight.dtype)
            if for_hidden is not None:
                for_hidden[part] = narrow @ weight
            if for_weight is not None:
                _add_product(for_weight, narrow, hidden[part])
            if for_bias is not None:
                for_bias += slope.sum(0)
        return (
            for_hidden,
            for_weight.to(weight.dtype) if for_weight is not None else None,
            for_bias.to(bias.dtype) if for_bias is not None else None,
            None,
            None,
            None,
        )


def _at(logits: Tensor, temperature: float) -> Tensor:
    """The logits themselves at temperature 1, which spares a copy of them."""
    return logits if temperature == 1.0 else logits.float().div(temperature)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left.T @ right, in place where the precisions agree."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
    else:
        total += left.T @ right


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Parts of the scored tokens whose logits take `CHUNK_BYTES`, all of about one size."""
    count = len(hidden)
    limit = max(1, CHUNK_BYTES[hidden.device.type] // (4 * len(weight)))
    size = -(-count // max(1, -(-count // limit))) if count else 1
    return [slice(at, min(count, at + size)) for at in range(0, count, size)]


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
    together = same_beginnings(sequences, starts) if can_share(model, model.device) else None
    batch = pack(sequences, starts, families=together).to(model.device)
    hidden = hidden_states(model, batch)
    head = output_head(model)
    found = [
        _chunk_top(head, hidden[part], batch.targets[part], top)
        for part in _chunks(hidden, head.weight)
    ]
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
