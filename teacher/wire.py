"""The binary form of a score request and of its answer: safetensors, chosen by content type.

    request   tokens int32 [T], prompt_lengths int32 [N], completion_lengths int32 [N]
              candidates int32 [C, m] (optional)
              metadata: model (optional), top_logprobs (optional, decimal), entropy (optional, 1)
    answer    lengths int32 [N], perplexities float64 [N], logprobs float32 [C]
              top_ids int32 [C, k] and top_logprobs float32 [C, k] where k was asked for
              candidate_logprobs float32 [C, m] and entropy float32 [C] where they were
              metadata: model, fingerprint, version (optional, decimal)

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

from services.errors import WireError
from services.trajectory import TokenIds
from services.wire import Array, Unpacked, joined, pack, peek, unpack
from teacher.scores import MAX_CANDIDATES, NO_MORE, More, Query, TokenScores

MEDIA_TYPE = "application/vnd.safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """A decoded answer, not yet compared with what was asked."""

    model: str
    fingerprint: str
    logprobs: Sequence[Any]  # [t] each
    top_ids: Sequence[Any]  # [t, k] each
    top_logprobs: Sequence[Any]  # [t, k] each
    version: int | None = None
    candidates: Sequence[Any] = ()  # [t, m] each; of none: there are none
    entropy: Sequence[Any] = ()  # [t] each; of none: there are none


def encode_request(
    sequences: Sequence[tuple[TokenIds, TokenIds]],
    *,
    top: int = 0,
    model: str | None = None,
    more: More = NO_MORE,
) -> bytes:
    """The request for pairs of prompt and completion token ids."""
    parts = [ids.astype(np.int32, copy=False) for pair in sequences for ids in pair]
    lengths = np.array([len(part) for part in parts], np.int32).reshape(-1, 2)
    metadata = {"top_logprobs": str(top)} | ({"model": model} if model is not None else {})
    arrays = {
        "tokens": joined(parts, np.int32),
        "prompt_lengths": np.ascontiguousarray(lengths[:, 0]),
        "completion_lengths": np.ascontiguousarray(lengths[:, 1]),
    }
    if more.candidates:
        arrays["candidates"] = np.concatenate(more.candidates).astype(np.int32, copy=False)
    return pack(arrays, metadata | ({"entropy": "1"} if more.entropy else {}))


def json_request(
    sequences: Sequence[tuple[TokenIds, TokenIds]],
    *,
    top: int = 0,
    model: str | None = None,
    more: More = NO_MORE,
) -> bytes:
    """The same in JSON."""
    pairs = [{"prompt": p.tolist(), "completion": c.tolist()} for p, c in sequences]
    for pair, ids in zip(pairs, more.candidates, strict=False):
        pair["candidates"] = ids.tolist()
    body = {"sequences": pairs, "top_logprobs": top} | ({"entropy": True} if more.entropy else {})
    return json.dumps(body | ({"model": model} if model is not None else {})).encode()


def decode_request(body: bytes) -> Query:
    """What is asked.

    Raises:
        WireError: not a request, or one that the schema of the JSON form would refuse too.
    """
    request = unpack(body)
    tokens = request.array("tokens", np.int32, 1)
    prompts = request.array("prompt_lengths", np.int32, 1)
    completions = request.array("completion_lengths", np.int32, 1)
    if len(prompts) != len(completions) or not len(prompts):
        raise WireError(f"{len(prompts)} prompt lengths, {len(completions)} completion lengths")
    if prompts.min() < 1 or completions.min() < 0:
        raise WireError("a prompt needs at least one token")
    lengths = prompts.astype(np.int64) + completions
    if lengths.sum() != len(tokens):
        raise WireError(f"{len(tokens)} tokens for lengths that sum to {lengths.sum()}")
    if len(tokens) and tokens.min() < 0:
        raise WireError("a token id is negative")
    top = request.text.get("top_logprobs", "0")
    if not (top.isascii() and top.isdigit() and len(top) < 10):
        raise WireError("top_logprobs is not a number")
    more = More(request.text.get("entropy") == "1", _candidates(request, completions.tolist()))
    bounds = [0, *np.cumsum(lengths).tolist()]
    flat = tokens.tolist()
    return Query(
        model=request.text.get("model"),
        sequences=[flat[start:end] for start, end in pairwise(bounds)],
        starts=prompts.tolist(),
        top=int(top),
        path=lambda sequence, token: f"sequences.{sequence}" + ("" if token is None else ".tokens"),
        more=more,
    )


def _candidates(request: Unpacked, lengths: Sequence[int]) -> list[Array]:
    if "candidates" not in request.arrays:
        return []
    ids = request.ragged("candidates", np.int32, lengths, axes=2)
    if not 1 <= ids[0].shape[1] <= MAX_CANDIDATES or any((one < 0).any() for one in ids):
        raise WireError(f"candidates are 1 to {MAX_CANDIDATES} token ids in each place")
    return ids


def model_of(body: bytes) -> str | None:
    """The model that a request names, read from its header alone; None where there is none."""
    model = peek(body).get("model")
    return None if model is None else str(model)


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
    for name, values in (
        ("candidate_logprobs", [score.candidates for score in scores]),
        ("entropy", [score.entropy for score in scores]),
    ):
        if present := [one for one in values if one is not None]:  # of all or of none
            arrays[name] = np.concatenate(present)
    version = version_of(scores)
    of_version = {} if version is None else {"version": str(version)}
    return pack(arrays, {"model": model, "fingerprint": fingerprint, **of_version})


def version_of(scores: Sequence[TokenScores]) -> int | None:
    """The one version of the weights that made all scores of an answer."""
    return scores[0].version if scores else None


def decode_answer(body: bytes) -> Answer:
    """What was answered.

    Raises:
        WireError: not an answer.
    """
    answer = unpack(body)
    counts = answer.array("lengths", np.int32, 1)
    if (counts < 0).any():
        raise WireError("a length is negative")
    lengths: list[int] = counts.tolist()
    logprobs = answer.ragged("logprobs", np.float32, lengths)
    tops = {
        name: answer.ragged(name, dtype, lengths, axes=2)
        if name in answer.arrays
        else [np.empty((length, 0), dtype) for length in lengths]
        for name, dtype in (("top_ids", np.int32), ("top_logprobs", np.float32))
    }
    more = {
        field: answer.ragged(name, np.float32, lengths, axes) if name in answer.arrays else ()
        for field, name, axes in (
            ("candidates", "candidate_logprobs", 2),
            ("entropy", "entropy", 1),
        )
    }
    version = answer.text.get("version")
    if version is not None and not (version.isascii() and version.isdigit()):
        raise WireError(f"version {version!r} is not a number")
    return Answer(
        version=None if version is None else int(version),
        model=answer.text.get("model", ""),
        fingerprint=answer.text.get("fingerprint", ""),
        logprobs=logprobs,
        **tops,
        **more,
    )
