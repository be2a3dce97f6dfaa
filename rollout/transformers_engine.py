"""Sampling with transformers: many groups decoded together in one batch.

    prefill each prompt once ─▶ repeat its KV cache n times ─▶ decode, dropping what has finished

Every row draws from a random stream of its own, fixed by the group's seed and the row's place in
the group, so a group's samples do not depend on which other prompts share its batch. All of a
batch runs under one version of the weights, because weights change on the same thread.

Axes: `B` prompts, `P` longest prompt, `R` rows (trajectories) of the batch, `A` those still being
decoded, `T` longest completion, `V` vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rollout.engine import (
    Completion,
    Sampled,
    SamplingError,
    check_manifest,
    check_probe,
    check_request,
)
from rollout.pace import Pace
from rollout.prepacked import prepack
from services.batching import Batcher
from services.stage import Unavailable
from services.trajectory import Sampling
from services.weights import Weights

ATTENTION = "scope_sampling"
_LINGER_S = 0.005  # prompts are claimed several at a time: those of one claim share a batch


@dataclass(frozen=True, slots=True)
class Request:
    """One group to be sampled."""

    prompt_ids: Sequence[int]
    sampling: Sampling


class TransformersEngine:
    """See `rollout.engine.Engine`.

    Args:
        model: a causal language model in evaluation mode, with its own attention (not packed).
        end_tokens: ids that end a completion.
        batch_sequences: most trajectories in one batch; a larger group goes alone.
        probe_tolerance: nats by which log-probs of the probe may differ from the learner's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        end_tokens: Sequence[int],
        *,
        batch_sequences: int,
        probe_tolerance: float,
    ) -> None:
        self.pace = Pace()
        self._model = prepare(model)
        self._end_tokens = end_tokens
        self._tolerance = probe_tolerance
        self._version: int | None = None  # read and written on the batcher's thread only
        self._batcher: Batcher[Request, Sampled] = Batcher(
            self._sample,
            cost=lambda request: request.sampling.n,
            budget=batch_sequences,
            linger_s=_LINGER_S,
        )

    async def sample(self, prompt_ids: Sequence[int], sampling: Sampling) -> Sampled:
        """See `rollout.engine.Engine`."""
        vocab_size = self._model.config.get_text_config().vocab_size
        check_request(prompt_ids, sampling, vocab_size=vocab_size)
        return await self._batcher.submit(Request(prompt_ids, sampling))

    async def load_weights(self, weights: Weights) -> None:
        """See `rollout.engine.Engine`. Weights whose names or shapes do not fit change nothing."""
        await self._batcher.between_batches(lambda: self._load(weights))

    async def close(self) -> None:
        """Lets the thread end after the batch that it is working on."""
        self._batcher.close()

    def _sample(self, requests: Sequence[Request]) -> list[Sampled]:
        if self._version is None:
            raise Unavailable("the engine has no weights that passed the probe")
        groups = sample_groups(self._model, requests, self._end_tokens, self.pace)
        return [Sampled(tuple(group), self._version) for group in groups]

    def _load(self, weights: Weights) -> None:
        self._version = None
        copy_weights(self._model, weights)
        check_probe(weights, sequence_logprobs(self._model, weights.probe_ids), self._tolerance)
        self._version = weights.version


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Switches a model with transformers' usual attention to the one below, and its linear layers
    on a CPU to prepacked ones, which decode faster and compute the same."""
    prepack(model)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)
    return model


def _grouped_attention(
    module: torch.nn.Module,
    query: Tensor,  # [A, heads, 1, D]
    key: Tensor,  # [A, kv_heads, S, D]
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """When one token is decoded, the heads that share a key head stand in for its queries: keys
    are read once for all of them and never repeated. All else is transformers' own attention."""
    rows, heads, count, width = query.shape
    if count > 1 or heads == key.shape[1] or settings.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    out = F.scaled_dot_product_attention(
        query.reshape(rows, key.shape[1], -1, width),
        key,
        value,
        attn_mask=attention_mask,
        scale=settings.get("scaling"),
    )
    return out.reshape(rows, 1, heads, -1), None


AttentionInterface.register(ATTENTION, _grouped_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@torch.inference_mode()
def sample_groups(
    model: PreTrainedModel,
    requests: Sequence[Request],
    end_tokens: Sequence[int],
    pace: Pace | None = None,
) -> list[list[Completion]]:
    """Samples all groups in one batch; `pace` sees how long its forwards took.

    Raises:
        SamplingError: the model computed logits that are no numbers.
    """
    rows = _Rows(requests, end_tokens, model.device)
    logits_BV, cache = _prefill(model, rows)
    logits_AV = logits_BV[rows.prompt_R]
    cache.batch_select_indices(rows.prompt_R)
    _make_room(cache)
    counts: list[int] = []
    stamps: list[float] = []
    for step in range(rows.longest):
        rows.choose(step, logits_AV)
        kept = rows.drop_finished()  # waits for the device
        stamps.append(time.perf_counter())
        if not rows.count:
            break
        counts.append(rows.count)
        if kept is not None:
            cache.batch_select_indices(kept)
        logits_AV = model(
            input_ids=rows.last_tokens(step),
            attention_mask=rows.mask(step),
            position_ids=rows.positions(step),
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    if pace is not None:
        pace.saw(counts, [later - sooner for sooner, later in pairwise(stamps)])
    return rows.completions()


@torch.inference_mode()
def sequence_logprobs(model: PreTrainedModel, token_ids: Sequence[int]) -> list[float]:
    """Log-probs (nats, temperature 1) of `token_ids[1:]`, in one plain forward."""
    ids = torch.tensor([list(token_ids)], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    logprobs: list[float] = (
        torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None]).squeeze(1).tolist()
    )
    return logprobs


@torch.no_grad()
def copy_weights(model: PreTrainedModel, weights: Weights) -> None:
    """Writes `weights` into the parameters of the same names, in the model's own precision.

    Raises:
        WeightsMismatch: names or shapes differ; nothing has been written then.
    """
    parameters = dict(model.named_parameters())
    check_manifest(weights, {name: tuple(p.shape) for name, p in parameters.items()})
    for name, tensor in weights.tensors():
        parameters[name].copy_(tensor)


def _prefill(model: PreTrainedModel, rows: _Rows) -> tuple[Tensor, DynamicCache]:
    """[B, V] logits after each prompt, and the KV cache of the prompts."""
    cache = DynamicCache(config=model.config)
    mask_BP = rows.prompt_mask_BP
    logits: Tensor = model(
        input_ids=rows.prompt_ids_BP,
        attention_mask=mask_BP,
        # Padding has no place in the sequence; any position does for what nobody attends to.
        position_ids=(mask_BP.cumsum(1) - 1).clamp_(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits
    return logits[:, -1], cache


def _make_room(cache: DynamicCache) -> None:
    """Gives each layer room to grow. Those that attend to a window alone keep the cache that
    transformers gives them."""
    for place, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[place] = _RoomyLayer(layer)


class _RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one layer [A, heads, S, D], with room to grow: a token is written in its
    place where `DynamicLayer` copies all that came before it, and rows leave by moving the few
    that take their places."""

    keys: Tensor
    values: Tensor

    def __init__(self, read: DynamicLayer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        keys, values = read.keys, read.values
        assert keys is not None and values is not None  # the prompts
        self.lazy_initialization(keys, values)
        self._show(keys, values, keys.shape[2])

    def _show(self, all_keys: Tensor, all_values: Tensor, length: int) -> None:
        """The first `length` places of these are what is attended to."""
        self._all_keys, self._all_values = all_keys, all_values
        self.keys, self.values = all_keys[:, :, :length], all_values[:, :, :length]

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """See `DynamicLayer.update`."""
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if end > self._all_keys.shape[2]:
            self._show(_roomier(self.keys, end), _roomier(self.values, end), start)
        self._show(self._all_keys, self._all_values, end)
        self.keys[:, :, start:] = key_states
        self.values[:, :, start:] = value_states
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """See `DynamicLayer.batch_select_indices`. Rows that stay where they are cost nothing."""
        count, length = len(indices), self.keys.shape[2]
        moved = (indices != torch.arange(count, device=indices.device)).nonzero().squeeze(1)
        if len(moved):
            self.keys[moved] = self.keys[indices[moved]]
            self.values[moved] = self.values[indices[moved]]
        self._show(self._all_keys[:count], self._all_values[:count], length)


def _roomier(states: Tensor, least: int) -> Tensor:
    """A copy of [A, heads, S, D] with twice the room, or for `least` places."""
    rows, heads, length, width = states.shape
    made = states.new_empty(rows, heads, max(least, 2 * length), width)
    made[:, :, :length] = states
    return made


class _Rows:
    """The trajectories of one batch while they grow. A row keeps its number when others are
    dropped from the batch; `_active_A` says which rows the batch still consists of."""

    def __init__(
        self, requests: Sequence[Request], end_tokens: Sequence[int], device: torch.device
    ) -> None:
        counts = [r.sampling.n for r in requests]
        lengths_B = torch.tensor([len(r.prompt_ids) for r in requests])
        limits_B = torch.tensor([r.sampling.max_tokens for r in requests])
        temperatures_B = torch.tensor([r.sampling.temperature for r in requests])
        self.longest = int(limits_B.max())
        self.prompt_ids_BP, self.prompt_mask_BP = _padded(requests, device)
        prompt_R = torch.repeat_interleave(torch.arange(len(requests)), torch.tensor(counts))
        self.prompt_R = prompt_R.to(device)
        self._counts = counts
        self._end_tokens = torch.tensor(list(end_tokens), device=device)
        self._prompt_length_R = lengths_B[prompt_R].to(device)
        self._limit_R = limits_B[prompt_R].to(device)
        self._temperature_R = temperatures_B[prompt_R].to(device)
        self._uniform_RT = _uniforms(requests, self.longest).to(device)
        self._tokens_RT = torch.zeros(self._uniform_RT.shape, dtype=torch.int64, device=device)
        self._logprobs_RT = torch.zeros(self._uniform_RT.shape, device=device)
        self._length_R = torch.zeros(len(prompt_R), dtype=torch.int64, device=device)
        self._stopped_R = torch.zeros(len(prompt_R), dtype=torch.bool, device=device)
        self._mask_RS = torch.cat(  # S = P + T
            [self.prompt_mask_BP[self.prompt_R], torch.ones_like(self._tokens_RT)], dim=1
        )
        self._active_A = torch.arange(len(prompt_R), device=device)

    @property
    def count(self) -> int:
        """A: how many rows the batch has now."""
        return len(self._active_A)

    def choose(self, step: int, logits_AV: Tensor) -> None:
        """Draws the next token of every row; finished rows that are still in the batch get one
        as well, past their end."""
        active = self._active_A
        tokens_A, logprobs_A = draw(
            logits_AV, self._temperature_R[active], self._uniform_RT[active, step]
        )
        self._tokens_RT[active, step] = tokens_A
        self._logprobs_RT[active, step] = logprobs_A
        growing_A = self._length_R[active] == 0
        stops_A = growing_A & torch.isin(tokens_A, self._end_tokens)
        ends_A = stops_A | (growing_A & (self._limit_R[active] == step + 1))
        self._stopped_R[active] |= stops_A
        self._length_R[active[ends_A]] = step + 1

    def drop_finished(self) -> Tensor | None:
        """Drops finished rows from the batch. Returns, if there were any, which row of the batch
        each place of it now holds: those that stay keep their places, but for the last ones,
        which fill the gaps."""
        growing_A = self._length_R[self._active_A] == 0
        count = int(growing_A.sum())
        if count == self.count:
            return None
        kept = torch.arange(count, device=growing_A.device)
        kept[~growing_A[:count]] = count + growing_A[count:].nonzero().squeeze(1)
        self._active_A = self._active_A[kept]
        return kept

    def last_tokens(self, step: int) -> Tensor:
        """[A, 1]"""
        return self._tokens_RT[self._active_A, step, None]

    def positions(self, step: int) -> Tensor:
        """[A, 1]: the place of the last token in its sequence, padding not counted."""
        return (self._prompt_length_R[self._active_A] + step)[:, None]

    def mask(self, step: int) -> Tensor:
        """[A, P + step + 1]: 0 on padding."""
        return self._mask_RS[self._active_A, : self.prompt_ids_BP.shape[1] + step + 1]

    def completions(self) -> list[list[Completion]]:
        """Those of each request, in its order."""
        tokens = self._tokens_RT.to(torch.int32).cpu().numpy()
        logprobs = self._logprobs_RT.cpu().numpy()
        made: list[Completion] = []
        for row, (length, stopped) in enumerate(
            zip(self._length_R.tolist(), self._stopped_R.tolist(), strict=True)
        ):
            # Copies: views would keep the arrays of the whole batch alive.
            ids, lps = tokens[row, :length].copy(), logprobs[row, :length].copy()
            made.append(Completion(ids, lps, "stop" if stopped else "length"))
        ends = np.cumsum(self._counts)
        return [made[end - n : end] for end, n in zip(ends, self._counts, strict=True)]


def draw(logits_AV: Tensor, temperature_A: Tensor, uniform_A: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling: the [A] tokens at which the cumulated probability passes
    `uniform_A` (float64, in [0, 1)), and their log-probs (float32).

    A token of probability zero is never drawn: the CDF does not rise there.

    Raises:
        SamplingError: the logits are no numbers.
    """
    logprobs_AV = torch.log_softmax(logits_AV.float() / temperature_A[:, None], -1)
    # In float32 the CDF of a large vocabulary would lose its least likely tokens.
    cdf_AV = logprobs_AV.exp().cumsum(-1, dtype=torch.float64)
    total_A1 = cdf_AV[:, -1:]
    if not bool(torch.isfinite(total_A1).all()):
        raise SamplingError("the model computed logits that are no numbers")
    tokens_A1 = torch.searchsorted(cdf_AV, uniform_A[:, None] * total_A1, right=True)
    return tokens_A1.squeeze(1), logprobs_AV.gather(1, tokens_A1).squeeze(1)


def _uniforms(requests: Sequence[Request], longest: int) -> Tensor:
    """[R, T] float64 in [0, 1): one stream a row, keyed by group seed and place in the group."""
    values = np.zeros((sum(r.sampling.n for r in requests), longest))
    row = 0
    for sampling in (r.sampling for r in requests):
        for place in range(sampling.n):
            stream = np.random.Philox(np.random.SeedSequence(sampling.seed, spawn_key=(place,)))
            count = sampling.max_tokens
            values[row, :count] = np.random.Generator(stream).random(count)
            row += 1
    return torch.from_numpy(values)


def _padded(requests: Sequence[Request], device: torch.device) -> tuple[Tensor, Tensor]:
    """[B, P] prompts padded on the left, where the cache can go on growing, and their mask."""
    longest = max(len(r.prompt_ids) for r in requests)
    ids = torch.zeros(len(requests), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, request in enumerate(requests):
        start = longest - len(request.prompt_ids)
        ids[place, start:] = torch.tensor(list(request.prompt_ids))
        mask[place, start:] = 1
    return ids.to(device), mask.to(device)
