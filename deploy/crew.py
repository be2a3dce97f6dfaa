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
class _Role:
    make: Callable[[str], Any]  # a new actor of that name
    hired: int = 0  # so far: a name is given once


@dataclass
class _Worker:
    role: str
    name: str
    make: Callable[[], Any]  # a new actor
    actor: Any = None
    task: asyncio.Task[None] | None = None
    started: float = 0.0
    restarts: int = 0
    due: float | None = None  # when it is to be started again
    leaving: float | None = None  # since when
    told: Any = None  # its answer to that


class Crew:
    """All stage workers of a run. `say` tells the user what happens to them."""

    def __init__(self, run: str, say: Callable[[str], None]) -> None:
        self._run = run
        self._say = say
        self._roles: dict[str, _Role] = {}
        self._workers: list[_Worker] = []

    def staff(
        self,
        role: str,
        count: int,
        cls: type[Any],
        resources: Resources,
        *args: Any,
        **options: Any,
    ) -> None:
        """Starts the workers of a role: actors of `cls`, made with `args`, their names
        and `options`."""
        self._roles[role] = _Role(functools.partial(_actor, cls, resources, args, options))
        for _ in range(count):
            self._hire(role)

    def scale(self, role: str, count: int) -> None:
        """Hires workers or lets the newest go, until a role has `count`. Those that leave finish
        what they hold; those that find no room wait for nodes."""
        workers = [w for w in self._workers if w.role == role and w.leaving is None]
        if len(workers) != count:
            self._say(f"{role}: {len(workers)} → {count} workers")
        for worker in workers[count:]:
            worker.leaving = time.monotonic()
            with suppress(RayActorError):
                worker.told = worker.actor.stop.remote()
        for _ in range(len(workers), count):
            self._hire(role)

    def _hire(self, name: str) -> None:
        role = self._roles[name]
        full = f"{self._run}-{name}-{role.hired}"
        role.hired += 1
        worker = _Worker(name, full, functools.partial(role.make, full))
        self._workers.append(worker)
        _start(worker)

    def _let_go(self) -> None:
        """Ends the workers that have left, and those that were never there to be told."""
        for worker in [w for w in self._workers if w.leaving is not None]:
            assert worker.task is not None and worker.leaving is not None
            deaf = (
                time.monotonic() - worker.leaving > _STOP_S
                and not ray.wait([worker.told], timeout=0)[0]
            )
            if worker.task.done() or deaf:
                ray.kill(worker.actor)
                worker.task.add_done_callback(lambda task: task.exception())  # is looked at
                self._workers.remove(worker)

    def revive(self) -> list[str]:
        """Looks after every worker; to be called again and again.

        Returns:
            names of the workers that were found dead in this call.

        Raises:
            WorkerFailed: one failed by itself, or died too often.
        """
        self._let_go()
        now = time.monotonic()
        dead = []
        for worker in self._workers:
            if worker.leaving is not None:
                continue
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


def _actor(
    cls: type[Any],
    resources: Resources,
    args: tuple[Any, ...],
    options: dict[str, Any],
    name: str,
) -> Any:
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
        .remote(*args, name, **options)
    )


def _start(worker: _Worker) -> None:
    with suppress(RayActorError, ValueError):
        ray.kill(ray.get_actor(worker.name))  # the name of a dead actor may linger
    worker.actor = worker.make()
    worker.started = time.monotonic()
    worker.task = asyncio.create_task(_run(worker.actor))


async def _run(actor: Any) -> None:
    await actor.run.remote()
