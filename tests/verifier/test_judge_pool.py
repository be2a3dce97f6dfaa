"""The judges are real processes here: stopped, killed, starved of memory and left orphaned."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from services.errors import Unavailable
from services.trajectory import Verdict
from tests.waiting import DEADLINE_S, until
from verifier.judge_pool import JudgePool

RIGHT = Verdict("correct", "equals the reference")
ENDLESS = "tests.verifier.endless:judge"


def state(pid: int) -> str:
    """One letter (proc(5)): R running, S sleeping, T stopped, Z dead and not reaped; X gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def is_dead(pid: int) -> bool:
    return state(pid) in "XZ"


@pytest_asyncio.fixture
async def pool() -> AsyncIterator[JudgePool]:
    async with JudgePool(
        {"exact"}, deadline_s=DEADLINE_S, memory_mb=256, answer_marker="=>"
    ) as pool:
        yield pool


async def test_judges_in_another_process_and_leaves_none_behind() -> None:
    async with JudgePool({"exact"}, judges=2, answer_marker="=>") as pool:
        verdicts = await asyncio.gather(
            *(pool.judge("exact", f"it is => {i}", "3") for i in range(20))
        )
        pids = pool.pids
        assert len(pids) == 2
        assert os.getpid() not in pids
    assert [i for i, verdict in enumerate(verdicts) if verdict == RIGHT] == [3]
    assert all(is_dead(pid) for pid in pids)


async def test_text_of_any_kind_goes_through(pool: JudgePool) -> None:
    for text in ("", "\x00 \ud800 ∮ \U0001f600", "x" * 300_000):
        assert await pool.judge("exact", f"=> {text}.", f"{text}.") == RIGHT


async def test_one_that_hangs_is_killed_and_its_job_is_tried_again(pool: JudgePool) -> None:
    (hanging,) = pool.pids
    os.kill(hanging, signal.SIGSTOP)
    assert await pool.judge("exact", "=> 1", "1") == RIGHT
    assert hanging not in pool.pids
    await until(lambda: is_dead(hanging))


@pytest.mark.slow
async def test_a_job_that_always_hangs_is_unknown_and_the_next_one_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with JudgePool({"math", ENDLESS}, deadline_s=0.5) as pool:
        bomb = await pool.judge(ENDLESS, "bomb", "5")
        assert bomb == Verdict("unknown", "the judge took longer than 0.5 s")
        assert pool.replaced == 2
        monkeypatch.setattr(pool, "_deadline_s", DEADLINE_S)
        assert await pool.judge("math", r"\boxed{\frac{1}{2}}", "0.5") == RIGHT


@pytest.mark.slow
async def test_a_bomb_holds_up_no_other_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verifier.judge_pool._QUICK_S", DEADLINE_S)
    async with JudgePool({"math", "exact", ENDLESS}, judges=2, deadline_s=DEADLINE_S) as pool:
        await asyncio.gather(*(pool.judge("exact", "1", "1") for _ in range(2)))
        bomb = asyncio.create_task(pool.judge(ENDLESS, "bomb", "5"))
        for _ in range(20):
            assert await pool.judge("math", r"\boxed{5}", "5") == RIGHT
        assert not bomb.done()
        bomb.cancel()
        await asyncio.wait({bomb})


async def test_one_that_is_killed_at_work_is_replaced_and_its_job_tried_again() -> None:
    async with JudgePool({"exact"}, deadline_s=DEADLINE_S) as pool:
        (first,) = pool.pids
        os.kill(first, signal.SIGSTOP)  # so that the job is certainly not finished
        await until(lambda: state(first) == "T")
        job = asyncio.create_task(pool.judge("exact", "1" * 300_000, "1" * 300_000))
        await until(lambda: pool.busy == 1)
        os.kill(first, signal.SIGKILL)
        assert await job == RIGHT
        assert first not in pool.pids


async def test_a_job_whose_judges_all_die_is_unknown_with_the_signal() -> None:
    async with JudgePool({ENDLESS}, deadline_s=DEADLINE_S) as pool:
        job = asyncio.create_task(pool.judge(ENDLESS, "bomb", "5"))
        killed: set[int] = set()
        for _ in range(2):
            await until(lambda: pool.busy == 1 and bool({*pool.pids} - killed))
            (pid,) = pool.pids
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)
        assert await job == Verdict("unknown", "the judge died of SIGKILL")


async def test_one_that_died_idle_costs_no_attempt(pool: JudgePool) -> None:
    (idle,) = pool.pids
    os.kill(idle, signal.SIGKILL)
    await until(lambda: is_dead(idle))
    assert await pool.judge("exact", "=> 1", "1") == RIGHT


async def test_too_much_memory_is_unknown_and_the_next_job_works() -> None:
    async with JudgePool({"exact"}, deadline_s=DEADLINE_S, memory_mb=256) as pool:
        verdict = await pool.judge("exact", "x" * 200 * 2**20, "x")
        assert verdict == Verdict("unknown", "the judge ran out of its 256 MiB of memory")
        assert await pool.judge("exact", "1", "1") == RIGHT


async def test_a_cancelled_job_answers_no_later_one(pool: JudgePool) -> None:
    (busy,) = pool.pids
    os.kill(busy, signal.SIGSTOP)
    job = asyncio.create_task(pool.judge("exact", "=> 1", "1"))
    await until(lambda: pool.busy == 1)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    assert (await pool.judge("exact", "=> 2", "1")).outcome == "incorrect"
    await until(lambda: is_dead(busy))


async def test_a_judge_is_confined(pool: JudgePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCOPE_REDIS_PASSWORD", "hunter2")
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    os.kill(pool.pids[0], signal.SIGKILL)
    await pool.judge("exact", "=> 1", "1")  # its successor was started with the secrets set
    (pid,) = pool.pids
    process = Path(f"/proc/{pid}")
    assert b"PYTHONPATH" in (process / "environ").read_bytes()
    assert b"hunter2" not in (process / "environ").read_bytes()
    limits = {line[:26].strip(): line[26:].split() for line in _lines(process / "limits")}
    assert limits["Max address space"][:2] == [str(256 * 2**20)] * 2
    assert limits["Max core file size"][:2] == ["0", "0"]
    assert limits["Max processes"][:2] == ["0", "0"]
    assert "NoNewPrivs:\t1" in _lines(process / "status")
    assert os.getpgid(pid) == os.getsid(pid) == pid
    files = {os.readlink(fd) for fd in (process / "fd").iterdir()}
    files -= {file for file in files if file.startswith(("pipe:", "socket:"))}  # its own two
    assert {file for file in files if not file.endswith("(deleted)")} == {os.devnull}


@pytest.mark.parametrize("stopped", [False, True])
async def test_judges_die_with_a_parent_that_is_killed(stopped: bool) -> None:
    """Even one that cannot notice the closed pipe, because it is stopped."""
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _PARENT),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert parent.stdout is not None
    judge = int(await parent.stdout.readline())
    if stopped:
        os.kill(judge, signal.SIGSTOP)
        await until(lambda: state(judge) == "T")
    parent.kill()
    await parent.wait()
    await until(lambda: is_dead(judge))


async def test_the_kernel_ends_a_job_that_its_parent_cannot_end(tmp_path: Path) -> None:
    """The parent stops itself as soon as the job is at work, so that its deadline never comes."""
    (tmp_path / "endless.py").write_text("def judge(completion, reference):\n    while True: pass")
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _STOPPED_PARENT),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert parent.stdout is not None
    judge = int(await parent.stdout.readline())
    try:
        await until(lambda: is_dead(judge))
        assert state(parent.pid) == "T"
    finally:
        parent.kill()
        await parent.wait()


async def test_a_judge_that_cannot_start_says_why() -> None:
    with pytest.raises(Unavailable, match=r"a judge exited with code 1 \(.*\w.*\) at its start"):
        async with JudgePool({"math"}, memory_mb=24):
            pass


_PARENT = """
import asyncio
from verifier.judge_pool import JudgePool

async def main():
    async with JudgePool({"exact"}) as pool:
        print(pool.pids[0], flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""

_STOPPED_PARENT = """
import asyncio, os, signal
from verifier.judge_pool import JudgePool

async def main():
    async with JudgePool({"endless:judge"}, deadline_s=0.3) as pool:
        print(pool.pids[0], flush=True)
        job = asyncio.create_task(pool.judge("endless:judge", "", ""))
        while not pool.busy:
            await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGSTOP)

asyncio.run(main())
"""


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines()
