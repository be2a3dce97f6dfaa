"""One untrusted program that runs under limits, whatever confines it, and how it is spoken to.

Sandbox ──start──▶ Sandboxed: source code in, then frames or plain text in both directions
  ├─ bubblewrap   namespaces of its own
  └─ landlock     a process among the host's, with almost all rights taken away
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, get_args

from services.errors import WorkerFailed
from services.sandbox.inside import LENGTH_BYTES, READY, frame

Level: TypeAlias = Literal["bubblewrap", "landlock"]
LEVELS: tuple[Level, ...] = get_args(Level)
Mode: TypeAlias = Literal["program", "calls", "tests"]
T = TypeVar("T")

LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
ENVIRONMENT = {"LANG": "C.UTF-8"}
_ERRORS_BYTES = 16 * 1024  # of standard error; the rest is thrown away
_CHUNK_BYTES = 64 * 1024
_ASK_S = 120.0
_START_S = 300.0
_PATIENCE = 4  # times `Limits.wall_s`, for a program that the machine finds no time for
_THREADS = 64
_COUNTS = Path("/proc/vmstat")  # of what the kernel did since it started
_OTHER_PYTHONS = ("/usr/local/bin/python3", "/usr/bin/python3")


class SandboxRefused(WorkerFailed):
    """Code cannot be confined here. The message names what is missing."""


class NotStarted(RuntimeError):
    """A sandbox could not be made this time, for lack of memory or processes, say: nothing of
    the program was run."""


class Limit(RuntimeError):
    """A program reached a limit; the message completes the sentence "the program …"."""


class Starved(RuntimeError):
    """A program was ended for what the machine lacked, not for what the program did; the message
    completes the sentence "the program …"."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use. Seconds are the processor's. By the clock they may become
    `wall_s`, and then either the program slept for half of that, or the machine is too busy to
    run it: a thread that ran or waited for a processor for more than half of it would have used
    up `time_s` on an idle one."""

    time_s: float
    memory_bytes: int
    disk_bytes: int
    output_bytes: int

    @property
    def wall_s(self) -> float:
        """Seconds on the clock after which it is killed: it may wait, but not for ever."""
        return 2 * self.time_s + 5


@dataclass(slots=True)
class Sandboxed:
    """One running program: frames to it, frames or plain output from it.

    `overrun` says which limit it went past that the kernel does not keep; it is asked at the end.
    """

    process: asyncio.subprocess.Process
    limits: Limits
    overrun: Callable[[], str]
    _started_at: float = field(default_factory=time.monotonic)
    _killed_before: int | None = field(default_factory=lambda: _killed_for_memory())
    _awaited_s: float = 0.0
    _flooded: bool = False
    _errors: bytearray = field(default_factory=bytearray)
    _draining: asyncio.Task[None] | None = None

    async def send(self, message: dict[str, Any]) -> None:
        """Sends a frame."""
        await self.write(frame(message))

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """Writes to its input, and closes that if this is the `last` of it.

        A program that does not read, or is gone, is no error here: what it says will show it.
        """
        assert self.process.stdin is not None
        with suppress(ConnectionError):
            self.process.stdin.write(data)
            await self.process.stdin.drain()
        if last:
            self.process.stdin.close()

    async def receive(self) -> dict[str, Any]:
        """The next frame.

        Raises:
            Limit: it is too long, or not JSON.
            EOFError: the program ended first.
        """
        assert self.process.stdout is not None
        try:
            length = int.from_bytes(await self.process.stdout.readexactly(LENGTH_BYTES), "big")
            if length > self.limits.output_bytes:
                raise Limit("returned too much")
            message = json.loads(await self.process.stdout.readexactly(length))
        except asyncio.IncompleteReadError:
            raise EOFError from None
        except (ValueError, RecursionError):
            raise Limit("returned what cannot be read") from None
        return message if isinstance(message, dict) else {}

    async def output(self) -> bytes:
        """All that it prints until it ends.

        Raises:
            Limit: it prints too much.
        """
        assert self.process.stdout is not None
        printed = bytearray()
        while part := await self.process.stdout.read(_CHUNK_BYTES):
            printed += part
            if len(printed) > self.limits.output_bytes:
                raise Limit(f"printed more than {self.limits.output_bytes >> 20} MiB")
        return bytes(printed)

    async def within(self, work: Awaitable[T]) -> T:
        """What `work` gives, which waits for this program. All such waits share `limits.wall_s`,
        and more if the machine has no time for the program.

        Raises:
            Limit: the time is over, and the program slept for half of it.
            Starved: the time is over, and the program was not given enough of a processor.
        """
        began = time.monotonic()
        waiting = asyncio.ensure_future(work)
        wall_s = self.limits.wall_s
        try:
            for most_s in (wall_s, _PATIENCE * wall_s):
                left_s = most_s - self._awaited_s - (time.monotonic() - began)
                await asyncio.wait({waiting}, timeout=max(0.0, left_s))
                if waiting.done():
                    return waiting.result()
                if runnable_s(self.process.pid) < most_s - wall_s / 2:
                    raise Limit(f"took longer than {most_s:g} s, of which it slept {wall_s / 2:g}")
            raise Starved(
                f"did not get {self.limits.time_s:g} s of a processor within {most_s:g} s"
            )
        finally:
            waiting.cancel()
            await asyncio.wait({waiting})  # it may still hold the stream
            self._awaited_s += time.monotonic() - began

    async def end(self) -> str:
        """Waits for its end; the empty text if it ended well, or else how, in its own words.

        Raises:
            Starved: it was killed as the kernel kills when the machine's memory runs out. By its
                own hand it can end like that, too, so the kernel must have done it to somebody.
        """
        code = await self.process.wait()
        if self._draining is not None:
            await self._draining
        if self._flooded:
            return f"printed more than {self.limits.output_bytes >> 20} MiB of errors"
        if overrun := self.overrun():
            return overrun
        if code < 0:
            code = 128 - code  # died of a signal: as a shell, and bwrap, would say it
        if code == 0:
            return ""
        early = time.monotonic() - self._started_at < self.limits.time_s
        if code == 128 + signal.SIGKILL and early:
            killed = _killed_for_memory()
            if killed is None or killed != self._killed_before:
                raise Starved("was killed before its time was over: is there enough memory?")
        elif code in (128 + signal.SIGXCPU, 128 + signal.SIGKILL):
            return f"used more than {self.limits.time_s:g} s"
        said = self._errors.decode(errors="replace").strip().splitlines()
        printable = "".join(filter(str.isprintable, said[-1][:200])) if said else ""
        return f"failed ({printable})" if printable else f"failed (exit code {code})"

    async def discard_output(self) -> None:
        """Reads to the end what nobody wants any more."""
        assert self.process.stdout is not None
        while await self.process.stdout.read(_CHUNK_BYTES):
            pass

    async def drain_errors(self) -> None:
        """Reads standard error to its end, so that nobody blocks on it; keeps the last of it.
        Who prints more there than may be printed is killed: reading costs time of ours."""
        assert self.process.stderr is not None
        read = 0
        while part := await self.process.stderr.read(_CHUNK_BYTES):
            self._errors += part
            del self._errors[:-_ERRORS_BYTES]
            read += len(part)
            if read > self.limits.output_bytes and not self._flooded:
                self._flooded = True
                self.kill()

    def kill(self) -> None:
        """Ends the program now, if it still runs, and with it, by the kernel, all inside."""
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.kill()


class Sandbox(Protocol):
    """How programs are confined on this machine, proven by a probe when it was made."""

    def start(
        self, limits: Limits, mode: Mode, source: str, *entry_point: str
    ) -> AbstractAsyncContextManager[Sandboxed]:
        """A fresh sandbox that runs `source` in one of the modes of `services.sandbox.inside`,
        killed at the end. A program may wait for its input forever: see `Sandboxed.within`.

        Raises:
            SandboxRefused: it cannot be started.
            NotStarted: it could not be started this time.
        """


@asynccontextmanager
async def started(
    command: Sequence[str],
    limits: Limits,
    code: bytes,
    *,
    pass_fds: Sequence[int] = (),
    overrun: Callable[[], str] = str,
) -> AsyncIterator[Sandboxed]:
    """`command` with nothing of this process but its standard streams (and `pass_fds`). It is
    told `code` first, and killed at the end.

    Raises:
        SandboxRefused: it cannot be started.
        NotStarted: it ended before the program began, or did not get that far.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            env=ENVIRONMENT,
            pass_fds=pass_fds,
            start_new_session=True,
        )
    except OSError as error:
        raise SandboxRefused(f"{command[0]} cannot be started: {error}") from error
    sandboxed = Sandboxed(process, limits, overrun)
    draining = asyncio.create_task(sandboxed.drain_errors())
    sandboxed._draining = draining
    assert process.stdin is not None
    process.stdin.write(code)  # not drained: the next write is, and it might never be read
    try:
        await _ready(sandboxed)
        yield sandboxed
    finally:
        sandboxed.kill()
        process.stdin.close()
        # asyncio takes it for ended when its pipes are, and an unread one never is.
        await sandboxed.discard_output()
        await process.wait()
        await draining


async def _ready(sandboxed: Sandboxed) -> None:
    assert sandboxed.process.stdout is not None
    try:
        async with asyncio.timeout(_START_S):
            if await sandboxed.process.stdout.read(len(READY)) != READY:
                how = await sandboxed.end() or "ended"
                raise NotStarted(f"no sandbox can be made: a program {how}")
    except TimeoutError:
        raise NotStarted(f"no sandbox can be made in {_START_S:g} s") from None
    except Starved as killed:
        raise NotStarted(f"no sandbox can be made: a program {killed}") from None


def _killed_for_memory() -> int | None:
    """How many processes the kernel has killed because memory ran out, in whatever container; None
    where it does not tell."""
    if not _COUNTS.exists():
        return None
    counts = dict(line.split() for line in _COUNTS.read_text(encoding="utf-8").splitlines())
    return int(counts["oom_kill"]) if "oom_kill" in counts else None


def runnable_s(pid: int) -> float:
    """Seconds in which the thread of `pid` and the processes below it that slept the least ran
    or waited for a processor (proc(5), `schedstat`); endless where the kernel does not tell."""
    if not os.path.exists("/proc/self/schedstat"):
        return math.inf
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            # One has just ended, another may be hidden; a name may be any bytes.
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                stat_line = Path(entry.path, "stat").read_bytes()
                parent = int(stat_line.rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    longest_ns, left = 0, [pid]
    while left:
        process = left.pop()
        left += children.get(process, [])
        with suppress(FileNotFoundError, ProcessLookupError):
            for thread in os.scandir(f"/proc/{process}/task"):
                ran, waited, _ = Path(thread.path, "schedstat").read_text(encoding="utf-8").split()
                longest_ns = max(longest_ns, int(ran) + int(waited))
    return longest_ns / 1e9


def inside_arguments(
    limits: Limits, mode: Mode, code: bytes, entry_point: Sequence[str]
) -> list[str]:
    """The arguments of `services.sandbox.inside`."""
    cpu_s = max(1, round(limits.time_s))
    numbers = (cpu_s, limits.memory_bytes, limits.disk_bytes, _THREADS, len(code))
    return [mode, *map(str, numbers), *entry_point]


@dataclass(frozen=True, slots=True)
class Interpreter:
    """What runs the programs: its real path, the directory with its library, its options."""

    path: str
    prefix: str
    flags: tuple[str, ...]

    @property
    def directories(self) -> list[str]:
        """All that a program needs to read. Below /usr that is the libraries only."""
        return [*LIBRARIES, *([] if self.prefix == "/usr" else [self.prefix])]


def find_interpreter(configured: Path | None) -> Interpreter:
    """The configured interpreter, with the packages that it has, or else a bare one: this
    process's own if everybody can read it.

    Raises:
        SandboxRefused: there is none that an unprivileged user can read.
    """
    flags = ("-I", "-B", "-X", "utf8") if configured else ("-I", "-S", "-B", "-X", "utf8")
    own = os.path.realpath(sys.executable)
    candidates = [str(configured)] if configured else [own, *_OTHER_PYTHONS]
    for candidate in candidates:
        path = os.path.realpath(candidate)
        if os.geteuid() == 0 and not _readable_by_all(Path(path)):
            continue
        try:
            asked = subprocess.run(
                [path, "-I", "-S", "-c", "import sys; print(sys.base_prefix)"],
                capture_output=True,
                encoding="utf-8",
                timeout=_ASK_S,
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            if configured:
                raise SandboxRefused(f"the configured `python` does not run: {error}") from error
            continue
        return Interpreter(path, asked.stdout.strip(), flags)
    raise SandboxRefused(
        f"the user `nobody` cannot read {' or '.join(candidates)}: run this worker as another "
        "user than root, or set `python` to an interpreter that everybody can read"
    )


def _readable_by_all(path: Path) -> bool:
    def mode(path: Path) -> int:
        return path.stat().st_mode if path.exists() else 0

    return bool(mode(path) & stat.S_IROTH) and all(
        mode(parent) & stat.S_IXOTH for parent in path.parents
    )
