"""One version of the student's weights, as it travels from the learner to every engine.

A version is one flat buffer, so that Ray ships it as a single out-of-band object: written once,
read on each node without a copy. With it travels a probe, the learner's own log-probs of a fixed
sequence, so that an engine that loaded something else is found out before it samples a token.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Manifest: TypeAlias = tuple[tuple[str, str, tuple[int, ...]], ...]
"""(name, torch dtype, shape) of each tensor."""


def manifest(parameters: Iterable[tuple[str, torch.Tensor]]) -> Manifest:
    """The manifest of `parameters`, in their order."""
    return tuple(
        (name, str(p.dtype).removeprefix("torch."), tuple(p.shape)) for name, p in parameters
    )


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
    ) -> Weights:
        """As `flatten`, where `tensors` come one by one, in the order of the manifest, so that
        only one of them need be whole at a time."""
        sizes = [math.prod(shape) * getattr(torch, dtype).itemsize for _, dtype, shape in manifest]
        buffer = torch.empty(sum(sizes), dtype=torch.uint8)
        parts = torch.split(buffer, sizes) if sizes else ()
        for part, tensor in zip(parts, tensors, strict=True):
            part.copy_(tensor.contiguous().view(-1).view(torch.uint8))
        return Weights(version, manifest, buffer.numpy(), tuple(probe_ids), tuple(probe_logprobs))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor of each parameter: views of the buffer, not to be written to."""
        with warnings.catch_warnings():  # Ray's buffers are read-only, and that is what we want
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            flat = torch.from_numpy(self.buffer)
        offset = 0
        for name, dtype_name, shape in self.manifest:
            dtype: torch.dtype = getattr(torch, dtype_name)
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            # Tensors of mixed dtypes may lie off their alignment; a copy puts that right.
            part = flat[offset : offset + size]
            part = part if offset % dtype.itemsize == 0 else part.clone()
            yield name, part.view(dtype).view(shape)
            offset += size

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
