"""A run's metrics: `metrics.jsonl` and TensorBoard files, one record a gradient step; and the
trajectories that it shows, in `trajectories.jsonl`.

The learner leaves each step's record in Redis and the driver writes it here, so that the run
directory has one writer, wherever the learner is.
"""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from services.trackers import BackgroundTracker


class Recorder:
    """Appends records to a run directory. A step that is trained again after a crash replaces
    its first record, so the file always holds the surviving history.

    Args:
        run_dir: of the run.
        trackers: who else is told; they are closed with the recorder.
    """

    def __init__(self, run_dir: Path, trackers: Sequence[BackgroundTracker] = ()) -> None:
        self._trackers = trackers
        self._path = run_dir / "metrics.jsonl"
        self._last_step = max((r["step"] for r in read(run_dir)), default=0)
        self._tensorboard = _TensorBoard(run_dir / "tensorboard")

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tensorboard.close()
        for tracker in self._trackers:
            tracker.close(failed=error is not None)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record; `record["step"]` is its gradient step.

        Raises:
            OSError: it cannot be written, and nothing of it was; it may be given again. What
                TensorBoard's file has no room for is kept, and written later.
        """
        step = int(record["step"])
        if step <= self._last_step:
            self._drop_from(step)
        _append(self._path, _line(record))
        self._last_step = step
        metrics = {
            name: value
            for name, value in record.items()
            if "/" in name and isinstance(value, int | float) and math.isfinite(value)
        }
        self._tensorboard.write(metrics, step)
        for tracker in self._trackers:
            tracker.log(metrics, step)

    def show(self, samples: Iterable[dict[str, Any]]) -> None:
        """Appends trajectories for people to look at; `samples` of a step that is trained again
        follow those of the first time, and `read_samples` gives the last."""
        _append(self._path.parent / "trajectories.jsonl", "".join(map(_line, samples)))

    def _drop_from(self, step: int) -> None:
        kept = [
            line
            for line in self._path.read_text(encoding="utf-8").splitlines()
            if _step(line) < step
        ]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        temporary.rename(self._path)


class _TensorBoard:
    """Scalars in TensorBoard's files. Written here and not on tensorboardX's own thread, which dies
    of a full disk and then holds up whoever writes."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._prefix = str(directory / "events")
        self._waiting: list[tuple[dict[str, float], int, float]] = []
        self._writer: Any = None

    def write(self, metrics: dict[str, float], step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        self._waiting.append((metrics, step, time.time()))
        try:
            if self._writer is None:
                self._writer = EventsWriter(self._prefix, f".{uuid.uuid4().hex[:8]}")
            for values, at, when in self._waiting:
                for name, value in values.items():
                    summary = scalar(name, value)
                    self._writer.write_event(Event(step=at, wall_time=when, summary=summary))
            self._writer.flush()
        except OSError:
            self.close()  # its end is torn: the next file has it all again
            return
        self._waiting.clear()

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(OSError):
                writer.close()


def _append(file: Path, text: str) -> None:
    """All of `text`, or nothing."""
    with file.open("ab", buffering=0) as out:
        end, left = out.seek(0, os.SEEK_END), text.encode()
        try:
            while left:
                left = left[out.write(left) :]
        except OSError:
            out.truncate(end)
            raise


def read(run_dir: Path) -> list[dict[str, Any]]:
    """All whole records of a run; a line torn by a crash is left out. What has no value in a step
    (the file says null) is NaN."""
    records = _lines(run_dir / "metrics.jsonl")
    return [{n: math.nan if v is None else v for n, v in record.items()} for record in records]


def read_samples(run_dir: Path) -> list[dict[str, Any]]:
    """The trajectories that a run shows, each prompt of a step once."""
    samples = {(s["step"], s["prompt"]): s for s in _lines(run_dir / "trajectories.jsonl")}
    return list(samples.values())


def _line(value: Any) -> str:
    """As JSON, which knows no NaN and no infinity: null stands for both."""
    return json.dumps(_finite(value), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return [*map(_finite, value)] if isinstance(value, list | tuple) else value


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _step(line: str) -> float:
    return float(json.loads(line)["step"]) if line.endswith("}") else math.inf
