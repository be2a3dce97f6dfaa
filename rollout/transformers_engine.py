"""Sampling with transformers: many groups decoded together in one batch.

    prefill each prompt once ─▶ repeat its KV cache n times ─▶ decode, dropping what has finished

Every row draws from a random stream of its own, fixed by the group's seed and the row's place in
the group, so a group's samples do not depend on which other prompts share its batch. All of a
batch runs under one version of the weights, because weights change on the same thread.

Axes: `B` prompts, `P` longest prompt, `R` rows (trajectories) of the batch, `A` those still being
decoded, `T` longest completion, `V` vocabulary.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
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
    check_request,
)
from rollout.pace import Pace
from rollout.prepacked import prepack
from rollout.rows import Request, Rows
from services import layouts
from services.batching import Batcher
from services.errors import BadItem, Unavailable
from services.trajectory import Sampling
from services.weights import Weights, check_probe, copy_weights

ATTENTION = "scope_sampling"
_log = logging.getLogger(__name__)
# Differences may be so many times what rounding the embeddings does, but none of so many nats.
_TIMES, _NO_ROUNDING = 4.0, 0.5
_STATE = "scope_way_to_sample"  # kept with a model that was prepared
METHODS = ("padded prompts", "prompts of one length", "no cache")  # the fastest first
_CACHE = "past_key_values"
_LINGER_S = 0.005  # prompts are claimed several at a time: those of one claim share a batch


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
        self._usual: float | None = None  # see `check_probe`
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
        try:
            layouts.check_length(self._model.config, len(prompt_ids) + sampling.max_tokens)
        except ValueError as error:
            raise BadItem(str(error)) from None
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
        logprobs = sequence_logprobs(self._model, weights.probe_ids)
        mean = check_probe(weights, logprobs, self._tolerance, self._usual)
        self._usual = mean if self._usual is None else self._usual
        self._version = weights.version


@dataclass(frozen=True, slots=True)
class Way:
    """How a model is sampled from."""

    method: str  # one of `METHODS`
    attention: str  # transformers' name of it


def way(model: PreTrainedModel) -> Way:
    """What `prepare` found; the fastest, for a model that was not prepared."""
    chosen: Way = getattr(model, _STATE, Way(METHODS[0], model.config._attn_implementation or ""))
    return chosen


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Switches a model's linear layers on a CPU to prepacked ones, which decode faster and compute
    the same. Then finds out how it samples right: what it drew in a small trial must have the
    log-probs of plain forwards. Where transformers' usual attention is the model's own, the one
    below is tried in its place.

    Raises:
        ValueError: it does not, in any of the ways known here, or its weights are no numbers.
    """
    if hasattr(model, _STATE):
        return model
    own, family = layouts.own_attention(model), model.config.model_type
    layouts.set_attention(model, own)
    if not all(map(math.isfinite, sequence_logprobs(model, layouts.trial_tokens(model, 3)))):
        raise ValueError(f"{family}: the model's log-probs are no numbers; its weights are broken")
    prepack(model)
    attentions = [ATTENTION, own] if own == "sdpa" else [own]
    differences, allowed, measured = {}, tolerance(model), False
    for tried in (Way(method, attention) for method in METHODS for attention in attentions):
        setattr(model, _STATE, tried)
        differences[tried] = _trial(model)
        if allowed < differences[tried] < _NO_ROUNDING and not measured:
            measured = True
            allowed = max(allowed, min(_NO_ROUNDING, _TIMES * _rounding(model)))
        if differences[tried] <= allowed:
            _log.info("%s: samples with %s, proven on four prompts", family, tried.method)
            return model
    delattr(model, _STATE)
    layouts.set_attention(model, own)
    raise ValueError(
        f"{family} models are not supported: none samples as they compute: "
        f"{dict(zip(METHODS, differences.values(), strict=False))}"
    )


def tolerance(model: PreTrainedModel) -> float:
    """Nats that rounding alone may make of the trial's log-probs, of a model that makes little of
    it."""
    return 2e-4 if model.dtype == torch.float32 else 0.15


def _rounding(model: PreTrainedModel) -> float:
    """Nats by which plain forwards move with the rounding of the embeddings."""
    ids, worst = layouts.trial_tokens(model, 12), 0.0
    before = np.array(_plain(model, ids))
    for draw in range(layouts.DRAWS):
        with layouts.rounded(model, draw):
            worst = max(worst, float(np.abs(np.array(_plain(model, ids)) - before).max()))
    return worst


def _trial(model: PreTrainedModel) -> float:
    """Largest difference (nats) between log-probs of a few samples as they were drawn and as
    plain forwards with the model's own attention give them; infinity where the model cannot be
    sampled from in this way."""
    prompts = [layouts.trial_tokens(model, n) for n in (1, 12, 3, 1)]
    limits = (6, 8, 5, 4)  # rows leave the batch one by one
    requests = [
        Request(prompt, Sampling(n=2, max_tokens=limit, seed=limit))
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    worst = 0.0
    try:
        groups = sample_groups(model, requests, [-1])
        layouts.set_attention(model, layouts.own_attention(model))
        for request, group in zip(requests, groups, strict=True):
            for drawn in group:
                whole = [*request.prompt_ids, *drawn.token_ids.tolist()]
                plain = np.array(_plain(model, whole)[len(request.prompt_ids) - 1 :])
                worst = max(worst, float(np.abs(plain - drawn.logprobs).max()))
    except (*layouts.FAILURES, SamplingError) as error:
        _log.info("%s does not sample this way: %s", model.config.model_type, error)
        return math.inf
    finally:
        layouts.set_attention(model, way(model).attention)
    return worst if math.isfinite(worst) else math.inf


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
        SamplingError: the model computed logits that are not finite.
        ValueError: see `layouts.check_length`.
    """
    for request in requests:
        layouts.check_length(model.config, len(request.prompt_ids) + request.sampling.max_tokens)
    chosen = way(model)
    layouts.set_attention(model, chosen.attention)
    if chosen.method == "padded prompts":
        return _sample_padded(model, requests, end_tokens, pace)
    sample = _sample_cached if chosen.method == "prompts of one length" else _sample_anew
    lengths = [len(request.prompt_ids) for request in requests]
    made: dict[int, list[Completion]] = {}
    for length in sorted(set(lengths)):
        indices = [index for index, own in enumerate(lengths) if own == length]
        groups = sample(model, [requests[index] for index in indices], end_tokens, pace)
        made.update(zip(indices, groups, strict=True))
    return [made[index] for index in range(len(requests))]


def _sample_cached(
    model: PreTrainedModel,
    requests: Sequence[Request],
    end_tokens: Sequence[int],
    pace: Pace | None,
) -> list[list[Completion]]:
    """Prompts of one length need no padding, which a recurrent layer would see, and so no mask:
    any cache that transformers can reorder will do."""
    rows = Rows(requests, end_tokens, model.device)
    cache = DynamicCache(config=model.config)
    # Models without attention call it so.
    name = "cache_params" if "cache_params" in signature(model.forward).parameters else _CACHE

    def forward(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, **{name: cache}, use_cache=True).logits
        return logits[:, -1]

    logits_AV = forward(rows.prompt_ids_BP)[rows.prompt_R]
    cache.reorder_cache(rows.prompt_R)  # type: ignore[arg-type]
    watch = _Watch(pace)
    for step in range(rows.longest):
        rows.choose(step, logits_AV)
        kept = rows.drop_finished()
        if not watch.goes_on(rows.count):
            break
        if kept is not None:
            cache.reorder_cache(kept)  # type: ignore[arg-type]
        logits_AV = forward(rows.last_tokens(step))
    return rows.completions()


def _sample_anew(
    model: PreTrainedModel,
    requests: Sequence[Request],
    end_tokens: Sequence[int],
    pace: Pace | None,
) -> list[list[Completion]]:
    """Without a cache: each token costs a forward over all that stands before it. Right for every
    causal model, and the last resort."""
    rows = Rows(requests, end_tokens, model.device)
    watch = _Watch(pace)
    logits_AV = model(input_ids=rows.prompt_ids_BP, use_cache=False).logits[:, -1][rows.prompt_R]
    for step in range(rows.longest):
        rows.choose(step, logits_AV)
        rows.drop_finished()
        if not watch.goes_on(rows.count):
            break
        logits_AV = model(input_ids=rows.whole(step), use_cache=False).logits[:, -1]
    return rows.completions()


class _Watch:
    """Tells a pace, if there is one, how long each forward took and how many rows it had."""

    def __init__(self, pace: Pace | None) -> None:
        self._pace = pace
        self._counts: list[int] = []
        self._stamps: list[float] = []

    def goes_on(self, count: int) -> bool:
        """Notes that a step ends with `count` rows; the last step is the one with none."""
        self._stamps.append(time.perf_counter())
        if count:
            self._counts.append(count)
        elif self._pace is not None:
            between = [later - sooner for sooner, later in pairwise(self._stamps)]
            self._pace.saw(self._counts, between)
        return count > 0


def _sample_padded(
    model: PreTrainedModel,
    requests: Sequence[Request],
    end_tokens: Sequence[int],
    pace: Pace | None,
) -> list[list[Completion]]:
    """Prompts of all lengths in one batch, padded on the left."""
    rows = Rows(requests, end_tokens, model.device)
    logits_BV, cache = _prefill(model, rows)
    logits_AV = logits_BV[rows.prompt_R]
    cache.batch_select_indices(rows.prompt_R)
    _make_room(cache, rows.prompt_ids_BP.shape[1] + rows.longest)
    watch = _Watch(pace)
    for step in range(rows.longest):
        rows.choose(step, logits_AV)
        kept = rows.drop_finished()  # waits for the device
        if not watch.goes_on(rows.count):
            break
        if kept is not None:
            cache.batch_select_indices(kept)
        logits_AV = model(
            input_ids=rows.last_tokens(step),
            attention_mask=rows.mask(step),
            position_ids=rows.positions(step),
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    return rows.completions()


@torch.inference_mode()
def sequence_logprobs(model: PreTrainedModel, token_ids: Sequence[int]) -> list[float]:
    """Log-probs (nats, temperature 1) of `token_ids[1:]`, in one plain forward."""
    layouts.set_attention(model, way(model).attention)
    return _plain(model, token_ids)


def _plain(model: PreTrainedModel, token_ids: Sequence[int]) -> list[float]:
    """`sequence_logprobs` with the attention that is on."""
    ids = torch.tensor([list(token_ids)], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    logprobs: list[float] = (
        torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None]).squeeze(1).tolist()
    )
    return logprobs


def _prefill(model: PreTrainedModel, rows: Rows) -> tuple[Tensor, DynamicCache]:
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


def _make_room(cache: DynamicCache, most: int) -> None:
    """Gives each layer room to grow, to `most` places at the end. Those that attend to a window
    alone keep the cache that transformers gives them."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = _RoomyLayer(layer, most)


class _RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one layer [A, heads, S, D], with room to grow: a token is written in its
    place where `DynamicLayer` copies all that came before it, and rows leave by moving the few
    that take their places."""

    keys: Tensor
    values: Tensor

    def __init__(self, read: DynamicLayer, most: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._most = most
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
            places = max(end, min(2 * start, self._most))
            self._show(_roomier(self.keys, places), _roomier(self.values, places), start)
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


def _roomier(states: Tensor, places: int) -> Tensor:
    """A copy of [A, heads, S, D] with room for `places`."""
    rows, heads, length, width = states.shape
    made = states.new_empty(rows, heads, places, width)
    made[:, :, :length] = states
    return made
