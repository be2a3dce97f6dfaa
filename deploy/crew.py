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
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from deploy.roles import Role, Settings, worker_class
from services.errors import WorkerDied, WorkerFailed
from services.stage import Connection
from services.worker import Post, StepWorker

log = logging.getLogger(__name__)

RESTARTS = 20  # of one worker that never ran for as long as `_HEALTHY_S`
_HEALTHY_S = 300.0  # a worker that ran for so long gets its budget back
_LONGEST_PAUSE_S = 30.0
_STOP_S = 10.0


@dataclass
class _Staff:
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
    stopped: Any = None  # its answer to being stopped


class Crew:
    """All stage workers of a run. `say` tells the user what happens to them."""

    def __init__(self, connection: Connection, say: Callable[[str], None]) -> None:
        self._connection = connection
        self._say = say
        self._roles: dict[str, _Staff] = {}
        self._workers: list[_Worker] = []

    def staff(self, role: Role, settings: Settings) -> None:
        """Starts the workers of a role, each with `settings`.

        Raises:
            TypeError: these are the settings of other workers. Workers are named in text, so that
                no type checker sees it.
        """
        worker = worker_class(role.step)
        if not isinstance(settings, worker.settings_class):
            raise TypeError(
                f"the workers of {role.name} take {worker.settings_class.__name__} and were given "
                f"{type(settings).__name__}"
            )
        post = Post(self._connection, role.step, role.capacity, role.lanes)
        make = functools.partial(_actor, worker, role, post, settings)
        self._roles[role.name] = _Staff(make)
        for _ in range(role.workers):
            self._hire(role.name)

    def scale(self, role: str, count: int) -> None:
        """Hires workers or lets the newest go, until a role has `count`. Those that leave finish
        what they hold; those that find no room wait for nodes."""
        workers = [w for w in self._workers if w.role == role and w.leaving is None]
        if len(workers) != count:
            self._say(f"{role}: {len(workers)} → {count} workers")
        for worker in workers[count:]:
            worker.leaving = time.monotonic()
            with suppress(RayActorError):
                worker.stopped = worker.actor.stop.remote()
        for _ in range(len(workers), count):
            self._hire(role)

    def _hire(self, name: str) -> None:
        role = self._roles[name]
        full = f"{self._connection.run}-{name}-{role.hired}"
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
                and not ray.wait([worker.stopped], timeout=0)[0]
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
        if isinstance(error, RayTaskError) and not isinstance(error.cause, WorkerDied):
            raise WorkerFailed(f"{worker.name} stopped: {error.cause or error}") from error
        if not isinstance(error, RayActorError | RayTaskError):
            raise error
        worker.restarts = 1 if now - worker.started > _HEALTHY_S else worker.restarts + 1
        if worker.restarts > RESTARTS:
            raise WorkerFailed(f"{worker.name} died {worker.restarts} times; last error: {error}")
        # A time at which others see to it, and no wait, so that it is none of tenacity's.
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
    worker: type[StepWorker[Any, Any, Any]], role: Role, post: Post, settings: Settings, name: str
) -> Any:
    return (
        ray.remote(worker)
        .options(
            num_cpus=role.resources.cpus,
            num_gpus=role.resources.gpus,
            resources=role.resources.custom,
            scheduling_strategy="SPREAD",
            name=name,
            max_restarts=0,
        )
        .remote(replace(post, name=name), settings)
    )


def _start(worker: _Worker) -> None:
    with suppress(RayActorError, ValueError):
        ray.kill(ray.get_actor(worker.name))  # the name of a dead actor may linger
    worker.actor = worker.make()
    worker.started = time.monotonic()
    worker.task = asyncio.create_task(_run(worker.actor))


async def _run(actor: Any) -> None:
    await actor.run.remote()
