"""The record of one prompt, from the feed to the learner: each stage appends a part.

    Prompt ──rollout──▶ RolloutGroup ──verifier──▶ VerifiedGroup ──teacher──▶ ScoredGroup

Each type holds the one before it, so a later stage can read everything that an earlier one
recorded and can change none of it. Arrays are NumPy: `int32` token ids, `float32` log-probs in
nats. `P` is the prompt's length in tokens. `L` is a trajectory's: all tokens after the prompt,
the end token included, with a mask of those that the student sampled.

`encode` and `decode` are its wire form, a checksum and one safetensors file a part. The bytes of
earlier parts are handed on as they came. Nothing is ever pickled, and bytes that are not exactly
what `encode` wrote raise `WireError`.
"""

from __future__ import annotations

import json
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from services.config import DEFAULT_TEACHER
from services.errors import WireError
from services.wire import Array, Unpacked, joined, pack, peek, unpack

TokenIds: TypeAlias = npt.NDArray[np.int32]
LogProbs: TypeAlias = npt.NDArray[np.float32]
Mask: TypeAlias = npt.NDArray[np.bool_]
Outcome: TypeAlias = Literal["correct", "incorrect", "unknown"]
Finish: TypeAlias = Literal["stop", "length"]
Message: TypeAlias = Mapping[str, str]
"""`role` and `content`."""


class _Wire(NamedTuple):
    """Where a record stands in the bytes that it was decoded from."""

    blob: bytes
    end: int
    checksum: int


@dataclass(frozen=True, slots=True, eq=False)
class Record(ABC):
    """What one stage knows of a prompt: a part of its own behind the record of the stage before."""

    _wire: _Wire | None = field(default=None, init=False, repr=False)

    @abstractmethod
    def _part(self) -> tuple[Record | None, dict[str, Any], dict[str, Array]]:
        """The record before, and this part as JSON and arrays."""

    @classmethod
    @abstractmethod
    def _of(cls, before: Any, header: dict[str, Any], part: Unpacked) -> Record:
        """The record whose `_part` these are; what is wrong with them is a `WireError`, a KeyError,
        a TypeError, a ValueError or an IndexError."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample one group. `seed` fixes all `n` trajectories of the group."""

    n: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    top: int = 0
    """So many of the student's most likely tokens are recorded with each that is sampled."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompt(Record):
    """One prompt, tokenised once by the feeder. `order` is its index in the feed, from 0."""

    id: str
    order: int
    token_ids: TokenIds  # [P]
    data_source: str
    reference: str
    sampling: Sampling
    min_weight_version: int = 0  # sampled only by weights at least this new (evaluation)
    teacher: str = DEFAULT_TEACHER  # which of the run's teachers scores its trajectories
    messages: tuple[Message, ...] = ()
    """What `token_ids` were made of, where an environment goes on with it; else empty."""
    teacher_context: TokenIds | None = None  # [C] read by the teacher instead of `token_ids`

    @property
    def teacher_ids(self) -> TokenIds:
        """What the teacher reads before each trajectory."""
        return self.token_ids if self.teacher_context is None else self.teacher_context

    def _part(self) -> tuple[Record | None, dict[str, Any], dict[str, Array]]:
        header = {
            "id": self.id,
            "order": self.order,
            "data_source": self.data_source,
            "reference": self.reference,
            "sampling": asdict(self.sampling),
            "min_weight_version": self.min_weight_version,
            "teacher": self.teacher,
            **({"messages": self.messages} if self.messages else {}),
        }
        arrays = {"token_ids": np.ascontiguousarray(self.token_ids, np.int32)}
        if self.teacher_context is not None:
            arrays["teacher_context"] = np.ascontiguousarray(self.teacher_context, np.int32)
        return None, header, arrays

    @classmethod
    def _of(cls, before: Any, header: dict[str, Any], part: Unpacked) -> Prompt:
        header["sampling"] = Sampling(**header["sampling"])
        header["messages"] = tuple(header.get("messages", ()))
        ids = part.array("token_ids", np.int32, 1)
        context = None
        if "teacher_context" in part.arrays:
            context = part.array("teacher_context", np.int32, 1)
        return Prompt(token_ids=ids, teacher_context=context, **header)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the verifier says. `unknown` means that it could not tell (time-out, fault): such
    a trajectory enters neither path and never counts as incorrect."""

    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True)
class Episode:
    """What a trajectory of several turns was. `turns` are the student's; `tool_seconds` are those
    that it waited for its environment."""

    turns: int
    tool_errors: int
    tool_seconds: float
    verdict: Verdict | None = None
    """The environment's own, where it gave one: the verifier takes it as it is."""


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """All tokens after the prompt. `logprobs` are under the distribution that sampled them
    (temperature applied), as the importance ratio needs them; 0 where nothing was sampled.

    `version_runs` tells which weights sampled which tokens, where they changed on the way: `(t, v)`
    says that version `v` sampled from token `t` on, until the next run. Empty when all tokens come
    from the group's version.
    """

    token_ids: TokenIds  # [L]
    logprobs: LogProbs  # [L]
    finish: Finish
    text: str
    version_runs: tuple[tuple[int, int], ...] = ()
    mask: Mask | None = None
    """[L] False for the world's tokens (tool output, a user's turn); None: the student sampled
    all."""
    episode: Episode | None = None
    """Where an environment took part; `text` is then what the verifier reads: the last turn, or
    the environment's note."""
    top: TokenIds | None = None
    """[L, k] the student's most likely tokens in each one's place, the first the most likely; any
    `k` different ones where nothing was sampled. None: they were not asked for."""

    @property
    def sampled(self) -> Mask:
        """[L] which tokens the student sampled: perplexities, ratios, losses and lengths are over
        these alone."""
        return np.ones(len(self.token_ids), np.bool_) if self.mask is None else self.mask

    @property
    def sampled_count(self) -> int:
        """How many tokens the student sampled."""
        return len(self.token_ids) if self.mask is None else int(self.mask.sum())


@dataclass(frozen=True, slots=True, eq=False)
class RolloutGroup(Record):
    """All trajectories of one prompt. `weight_version` is the oldest that any of their tokens was
    sampled from."""

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    weight_version: int

    def token_versions(self, index: int) -> npt.NDArray[np.int64]:
        """[L] the version of the weights that each token of one trajectory was sampled from."""
        trajectory = self.trajectories[index]
        starts, versions = zip(*trajectory.version_runs or [(0, self.weight_version)], strict=True)
        return np.repeat(versions, np.diff([*starts, len(trajectory.token_ids)]))

    @property
    def mean_weight_version(self) -> float:
        """Over all sampled tokens; of an empty group its own."""
        versions = [self.token_versions(i)[t.sampled] for i, t in enumerate(self.trajectories)]
        flat = np.concatenate([*versions, np.empty(0, np.int64)])
        return float(flat.mean()) if len(flat) else float(self.weight_version)

    def _part(self) -> tuple[Record | None, dict[str, Any], dict[str, Array]]:
        trajectories = self.trajectories
        header = {
            "weight_version": self.weight_version,
            "lengths": [len(t.token_ids) for t in trajectories],
            "finish": [t.finish for t in trajectories],
            "text": [t.text for t in trajectories],
            "version_runs": [t.version_runs for t in trajectories],
        }
        if any(t.episode for t in trajectories):
            header["episodes"] = [t.episode and asdict(t.episode) for t in trajectories]
        arrays = {
            "token_ids": joined([t.token_ids for t in trajectories], np.int32),
            "logprobs": joined([t.logprobs for t in trajectories], np.float32),
        }
        tops = [t.top for t in trajectories if t.top is not None]
        if tops:
            arrays["top_ids"] = np.concatenate(tops).astype(np.int32, copy=False)
        if any(t.mask is not None for t in trajectories):
            arrays["sampled"] = joined([t.sampled for t in trajectories], np.bool_)
        return self.prompt, header, arrays

    @classmethod
    def _of(cls, before: Prompt, header: dict[str, Any], part: Unpacked) -> RolloutGroup:
        lengths = header["lengths"]
        masks: list[Any] = [None] * len(lengths)
        if "sampled" in part.arrays:
            masks = [None if m.all() else m for m in part.ragged("sampled", np.bool_, lengths)]
        tops: list[Any] = [None] * len(lengths)
        if "top_ids" in part.arrays:
            tops = part.ragged("top_ids", np.int32, lengths, axes=2)
        runs = (tuple((int(t), int(v)) for t, v in run) for run in header["version_runs"])
        fields = zip(
            part.ragged("token_ids", np.int32, lengths),
            part.ragged("logprobs", np.float32, lengths),
            header["finish"],
            header["text"],
            runs,
            masks,
            map(_episode, header.get("episodes", [None] * len(lengths))),
            tops,
            strict=True,
        )
        return RolloutGroup(before, tuple(Trajectory(*f) for f in fields), header["weight_version"])


def _episode(header: dict[str, Any] | None) -> Episode | None:
    if header is None:
        return None
    verdict = header.pop("verdict")
    return Episode(**header, verdict=None if verdict is None else Verdict(**verdict))


@dataclass(frozen=True, slots=True, eq=False)
class VerifiedGroup(Record):
    """A group with one verdict per trajectory, in the same order."""

    rollout: RolloutGroup
    verdicts: tuple[Verdict, ...]

    @property
    def prompt(self) -> Prompt:
        """What it was sampled for."""
        return self.rollout.prompt

    def indices(self, *outcomes: Outcome) -> list[int]:
        """Of the trajectories whose verdict is one of `outcomes`."""
        return [i for i, v in enumerate(self.verdicts) if v.outcome in outcomes]

    def _part(self) -> tuple[Record | None, dict[str, Any], dict[str, Array]]:
        return self.rollout, {"verdicts": [[v.outcome, v.reason] for v in self.verdicts]}, {}

    @classmethod
    def _of(cls, before: RolloutGroup, header: dict[str, Any], part: Unpacked) -> VerifiedGroup:
        verdicts = tuple(Verdict(outcome, reason) for outcome, reason in header["verdicts"])
        if len(verdicts) != len(before.trajectories):
            raise WireError(f"{len(verdicts)} verdicts for {len(before.trajectories)} trajectories")
        return VerifiedGroup(before, verdicts)


@dataclass(frozen=True, slots=True, eq=False)
class TopTokens:
    """The `k` most likely tokens at each position of a trajectory, of the teacher or of the
    student, and what the teacher says of them."""

    ids: TokenIds  # [L, k]
    logprobs: LogProbs  # [L, k]


@dataclass(frozen=True, slots=True, eq=False)
class ScoredGroup(Record):
    """A verified group with the teacher's log-probs (temperature 1) of the trajectories that
    the objective asked for, keyed by their index in the group."""

    verified: VerifiedGroup
    teacher_logprobs: Mapping[int, LogProbs]  # index -> [L]
    teacher: str  # fingerprint of the model that scored; empty when nothing was to be scored
    teacher_top: Mapping[int, TopTokens] = field(default_factory=dict)
    """Of the same indices, or of none when the objective looks at sampled tokens only."""
    teacher_version: int | None = None
    """Of the student's weights that scored, where the teacher follows the student."""
    chunks: Mapping[int, TokenIds] = field(default_factory=dict)
    """index -> [L] which chunk each token belongs to, from 0 on, where the teacher has a tokenizer
    of its own: a chunk's log-prob is that of its first token, and 0 follows. −1 where the teacher
    has no say. Of no index where the tokenizers are the same."""
    teacher_entropy: Mapping[int, LogProbs] = field(default_factory=dict)  # index -> [L] nats
    """Over the vocabulary. Of the same indices, or of none when the objective does not ask."""

    @property
    def rollout(self) -> RolloutGroup:
        """What was sampled."""
        return self.verified.rollout

    @property
    def prompt(self) -> Prompt:
        """What it was sampled for."""
        return self.verified.rollout.prompt

    def _part(self) -> tuple[Record | None, dict[str, Any], dict[str, Array]]:
        indices = sorted(self.teacher_logprobs)
        arrays = {"logprobs": joined([self.teacher_logprobs[i] for i in indices], np.float32)}
        if self.teacher_top:
            top = [self.teacher_top[i] for i in indices]
            own = [self.rollout.trajectories[i].top for i in indices]
            same = (
                ids is not None and np.array_equal(t.ids, ids)
                for t, ids in zip(top, own, strict=True)
            )
            if not all(same):
                arrays["top_ids"] = np.concatenate([t.ids for t in top]).astype(np.int32)
            arrays["top_logprobs"] = np.concatenate([t.logprobs for t in top]).astype(np.float32)
        if self.chunks:
            arrays["chunks"] = joined([self.chunks[i] for i in indices], np.int32)
        if self.teacher_entropy:
            arrays["entropy"] = joined([self.teacher_entropy[i] for i in indices], np.float32)
        header: dict[str, Any] = {"indices": indices, "teacher": self.teacher}
        if self.teacher_version is not None:
            header["teacher_version"] = self.teacher_version
        return self.verified, header, arrays

    @classmethod
    def _of(cls, before: VerifiedGroup, header: dict[str, Any], part: Unpacked) -> ScoredGroup:
        indices = header["indices"]
        lengths = [len(before.rollout.trajectories[i].token_ids) for i in indices]
        scores = part.ragged("logprobs", np.float32, lengths)
        top: dict[int, TopTokens] = {}
        if "top_logprobs" in part.arrays:
            ids: Sequence[Any] = [before.rollout.trajectories[i].top for i in indices]
            if "top_ids" in part.arrays:
                ids = part.ragged("top_ids", np.int32, lengths, axes=2)
            logprobs = part.ragged("top_logprobs", np.float32, lengths, axes=2)
            pairs = zip(ids, logprobs, strict=True)
            top = {i: TopTokens(*pair) for i, pair in zip(indices, pairs, strict=True)}
        by_index = dict(zip(indices, scores, strict=True))
        chunks: dict[int, TokenIds] = {}
        if "chunks" in part.arrays:
            numbers = part.ragged("chunks", np.int32, lengths)
            chunks = dict(zip(indices, numbers, strict=True))
        entropy: dict[int, LogProbs] = {}
        if "entropy" in part.arrays:
            spread = part.ragged("entropy", np.float32, lengths)
            entropy = dict(zip(indices, spread, strict=True))
        version = header.get("teacher_version")
        return ScoredGroup(before, by_index, header["teacher"], top, version, chunks, entropy)


RecordT = TypeVar("RecordT", bound=Record)

# ----------------------------------------------------------------------------- wire form
#
#   magic "SCP2" | CRC-32 of the rest | { length | safetensors file } once a part
#
# The checksum is ours because safetensors has none: a flipped bit in a log-prob would otherwise
# be trained on. It goes over the parts in turn, so that appending one needs no look at the others.

_PARTS: tuple[type[Record], ...] = (Prompt, RolloutGroup, VerifiedGroup, ScoredGroup)
_MAGIC = b"SCP2"
_PREFIX = struct.Struct("<4sI")
_LENGTH = struct.Struct("<Q")


def encode(record: Record) -> bytes:
    """The wire form of `record`. What it was decoded from, and what any record in it was, is
    copied and not made again."""
    wire = _wire_of(record)
    if wire.end == len(wire.blob):
        return wire.blob
    return _PREFIX.pack(_MAGIC, wire.checksum) + wire.blob[_PREFIX.size : wire.end]


def decode(kind: type[RecordT], blob: bytes) -> RecordT:
    """The record that `encode` wrote.

    Raises:
        WireError: the bytes are truncated or corrupted, or hold the record of another stage or
            of an older format.
    """
    parts = _split(blob)
    held = _PARTS[len(parts) - 1]
    if held is not kind:
        raise WireError(f"expected a {kind.__name__}, found a {held.__name__}")
    record: Record | None = None
    for of, (part, wire) in zip(_PARTS, parts, strict=False):
        try:
            unpacked = unpack(part)
            record = of._of(record, json.loads(unpacked.text["part"]), unpacked)
        except WireError:
            raise
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise WireError(f"malformed {of.__name__}: {error!r}") from error
        object.__setattr__(record, "_wire", wire)
    assert isinstance(record, kind)
    return record


def order_of(blob: bytes) -> int:
    """The order of the prompt that a record of any stage is about.

    Raises:
        WireError: the bytes are truncated or corrupted.
    """
    first, _ = _split(blob)[0]
    try:
        return int(json.loads(peek(first)["part"])["order"])
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"a record without a prompt: {error!r}") from error


def _wire_of(record: Record) -> _Wire:
    if record._wire is not None:
        return record._wire
    before, header, arrays = record._part()
    body, checksum = b"", 0
    if before is not None:
        wire = _wire_of(before)
        body, checksum = wire.blob[_PREFIX.size : wire.end], wire.checksum
    part = pack(arrays, {"part": json.dumps(header)})
    added = _LENGTH.pack(len(part)) + part
    checksum = zlib.crc32(added, checksum)
    blob = b"".join((_PREFIX.pack(_MAGIC, checksum), body, added))
    return _Wire(blob, len(blob), checksum)


def _split(blob: bytes) -> list[tuple[bytes, _Wire]]:
    """The parts of a record, and where the record that ends with each stands in `blob`."""
    if len(blob) < _PREFIX.size:
        raise WireError(f"{len(blob)} bytes are too few for a record")
    magic, expected = _PREFIX.unpack_from(blob)
    if magic != _MAGIC:
        older = magic[:3] == _MAGIC[:3] and magic[3:].isdigit()
        raise WireError(
            f"a record of format {magic[3:].decode()}, and this version reads format "
            f"{_MAGIC[3:].decode()} only: end the run with the version that began it"
            if older
            else f"not a record: it begins with {magic!r}"
        )
    parts: list[tuple[bytes, _Wire]] = []
    at, checksum = _PREFIX.size, 0
    while at < len(blob) and len(parts) < len(_PARTS):
        start = at + _LENGTH.size
        if start > len(blob) or (end := start + _LENGTH.unpack_from(blob, at)[0]) > len(blob):
            break
        checksum = zlib.crc32(memoryview(blob)[at:end], checksum)
        parts.append((blob[start:end], _Wire(blob, end, checksum)))
        at = end
    if at != len(blob) or checksum != expected or not parts:
        raise WireError("checksum mismatch: the record was truncated or corrupted")
    return parts
