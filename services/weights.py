"""One version of the student's weights, as it travels from the learner to every engine.

A version is one flat buffer, so that Ray ships it as a single out-of-band object: written once,
read on each node without a copy. With it travels a probe, the learner's own log-probs of a fixed
sequence, so that an engine that loaded something else is found out before it samples a token.
"""

from __future__ import annotations

import math
import uuid
import warnings
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from services.errors import WorkerFailed
from services.models import probe_difference

if TYPE_CHECKING:  # the weight store holds versions, and must not cost an import of torch
    import torch
    from transformers import PreTrainedModel

Manifest: TypeAlias = tuple[tuple[str, str, tuple[int, ...]], ...]
"""(name, torch dtype, shape) of each tensor."""


def manifest(parameters: Iterable[tuple[str, torch.Tensor]]) -> Manifest:
    """The manifest of `parameters`, in their order."""
    return tuple(
        (name, str(p.dtype).removeprefix("torch."), tuple(p.shape)) for name, p in parameters
    )


def on_the_wire(own: Manifest, dtype: str) -> Manifest:
    """How parameters of the manifest `own` travel to engines that compute in `dtype`: matrices in
    it, which is what these would make of them. Vectors stay: some models keep theirs in float32."""
    return tuple(
        (name, dtype if len(shape) > 1 and one == "float32" else one, shape)
        for name, one, shape in own
    )


def views(manifest: Manifest, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of each parameter in `flat`, the bytes of all of them, wherever that lies."""
    import torch

    offset = 0
    for name, dtype_name, shape in manifest:
        dtype: torch.dtype = getattr(torch, dtype_name)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        # Tensors of mixed dtypes may lie off their alignment; a copy puts that right.
        part = flat[offset : offset + size]
        part = part if offset % dtype.itemsize == 0 else part.clone()
        yield name, part.view(dtype).view(shape)
        offset += size


@dataclass(frozen=True, slots=True)
class Weights:
    """All parameters of one version. `version` counts the gradient steps behind it."""

    version: int
    manifest: Manifest
    buffer: npt.NDArray[np.uint8]
    probe_ids: tuple[int, ...]
    probe_logprobs: tuple[float, ...]  # of probe_ids[1:], temperature 1
    sender: Sender | None = None
    """Who sends the tensors, where `buffer` is empty."""
    serial: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Tells them from others of the same version, which a learner that went back makes."""

    @staticmethod
    def flatten(
        version: int,
        parameters: Iterable[tuple[str, torch.Tensor]],
        probe_ids: Iterable[int],
        probe_logprobs: Iterable[float],
    ) -> Weights:
        """Copies `parameters` into one new buffer on the CPU."""
        named = [(name, p.detach()) for name, p in parameters]
        return Weights.gather(
            version, manifest(named), (p for _, p in named), probe_ids, probe_logprobs
        )

    @staticmethod
    def gather(
        version: int,
        manifest: Manifest,
        tensors: Iterable[torch.Tensor],
        probe_ids: Iterable[int],
        probe_logprobs: Iterable[float],
        pinned: bool = False,
    ) -> Weights:
        """As `flatten`, where `tensors` come one by one, in the order of the manifest, so that
        only one of them need be whole at a time; each is cast to the manifest's dtype first.

        Args:
            pinned: the tensors lie on a GPU, which writes them into page-locked memory at the
                rate of its bus and is waited for once. Torch gives that memory to a later version
                when nobody holds this one any more.
        """
        import torch

        dtypes: list[torch.dtype] = [getattr(torch, dtype) for _, dtype, _ in manifest]
        shapes = [shape for *_, shape in manifest]
        sizes = [math.prod(s) * d.itemsize for d, s in zip(dtypes, shapes, strict=True)]
        buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pinned)
        parts = torch.split(buffer, sizes) if sizes else ()
        for part, dtype, tensor in zip(parts, dtypes, tensors, strict=True):
            flat = tensor.to(dtype).contiguous().view(-1).view(torch.uint8)
            part.copy_(flat, non_blocking=pinned)
        if pinned:
            torch.cuda.synchronize()
        return Weights(version, manifest, buffer.numpy(), tuple(probe_ids), tuple(probe_logprobs))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor of each parameter: views of the buffer, not to be written to."""
        return views(self.manifest, self.flat())

    def flat(self) -> torch.Tensor:
        """[bytes] uint8: the buffer itself, not to be written to."""
        import torch

        with warnings.catch_warnings():  # Ray's buffers are read-only, and that is what we want
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(self.buffer)

    def announcement(self) -> Weights:
        """All but the tensors."""
        return replace(self, buffer=np.empty(0, np.uint8))


@dataclass(frozen=True, slots=True)
class Call:
    """What the learner's end of a transfer wants done: a method of vLLM's weight-transfer API. The
    argument of the last, `finish_weight_update`, is the announcement of what was sent, which may
    be newer than what was asked for."""

    method: str
    argument: Any


class TransferFailed(RuntimeError):
    """The learner did not send what it had announced."""


class Sender(Protocol):
    """The learner's end of a transfer that does not go through the buffer."""

    def calls(self, world_size: int) -> AsyncIterator[Call]:
        """Asks for the newest version, and gives the calls that load it into an engine of
        `world_size` processes. The next comes when the one before was done.

        Raises:
            TransferFailed: the learner does not go on.
        """
        ...


class WeightFeed(Protocol):
    """Where an engine's weights come from; each engine has a feed of its own."""

    async def next(self, timeout_s: float) -> Weights | None:
        """The newest published weights, unless the last call gave these very ones; waits up to
        `timeout_s` for them, and gives None when there are none."""
        ...


class WeightsMismatch(WorkerFailed):
    """An engine would compute with other weights than the learner's; the message says why."""


def check_manifest(weights: Weights, own: Mapping[str, tuple[int, ...]]) -> None:
    """Compares the names and shapes of `weights` with those of the engine's model.

    Raises:
        WeightsMismatch: it names every difference.
    """
    given = {name: shape for name, _, shape in weights.manifest}
    problems = [f"{name} is missing" for name in own.keys() - given.keys()]
    problems += [f"{name} is not in the model" for name in given.keys() - own.keys()]
    problems += [
        f"{name} is {list(given[name])}, not {list(own[name])}"
        for name in own.keys() & given.keys()
        if own[name] != given[name]
    ]
    if problems:
        raise WeightsMismatch(f"weights version {weights.version}: {'; '.join(sorted(problems))}")


def check_probe(
    weights: Weights, logprobs: Sequence[float], tolerance: float, usual: float | None = None
) -> float:
    """Compares the engine's log-probs of the probe with the learner's, by the mean and a high
    quantile of their differences: a good model in bfloat16 has outliers.

    Args:
        tolerance: nats that the mean may come to.
        usual: what this returned for the engine's first weights, which is rounding alone: then
            the mean may be 8 times that, or a tenth of the tolerance.

    Returns:
        The mean difference in nats.

    Raises:
        WeightsMismatch: they differ by more, or are no numbers.
    """
    if not all(map(math.isfinite, [*logprobs, *weights.probe_logprobs])):
        raise WeightsMismatch(f"weights version {weights.version}: log-probs are not finite")
    mean, high = probe_difference(logprobs, weights.probe_logprobs)
    limit = tolerance if usual is None else min(tolerance, max(8 * usual, tolerance / 10))
    if mean <= limit and high <= 3 * limit:
        return mean
    said = (
        f"weights version {weights.version}: the engine's log-probs of the probe differ from "
        f"the learner's by {mean:.3g} nats"
    )
    if mean > tolerance:
        raise WeightsMismatch(f"{said}, more than probe_tolerance ({tolerance:g})")
    if usual is None:
        raise WeightsMismatch(f"{said}, a tenth of them by {high:.3g} or more, too uneven for it")
    raise WeightsMismatch(
        f"{said}, more than {limit:.2g}: under its first weights it was {usual:.2g} "
        f"(probe_tolerance is {tolerance:g})"
    )


def copy_weights(model: PreTrainedModel, weights: Weights) -> None:
    """Writes `weights` into the parameters of the same names, in the model's own precision.

    Raises:
        WeightsMismatch: names or shapes differ; nothing has been written then.
    """
    import torch

    parameters = dict(model.named_parameters())
    check_manifest(weights, {name: tuple(p.shape) for name, p in parameters.items()})
    with torch.no_grad():
        for name, tensor in weights.tensors():
            parameters[name].copy_(tensor)
