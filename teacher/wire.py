"""The binary form of a score request and of its answer: safetensors, chosen by content type.

    request   tokens int32 [T], prompt_lengths int32 [N], completion_lengths int32 [N]
              metadata: model (optional), top_logprobs (optional, decimal)
    answer    lengths int32 [N], perplexities float64 [N], logprobs float32 [C]
              top_ids int32 [C, k] and top_logprobs float32 [C, k] where k was asked for
              metadata: model, fingerprint

`T` tokens of all sequences one after another, each prompt before its completion; `N` sequences;
`C` completion tokens. Both directions of both are here, so that server and client cannot differ.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from services.trajectory import TokenIds
from teacher.scores import Query, TokenScores

MEDIA_TYPE = "application/vnd.safetensors"
_HEADER_BYTES = 8  # the length of safetensors' own header, little endian

Array = npt.NDArray[Any]


class WireError(ValueError):
    """Bytes that are not such a request or answer; the message says what is wrong with them."""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """A decoded answer, not yet compared with what was asked."""

    model: str
    fingerprint: str
    logprobs: Sequence[Any]  # [t] each
    top_ids: Sequence[Any]  # [t, k] each
    top_logprobs: Sequence[Any]  # [t, k] each


def encode_request(
    sequences: Sequence[tuple[TokenIds, TokenIds]], *, top: int = 0, model: str | None = None
) -> bytes:
    """The request for pairs of prompt and completion token ids."""
    parts = [ids.astype(np.int32, copy=False) for pair in sequences for ids in pair]
    lengths = np.array([len(part) for part in parts], np.int32).reshape(-1, 2)
    metadata = {"top_logprobs": str(top)} | ({"model": model} if model is not None else {})
    return save(
        {
            "tokens": np.concatenate([*parts, np.empty(0, np.int32)]),
            "prompt_lengths": np.ascontiguousarray(lengths[:, 0]),
            "completion_lengths": np.ascontiguousarray(lengths[:, 1]),
        },
        metadata,
    )


def json_request(
    sequences: Sequence[tuple[TokenIds, TokenIds]], *, top: int = 0, model: str | None = None
) -> bytes:
    """The same in JSON."""
    pairs = [{"prompt": p.tolist(), "completion": c.tolist()} for p, c in sequences]
    body = {"sequences": pairs, "top_logprobs": top}
    return json.dumps(body | ({"model": model} if model is not None else {})).encode()


def decode_request(body: bytes) -> Query:
    """What is asked.

    Raises:
        WireError: not a request, or one that the schema of the JSON form would refuse too.
    """
    metadata, arrays = _open(body)
    tokens = _array(arrays, "tokens", np.int32, 1)
    prompts = _array(arrays, "prompt_lengths", np.int32, 1)
    completions = _array(arrays, "completion_lengths", np.int32, 1)
    if len(prompts) != len(completions) or not len(prompts):
        raise WireError(f"{len(prompts)} prompt lengths, {len(completions)} completion lengths")
    if prompts.min() < 1 or completions.min() < 0:
        raise WireError("a prompt has at least one token and a completion at least none")
    lengths = prompts.astype(np.int64) + completions
    if lengths.sum() != len(tokens):
        raise WireError(f"{len(tokens)} tokens for lengths that sum to {lengths.sum()}")
    if len(tokens) and tokens.min() < 0:
        raise WireError("a token id is negative")
    top = metadata.get("top_logprobs", "0")
    if not (top.isascii() and top.isdigit() and len(top) < 10):
        raise WireError("top_logprobs is no number")
    bounds = [0, *np.cumsum(lengths).tolist()]
    flat = tokens.tolist()
    return Query(
        model=metadata.get("model"),
        sequences=[flat[start:end] for start, end in pairwise(bounds)],
        starts=prompts.tolist(),
        top=int(top),
        path=lambda sequence, token: f"sequences.{sequence}" + ("" if token is None else ".tokens"),
    )


def model_of(body: bytes) -> str | None:
    """The model that a request names, read from its header alone; None where there is none."""
    length = int.from_bytes(body[:_HEADER_BYTES], "little")
    try:
        metadata = json.loads(body[_HEADER_BYTES : _HEADER_BYTES + length])["__metadata__"]
        return str(metadata["model"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def encode_answer(model: str, fingerprint: str, scores: Sequence[TokenScores], top: int) -> bytes:
    """The answer that holds `scores`."""
    arrays: dict[str, Array] = {
        "lengths": np.array([len(score.logprobs) for score in scores], np.int32),
        "perplexities": np.array([score.perplexity for score in scores], np.float64),
        "logprobs": np.concatenate([score.logprobs for score in scores]),
    }
    if top:
        arrays["top_ids"] = np.concatenate([score.top_ids for score in scores])
        arrays["top_logprobs"] = np.concatenate([score.top_logprobs for score in scores])
    return save(arrays, {"model": model, "fingerprint": fingerprint})


def decode_answer(body: bytes) -> Answer:
    """What was answered.

    Raises:
        WireError: not an answer.
    """
    metadata, arrays = _open(body)
    lengths = _array(arrays, "lengths", np.int32, 1)
    logprobs = _array(arrays, "logprobs", np.float32, 1)
    if (lengths < 0).any() or lengths.sum(dtype=np.int64) != len(logprobs):
        raise WireError(f"{len(logprobs)} log-probs for lengths that sum to {lengths.sum()}")
    bounds = np.cumsum(lengths)[:-1]
    tops = {}
    for name, dtype in (("top_ids", np.int32), ("top_logprobs", np.float32)):
        if name in arrays:
            table = _array(arrays, name, dtype, 2)
            if len(table) != len(logprobs):
                raise WireError(f"{len(table)} rows of {name} for {len(logprobs)} log-probs")
        else:
            table = np.empty((len(logprobs), 0), dtype)
        tops[name] = np.split(table, bounds)
    return Answer(
        model=metadata.get("model", ""),
        fingerprint=metadata.get("fingerprint", ""),
        logprobs=np.split(logprobs, bounds),
        **tops,
    )


def _open(body: bytes) -> tuple[dict[str, str], dict[str, Array]]:
    try:
        arrays = load(body)
    except (SafetensorError, ValueError, KeyError) as error:
        raise WireError(f"not safetensors: {error}") from error
    length = int.from_bytes(body[:_HEADER_BYTES], "little")
    header = json.loads(body[_HEADER_BYTES : _HEADER_BYTES + length])  # `load` has parsed it
    return header.get("__metadata__") or {}, arrays


def _array(arrays: dict[str, Array], name: str, dtype: type[np.generic], axes: int) -> Array:
    if name not in arrays:
        raise WireError(f"the tensor {name!r} is missing")
    array = arrays[name]
    if array.dtype != dtype or array.ndim != axes:
        raise WireError(
            f"{name!r} is {array.dtype} of {array.ndim} axes, not {np.dtype(dtype)} of {axes}"
        )
    return array
