"""Does the sandbox hold here? A program of ours tries to get out of it before any other runs."""

from __future__ import annotations

import json
import os
import secrets
import socket
import tempfile
from pathlib import Path

from services.sandbox.confined import (
    Level,
    Limit,
    Limits,
    NotStarted,
    Sandbox,
    SandboxRefused,
    Starved,
)

_LIMITS = Limits(time_s=10, memory_bytes=256 << 20, disk_bytes=1 << 20, output_bytes=1 << 16)

# Prints, as JSON, what it could do that it must not. Each attempt ends in an OSError if it fails.
_ATTEMPTS = """
import ctypes, json, os, socket, sys, threading
level, secret, port, pid = json.loads(sys.stdin.readline())
libc = ctypes.CDLL(None, use_errno=True)

def must(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")

def write(path):
    open(path, "w").close()

attempts = {
    "read a file of the host": lambda: open(secret).close(),
    "change a file of the host": lambda: os.chmod(secret, 0o777),
    "see the host's processes": lambda: os.listdir("/proc"),
    "signal the host's processes": lambda: os.kill(pid, 0),
    "write to its root directory": lambda: write("/escaped"),
    "write to the interpreter": lambda: write(os.path.join(sys.base_prefix, "lib", "escaped")),
    "reach the host's network": lambda: socket.create_connection(("127.0.0.1", port), 1).close(),
    "open a socket": lambda: socket.socket().close(),
    "start a process": lambda: os.fork() or os._exit(0),
    "make a namespace": lambda: must(libc.unshare(0x10000000)),
    "mount": lambda: must(libc.mount(b"none", b"/tmp", b"tmpfs", 0, None)),
    "become root": lambda: os.setuid(0),
}
escaped = [f"see the variable {name}" for name in os.environ if name.startswith("SCOPE_PROBE")]
if level == "bubblewrap" and os.getpid() > 2:
    escaped.append("share the host's process ids")
for name, attempt in attempts.items():
    try:
        attempt()
    except OSError:
        continue
    escaped.append(name)
write("a file")  # what it must be able to do
thread = threading.Thread(target=print, args=(json.dumps(escaped),))
thread.start()
thread.join()
"""
_FILLER = "for name in 'abc': open(name, 'wb').write(b'x' * 1000000)"


async def check(sandbox: Sandbox, level: Level) -> None:
    """Runs the probe.

    Raises:
        SandboxRefused: a sandbox cannot be made, which says what to change, or does not hold.
    """
    with (
        tempfile.NamedTemporaryFile(prefix=secrets.token_hex(4)) as secret,
        socket.socket() as host,
    ):
        Path(secret.name).chmod(0o644)
        host.bind(("127.0.0.1", 0))
        host.listen()
        settings = json.dumps([level, secret.name, host.getsockname()[1], os.getpid()])
        try:
            printed, how = await _run(sandbox, _ATTEMPTS, settings)
        except NotStarted as error:
            hint = f". {missing()}" if level == "bubblewrap" else ""
            raise SandboxRefused(f"{error}{hint}") from error
        try:
            escaped = json.loads(printed)
        except ValueError:
            raise SandboxRefused(f"the probe of the sandbox {how or 'said nothing'}") from None
        if Path(secret.name).stat().st_mode & 0o777 != 0o644:
            escaped.append("change a file of the host")
    _, how = await _run(sandbox, _FILLER, "")
    if not how:
        escaped.append("fill more than its disk")
    if escaped:
        raise SandboxRefused(f"the sandbox does not hold: a program can {' and '.join(escaped)}")


async def _run(sandbox: Sandbox, source: str, given: str) -> tuple[bytes, str]:
    """What the program prints, and how it ended (see `Sandboxed.end`)."""
    try:
        async with sandbox.start(_LIMITS, "program", source) as running:
            await running.write(given.encode() + b"\n", last=True)
            return await running.within(running.output()), await running.within(running.end())
    except (Limit, Starved) as error:
        raise SandboxRefused(f"the probe of the sandbox did not end: {error}") from error


_SETTINGS = (
    # (what shows that it is missing, its value then, what to do)
    (
        "proc/sys/kernel/unprivileged_userns_clone",
        "0",
        "sysctl kernel.unprivileged_userns_clone=1",
    ),
    (
        "proc/sys/kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "sysctl kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile for bwrap "
        "with `userns`",
    ),
    ("proc/sys/user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=10000"),
)


def missing(root: Path = Path("/")) -> str:
    """The settings of this machine that are known to be in the way."""
    wrong = []
    for name, value, remedy in _SETTINGS:
        path = root / name
        if path.exists() and path.read_text(encoding="utf-8").strip() == value:
            wrong.append(remedy)
    status = root / "proc/self/status"
    if not status.exists():
        wrong.append("/proc, which is not mounted")
    elif "\nSeccomp:\t2" in status.read_text(encoding="utf-8"):
        wrong.append(
            "a seccomp profile of the container that allows user namespaces and mounts (Docker: "
            "--security-opt seccomp=PROFILE; Kubernetes: securityContext.seccompProfile)"
        )
    remedy = (
        f"Missing here: {'; '.join(wrong)}" if wrong else "See docs/verifier.md, sandbox levels"
    )
    return f"{remedy}. Or choose the weaker sandbox `landlock`"
