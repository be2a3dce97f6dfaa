"""The life of one prompt: one frozen type per stage, and the wire form of each.

    Prompt ──rollout──▶ RolloutGroup ──verifier──▶ VerifiedGroup ──teacher──▶ ScoredGroup

Each type holds the one before it, so a later stage can read everything that an earlier one
recorded and can change none of it. Arrays are NumPy: `int32` token ids, `float32` log-probs in
nats. `P` is the prompt's length in tokens, `T` a completion's, end token included.

The wire form is one checksummed safetensors blob (`encode`, `decode`): arrays as tensors, the
rest as a JSON header. Nothing is ever pickled, and bytes that are not exactly what `encode`
wrote raise `WireError`.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from services.config import DEFAULT_TEACHER

TokenIds: TypeAlias = npt.NDArray[np.int32]
LogProbs: TypeAlias = npt.NDArray[np.float32]
Outcome: TypeAlias = Literal["correct", "incorrect", "unknown"]
Finish: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample one group. `seed` fixes all `n` trajectories of the group."""

    n: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One prompt, tokenised once by the feeder. `order` is its place in the feed, from 0."""

    id: str
    order: int
    token_ids: TokenIds  # [P]
    data_source: str
    reference: str
    sampling: Sampling
    min_weight_version: int = 0  # sampled only by weights at least this new (evaluation)
    teacher: str = DEFAULT_TEACHER  # which of the run's teachers scores its trajectories


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One sampled completion. `logprobs` are under the distribution that sampled it
    (temperature applied), as the importance ratio needs them.

    `version_runs` tells which weights sampled which tokens, where they changed on the way: `(t, v)`
    says that version `v` sampled from token `t` on, until the next run. Empty when all tokens come
    from the group's version.
    """

    token_ids: TokenIds  # [T]
    logprobs: LogProbs  # [T]
    finish: Finish
    text: str
    version_runs: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class RolloutGroup:
    """All trajectories of one prompt. `weight_version` is the oldest that any of their tokens was
    sampled from."""

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    weight_version: int

    def token_versions(self, place: int) -> npt.NDArray[np.int64]:
        """[T] the version of the weights that each token of one trajectory was sampled from."""
        trajectory = self.trajectories[place]
        starts, versions = zip(*trajectory.version_runs or [(0, self.weight_version)], strict=True)
        return np.repeat(versions, np.diff([*starts, len(trajectory.token_ids)]))

    @property
    def mean_weight_version(self) -> float:
        """Over all tokens; of an empty group its own."""
        versions = [self.token_versions(place) for place in range(len(self.trajectories))]
        flat = np.concatenate([*versions, np.empty(0, np.int64)])
        return float(flat.mean()) if len(flat) else float(self.weight_version)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the verifier found. `unknown` means that it could not tell (time-out, fault): such
    a trajectory enters neither path and never counts as incorrect."""

    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class VerifiedGroup:
    """A group with one verdict per trajectory, in the same order."""

    rollout: RolloutGroup
    verdicts: tuple[Verdict, ...]

    def indices(self, *outcomes: Outcome) -> list[int]:
        """Places in the group of the trajectories whose verdict is one of `outcomes`."""
        return [i for i, v in enumerate(self.verdicts) if v.outcome in outcomes]


@dataclass(frozen=True, slots=True, eq=False)
class TopTokens:
    """The teacher's `k` most likely tokens in the place of each of a trajectory's."""

    ids: TokenIds  # [T, k]
    logprobs: LogProbs  # [T, k]


@dataclass(frozen=True, slots=True, eq=False)
class ScoredGroup:
    """A verified group with the teacher's log-probs (temperature 1) of the trajectories that
    the objective asked for, keyed by their place in the group."""

    verified: VerifiedGroup
    teacher_logprobs: Mapping[int, LogProbs]  # place -> [T]
    teacher: str  # fingerprint of the model that scored; empty when nothing was to be scored
    teacher_top: Mapping[int, TopTokens] = field(default_factory=dict)
    """Of the same places, or of none when the objective looks at sampled tokens only."""

    @property
    def rollout(self) -> RolloutGroup:
        """What was sampled."""
        return self.verified.rollout

    @property
    def prompt(self) -> Prompt:
        """What it was sampled for."""
        return self.verified.rollout.prompt


Item: TypeAlias = Prompt | RolloutGroup | VerifiedGroup | ScoredGroup
ItemT = TypeVar("ItemT", Prompt, RolloutGroup, VerifiedGroup, ScoredGroup)


class WireError(ValueError):
    """Bytes that are not an intact item of the expected kind."""


# ----------------------------------------------------------------------------- wire form
#
#   magic "SCP1" | CRC-32 of the rest, little endian | safetensors file
#
# The checksum is ours because safetensors has none: a flipped bit in a log-prob would
# otherwise be trained on. Ragged arrays are concatenated; their lengths stand in the header.

_MAGIC = b"SCP1"
_PREFIX = struct.Struct("<4sI")
_HEADER_LENGTH = struct.Struct("<Q")


def encode(item: Item) -> bytes:
    """The wire form of `item`."""
    header: dict[str, Any] = {"kind": type(item).__name__}
    arrays: dict[str, npt.NDArray[Any]] = {}
    if isinstance(item, ScoredGroup):
        places = sorted(item.teacher_logprobs)
        header["scored"] = {"places": places, "teacher": item.teacher}
        arrays["teacher_logprobs"] = _concat(
            [item.teacher_logprobs[i] for i in places], np.dtype(np.float32)
        )
        if item.teacher_top:
            top = [item.teacher_top[i] for i in places]
            arrays["teacher_top_ids"] = np.concatenate([t.ids for t in top]).astype(np.int32)
            arrays["teacher_top_logprobs"] = np.concatenate([t.logprobs for t in top]).astype(
                np.float32
            )
    if isinstance(item, VerifiedGroup | ScoredGroup):
        verified = item.verified if isinstance(item, ScoredGroup) else item
        header["verdicts"] = [[v.outcome, v.reason] for v in verified.verdicts]
    if not isinstance(item, Prompt):
        rollout = item if isinstance(item, RolloutGroup) else item.rollout
        header["weight_version"] = rollout.weight_version
        header["trajectories"] = [
            [t.finish, t.text, len(t.token_ids), *([t.version_runs] if t.version_runs else [])]
            for t in rollout.trajectories
        ]
        arrays["token_ids"] = _concat(
            [t.token_ids for t in rollout.trajectories], np.dtype(np.int32)
        )
        arrays["logprobs"] = _concat(
            [t.logprobs for t in rollout.trajectories], np.dtype(np.float32)
        )
    prompt = item if isinstance(item, Prompt) else _rollout_of(item).prompt
    arrays["prompt_ids"] = np.ascontiguousarray(prompt.token_ids, dtype=np.int32)
    header["prompt"] = {
        "id": prompt.id,
        "order": prompt.order,
        "data_source": prompt.data_source,
        "reference": prompt.reference,
        "sampling": asdict(prompt.sampling),
        "min_weight_version": prompt.min_weight_version,
        "teacher": prompt.teacher,
    }
    body = save_tensors(arrays, metadata={"item": json.dumps(header)})
    return _PREFIX.pack(_MAGIC, zlib.crc32(body)) + body


def decode(kind: type[ItemT], blob: bytes) -> ItemT:
    """The item that `encode` wrote.

    Raises:
        WireError: the bytes are truncated or corrupted, or hold another kind of item.
    """
    header, arrays = _open(blob)
    if header.get("kind") != kind.__name__:
        raise WireError(f"expected a {kind.__name__}, found {header.get('kind')!r}")
    try:
        item = _build(kind, header, arrays)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise WireError(f"malformed {kind.__name__}: {error!r}") from error
    assert isinstance(item, kind)
    return item


def order_of(blob: bytes) -> int:
    """The order of the prompt that an encoded item of any stage came from.

    Raises:
        WireError: the bytes are truncated or corrupted.
    """
    header, _ = _open(blob)
    try:
        return int(header["prompt"]["order"])
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"an item without a prompt: {error!r}") from error


def _rollout_of(item: RolloutGroup | VerifiedGroup | ScoredGroup) -> RolloutGroup:
    return item if isinstance(item, RolloutGroup) else item.rollout


def _concat(parts: Sequence[npt.NDArray[Any]], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    return np.concatenate([*parts, np.empty(0, dtype)]).astype(dtype, copy=False)


def _open(blob: bytes) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    if len(blob) < _PREFIX.size + _HEADER_LENGTH.size:
        raise WireError(f"{len(blob)} bytes are too few for an item")
    magic, checksum = _PREFIX.unpack_from(blob)
    body = blob[_PREFIX.size :]
    if magic != _MAGIC:
        raise WireError(f"unknown wire format {magic!r}")
    if zlib.crc32(body) != checksum:
        raise WireError("checksum mismatch: the item was truncated or corrupted")
    (length,) = _HEADER_LENGTH.unpack_from(body)
    try:
        raw = json.loads(body[_HEADER_LENGTH.size : _HEADER_LENGTH.size + length])
        header = json.loads(raw["__metadata__"]["item"])
        return header, load_tensors(body)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WireError(f"not a safetensors item: {error!r}") from error


def _build(kind: type[Item], header: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> Item:
    prompt = Prompt(
        token_ids=arrays["prompt_ids"],
        **{**header["prompt"], "sampling": Sampling(**header["prompt"]["sampling"])},
    )
    if kind is Prompt:
        return prompt
    lengths = [length for _, _, length, *_ in header["trajectories"]]
    tokens = _split(arrays["token_ids"], lengths)
    logprobs = _split(arrays["logprobs"], lengths)
    rollout = RolloutGroup(
        prompt=prompt,
        trajectories=tuple(
            Trajectory(ids, lp, finish, text, tuple((t, v) for t, v in runs[0]) if runs else ())
            for (finish, text, _, *runs), ids, lp in zip(
                header["trajectories"], tokens, logprobs, strict=True
            )
        ),
        weight_version=header["weight_version"],
    )
    if kind is RolloutGroup:
        return rollout
    verdicts = tuple(Verdict(outcome, reason) for outcome, reason in header["verdicts"])
    if len(verdicts) != len(lengths):
        raise ValueError(f"{len(verdicts)} verdicts for {len(lengths)} trajectories")
    verified = VerifiedGroup(rollout=rollout, verdicts=verdicts)
    if kind is VerifiedGroup:
        return verified
    places = header["scored"]["places"]
    scores = _split(arrays["teacher_logprobs"], [lengths[i] for i in places])
    return ScoredGroup(
        verified=verified,
        teacher_logprobs=dict(zip(places, scores, strict=True)),
        teacher=header["scored"]["teacher"],
        teacher_top=_top_tokens(arrays, places, lengths),
    )


def _top_tokens(
    arrays: Mapping[str, npt.NDArray[Any]], places: Sequence[int], lengths: Sequence[int]
) -> dict[int, TopTokens]:
    if "teacher_top_ids" not in arrays:
        return {}
    ids, logprobs = arrays["teacher_top_ids"], arrays["teacher_top_logprobs"]
    if ids.ndim != 2 or ids.shape != logprobs.shape:
        raise ValueError(f"top tokens of shape {ids.shape}, log-probs of {logprobs.shape}")
    scored = [lengths[i] for i in places]
    parts = zip(_split(ids, scored), _split(logprobs, scored), strict=True)
    return {place: TopTokens(*part) for place, part in zip(places, parts, strict=True)}


def _split(flat: npt.NDArray[Any], lengths: Sequence[int]) -> list[npt.NDArray[Any]]:
    if sum(lengths) != flat.shape[0]:
        raise ValueError(f"{flat.shape[0]} values for lengths that sum to {sum(lengths)}")
    return np.split(flat, np.cumsum(lengths)[:-1]) if lengths else []
