"""Checkpoints that are whole or absent, written beside the training by all ranks together.

    step-000020/
        __0_0.distcp …  what each rank holds of model and optimizer (torch.distributed.checkpoint)
        .metadata       where each tensor's parts are: any number of ranks can load them
        model/          Hugging Face directory, in the ones that are kept for good
        state.json      the mark: step, what it has learned from, and the size of every file

On a disk a checkpoint is written under a temporary name, synced and renamed. An object store has
no rename, so there the mark, which is written last, makes the checkpoint. Whatever has no mark, or
not the files that its mark lists, was torn and is passed over.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult

from services.errors import Unavailable
from trainer.storage import Storage

log = logging.getLogger(__name__)

State: TypeAlias = dict[str, Tensor]
"""Name -> tensor; one that is sharded is a DTensor, and each rank holds its part."""

RANK_PREFIX = "rank."  # of names that belong to one rank: absent when there were fewer ranks
_MARK = "state.json"
_PINNED = StagingOptions(
    use_pinned_memory=True,
    use_shared_memory=False,
    use_async_staging=False,
    use_non_blocking_copy=True,
)
_UNUSABLE = (OSError, ValueError, KeyError, TypeError)


class CheckpointFailed(Unavailable):
    """A checkpoint could not be written; the message says why and which one is intact."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a checkpoint stands.

    `entries` are the scored-stream ids trained since the checkpoint before, which may not have
    been settled in Redis when the process died. `covered` are the orders of all prompts that the
    checkpoint has learned from, as [first, past the last] ranges: with them a run goes on even
    when Redis is lost, or when a newer checkpoint is.
    """

    step: int
    entries: list[str]
    covered: list[tuple[int, int]]

    @property
    def orders(self) -> Iterator[int]:
        """The orders in `covered`, one by one."""
        return (order for start, end in self.covered for order in range(start, end))


def ranges(orders: Iterable[int]) -> list[tuple[int, int]]:
    """`orders` as the fewest [first, past the last] ranges."""
    made: list[tuple[int, int]] = []
    for order in sorted(orders):
        if made and made[-1][1] == order:
            made[-1] = (made[-1][0], order + 1)
        else:
            made.append((order, order + 1))
    return made


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was found whole."""

    storage: Storage
    name: str
    progress: Progress

    def load(self, state: State) -> None:
        """Fills `state` in place; all ranks call it, and may be more or fewer than saved it.

        Raises:
            CheckpointFailed: a tensor is not in the checkpoint, or has another shape.
        """
        reader = FileSystemReader(self.name)
        reader.fs = self.storage.adapter()  # type: ignore[assignment]
        saved = reader.read_metadata().state_dict_metadata
        wanted = {k: v for k, v in state.items() if k in saved or not k.startswith(RANK_PREFIX)}
        try:
            load(wanted, storage_reader=reader, process_group=_group())
        except CheckpointException as error:
            raise CheckpointFailed(f"{self} cannot be loaded: {_cause(error)}") from error

    def __str__(self) -> str:
        return f"{self.storage.where}/{self.name}"


def latest(storage: Storage) -> Checkpoint | None:
    """The newest whole checkpoint; torn ones are passed over and named in the log."""
    for name in reversed(_names(storage)):
        try:
            state = json.loads(storage.read(f"{name}/{_MARK}"))
            if _sizes(storage, name) != state["files"]:
                raise OSError("files are missing or cut short")
            progress = state["progress"]
            covered = [(start, end) for start, end in progress["covered"]]
            reached = Progress(progress["step"], progress["entries"], covered)
            return Checkpoint(storage, name, reached)
        except _UNUSABLE as error:
            log.warning(
                "checkpoint %s/%s cannot be used (%s): trying the previous one",
                storage.where, name, error,
            )  # fmt: skip
    return None


class Saver:
    """Writes checkpoints beside the training, one at a time. Every rank has one, and all call
    `save` at the same steps.

    Args:
        storage: where; all ranks must see the same.
        keep_last: how many of the newest are kept.
        keep_every: those of every so many steps are kept for good; None keeps none.
    """

    def __init__(self, storage: Storage, *, keep_last: int, keep_every: int | None = None) -> None:
        self._storage, self._keep_last, self._keep_every = storage, keep_last, keep_every
        self._stager = DefaultStager(_PINNED) if torch.cuda.is_available() else None
        self._group = _group()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None
        self._progress: Progress | None = None  # of the one that is being written

    def save(
        self,
        state: Mapping[str, Tensor],
        progress: Progress,
        model: Callable[[Path], None] | None = None,
    ) -> None:
        """Copies `state` off the device and returns; the rest happens beside the training. The
        one before must have been taken with `finish`.

        Args:
            progress: what the first rank knows of it; the others' is not looked at.
            model: writes the Hugging Face directory; called on the first rank if this is one of
                those that are kept for good.
        """
        assert self._saving is None, "the checkpoint before was not taken"
        staged = self._copy(state)
        for_good = self._keep_every is not None and progress.step % self._keep_every == 0
        writer = _Writer(
            self._storage, progress, keep=self._kept, model=model if for_good else None
        )
        self._progress = progress
        self._saving = self._thread.submit(self._write, staged, writer)

    @property
    def idle(self) -> bool:
        """Whether `finish` would not wait."""
        return self._saving is None or self._saving.done()

    def finish(self) -> Progress | None:
        """Waits for the checkpoint that is being written, and gives what it contains once it is
        durable; None when there is none.

        Raises:
            CheckpointFailed: it could not be written, on whatever rank; those before are intact.
        """
        saving, self._saving = self._saving, None
        if saving is None:
            return None
        saving.result()
        return self._progress

    def close(self) -> None:
        """Ends the thread; waits for what it is writing."""
        self._thread.shutdown()
        if self._stager:
            self._stager.close()

    def _copy(self, state: Mapping[str, Tensor]) -> State:
        """On the CPU. Page-locked memory is dear to get, so the stager keeps it for the next save;
        any other would stay three times the model's size for nothing, and goes with the save."""
        if self._stager:
            return cast(State, self._stager.stage(dict(state)))  # not a Future: it has blocked
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def _write(self, staged: State, writer: _Writer) -> None:
        try:
            save(staged, storage_writer=writer, process_group=self._group)
        except CheckpointException as error:
            if dist.is_initialized() and dist.get_rank() > 0:
                raise CheckpointFailed(_cause(error)) from error
            raise CheckpointFailed(
                f"checkpoint {self._storage.where}/{writer.name} could not be written: "
                f"{_cause(error)}; the newest complete one is {writer.abandon()}"
            ) from error

    def _kept(self, steps: list[int]) -> set[int]:
        """Of the `steps` that have checkpoints, in order, those that stay."""
        for_good = {step for step in steps if self._keep_every and step % self._keep_every == 0}
        return for_good | set(steps[-self._keep_last :])


class _Writer(FileSystemWriter):
    """Torch's writer, with our way to make a checkpoint durable. `set_up_storage_writer` and
    `finish` are called where a failure on one rank becomes a failure on all."""

    def __init__(
        self,
        storage: Storage,
        progress: Progress,
        *,
        keep: Callable[[list[int]], set[int]],
        model: Callable[[Path], None] | None,
    ) -> None:
        self.name = f"step-{progress.step:06d}"
        self._temporary = f".{self.name}.tmp" if storage.renames else self.name
        super().__init__(self._temporary, sync_files=False, per_thread_copy_ahead=0)
        self.fs = storage.adapter()  # type: ignore[assignment]  # syncs what it closes
        self._storage, self._progress, self._keep, self._model = storage, progress, keep, model

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        if is_coordinator:
            self._storage.delete(self._temporary)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called on the first rank when all have written."""
        super().finish(metadata, results)
        if self._model is not None:
            self._storage.fill(f"{self._temporary}/model", self._model)
        sizes = _sizes(self._storage, self._temporary)
        absent = {part.relative_path for part in metadata.storage_data.values()} - sizes.keys()
        if absent:
            raise OSError(
                f"{', '.join(sorted(absent))} of other ranks cannot be seen from the first: "
                "trainer.checkpoint.storage must be one that all nodes share"
            )
        state = {"progress": asdict(self._progress), "files": sizes}
        self._storage.write(f"{self._temporary}/{_MARK}", json.dumps(state).encode())
        if self._storage.renames:
            self._storage.delete(self.name)  # a torn one that `latest` passed over
            self._storage.rename(self._temporary, self.name)
        try:
            self._prune()
        except OSError as error:
            log.warning("old checkpoints could not be deleted: %s", error)

    def abandon(self) -> str:
        """Makes room again after a failure, and says which checkpoint is the newest now."""
        try:
            self._storage.delete(self._temporary)
            return str(latest(self._storage) or "none")
        except OSError as error:
            return f"not to be found ({error})"

    def _prune(self) -> None:
        """Old ones, and what is newer than the one just written: the run went on from before it,
        so it belongs to a history that was given up."""
        steps = {_step(name): name for name in _names(self._storage)}
        whole = [
            step
            for step, name in steps.items()
            if step <= self._progress.step and self._storage.exists(f"{name}/{_MARK}")
        ]
        for step in steps.keys() - self._keep(sorted(whole)):
            self._storage.delete(steps[step])
        for name in self._storage.names():
            if name.startswith(".step-"):  # of a process that was killed
                self._storage.delete(name)


def _group() -> dist.ProcessGroup | None:
    """A group of its own for all ranks, over CPUs: threads must not share one."""
    if not dist.is_initialized():
        return None
    group: dist.ProcessGroup = dist.new_group(backend="gloo")
    return group


def _names(storage: Storage) -> list[str]:
    return [name for name in storage.names() if re.fullmatch(r"step-\d+", name)]


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def _sizes(storage: Storage, name: str) -> dict[str, int]:
    return {path: size for path, size in storage.sizes(name).items() if path != _MARK}


def _cause(error: CheckpointException) -> str:
    """The first rank's failure in one line: torch's message holds every rank's traceback."""
    rank, (cause, _) = min(error.failures.items())
    text = " ".join(str(cause).split()) or type(cause).__name__
    return text if len(error.failures) == 1 and rank == 0 else f"rank {rank}: {text}"
