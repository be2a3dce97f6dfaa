"""The workers of a run's stages: started as Ray actors, restarted when they die, stopped.

Ray restarts an actor's process, but not the loop that ran in it, so the driver does both. A worker
whose process or engine died is started again with back-off, as often as its budget allows; one
that failed by itself (its error says why) is not, because it would fail again.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from rollout.engine import EngineDied
from services.config import Resources

log = logging.getLogger(__name__)

RESTARTS = 20  # of one worker that never ran for as long as `_HEALTHY_S`
_HEALTHY_S = 300.0  # a worker that ran for so long gets its budget back
_LONGEST_PAUSE_S = 30.0
_STOP_S = 10.0


class WorkerFailed(RuntimeError):
    """A worker stopped for good; the message says which and why."""


@dataclass
class _Worker:
    name: str
    make: Callable[[], Any]  # a new actor
    actor: Any = None
    task: asyncio.Task[None] | None = None
    started: float = 0.0
    restarts: int = 0
    due: float | None = None  # when it is to be started again


class Crew:
    """All stage workers of a run. `say` tells the user what happens to them."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._workers: list[_Worker] = []

    def add(self, name: str, cls: type[Any], resources: Resources, *args: Any) -> None:
        """Starts a worker: an actor of `cls`, made with `args` and its name."""
        worker = _Worker(name, functools.partial(_actor, cls, resources, name, *args))
        self._workers.append(worker)
        _start(worker)

    def revive(self) -> list[str]:
        """Looks after every worker; to be called again and again.

        Returns:
            names of the workers that were found dead in this call.

        Raises:
            WorkerFailed: one failed by itself, or died too often.
        """
        now = time.monotonic()
        dead = []
        for worker in self._workers:
            if worker.due is not None:
                if now >= worker.due:
                    worker.due = None
                    _start(worker)
            elif worker.task is not None and worker.task.done():
                error = worker.task.exception()
                if error is not None:  # else it was asked to stop
                    self._judge(worker, error, now)
                    dead.append(worker.name)
        return dead

    def _judge(self, worker: _Worker, error: BaseException, now: float) -> None:
        if isinstance(error, RayTaskError) and not isinstance(error.cause, EngineDied):
            raise WorkerFailed(f"{worker.name} stopped: {error.cause or error}") from error
        if not isinstance(error, RayActorError | RayTaskError):
            raise error
        worker.restarts = 1 if now - worker.started > _HEALTHY_S else worker.restarts + 1
        if worker.restarts > RESTARTS:
            raise WorkerFailed(f"{worker.name} died {worker.restarts} times; at last: {error}")
        worker.due = now + min(_LONGEST_PAUSE_S, 0.5 * 2**worker.restarts)
        log.warning("%s died: %s", worker.name, error)
        self._say(f"{worker.name} died; starting it again")

    async def stop(self) -> None:
        """Lets every worker finish what it holds, within some seconds."""
        for worker in self._workers:
            with suppress(RayActorError):
                worker.actor.stop.remote()
        tasks = [worker.task for worker in self._workers if worker.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=_STOP_S)


def _actor(cls: type[Any], resources: Resources, name: str, *args: Any) -> Any:
    return (
        ray.remote(cls)
        .options(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            resources=resources.custom,
            scheduling_strategy="SPREAD",
            name=name,
            max_restarts=0,
        )
        .remote(*args, name)
    )


def _start(worker: _Worker) -> None:
    with suppress(RayActorError, ValueError):
        ray.kill(ray.get_actor(worker.name))  # the name of a dead actor may linger
    worker.actor = worker.make()
    worker.started = time.monotonic()
    worker.task = asyncio.create_task(_run(worker.actor))


async def _run(actor: Any) -> None:
    await actor.run.remote()
