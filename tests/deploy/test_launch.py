"""What the driver's watch ends a run for."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayTaskError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from deploy.config import ConfigError, load
from deploy.console import RunConsole
from deploy.crew import Crew, _Worker
from deploy.launch import Run, RunFailed, _without_addresses, start
from deploy.telemetry import Telemetry
from services.disk import write_whole
from services.errors import PatienceExceeded, WorkerFailed
from services.metrics import Recorder
from services.stage import Connection
from services.streams import Streams, claim
from services.tasks import end
from tests.deploy.conftest import ROOT
from tests.waiting import DEADLINE_S, until
from trainer.loop import ExportFailed


@pytest.mark.parametrize(
    ("settled", "sentence"),
    [
        (False, "no gradient step for .* the slowest stage is the one that reads 'prompts'"),
        (True, "nothing is in flight, and the learner has not ended for"),
    ],
    ids=["a stage that hangs", "a learner that hangs when all is trained"],
)
async def test_a_run_that_hangs_ends_with_a_sentence(
    connection: Connection, streams: Streams, tmp_path: Path, settled: bool, sentence: str
) -> None:
    await streams.feed([b"item"], expected_fed=0, max_in_flight=1)
    if settled:
        (item,) = await claim([streams], "prompts", "w", count=1, block_ms=1000)
        await streams.settle("prompts", [item.id])
    config = load(ROOT / "deploy/runs/demo.yaml", ["trainer.stall_timeout_s=0.6"])
    preflight: Any = SimpleNamespace(total_groups=1)
    run = Run(config, tmp_path, RunConsole(), preflight, False, Telemetry(config))
    learner: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    with Recorder(tmp_path) as recorder, pytest.raises(RunFailed, match=sentence):
        async with asyncio.timeout(DEADLINE_S):
            await run._watch(streams, recorder, learner, Crew(connection, str))


@pytest.mark.parametrize(("dead", "stops"), [(1, False), (2, True)])
async def test_a_run_with_too_many_dead_prompts_ends_with_a_sentence(
    connection: Connection,
    streams: Streams,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dead: int,
    stops: bool,
) -> None:
    await streams.feed([b"item"] * 10, expected_fed=0, max_in_flight=10)
    for item in await claim([streams], "prompts", "w", count=dead, block_ms=1000):
        await streams.bury(item, "poison")
    settings = ["trainer.groups_per_step=1", "max_dead_fraction=0.1"]
    config = load(ROOT / "deploy/runs/demo.yaml", settings)
    preflight: Any = SimpleNamespace(total_groups=10)
    run = Run(config, tmp_path, RunConsole(), preflight, False, Telemetry(config))
    learner: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    looks = 0

    def looked(*_: object) -> None:
        nonlocal looks
        looks += 1

    monkeypatch.setattr(run.console, "progress", looked)
    with Recorder(tmp_path) as recorder:
        watch = asyncio.create_task(run._watch(streams, recorder, learner, Crew(connection, str)))
        await until(lambda: watch.done() or looks > 3)
        if stops:
            with pytest.raises(RunFailed, match=r"2 of 10 prompts are dead.*scope dead"):
                await watch
        assert watch.done() is stops
        await end([watch])


async def test_a_run_directory_that_cannot_be_written_is_waited_for(
    connection: Connection, streams: Streams, tmp_path: Path
) -> None:
    await streams.feed([b"item"], expected_fed=0, max_in_flight=1)
    config = load(ROOT / "deploy/runs/demo.yaml")
    preflight: Any = SimpleNamespace(total_groups=1)
    away = tmp_path / "away"
    run = Run(config, away, RunConsole(), preflight, False, Telemetry(config))
    learner: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    with Recorder(tmp_path) as recorder:
        watch = asyncio.create_task(run._watch(streams, recorder, learner, Crew(connection, str)))
        await until(lambda: watch.done() or run.said)
        assert not watch.done()
        assert "the run directory waits to be written" in "".join(run.said)
        away.mkdir()
        await until(lambda: watch.done() or (away / "ledger.json").exists())
        assert not watch.done()
        await end([watch])


def failed_by_code(error: Exception) -> WorkerGroupError:
    """As Ray Train hands over what the code of a rank raised."""
    return WorkerGroupError("", {0: UserExceptionWithTraceback(error, "Traceback: …")})


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (
            failed_by_code(IndexError("index 56 is out of bounds")),
            "the learner failed: IndexError: index 56 is out of bounds; mend that first, or it "
            "ends like this again; then continue with: scope resume",
        ),
        (
            failed_by_code(ExportFailed("the student cannot be exported: no room")),
            "the learner failed: the student cannot be exported: no room; continue with:",
        ),
        (
            WorkerGroupError("", {0: RuntimeError("the worker is dead")}),
            "; continue with: scope resume",
        ),
    ],
    ids=["a fault of code", "a full disk", "a rank that died"],
)
async def test_a_learner_that_failed_is_continued_where_that_helps(
    connection: Connection, streams: Streams, tmp_path: Path, failure: Exception, sentence: str
) -> None:
    said = await ending(connection, streams, tmp_path, Crew(connection, str), failure)
    assert sentence in said
    assert ("mend that first" in said) == ("mend that first" in sentence)


@pytest.mark.parametrize(
    ("cause", "mended"),
    [
        (ValueError("no"), True),
        (WorkerFailed("other weights"), True),
        (PatienceExceeded(""), False),
    ],
    ids=repr,
)
async def test_a_worker_that_failed_too(
    connection: Connection, streams: Streams, tmp_path: Path, cause: Exception, mended: bool
) -> None:
    crew = Crew(connection, str)
    loop = asyncio.get_running_loop()
    worker = _Worker("rollout", "rollout-0", lambda: None, task=loop.create_future())  # type: ignore[arg-type]
    worker.task.set_exception(RayTaskError("run", "Traceback", cause))  # type: ignore[union-attr]
    crew._workers.append(worker)
    said = await ending(connection, streams, tmp_path, crew)
    assert said.startswith(f"rollout-0 stopped: {cause}; ")
    assert ("mend that first" in said) == mended


async def ending(
    connection: Connection,
    streams: Streams,
    tmp_path: Path,
    crew: Crew,
    failure: Exception | None = None,
) -> str:
    """What a run says at its end, of which the learner fails, or the crew."""
    config = load(ROOT / "deploy/runs/demo.yaml", [])
    preflight: Any = SimpleNamespace(total_groups=1)
    run = Run(config, tmp_path, RunConsole(), preflight, False, Telemetry(config))
    learner: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    if failure is not None:
        learner.set_exception(failure)
    with Recorder(tmp_path) as recorder, pytest.raises(RunFailed) as failed:
        async with asyncio.timeout(DEADLINE_S):
            await run._watch(streams, recorder, learner, crew)
    return str(failed.value)


async def test_of_two_runs_of_one_name_that_start_together_one_goes_on(
    connection: Connection, streams: Streams, tmp_path: Path
) -> None:
    """On one Redis, with run directories of their own."""
    config = load(ROOT / "deploy/runs/demo.yaml", [])
    preflight: Any = SimpleNamespace(train=SimpleNamespace(prompt=None))
    runs = [
        Run(config, tmp_path / name, RunConsole(), preflight, False, Telemetry(config))
        for name in ("one", "two")
    ]
    ends = await asyncio.gather(
        *(run._prepare_streams(streams) for run in runs), return_exceptions=True
    )
    (refused,) = filter(None, ends)
    assert "this Redis already holds a run named 'demo'" in str(refused)
    resumed = Run(config, tmp_path / "moved", RunConsole(), preflight, True, Telemetry(config))
    await resumed._prepare_streams(streams)


def test_a_run_in_progress_is_not_resumed(tmp_path: Path) -> None:
    run = start(load(ROOT / "deploy/runs/demo.yaml", [f"runs_dir={tmp_path}"]), RunConsole())
    with pytest.raises(ConfigError, match="is being run by another process"):
        start(load(run.directory / "config.yaml"), RunConsole(), directory=run.directory)
    assert run.lock is not None
    run.lock.close()  # as the system does when it dies
    start(load(run.directory / "config.yaml"), RunConsole(), directory=run.directory)


def test_no_address_that_may_hold_a_password_goes_to_a_tracker() -> None:
    others = (
        "{a: {model: a, endpoints: ['http://u:hidden@h']}, "
        "b: {model: b, cache: {url: 'redis://u:hidden@h'}}}"
    )
    config = load(
        ROOT / "deploy/runs/demo.yaml",
        [
            "redis.url=redis://u:hidden@h",
            "teacher.cache.url=redis://u:hidden@h",
            "trainer.checkpoint.storage=s3://key:hidden@bucket",
            f"teachers={others}",
        ],
    )
    told = _without_addresses(config)
    assert "hidden" not in str(told)
    assert {name: one["model"] for name, one in told["teachers"].items()} == {
        "default": "examples/arithmetic/teacher",
        "a": "a",
        "b": "b",
    }


def test_a_result_that_finds_no_room_is_one_sentence(tmp_path: Path) -> None:
    """And the file before it is left whole."""
    config = load(ROOT / "deploy/runs/demo.yaml", [])
    preflight: Any = SimpleNamespace(total_groups=1)
    run = Run(config, tmp_path, RunConsole(), preflight, False, Telemetry(config))
    (tmp_path / "result").write_text("whole", encoding="utf-8")
    (tmp_path / ".result.tmp").symlink_to("/dev/full")
    sentence = f"cannot be written: .*No space left.*; continue with: scope resume {tmp_path}"
    with pytest.raises(RunFailed, match=sentence), run._writing():
        write_whole(tmp_path / "result", "torn")
    assert (tmp_path / "result").read_text(encoding="utf-8") == "whole"


def test_a_runs_dir_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = load(ROOT / "deploy/runs/demo.yaml", [f"runs_dir={tmp_path}/file"])
    with pytest.raises(ConfigError, match=r"^runs_dir cannot be written: .*Not a directory"):
        start(config, RunConsole())
