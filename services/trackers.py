"""Trackers of experiments beside `metrics.jsonl`: W&B and MLflow, as the user's environment says.

    Recorder.write ──▶ queue ──▶ thread ──▶ server, or a store on this machine

Each has a thread of its own, so that one which is slow or cannot be reached holds up nobody: its
records wait and are sent later; what is left at the end is in `metrics.jsonl`. A resumed run goes
on in the same run of the tracker, which knows it by the id in the run directory.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar

import tenacity

from services.disk import write_whole

T = TypeVar("T")

log = logging.getLogger(__name__)

PROJECT = "scope"  # where WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME do not say otherwise
_REACH_S, _CLOSE_S = 20.0, 30.0
_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 60.0
_MLFLOW_PARAMETERS = 100  # that it takes at once
_MLFLOW_TEXT = 6000  # characters of one


class Tracker(Protocol):
    """One run of a tracker, made on the thread that uses it."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Sends the metrics of a step; one that is trained again after a crash comes again."""

    def close(self, *, failed: bool) -> None:
        """Ends the run there."""


def missing(kinds: Iterable[str]) -> list[str]:
    """One sentence for each that is not installed."""
    return [
        f"trackers names {kind}, which is not installed: pip install -e '.[{kind}]'"
        for kind in kinds
        if not find_spec(kind)
    ]


def start(
    kinds: Iterable[str], run_dir: Path, name: str, settings: Mapping[str, Any]
) -> list[BackgroundTracker]:
    """Begins to track a run, or goes on.

    Args:
        kinds: `wandb`, `mlflow`.
        run_dir: of the run; its id for trackers is kept there.
        name: of the run.
        settings: its configuration, without secrets.
    """
    file = run_dir / "tracker-id"
    if not file.exists():
        write_whole(file, uuid.uuid4().hex)
    id_ = file.read_text(encoding="utf-8")
    makers: dict[str, Callable[[], Tracker]] = {
        "wandb": lambda: Wandb(run_dir, id_, name, settings),
        "mlflow": lambda: MLflow(run_dir, id_, name, settings),
    }
    return [BackgroundTracker(kind, makers[kind]) for kind in kinds]


class BackgroundTracker:
    """A tracker behind a queue. Nothing here waits for it, but `close`, for some seconds."""

    def __init__(self, kind: str, make: Callable[[], Tracker]) -> None:
        self._kind, self._make = kind, make
        self._queue: queue.SimpleQueue[tuple[Mapping[str, float], int] | None] = queue.SimpleQueue()
        self._sent = self._given = 0
        self._failed, self._given_up = False, threading.Event()
        # Of the kind that the end of the process does not wait for.
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"tracker-{kind}")
        self._thread.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Leaves a step's metrics to the thread."""
        self._given += 1
        self._queue.put((metrics, step))

    def close(self, *, failed: bool, timeout_s: float = _CLOSE_S) -> None:
        """Gives the thread `timeout_s` to send what is left; says what it did not send."""
        self._failed = failed
        self._queue.put(None)
        self._thread.join(timeout_s)
        alive = self._thread.is_alive()
        if alive:
            self._given_up.set()
        if alive or self._sent < self._given:  # it may have died of a fault of its own
            log.warning(
                "%s: %d of %d steps were not sent within %g s; metrics.jsonl has them all",
                self._kind, self._given - self._sent, self._given, timeout_s,
            )  # fmt: skip

    def _work(self) -> None:
        tracker = self._patiently(self._make)
        while tracker is not None and (entry := self._queue.get()) is not None:
            metrics, step = entry
            self._patiently(lambda m=metrics, s=step: tracker.log(m, s))  # type: ignore[misc]
            self._sent += 1
        if tracker is not None and not self._given_up.is_set():
            self._patiently(lambda: tracker.close(failed=self._failed))

    def _patiently(self, call: Callable[[], T]) -> T | None:
        """Until it succeeds, or nobody waits any more."""
        if self._given_up.is_set():
            return None
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_errors(self._kind)),
            wait=tenacity.wait_exponential(_FIRST_RETRY_S, _LAST_RETRY_S),
            sleep=tenacity.sleep_using_event(self._given_up),
            stop=tenacity.stop_when_event_set(self._given_up),
            before_sleep=self._say_once,
        )
        try:
            return retrying(call)
        except tenacity.RetryError:
            return None

    def _say_once(self, state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            error = state.outcome.exception()
            log.warning("%s: %s; trying again beside the training", self._kind, error)


class Wandb:
    """A run of Weights & Biases. WANDB_MODE=offline keeps it in the run directory, and so does a
    server that does not answer at the start."""

    def __init__(self, run_dir: Path, id_: str, name: str, settings: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # to its makers
        import wandb
        from wandb.errors import Error

        init = functools.partial(
            wandb.init,
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            id=id_,
            resume="allow",
            dir=run_dir,
            config=dict(settings),
            settings=wandb.Settings(
                console="off",
                silent=True,
                save_code=False,
                init_timeout=_REACH_S,
                login_timeout=_REACH_S,  # where it would ask on the terminal for a key
                finish_timeout=_CLOSE_S,
            ),
        )
        try:
            self._run = init()
        except Error as error:  # its own wait would hold up the end of the process
            log.warning("wandb: %s; kept in %s/wandb, for `wandb sync`", error, run_dir)
            wandb.teardown()  # or the run's id would still be in use
            self._run = init(mode="offline")
        # W&B refuses to go back in its own count of steps, as a resumed run does.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._run.log({**metrics, "step": step})

    def close(self, *, failed: bool) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI or else in `mlflow.db` beside the run directory."""

    def __init__(self, run_dir: Path, id_: str, name: str, settings: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # to its makers
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # its tables are not our progress
        own = f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"
        self._metric = Metric
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", own))
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(project)
        known = self._client.search_runs([number], f"tags.`scope.id` = '{id_}'")
        if known:
            self._id = known[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        made = self._client.create_run(number, run_name=name, tags={"scope.id": id_})
        self._id = made.info.run_id
        parameters = [Param(key, str(value)[:_MLFLOW_TEXT]) for key, value in _flat(settings)]
        for first in range(0, len(parameters), _MLFLOW_PARAMETERS):
            some = parameters[first : first + _MLFLOW_PARAMETERS]
            self._client.log_batch(self._id, params=some)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        now = int(time.time() * 1000)
        self._client.log_batch(
            self._id, metrics=[self._metric(k, v, now, step) for k, v in metrics.items()]
        )

    def close(self, *, failed: bool) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")


def _errors(kind: str) -> tuple[type[Exception], ...]:
    """What a tracker raises when it cannot be reached or refuses."""
    if kind == "wandb":
        from wandb.errors import Error

        return Error, OSError
    from mlflow.exceptions import MlflowException

    return MlflowException, OSError


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    """`{"a": {"b": 1}}` as `a.b`."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
