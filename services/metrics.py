"""A run's metrics: `metrics.jsonl` and TensorBoard files, one record a gradient step; and the
trajectories that it shows, in `trajectories.jsonl`.

The learner leaves each step's record in Redis and the driver writes it here, so that the run
directory has one writer, wherever the learner is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from services.trackers import Background


class Recorder:
    """Appends records to a run directory. A step that is trained again after a crash replaces
    its first record, so the file always holds the surviving history.

    Args:
        run_dir: of the run.
        trackers: who else is told; they are closed with the recorder.
    """

    def __init__(self, run_dir: Path, trackers: Sequence[Background] = ()) -> None:
        from tensorboardX import SummaryWriter

        self._trackers = trackers
        self._path = run_dir / "metrics.jsonl"
        self._last_step = max((r["step"] for r in read(run_dir)), default=0)
        self._file = self._path.open("a", buffering=1)
        self._tensorboard: Any = SummaryWriter(str(run_dir / "tensorboard"))

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._tensorboard.close()
        for tracker in self._trackers:
            tracker.close(failed=error is not None)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record; `record["step"]` is its gradient step."""
        step = int(record["step"])
        if step <= self._last_step:
            self._drop_from(step)
        self._last_step = step
        self._file.write(_line(record))
        metrics = {
            name: value
            for name, value in record.items()
            if "/" in name and isinstance(value, int | float) and math.isfinite(value)
        }
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)
        for tracker in self._trackers:
            tracker.log(metrics, step)

    def show(self, samples: Iterable[dict[str, Any]]) -> None:
        """Appends trajectories for people to look at; `samples` of a step that is trained again
        follow those of the first time, and `read_samples` gives the last."""
        with (self._path.parent / "trajectories.jsonl").open("a") as file:
            file.writelines(map(_line, samples))

    def _drop_from(self, step: int) -> None:
        self._file.close()
        kept = [line for line in self._path.read_text().splitlines() if _step(line) < step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.rename(self._path)
        self._file = self._path.open("a", buffering=1)


def read(run_dir: Path) -> list[dict[str, Any]]:
    """All whole records of a run; a line torn by a crash is left out. What has no value in a step
    (the file says null) is NaN."""
    records = _lines(run_dir / "metrics.jsonl")
    return [{n: math.nan if v is None else v for n, v in record.items()} for record in records]


def read_samples(run_dir: Path) -> list[dict[str, Any]]:
    """The trajectories that a run shows, each prompt of a step once."""
    found = {(s["step"], s["prompt"]): s for s in _lines(run_dir / "trajectories.jsonl")}
    return list(found.values())


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
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _step(line: str) -> float:
    return float(json.loads(line)["step"]) if line.endswith("}") else math.inf
