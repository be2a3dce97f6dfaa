"""Untrusted code in a fresh sandbox for each program, made by bubblewrap.

    Bubblewrap.start ──▶ bwrap: new user, pid, network, ipc, uts, cgroup and mount namespaces
                          └─▶ python inside.py: read-only root, /tmp of its own, no capability,
                              system calls by allow list (`services.sandbox.seccomp`), hard limits

Inside there is an interpreter with its libraries and nothing else: no /proc, no shell, no file
of the host's users, no environment. A process cannot start another one. When the first process
ends, or this one does, the kernel ends whatever is left.

As root, bwrap is started as the user `nobody`, because the kernel exempts root from the limit on
threads. So the interpreter must be in a place that everybody can read.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
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

log = logging.getLogger(__name__)

_NOBODY = 65534
_INSIDE = Path(__file__).with_name("inside.py")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


@dataclass(frozen=True, slots=True)
class Bubblewrap:
    """How sandboxes are made on this machine. Made by `prepare`, which proves that they hold."""

    command: tuple[str, ...]
    python: Interpreter
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
                "sandbox `bubblewrap` needs `bwrap`, which is not on the PATH "
                "(Debian, Ubuntu, Fedora: install the package `bubblewrap`)"
            )
        rules = seccomp.program(platform.machine())
        interpreter = find_interpreter(python)
        command = (*_unprivileged(), bwrap, *_options(interpreter))
        made = cls(command, interpreter, rules)
        await probe.check(made, "bubblewrap")
        log.info("programs are confined by %s and run by %s", bwrap, interpreter.path)
        return made

    @asynccontextmanager
    async def start(
        self, limits: Limits, mode: Mode, source: str, *entry_point: str
    ) -> AsyncIterator[Sandboxed]:
        """See `services.sandbox.confined.Sandbox`."""
        code = source.encode(errors="replace")
        with _file(self.filter) as rules, _file(_INSIDE.read_bytes()) as inside:
            command = [
                *self.command,
                *("--seccomp", str(rules), "--ro-bind-data", str(inside), "/inside.py"),
                *("--size", str(limits.disk_bytes), "--tmpfs", "/tmp"),
                *("--chdir", "/tmp", "--remount-ro", "/"),
                *(self.python.path, *self.python.flags, "/inside.py"),
                *inside_arguments(limits, mode, code, entry_point),
            ]
            async with started(command, limits, code, pass_fds=(rules, inside)) as running:
                yield running


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
            "as root, sandbox `bubblewrap` needs `setpriv` (of the package `util-linux`): install "
            "it, or run this worker as another user"
        )
    return [setpriv, f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", "--"]


def _options(python: Interpreter) -> list[str]:
    options = ["--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc"]
    options += ["--unshare-uts", "--unshare-cgroup-try", "--hostname", "sandbox"]
    options += ["--uid", str(_NOBODY), "--gid", str(_NOBODY), "--cap-drop", "ALL"]
    options += ["--die-with-parent", "--new-session"]
    for directory in map(Path, python.directories):
        if directory.is_symlink():
            options += ["--symlink", os.readlink(directory), str(directory)]
        elif directory.is_dir():
            options += ["--ro-bind", str(directory), str(directory)]
    if not any(map(Path(python.path).is_relative_to, python.directories)):
        options += ["--ro-bind", python.path, python.path]
    for device in _DEVICES:
        options += ["--dev-bind", device, device]
    return options


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
