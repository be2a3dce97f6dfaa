"""Checkpoints that are whole or absent: written under a temporary name, synced, renamed.

checkpoints/step-000020/
    model/       Hugging Face directory, loads with AutoModelForCausalLM
    trainer.pt   optimizer, schedule, random state
    state.json   step, and the entries of the scored stream that it contains
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_UNUSABLE = (OSError, ValueError, KeyError, TypeError)


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

    path: Path
    progress: Progress

    @property
    def model(self) -> Path:
        """The student as a Hugging Face directory."""
        return self.path / "model"

    def trainer(self) -> dict[str, Any]:
        """What `Learner.load_state_dict` takes."""
        state: dict[str, Any] = torch.load(self.path / "trainer.pt", weights_only=True)
        return state


def save(
    directory: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trainer: dict[str, Any],
    progress: Progress,
    *,
    keep_last: int,
) -> Path:
    """Writes a checkpoint; when it returns, the checkpoint is durable."""
    final = directory / f"step-{progress.step:06d}"
    temporary = directory / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    export(temporary / "model", model, tokenizer)
    torch.save(trainer, temporary / "trainer.pt")
    state = {"progress": asdict(progress), "files": _sizes(temporary)}
    (temporary / "state.json").write_text(json.dumps(state))
    for path in [*temporary.rglob("*"), temporary]:
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)  # a torn one that `latest` passed over
    temporary.rename(final)
    _sync(directory)
    for old in sorted(directory.glob("step-*"))[:-keep_last]:
        shutil.rmtree(old)
    return final


def latest(directory: Path) -> Checkpoint | None:
    """The newest whole checkpoint; torn ones are passed over and named in the log."""
    for path in sorted(directory.glob("step-*"), reverse=True):
        try:
            state = json.loads((path / "state.json").read_text())
            if _sizes(path) != state["files"]:
                raise OSError("files are missing or cut short")
            progress = state["progress"]
            covered = [(start, end) for start, end in progress["covered"]]
            return Checkpoint(path, Progress(progress["step"], progress["entries"], covered))
        except _UNUSABLE as error:
            log.warning("checkpoint %s cannot be used (%s): trying the one before", path, error)
    return None


def export(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes a Hugging Face directory."""
    packed = model.config._attn_implementation
    model.config._attn_implementation = "sdpa"  # ours has no meaning outside this project
    try:
        model.save_pretrained(path)
    finally:
        model.config._attn_implementation = packed
    tokenizer.save_pretrained(path)


def _sizes(directory: Path) -> dict[str, int]:
    return {
        str(file.relative_to(directory)): file.stat().st_size
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name != "state.json"
    }


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
