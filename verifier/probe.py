"""Does the sandbox hold here? A program of ours tries to get out of it before any other runs."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import tempfile
from pathlib import Path

from verifier.bubblewrap import Bubblewrap, Limit, Limits, SandboxRefused

_LIMITS = Limits(time_s=10, memory_bytes=256 << 20, disk_bytes=1 << 20, output_bytes=1 << 16)

# Prints, as JSON, what it could do that it must not. Each attempt ends in an OSError if it fails.
_ATTEMPTS = """
import ctypes, json, os, socket, sys
secret, port = json.loads(sys.stdin.readline())
libc = ctypes.CDLL(None, use_errno=True)

def must(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")

def write(path):
    open(path, "w").close()

attempts = {
    "read a file of the host": lambda: open(secret).close(),
    "see the host's processes": lambda: os.listdir("/proc"),
    "write to its root directory": lambda: write("/escaped"),
    "write to the interpreter": lambda: write(os.path.join(sys.base_prefix, "lib", "escaped")),
    "reach the host's network": lambda: socket.create_connection(("127.0.0.1", port), 1).close(),
    "open a socket": lambda: socket.socket().close(),
    "start a process": lambda: os.fork() or os._exit(0),
    "make a namespace": lambda: must(libc.unshare(0x10000000)),
    "mount": lambda: must(libc.mount(b"none", b"/tmp", b"tmpfs", 0, None)),
    "become root": lambda: os.setuid(0),
    "fill more than its disk": lambda: [
        open(f"/tmp/{i}", "wb").write(b"x" * 1000000) for i in range(3)
    ],
}
escaped = [f"see the variable {name}" for name in os.environ if name.startswith("SCOPE_PROBE")]
if os.getpid() > 2:
    escaped.append("share the host's process ids")
for name, attempt in attempts.items():
    try:
        attempt()
    except OSError:
        continue
    escaped.append(name)
print(json.dumps(escaped))
"""


async def check(sandbox: Bubblewrap) -> None:
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
        told = json.dumps([secret.name, host.getsockname()[1]]).encode() + b"\n"
        try:
            async with (
                asyncio.timeout(_LIMITS.wall_s),
                sandbox.open(_LIMITS, "program", _ATTEMPTS) as running,
            ):
                await running.write(told, last=True)
                printed = await running.output()
                how = await running.end()
        except (TimeoutError, Limit) as error:
            raise SandboxRefused(f"the probe of the sandbox did not end: {error}") from error
    try:
        escaped = json.loads(printed)
    except ValueError:
        raise SandboxRefused(f"no sandbox can be made: {how}. {_missing()}") from None
    if escaped:
        raise SandboxRefused(f"the sandbox does not hold: a program can {' and '.join(escaped)}")


_SETTINGS = (
    # (what shows that it is missing, its value then, what to do)
    (
        "/proc/sys/kernel/unprivileged_userns_clone",
        "0",
        "sysctl kernel.unprivileged_userns_clone=1",
    ),
    (
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "sysctl kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile for bwrap "
        "with `userns`",
    ),
    ("/proc/sys/user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=10000"),
)


def _missing() -> str:
    """The settings of this machine that are known to be in the way."""
    wrong = []
    for place, value, remedy in _SETTINGS:
        path = Path(place)
        if path.exists() and path.read_text().strip() == value:
            wrong.append(remedy)
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    if "\nSeccomp:\t2" in status:
        wrong.append(
            "a seccomp profile of the container that allows user namespaces and mounts (Docker: "
            "--security-opt seccomp=PROFILE; Kubernetes: securityContext.seccompProfile)"
        )
    return f"Missing here: {'; '.join(wrong)}" if wrong else "See docs/verifier.md, sandbox levels"
