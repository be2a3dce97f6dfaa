"""Untrusted text is judged here, in processes that can be killed at any moment.

    JudgePool ──job──▶ judge process: own session, memory limit, bare environment
              ◀─verdict── or, past the deadline, SIGKILL for its whole process group

Nothing but a judge reads what a student wrote. Judges are persistent, because an import takes
longer than a job. One that hangs, dies or runs out
of memory is killed and replaced and its job is tried once more, since the fault may have been
the machine's or an earlier job's. After that the verdict is `unknown`. The first try has a
second at most and the other one goes to a judge of its own kind, so that slow jobs queue behind
one another and never before a quick one. What goes back and forth is JSON (`verifier.judge` has
the form), never pickle.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Collection
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import IO, Any, Self

from services.errors import Unavailable
from services.sandbox.inside import LENGTH_BYTES, frame
from services.trajectory import Verdict
from verifier.cache import VerdictCache
from verifier.config import AnswerFrom, Kind
from verifier.judge import Setup

log = logging.getLogger(__name__)

START_DEADLINE_S = 300.0  # a cold import from a network disk takes a while
_EXIT_DEADLINE_S = 10.0  # between a judge's closed socket and its exit status
_QUICK_S = 1.0  # what takes longer has its second try among the slow ones
_QUICK_PER_SLOW = 4
_MAX_REPLY_BYTES = 64 * 1024
_ROOT = str(Path(__file__).parents[1])  # so that a judge finds the package wherever it runs
_INHERITED = ("PATH", "LD_LIBRARY_PATH")  # all that a judge sees of this process's environment


class JudgeFault(RuntimeError):
    """A judge gave no verdict; the message completes the sentence "the judge …"."""


class JudgePool:
    """Some judge processes, shared by any number of concurrent callers.

    On Linux a judge dies with the *thread* that started it: keep the event loop's thread alive.

    Args:
        kinds: what the judges can do; only these are imported.
        judges: how many processes. The others start with their first job, and so does the one
            for slow jobs that is added to every four of them.
        deadline_s: seconds for one judgement, start-up and waiting for a free judge not counted.
        memory_mb: address space of one judge, in MiB.
        answer_marker: see `verifier.exact`.
        answer_from, answer_in_thinking, require_evaluated: see `verifier.math_answer`.
        cached_verdicts: how many verdicts are remembered by completion and reference.

    Raises:
        Unavailable: (on entering) the first judge did not start; with the last that it said.
    """

    def __init__(
        self,
        kinds: Collection[Kind],
        *,
        judges: int = 1,
        deadline_s: float = 5.0,
        memory_mb: int = 1024,
        answer_marker: str | None = None,
        answer_from: AnswerFrom = "boxed",
        answer_in_thinking: bool = False,
        require_evaluated: bool = True,
        cached_verdicts: int = 0,
    ) -> None:
        self._count = judges
        self._deadline_s = deadline_s
        self._cache = VerdictCache(cached_verdicts)
        self._waiting = self._slow_jobs = self._replaced = 0
        options: dict[str, dict[str, Any]] = {
            "exact": {"marker": answer_marker},
            "math": {
                "answer_from": answer_from,
                "answer_in_thinking": answer_in_thinking,
                "require_evaluated": require_evaluated,
            },
        }
        self._setup = Setup(os.getpid(), memory_mb, deadline_s, tuple(sorted(kinds)), options)
        self._judges: list[_Judge] = []
        self._quick: asyncio.Queue[_Judge] = asyncio.Queue()
        self._slow: asyncio.Queue[_Judge] = asyncio.Queue()
        self._resources = AsyncExitStack()

    @property
    def pids(self) -> list[int]:
        """Process ids of the judges that are ready or at work now."""
        return [judge.pid for judge in self._judges if judge.pid is not None]

    @property
    def busy(self) -> int:
        """How many judges are taken: at work, or being replaced for it."""
        return len(self._judges) - self._quick.qsize() - self._slow.qsize()

    @property
    def waiting(self) -> int:
        """How many jobs wait for a judge."""
        return self._waiting

    @property
    def slow(self) -> int:
        """How many jobs have their second try, apart from the others."""
        return self._slow_jobs

    @property
    def replaced(self) -> int:
        """How many judges were killed or died since the start, at work on a job."""
        return self._replaced

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as resources:
            slow = -(-self._count // _QUICK_PER_SLOW)
            for index in range(self._count + slow):
                # A file, unlike a pipe, never blocks its writer; a judge can fill 64 KiB of it.
                stderr = resources.enter_context(TemporaryFile())  # noqa: SIM115 - the stack closes it
                judge = _Judge(self._setup, stderr)
                resources.push_async_callback(judge.close)
                self._judges.append(judge)
                (self._quick if index < self._count else self._slow).put_nowait(judge)
            await self._judges[0].start()
            self._resources = resources.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._resources.aclose()

    async def judge(self, kind: Kind, completion: str, reference: str) -> Verdict:
        """The verdict on one completion; `unknown`, with the reason, if none could be had.

        Raises:
            Unavailable: a judge could not be started.
        """
        verdict = self._cache.get(kind, completion, reference)
        if verdict is None:
            job = {"kind": kind, "text": completion, "reference": reference}
            verdict = await self._ask(frame(job))
            self._cache.put(verdict, kind, completion, reference)
        return verdict

    async def _ask(self, job: bytes) -> Verdict:
        try:
            return await self._try(job, self._quick, min(_QUICK_S, self._deadline_s))
        except JudgeFault:
            self._slow_jobs += 1
        try:
            return await self._try(job, self._slow, self._deadline_s)
        except JudgeFault as fault:
            return Verdict("unknown", f"the judge {fault}")
        finally:
            self._slow_jobs -= 1

    async def _try(self, job: bytes, idle: asyncio.Queue[_Judge], deadline_s: float) -> Verdict:
        self._waiting += 1
        try:
            judge = await idle.get()
        finally:
            self._waiting -= 1
        try:
            return await judge.ask(job, deadline_s)
        except JudgeFault as fault:
            self._replaced += 1
            log.warning("a judge is replaced: it %s", fault)
            raise
        finally:
            idle.put_nowait(judge)


@dataclass(frozen=True, slots=True)
class _Process:
    """A judge process that was started, and this end of its socket."""

    popen: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class _Judge:
    """A place for one judge process: started when it is needed, killed when it fails."""

    def __init__(self, setup: Setup, stderr: IO[bytes]) -> None:
        self._setup = setup
        self._stderr = stderr
        self._process: _Process | None = None
        self._ready = False
        self._dying: set[asyncio.Task[int]] = set()

    @property
    def pid(self) -> int | None:
        return self._process.popen.pid if self._process is not None and self._ready else None

    async def start(self) -> _Process:
        """Starts the process and waits until it is ready for a job.

        Raises:
            Unavailable: it could not be started, or did not get ready.
        """
        self._stderr.seek(0)
        self._stderr.truncate()
        try:
            self._process = process = await _spawn(self._setup, self._stderr)
        except OSError as error:
            raise Unavailable(f"a judge cannot be started: {error}") from error
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                await _receive(process)
            self._ready = True
        except TimeoutError:
            raise Unavailable(f"a judge was not ready after {START_DEADLINE_S:g} s") from None
        except (asyncio.IncompleteReadError, ConnectionError):
            raise Unavailable(f"a judge {await self._end_of(process)} at its start") from None
        finally:
            if not self._ready:
                self.kill()
        return process

    async def ask(self, job: bytes, deadline_s: float) -> Verdict:
        """One job's verdict. Whatever else happens, cancellation too, the process is killed:
        the answer to this job must not be taken for the next one's.

        Raises:
            JudgeFault: no verdict within the deadline.
            Unavailable: the process is to be replaced, and its successor does not start.
        """
        if self._process is not None and self._process.popen.poll() is not None:
            self.kill()  # it died between two jobs, which is not this job's fault
        process = self._process or await self.start()
        answered = False
        try:
            async with asyncio.timeout(deadline_s):
                process.writer.write(job)  # not drained: its answer shows that it was read
                reply = await _receive(process)
            verdict = _verdict(reply)
            answered = True
            return verdict
        except TimeoutError:
            raise JudgeFault(f"took longer than {deadline_s:g} s") from None
        except (asyncio.IncompleteReadError, ConnectionError):
            raise JudgeFault(await self._end_of(process)) from None
        finally:
            if not answered:
                self.kill()

    def kill(self) -> None:
        """Kills the process and all that it started; harmless when there is none."""
        process, self._process, self._ready = self._process, None, False
        if process is None:
            return
        process.writer.transport.abort()
        with suppress(ProcessLookupError):
            os.killpg(process.popen.pid, signal.SIGKILL)  # pid = group: start_new_session
        dying = asyncio.create_task(asyncio.to_thread(process.popen.wait))
        self._dying.add(dying)
        dying.add_done_callback(self._dying.discard)

    async def close(self) -> None:
        """Kills the process and waits until everything that was killed is gone."""
        self.kill()
        if self._dying:
            await asyncio.wait(self._dying)

    async def _end_of(self, process: _Process) -> str:
        """How a process that closed its socket ended, with the last line of what it said."""
        try:
            code = await asyncio.to_thread(process.popen.wait, _EXIT_DEADLINE_S)
        except subprocess.TimeoutExpired:
            return "closed its socket"
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip().splitlines()
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return f"{how} ({said[-1][:200]})" if said else how


async def _spawn(setup: Setup, stderr: IO[bytes]) -> _Process:
    # One socket and not two pipes: it can be dropped at once, with whatever is in its buffers.
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            popen = subprocess.Popen(
                [sys.executable, "-P", "-B", "-m", "verifier.judge", json.dumps(asdict(setup))],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                cwd="/",
                env=_environment(),
                start_new_session=True,
            )
    except OSError:
        ours.close()
        raise
    return _Process(popen, *await asyncio.open_unix_connection(sock=ours))


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return {
        **kept,
        # Where a domain of one's own may be.
        "PYTHONPATH": os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH")))),
        "PYTHONHASHSEED": "0",  # no verdict shall depend on it
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",  # a judge may start no thread
        "OPENBLAS_NUM_THREADS": "1",
    }


async def _receive(process: _Process) -> dict[str, Any]:
    """The next message; it may be anything that fits JSON, for a judge is not to be trusted.

    Raises:
        JudgeFault: it is not JSON, or too long.
        asyncio.IncompleteReadError: the process closed its socket first.
    """
    length = int.from_bytes(await process.reader.readexactly(LENGTH_BYTES), "big")
    if length > _MAX_REPLY_BYTES:
        raise JudgeFault(f"sent a reply of {length} bytes")
    body = await process.reader.readexactly(length)
    try:
        message = json.loads(body)
    except ValueError:
        raise JudgeFault("sent a reply that is not JSON") from None
    return message if isinstance(message, dict) else {}


def _verdict(reply: dict[str, Any]) -> Verdict:
    match reply:
        case {"fault": str(fault)}:
            raise JudgeFault(fault)
        case {"outcome": "correct" | "incorrect" | "unknown" as outcome, "reason": str(reason)}:
            return Verdict(outcome, reason)
        case _:
            raise JudgeFault("sent a reply without a verdict")
