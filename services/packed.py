"""Log-probs of given tokens under a model: packed, so that no time goes to padding, or in rows
where a model is right in these alone (`services.layouts`).

All sequences of a batch lie one after another in one row of `T` tokens. Linear layers see just
those tokens; attention alone looks at the boundaries (`services.attention`).
Samples of one prompt may share it: it lies there once, in front of what follows it in each.

Axes: `T` tokens of the pack, `S` segments (mostly whole sequences), `H` hidden, `C` scored tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from services import layouts
from services.attention import (
    ATTENTION,
    Buckets,
    Keys,
    Rule,
    computes,
    on_device,
    takes_prefixes,
)
from services.fused import fuse
from services.output_layer import chunks, linear_logprobs, output_head, with_triton

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
    keys: Keys | None = None  # of each segment; None where each sees its own alone

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
            keys=self.keys and self.keys.to(device),
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
    shared = tuple(p for p in prefixes if p[1] < p[2])
    return Pack(
        token_ids=torch.from_numpy(np.concatenate(tokens)),
        position_ids=torch.from_numpy(np.concatenate(positions)),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=max(map(len, sequences), default=0),
        sources=torch.from_numpy(np.concatenate([none, *sources])),
        targets=torch.from_numpy(np.concatenate([none, *targets])),
        lengths=tuple(len(s) for s in sources),
        buckets=Buckets.of(np.diff(bounds).tolist()),
        prefixes=shared,
        keys=Keys.of(bounds, shared) if shared else None,
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


def can_share(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether sequences of a `pack` may share prefixes where `device` computes in `dtype`: models
    whose layers see all that stands before a token, on a CPU or by a GPU's kernel."""
    return layouts.proven(model).shares and takes_prefixes(device, dtype)


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
            keys=pack.keys,
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
    output = "a Triton kernel, fused" if on_gpu and with_triton() else "chunks of logits"
    if proven.logits != layouts.LogitMap():
        cap = "" if proven.logits.cap is None else f", soft cap {proven.logits.cap:g}"
        output += f" (scale {proven.logits.scale:g}{cap})"
    return [f"attention: {attention}", f"output layer: {output}"]


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
    shared = can_share(model, model.device, model.dtype)
    together = same_beginnings(sequences, starts) if shared else None
    batch = pack(sequences, starts, families=together).to(model.device)
    hidden = hidden_states(model, batch)
    head, logit_map = output_head(model), layouts.proven(model).logits
    targets = batch.targets[:, None]
    if candidates is not None:
        targets = torch.cat([targets, candidates.to(model.device)], 1)
    scored = [
        _chunk_top(logit_map(head(hidden[part]).float()), targets[part], top, entropy)
        for part in chunks(len(hidden), len(head.weight), hidden.device)
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
