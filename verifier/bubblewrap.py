"""Untrusted code runs here: one fresh sandbox for each program, made by bubblewrap.

    Bubblewrap.open ──▶ bwrap: new user, pid, network, ipc, uts, cgroup and mount namespaces
                          └─▶ python inside.py: read-only root, /tmp of its own, no capability,
                              system calls by allow list (`verifier.seccomp`), hard limits

Inside there is an interpreter with its libraries and nothing else: no /proc, no shell, no file
of the host's users, no environment. A process cannot start another one. When the first process
ends, or this one does, the kernel ends whatever is left.

As root, bwrap is started as the user `nobody`, because the kernel exempts root from the limit on
threads. So the interpreter must be in a place that everybody can read.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from verifier import seccomp
from verifier.inside import LENGTH_BYTES, frame

log = logging.getLogger(__name__)

Mode: TypeAlias = Literal["program", "calls", "tests"]

_NOBODY = 65534
_INSIDE = Path(__file__).with_name("inside.py")
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_ERRORS_BYTES = 16 * 1024  # of standard error; the rest is thrown away
_CHUNK_BYTES = 64 * 1024
_PROBE_S = 30.0
_OTHER_PYTHONS = ("/usr/local/bin/python3", "/usr/bin/python3")


class SandboxRefused(RuntimeError):
    """Code cannot be confined here. The message names what is missing."""


class Limit(RuntimeError):
    """A program reached a limit; the message completes the sentence "the program …"."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use. Seconds are the processor's; the clock's may be twice as many."""

    time_s: float
    memory_bytes: int
    disk_bytes: int
    output_bytes: int

    @property
    def wall_s(self) -> float:
        return 2 * self.time_s + 5


@dataclass(slots=True)
class Sandboxed:
    """One running program: frames to it, frames or plain output from it."""

    process: asyncio.subprocess.Process
    limits: Limits
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

    async def end(self) -> str:
        """Waits for its end; the empty text if it ended well, or else how, in its own words."""
        code = await self.process.wait()
        if self._draining is not None:
            await self._draining
        if code == 0:
            return ""
        if code in (128 + signal.SIGXCPU, 128 + signal.SIGKILL):
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
        """Reads standard error to its end, so that nobody blocks on it; keeps the last of it."""
        assert self.process.stderr is not None
        while part := await self.process.stderr.read(_CHUNK_BYTES):
            self._errors += part
            del self._errors[:-_ERRORS_BYTES]


@dataclass(frozen=True, slots=True)
class Bubblewrap:
    """How sandboxes are made on this machine. Made by `prepare`, which proves that they hold."""

    command: tuple[str, ...]
    python: tuple[str, ...]
    filter: bytes

    @classmethod
    async def prepare(cls, python: Path | None = None) -> Bubblewrap:
        """Finds what a sandbox needs and lets a probe try to get out of one.

        Args:
            python: the interpreter for the programs; None takes this one's, without packages.

        Raises:
            SandboxRefused: something is missing, or the probe got out.
        """
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise SandboxRefused(
                "verifier kind `code` needs bubblewrap, and `bwrap` is not on the PATH "
                "(Debian, Ubuntu, Fedora: install the package `bubblewrap`)"
            )
        try:
            rules = seccomp.program(platform.machine())
        except KeyError as machine:
            raise SandboxRefused(f"there is no system call filter for {machine}") from None
        interpreter, prefix = _interpreter(python)
        # A configured interpreter may import what was installed for it; ours is a bare one.
        flags = ("-I", "-B", "-X", "utf8") if python else ("-I", "-S", "-B", "-X", "utf8")
        command = (*_unprivileged(), bwrap, *_options(interpreter, prefix))
        made = cls(command, (interpreter, *flags), rules)
        from verifier.probe import check

        await check(made)
        log.info("programs are confined by %s and run by %s", bwrap, interpreter)
        return made

    @asynccontextmanager
    async def open(
        self, limits: Limits, mode: Mode, source: str, *entry_point: str
    ) -> AsyncIterator[Sandboxed]:
        """A fresh sandbox that runs `source` in one of the modes of `verifier.inside`, killed at
        the end. A program may wait for its input forever: the caller keeps `limits.wall_s`.

        Raises:
            SandboxRefused: it cannot be started.
        """
        code = source.encode(errors="replace")
        told = (max(1, round(limits.time_s)), limits.memory_bytes, limits.disk_bytes, len(code))
        with _file(self.filter) as rules, _file(_INSIDE.read_bytes()) as inside:
            try:
                process = await asyncio.create_subprocess_exec(
                    *self.command,
                    *("--seccomp", str(rules), "--ro-bind-data", str(inside), "/inside.py"),
                    *("--size", str(limits.disk_bytes), "--tmpfs", "/tmp"),
                    *("--chdir", "/tmp", "--remount-ro", "/"),
                    *(*self.python, "/inside.py", mode, *map(str, told), *entry_point),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    cwd="/",
                    env={},
                    pass_fds=(rules, inside),
                )
            except OSError as error:
                raise SandboxRefused(f"bwrap cannot be started: {error}") from error
        sandboxed = Sandboxed(process, limits)
        draining = asyncio.create_task(sandboxed.drain_errors())
        sandboxed._draining = draining
        assert process.stdin is not None
        process.stdin.write(code)  # not drained: the next write is, and it might never be read
        try:
            yield sandboxed
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()  # and with it, by the kernel, all that is inside
            process.stdin.close()
            # asyncio takes it for ended when its pipes are, and an unread one never is.
            await sandboxed.discard_output()
            await process.wait()
            await draining


def _unprivileged() -> list[str]:
    """What makes a command run as `nobody`, if this process is root's.

    By a program, because subprocess would copy this process's memory map to do it, which takes
    longer than all the rest of a sandbox.

    Raises:
        SandboxRefused: it is root's, and that program is not there.
    """
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise SandboxRefused(
            "as root, verifier kind `code` needs `setpriv` (of the package `util-linux`): install "
            "it, or run the verifier as another user"
        )
    return [setpriv, f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", "--"]


def _options(interpreter: str, prefix: str) -> list[str]:
    options = ["--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc"]
    options += ["--unshare-uts", "--unshare-cgroup-try", "--hostname", "sandbox"]
    options += ["--uid", str(_NOBODY), "--gid", str(_NOBODY), "--cap-drop", "ALL"]
    options += ["--die-with-parent", "--new-session", "--clearenv"]
    options += ["--setenv", "LANG", "C.UTF-8"]
    for directory in map(Path, _LIBRARIES):
        if directory.is_symlink():
            options += ["--symlink", os.readlink(directory), str(directory)]
        elif directory.is_dir():
            options += ["--ro-bind", str(directory), str(directory)]
    if prefix != "/usr":
        options += ["--ro-bind", prefix, prefix]
    if not Path(interpreter).is_relative_to(prefix) or prefix == "/usr":
        options += ["--ro-bind", interpreter, interpreter]
    for device in _DEVICES:
        options += ["--dev-bind", device, device]
    return options


def _interpreter(configured: Path | None) -> tuple[str, str]:
    """The interpreter's real path and the directory that its library is in.

    Raises:
        SandboxRefused: there is none that bwrap's user can read.
    """
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
                text=True,
                timeout=_PROBE_S,
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            if configured:
                raise SandboxRefused(f"verifier.code.python does not run: {error}") from error
            continue
        return path, asked.stdout.strip()
    raise SandboxRefused(
        f"the user `nobody` cannot read {' or '.join(candidates)}: run the verifier as another "
        "user than root, or set verifier.code.python to an interpreter that everybody can read"
    )


def _readable_by_all(path: Path) -> bool:
    def mode(place: Path) -> int:
        return place.stat().st_mode if place.exists() else 0

    return bool(mode(path) & stat.S_IROTH) and all(
        mode(parent) & stat.S_IXOTH for parent in path.parents
    )


@contextmanager
def _file(content: bytes) -> Iterator[int]:
    """A file descriptor to read `content` from. One for each sandbox: they read it to its end."""
    descriptor = os.memfd_create("sandbox")
    try:
        os.write(descriptor, content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)
