"""Log-probs of given tokens under a model: packed, so that no time goes to padding, or in rows
where a model is right in these alone (`services.layouts`).

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
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from services import layouts
from services.attention import ATTENTION, Buckets, Rule, computes, on_device
from services.fused import fuse

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}  # of float32 logits that exist at once
MIN_PREFIX = 16  # tokens; a shorter beginning costs more to share than to compute again


@dataclass(frozen=True, slots=True)
class Pack:
    """Segments laid end to end, and which tokens are to be scored."""

    token_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, from 0 in each sequence
    cu_seqlens: Tensor  # [S + 1] int32, where each segment starts
    max_seqlen: int  # of whole sequences
    sources: Tensor  # [C] index in the pack of the token before each scored one
    targets: Tensor  # [C] the scored token ids
    lengths: tuple[int, ...]  # scored tokens of each sequence, sums to C
    buckets: Buckets
    # Where each shared beginning starts and ends, and where the last of those that follow it ends.
    prefixes: tuple[tuple[int, int, int], ...] = ()

    @property
    def seq_idx(self) -> Tensor:
        """[1, T] int32: which segment each token is in."""
        places = torch.arange(len(self.token_ids), dtype=torch.int32, device=self.cu_seqlens.device)
        return torch.searchsorted(self.cu_seqlens[1:], places, right=True, out_int32=True)[None]

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
    are the indices of all sequences: those in one have the same tokens before their starts, and
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
        for index in family:  # nothing is predicted from the last token
            after = lay(sequences[index][start:-1], start)
            scored = np.arange(after - 1, after + len(sequences[index]) - start - 1)
            scored[:1] = at + start - 1
            sources[index] = scored
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
    families: dict[object, list[int]] = {}
    for index, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        key = tuple(ids[:start]) if start >= MIN_PREFIX else index
        families.setdefault(key, []).append(index)
    return list(families.values())


def can_share(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether sequences of a `pack` may share prefixes where `device` computes: the attention for
    it exists on the CPU only, and for layers that see all that stands before a token."""
    return device.type == "cpu" and layouts.proven(model).shares


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Finds the layout in which `model` is right, and what it does to its logits. Its `generate`
    must not be used afterwards.

    Raises:
        ValueError: neither layout gives what the model gives for each sequence by itself.
    """
    if layouts.is_proven(model):
        return model
    fuse(model)
    family, own, training = model.config.model_type, layouts.own_attention(model), model.training
    model.train(False)
    proven = None
    try:
        proven = layouts.find(model, output_head(model), partial(_tried, model))
    except layouts.FAILURES as error:
        raise ValueError(f"{family} models are not supported: {error}") from error
    finally:
        model.train(training)
        if proven is None:
            layouts.set_attention(model, own)
    layouts.record(model, proven)
    return model


def _tried(
    model: PreTrainedModel,
    proven: layouts.Proven,
    sequences: Sequence[Sequence[int]],
    common: int | None,
) -> Tensor:
    """See `layouts.Run`."""
    together = None if common is None else [list(range(len(sequences)))]
    batch = pack(sequences, [common or 1] * len(sequences), families=together).to(model.device)
    return _all_hidden(model, batch, proven)[batch.sources]


def hidden_states(model: PreTrainedModel, pack: Pack) -> Tensor:
    """[C, H] final hidden states from which the scored tokens are predicted."""
    return _all_hidden(model, pack, layouts.proven(model))[pack.sources]


def _all_hidden(model: PreTrainedModel, pack: Pack, proven: layouts.Proven) -> Tensor:
    """[T, H] final hidden states of the whole pack."""
    layouts.check_length(model.config, pack.max_seqlen)
    packs = proven.layout == "packed"
    layouts.set_attention(model, ATTENTION if packs else layouts.own_attention(model))
    if packs:
        return layouts.last_hidden(
            model,
            proven.source,
            input_ids=pack.token_ids[None],
            position_ids=pack.position_ids[None],
            cu_seq_lens_q=pack.cu_seqlens,
            max_length_q=pack.max_seqlen,
            seq_idx=pack.seq_idx,  # this and the bounds are for kernels of convolutions and scans
            buckets=pack.buckets,
            prefixes=pack.prefixes,
        )[0]
    rows = [
        layouts.last_hidden(model, proven.source, input_ids=pack.token_ids[indices])
        for indices in pack.buckets.indices
    ]
    return pack.buckets.joined(rows)


def token_logprobs(
    model: PreTrainedModel,
    pack: Pack,
    temperatures: Sequence[float],
    others: Tensor | None = None,
    detached: int = 0,
) -> Tensor:
    """[K, C] float32 log-probs of the scored tokens, one row a temperature. Differentiable, but
    for the first `detached` rows. With `others`, [C, M] more token ids at each place,
    [K, C, 1 + M]: the scored token comes first."""
    hidden = hidden_states(model, pack)
    head = output_head(model)
    targets = pack.targets
    if others is not None:
        targets = torch.cat([targets[:, None], others], 1)
    return linear_logprobs(
        hidden,
        head.weight,
        head.bias,
        targets,
        temperatures,
        entropy=False,
        detached=detached,
        logit_map=layouts.proven(model).logits,
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
    logit_map: layouts.LogitMap = layouts.LogitMap(),  # noqa: B008 (frozen)
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
        logit_map: layouts.LogitMap,
    ) -> tuple[Tensor, ...]:
        logprobs = hidden.new_empty(len(temperatures), *targets.shape, dtype=torch.float32)
        entropy = hidden.new_empty(len(targets) if want_entropy else 0, dtype=torch.float32)
        normalisers = hidden.new_empty(len(temperatures), len(targets), dtype=torch.float32)
        chunks = _chunks(len(hidden), len(weight), hidden.device)
        for part in chunks:
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
        kept = logits if len(chunks) == 1 else None
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
        chunks = [slice(0, len(weight))]
        if kept is None:
            chunks = _chunks(len(weight), len(hidden), hidden.device)
        for part in chunks if wanted else ():
            offset = None if bias is None else bias[part]
            logits = F.linear(hidden, weight[part], offset) if kept is None else kept
            slope = _slope(ctx.logit_map(logits), targets - part.start, wanted)
            if ctx.logit_map != layouts.LogitMap():
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


def computed_by(model: PreTrainedModel, *, on_gpu: bool, half: bool) -> list[str]:
    """What would compute the attention and the output layer of a prepared model, one phrase each,
    with the versions of torch and Triton that are installed here; `half`: in 16 bits."""
    proven = layouts.proven(model)
    if proven.layout == "rows":
        attention = f"transformers' own ({layouts.own_attention(model)}), not packed"
    else:
        with layouts.narrowed(model) as has_window:
            sinks = next((p for n, p in model.named_parameters() if n.endswith("sinks")), None)
        attention = computes(Rule(None, 1 if has_window else None, sinks), on_gpu and half)
    output = "a Triton kernel, fused" if on_gpu and _with_triton() else "chunks of logits"
    if proven.logits != layouts.LogitMap():
        cap = "" if proven.logits.cap is None else f", soft cap {proven.logits.cap:g}"
        output += f" (scale {proven.logits.scale:g}{cap})"
    return [f"attention: {attention}", f"output layer: {output}"]


def _kernels(logits: Tensor) -> ModuleType | None:
    """`services.head_kernels` where they run: on a GPU with Triton."""
    return _with_triton() if logits.is_cuda else None


@cache
def _with_triton() -> ModuleType | None:
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


def _chunks(count: int, each: int, device: torch.device) -> list[slice]:
    """Parts of `count` rows with `each` logits that take `CHUNK_BYTES`, all of about one size."""
    limit = max(1, CHUNK_BYTES[device.type] // (4 * max(1, each)))
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


class Scored(NamedTuple):
    """What a model says of `t` tokens of one sequence, at temperature 1, in nats."""

    logprobs: Tensor  # [t]
    top_ids: Tensor  # [t, top]
    top_logprobs: Tensor  # [t, top]
    candidates: Tensor  # [t, m]
    entropy: Tensor  # [t]; NaN where it was not asked for


@torch.no_grad()
def score_top(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    top: int,
    candidates: Tensor | None = None,
    *,
    entropy: bool = False,
) -> list[Scored]:
    """As `score`, on the CPU, with more about each place: the `top` most likely tokens, the
    log-probs of `candidates` ([C, m] token ids, in the order of the sequences), and the entropy
    over the vocabulary."""
    together = same_beginnings(sequences, starts) if can_share(model, model.device) else None
    batch = pack(sequences, starts, families=together).to(model.device)
    hidden = hidden_states(model, batch)
    head, logit_map = output_head(model), layouts.proven(model).logits
    targets = batch.targets[:, None]
    if candidates is not None:
        targets = torch.cat([targets, candidates.to(model.device)], 1)
    scored = [
        _chunk_top(logit_map(head(hidden[part]).float()), targets[part], top, entropy)
        for part in _chunks(len(hidden), len(head.weight), hidden.device)
    ]
    flat = [torch.cat(parts).cpu() for parts in zip(*scored, strict=True)]
    split = [torch.split(part, list(batch.lengths)) for part in flat]
    return [Scored(*parts) for parts in zip(*split, strict=True)]


def _chunk_top(logits: Tensor, targets: Tensor, top: int, entropy: bool) -> tuple[Tensor, ...]:
    normaliser = torch.logsumexp(logits, 1, keepdim=True)
    chosen = logits.gather(1, targets) - normaliser
    best = torch.topk(logits, top, dim=1)
    spread = logits.new_full((len(logits),), float("nan"))
    if entropy:
        spread = torch.special.entr(logits.sub_(normaliser).exp_()).sum(1)
    return chosen[:, 0], best.indices, best.values - normaliser, chosen[:, 1:], spread
