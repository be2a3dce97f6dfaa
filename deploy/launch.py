"""One run, from nothing to an exported student: starts every part, watches over them, and ends.

    Redis ─▶ Ray ─▶ room for all? ─▶ weight store ─▶ learner (Ray Train) ─▶ teacher ─▶ workers
                                                                                          │
    evaluate before ─▶ feed ─▶ watch: restart the dead, scale, stop on faults ◀───────────┘
                          └──▶ evaluate after

The run directory belongs to the driver alone, and is all that `scope resume` needs.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import signal
import time
from collections.abc import Awaitable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import ray
from ray.train import TrainingFailedError
from redis.exceptions import RedisError

from deploy.cluster import NoRay, start_ray
from deploy.config import ConfigError, RunConfig, dump
from deploy.console import RunConsole
from deploy.crew import Crew
from deploy.evaluate import Result, evaluate
from deploy.failures import learner_cause, passes, sentence
from deploy.placement import reservations, reserved, wait_for_room
from deploy.preflight import Preflight, check
from deploy.restore import restore
from deploy.roles import roles, settings
from deploy.status import write_snapshot
from deploy.teachers import require_port, start_teachers
from deploy.telemetry import Telemetry
from deploy.usage import cpu_seconds
from rollout.feeder import Feeder
from services import trackers
from services.disk import write_whole
from services.errors import RunFailed, WorkerFailed
from services.metrics import Recorder
from services.pipeline import EVAL
from services.redis_server import EmbeddedRedis, RedisUnavailable, examine, resolve_url
from services.stage import Connection, consumers_of
from services.streams import Ledger, Streams
from services.tasks import in_thread
from services.weight_store import StoreFeed, start_store
from trainer.checkpoint import latest
from trainer.fit import end_fit, trainer
from trainer.loop import LoopConfig, checkpoints_of
from trainer.objectives.kinds import objective
from trainer.reader import describe
from trainer.storage import Storage

log = logging.getLogger(__name__)

_WATCH_S = 0.5
_RESERVE_S, _RESERVE_POLL_S = 600.0, 0.1  # Ray's actors start slowly on a busy machine


@dataclass
class Run:
    """A run in progress. `execute` is its life; everything else is one phase of it."""

    config: RunConfig
    directory: Path
    console: RunConsole
    preflight: Preflight
    resumed: bool
    telemetry: Telemetry
    lock: IO[str] | None = None  # for as long as it is open
    evaluations: dict[str, Result] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)

    async def execute(self) -> None:
        """Runs to the end.

        Raises:
            RunFailed: a part failed for good; what was trained is in the last checkpoint.
        """
        _cancel_on_signals()
        async with AsyncExitStack() as stack:
            connection = self._start_redis(stack)
            streams = await stack.enter_async_context(connection.streams())
            await self._prepare_streams(streams)
            self._start_ray(stack)
            _cancel_on_signals()
            await wait_for_room(
                reservations(self.config),
                timeout_s=self.config.ray.wait_for_nodes_s,
                say=self.console.say,
            )
            store = start_store(f"{self.config.name}-weights")
            learner = await self._start_learner(stack, connection, store)
            teachers = await start_teachers(
                self.config,
                self.preflight.fingerprints,
                self.preflight.probes,
                stack,
                self.console.say,
                StoreFeed(store),
            )
            crew = Crew(connection, self.console.say)
            stack.push_async_callback(crew.stop)
            for role in roles(self.config):
                worker_settings = settings(
                    self.config, role, StoreFeed(store), teachers, self.preflight.translators
                )
                crew.staff(role, worker_settings)
            with self._writing():
                recorder = stack.enter_context(Recorder(self.directory, self._trackers()))
            watch = asyncio.create_task(self._watch(streams, recorder, learner, crew))
            stack.callback(watch.cancel)
            try:
                await self._phases(connection, learner, watch)
            except WorkerFailed as error:
                raise self._failed(str(error)) from error
            with self._writing():
                await self._record(streams, recorder)
                write_snapshot(self.directory, await streams.ledger())

    async def _phases(
        self, connection: Connection, learner: asyncio.Future[None], watch: asyncio.Task[None]
    ) -> None:
        """Evaluate, train, evaluate; a fault that the watch finds ends each of them."""
        await _unless(watch, self._evaluate(connection, "before", version=0))
        feeder = Feeder(
            connection,
            self.preflight.train,
            total=self.preflight.total_groups,
            groups_per_step=self.config.trainer.groups_per_step,
            max_staleness=self.config.trainer.max_staleness,
            fixed_sampler=objective(self.config.trainer.objective).sampler == "teacher",
        )
        self.console.say(f"training on {self.preflight.total_groups} prompts")
        trained = asyncio.Event()
        evaluating = asyncio.create_task(self._evaluate_meanwhile(connection, trained))
        await _unless(watch, feeder.run())
        await _unless(watch, learner)
        trained.set()
        await _unless(watch, evaluating)
        async with connection.streams() as streams:
            final = (await streams.ledger()).step
        await _unless(watch, self._evaluate(connection, "after", version=final))

    # ---------------------------------------------------------------------------- starting

    @property
    def _checkpoints(self) -> Storage:
        return checkpoints_of(self.config.trainer.checkpoint, self.directory)

    def _start_redis(self, stack: AsyncExitStack) -> Connection:
        url = resolve_url(self.config.redis)
        if url is None:
            server = EmbeddedRedis(self.directory / "redis")
            server.start()
            stack.callback(server.stop)
            stack.callback(asyncio.create_task(self._keep_redis(server)).cancel)
            url = server.url
            self.console.say(f"Redis: private server, data in {server.directory}")
        else:
            self._examine_redis(url)
        return Connection(url, self.config.name, self.config.stage, self.config.pipeline)

    def _examine_redis(self, url: str) -> None:
        """A server that would lose prompts is refused before the first one is fed."""
        try:
            health = examine(url)
        except RedisUnavailable as error:
            raise RunFailed(f"redis.url: {error}") from error
        for risk in health.risks:
            self.console.say(f"note: redis.url: {risk}")
        if health.faults:
            raise RunFailed(f"redis.url: {'; '.join(health.faults)}")

    def _start_ray(self, stack: AsyncExitStack) -> None:
        settings = self.config.ray
        try:
            context = start_ray(settings, f"scope-{self.config.name}", self.console.say)
        except NoRay as error:
            raise self._failed(str(error)) from error
        stack.callback(ray.shutdown)
        if context.dashboard_url:
            self.console.say(f"Ray dashboard: http://{context.dashboard_url}")
        if settings.address is None:
            logs = self.directory / "logs"
            logs.unlink(missing_ok=True)
            logs.symlink_to(Path(context["session_dir"]) / "logs")

    async def _prepare_streams(self, streams: Streams) -> None:
        whose = streams.key("directory")  # of two that start together only one may have the name
        first = await streams.redis.set(whose, str(self.directory), nx=not self.resumed)
        if not self.resumed and (not first or (await streams.ledger()).fed):
            raise RunFailed(
                f"this Redis already holds a run named {self.config.name!r}: give the new one "
                f"another name (name=…), or resume that one"
            )
        try:
            checkpoint = latest(self._checkpoints)
        except OSError as error:
            raise RunFailed(f"checkpoint storage cannot be read: {error}") from error
        if checkpoint is not None and not self.resumed:
            raise RunFailed(
                f"{checkpoint} is of another run named {self.config.name!r}: give the new one "
                f"name (name=…), or resume that one"
            )
        mended = await restore(
            streams, checkpoint.progress if checkpoint else None, self.preflight.train.prompt
        )
        if checkpoint is not None:
            self.console.say(f"continuing from {checkpoint}")
        if mended.fed_again or mended.taken_out:
            self.console.say(
                f"Redis and the checkpoint differed: {mended.fed_again} prompts are fed again, "
                f"{mended.taken_out} that the checkpoint already holds are removed"
            )
        evaluation = streams.of(EVAL)
        # What an interrupted evaluation left behind belongs to no one now.
        names = ("ledger", "dead", *evaluation.pipeline.streams)
        await evaluation.redis.delete(*map(evaluation.key, names))
        await evaluation.create()

    async def _start_learner(
        self, stack: AsyncExitStack, connection: Connection, store: Any
    ) -> asyncio.Future[None]:
        """Returns when Ray Train has reserved its ranks, so that whatever starts next takes only
        what they leave."""
        made = trainer(
            LoopConfig(
                connection=connection,
                trainer=self.config.trainer,
                student=self.config.student,
                temperature=self.config.sampling.temperature,
                total_groups=self.preflight.total_groups,
                run_dir=self.directory.resolve(),
                weight_store=store,
                weight_transfer=self.config.rollout.engine.weight_transfer,
                engine_dtype=self.config.followers_dtype,
                seed=self.config.seed,
            )
        )
        before = reserved()
        learner = in_thread(made.fit)
        stack.push_async_callback(end_fit, learner)
        try:
            async with asyncio.timeout(self.config.ray.wait_for_nodes_s + _RESERVE_S):
                while not (learner.done() or reserved() - before):
                    await asyncio.sleep(_RESERVE_POLL_S)
        except TimeoutError:
            raise self._failed("Ray Train reserved no resources for the learner") from None
        return learner

    # ---------------------------------------------------------------------------- watching

    async def _watch(
        self,
        streams: Streams,
        recorder: Recorder,
        learner: asyncio.Future[None],
        crew: Crew,
    ) -> None:
        """Until cancelled: restarts dead workers, records metrics, and raises what ends a run."""
        last_step, last_progress = -1, time.monotonic()
        evaluation = streams.of(EVAL)
        try:
            while True:
                await asyncio.sleep(_WATCH_S)
                for dead in crew.revive():
                    self.telemetry.died(dead)
                    for lane in (streams, evaluation):
                        await lane.abandon(consumers_of(dead))
                for role, count in (await streams.wanted()).items():
                    crew.scale(role, count)
                ledger = await streams.ledger()
                self.telemetry.look(ledger, await streams.reports())
                try:
                    await self._record(streams, recorder)
                    write_snapshot(self.directory, ledger)
                except OSError as error:  # it is all in Redis until there is room
                    self._say_once(f"the run directory waits to be written: {error}")
                self.console.progress(ledger, self.preflight.total_groups)
                # Before the first prompt and after the last step something else is waited for,
                # with a deadline of its own; in between, and until it ends, for the learner.
                if ledger.step != last_step or not ledger.fed or learner.done():
                    last_step, last_progress = ledger.step, time.monotonic()
                self._stop_on_faults(ledger, time.monotonic() - last_progress)
                if learner.done():
                    learner.result()
        except WorkerFailed as error:
            cause = error.__cause__
            again = cause is not None and not passes(cause)
            raise self._failed(str(error), mended=again) from error
        except TrainingFailedError as error:
            cause = learner_cause(error)
            said = f"the learner failed: {sentence(cause)}"
            raise self._failed(said, mended=not passes(cause)) from error
        except RedisError as error:
            raise self._failed(f"Redis does not serve the run: {error}") from error

    def _stop_on_faults(self, ledger: Ledger, quiet_s: float) -> None:
        fraction = self.config.max_dead_fraction
        # At least over ten steps: one poisoned prompt among the first few is no bad run.
        seen = max(ledger.fed, 10 * self.config.trainer.groups_per_step)
        if ledger.dead > fraction * seen:
            raise self._failed(
                f"{ledger.dead} of {ledger.fed} prompts are dead, more than max_dead_fraction "
                f"({fraction:g}) allows; see what broke them with: scope dead {self.directory}",
                mended=True,
            )
        if quiet_s > self.config.trainer.stall_timeout_s:
            if ledger.in_flight == 0:
                raise self._failed(
                    f"nothing is in flight, and the learner has not ended for {quiet_s:.0f} s "
                    f"({describe(ledger)})"
                )
            slowest = ledger.slowest(self.config.trainer.groups_per_step)
            raise self._failed(
                f"no gradient step for {quiet_s:.0f} s; the slowest stage is the one that reads "
                f"{slowest!r} ({describe(ledger)})"
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Around what cannot wait for room on the disk of the run directory."""
        try:
            yield
        except OSError as error:
            raise self._failed(f"the run directory cannot be written: {error}") from error

    def _failed(self, what: str, *, mended: bool = False) -> RunFailed:
        """`mended`: the run as it is would end like this again."""
        first = "mend that first, or it ends like this again; then " if mended else ""
        return RunFailed(f"{what}; {first}continue with: scope resume {self.directory}")

    async def _keep_redis(self, server: EmbeddedRedis) -> None:
        """Until cancelled: starts the private Redis again when it dies. Its append-only file has
        everything, and every client waits and retries meanwhile. A task of its own, because the
        watch is one of these clients."""
        while True:
            await asyncio.sleep(_WATCH_S)
            if not server.running:
                self.console.say("Redis died; starting it again")
                server.start()

    def _trackers(self) -> list[trackers.BackgroundTracker]:
        shown = _without_addresses(self.config)
        return trackers.start(self.config.trackers, self.directory, self.config.name, shown)

    async def _record(self, streams: Streams, recorder: Recorder) -> None:
        """Moves the learner's records from Redis to the run directory."""
        key = streams.key("metrics")
        entries: Any = await streams.redis.xrange(key)
        # Of a cluster that was there before, most processes are elsewhere.
        own = entries and self.config.ray.address is None
        used = cpu_seconds(pipeline=self.config.pipeline) if own else {}
        for entry, fields in entries:
            record = json.loads(fields[b"record"]) | used
            recorder.write(record)
            recorder.show(json.loads(fields[b"samples"]))
            self.telemetry.step(record)
            self.console.step(record)
            await streams.redis.xdel(key, entry)

    def _say_once(self, what: str) -> None:
        if what not in self.said:
            self.said.add(what)
            self.console.say(what)

    # ------------------------------------------------------------------- evaluating, ending

    async def _evaluate(self, connection: Connection, label: str, *, version: int) -> None:
        source, config = self.preflight.heldout, self.config.evaluation
        if source is None or config is None:
            return
        if label == "before" and latest(self._checkpoints):
            # A resumed run began where it first began, and those weights are gone.
            if known := Result.read(self.directory, label):
                self.evaluations[label] = known
            return
        count = min(len(source), config.prompts or len(source))
        self.console.say(f"evaluating {label} training: {count} held-out prompts")
        result = await evaluate(
            connection, source, range(count), version=version, timeout_s=config.timeout_s
        )
        with self._writing():
            result.write(self.directory, label)
        self.evaluations[label] = result

    async def _evaluate_meanwhile(self, connection: Connection, trained: asyncio.Event) -> None:
        """Every `evaluation.every_steps` steps, on the same workers, while training goes on. The
        one under way when it has ended is finished: its prompts must not meet the next one's."""
        every = self.config.evaluation.every_steps if self.config.evaluation else None
        if every is None:
            return
        async with connection.streams() as streams:
            due = ((await streams.ledger()).step // every + 1) * every
            while not trained.is_set():
                step = (await streams.ledger()).step
                if step >= due:
                    await self._evaluate(connection, f"step-{step:06d}", version=step)
                    due = (step // every + 1) * every
                with suppress(TimeoutError):
                    async with asyncio.timeout(_WATCH_S):
                        await trained.wait()


def start(config: RunConfig, console: RunConsole, *, directory: Path | None = None) -> Run:
    """Checks the configuration and prepares its run directory (an existing one to resume)."""
    config = config.with_absolute_paths()  # workers run in directories of their own
    preflight = check(config)
    # In a cluster that is joined another run's Serve may hold the port, and is shared.
    if config.ray.address is None and config.served and preflight.fingerprints:
        require_port(config)
    resumed = directory is not None
    for model in preflight.models:
        console.say(model)
    for warning in preflight.warnings:
        console.say(f"note: {warning}")
    if directory is None:
        try:
            directory = _new_directory(config)
            config = config.model_copy(update={"name": directory.name})
            write_whole(directory / "config.yaml", dump(config))
        except OSError as error:
            raise ConfigError(f"runs_dir cannot be written: {error}") from None
    lock = _locked(directory)
    console.say(f"run directory: {directory}")
    return Run(config, directory, console, preflight, resumed, Telemetry(config), lock)


def _without_addresses(config: RunConfig) -> dict[str, Any]:
    """What others may be told of a config: its addresses may hold passwords."""
    return config.model_dump(
        mode="json",
        exclude={
            "redis": True,
            "teachers": {"__all__": {"cache": True, "endpoints": True}},
            "trainer": {"checkpoint": {"storage"}},
        },
    )


def _locked(directory: Path) -> IO[str]:
    """Two drivers of one run would ruin its Redis. The system lets go of the lock of one that was
    killed.

    Raises:
        ConfigError: another process runs it.
    """
    lock = (directory / ".lock").open("w", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError(
            f"{directory} is being run by another process: see scope status {directory}"
        ) from None
    except OSError as error:  # some shared file systems know no locks
        log.warning("%s cannot be locked: %s", directory, error)
    return lock


def _new_directory(config: RunConfig) -> Path:
    """`runs/<name>`, or with a number behind it: an earlier run is never written over."""
    number = 1
    while True:
        directory = config.runs_dir / (config.name if number == 1 else f"{config.name}-{number}")
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return directory


async def _unless(watch: asyncio.Task[None], work: Awaitable[None]) -> None:
    """Waits for `work`; a fault that `watch` finds meanwhile ends it."""
    task = asyncio.ensure_future(work)
    await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done() or not isinstance(task.exception(), WorkerFailed | None):
        task.cancel()
        await watch  # says it better: what failed, and how to go on
    task.result()


def _cancel_on_signals() -> None:
    """Makes Ctrl-C and SIGTERM cancel the task that calls this, so that everything is stopped in
    order. To be called again after `ray.init`, which puts handlers of its own in place."""
    task = asyncio.current_task()
    assert task is not None
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, task.cancel)
