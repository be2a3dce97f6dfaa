"""Untrusted code where namespaces are not allowed: the second level, by the operator's choice.

    Landlock.start ──▶ python landlocked.py: a user of its own (as root), Landlock, system calls by
                      allow list, hard limits; then the same inside.py as in the first level

Landlock (Linux 6.2 or newer) needs no privilege and no namespace. A program can open an
interpreter's library for reading and the files that it makes in one flat directory, nothing else.
docs/verifier.md says what this level lacks.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
import os
import platform
import secrets
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from services.sandbox import probe, seccomp
from services.sandbox.confined import (
    Interpreter,
    Limits,
    Mode,
    Sandboxed,
    SandboxRefused,
    find_interpreter,
    inside_arguments,
    started,
)
from services.sandbox.landlocked import NO_CAPABILITY

log = logging.getLogger(__name__)

_LANDLOCKED = Path(__file__).with_name("landlocked.py")
_CREATE_RULESET, _GET_VERSION = 444, 1
_OLDEST = 3  # since Linux 6.2: before it, a file that may not be written can be truncated
_USERS = range(61184, 65520)  # systemd's for the same purpose: nobody else has them
_MAX_FILES = 1000
_WATCH_S = 0.02
_MISSING = {
    errno.ENOSYS: "a kernel with it (Linux 6.2 or newer, CONFIG_SECURITY_LANDLOCK=y), or a seccomp "
    "profile of the container that knows its system calls",
    errno.EOPNOTSUPP: "`landlock` in the kernel's boot parameter lsm=",
    errno.EPERM: "a seccomp profile of the container that allows landlock_create_ruleset, "
    "landlock_add_rule and landlock_restrict_self",
}


@dataclass(frozen=True, slots=True)
class Landlock:
    """How programs are confined on this machine. Made by `prepare`, which proves that they are."""

    version: int
    python: Interpreter
    filter: bytes

    @classmethod
    async def prepare(cls, python: Path | None = None) -> Landlock:
        """Finds what this level needs and lets a probe try to get out.

        Args:
            python: the interpreter for the programs; None takes this one's, without packages.

        Raises:
            SandboxRefused: something is missing, or the probe got out.
        """
        version = _version()
        rules = seccomp.program(platform.machine(), among_others=True)
        made = cls(version, find_interpreter(python), rules)
        await probe.check(made, "landlock")
        log.warning(
            "programs are confined by Landlock (version %d): the second level, weaker than "
            "bubblewrap, see docs/verifier.md",
            version,
        )
        return made

    @asynccontextmanager
    async def start(
        self, limits: Limits, mode: Mode, source: str, *entry_point: str
    ) -> AsyncIterator[Sandboxed]:
        """See `services.sandbox.confined.Sandbox`."""
        code = source.encode(errors="replace")
        with _scratch() as (directory, user):
            command = [
                *(self.python.path, *self.python.flags, str(_LANDLOCKED)),
                *(str(os.getpid()), str(user), directory, str(self.version), self.filter.hex()),
                os.pathsep.join(self.python.directories),
                *inside_arguments(limits, mode, code, entry_point),
            ]

            def overrun() -> str:
                return _overrun(directory, limits.disk_bytes)

            async with started(command, limits, code, overrun=overrun) as running:
                watch = asyncio.create_task(_watch(running))
                try:
                    yield running
                finally:
                    watch.cancel()


@contextmanager
def _scratch() -> Iterator[tuple[str, int]]:
    """A directory for one program's files, and the user that owns it: one of its own if this
    process is root's (so that the kernel counts its threads apart), or else this process's."""
    with tempfile.TemporaryDirectory(
        prefix="scope-program-", ignore_cleanup_errors=True
    ) as directory:
        user = os.geteuid()
        if user == 0:
            user = secrets.choice(_USERS)
            try:
                os.chown(directory, user, user)
                os.scandir(directory).close()
            except PermissionError:
                raise SandboxRefused(f"sandbox `landlock`: {NO_CAPABILITY}") from None
        yield directory, user


async def _watch(running: Sandboxed) -> None:
    """Kills a program whose files outgrow their limit: no quota of the kernel does."""
    while not running.overrun():
        await asyncio.sleep(_WATCH_S)
    running.kill()


def _overrun(directory: str, most_bytes: int) -> str:
    size = 0
    with os.scandir(directory) as files:
        for count, file in enumerate(files, 1):
            size += file.stat(follow_symlinks=False).st_size
            if size > most_bytes:
                return f"wrote more than {most_bytes >> 20} MiB"
            if count > _MAX_FILES:
                return f"made more than {_MAX_FILES} files"
    return ""


def _version() -> int:
    """The version of Landlock's interface (landlock(7)) that the kernel has.

    Raises:
        SandboxRefused: there is none, or it is too old; with what is missing.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    version = int(libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _GET_VERSION))
    if version >= _OLDEST:
        return version
    code = errno.ENOSYS if version > 0 else ctypes.get_errno()
    missing = _MISSING.get(code, os.strerror(code))
    raise SandboxRefused(
        f"sandbox `landlock` needs Landlock, which this kernel does not offer. Missing: {missing}"
    )
