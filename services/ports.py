"""Ports of this machine."""

from __future__ import annotations

import random
import socket
from pathlib import Path

# Below are the ports that `ray start` gives its workers.
_FIRST, _LAST = 20_000, 65_535
_GIVEN_AWAY = Path("/proc/sys/net/ipv4/ip_local_port_range")


class PortTaken(RuntimeError):
    """Nobody can listen there; the message says on what, and why."""


def free_port(host: str = "") -> int:
    """A TCP port of `host` (an address of this machine; all of them) that nobody listens on now.

    Nobody connects *from* it either: a port that the kernel gives to connections may be gone
    between this answer and the server's start, above all on a busy machine.
    """
    for port in random.SystemRandom().sample(_never_given_away(), k=100):
        try:
            require_free(host, port)
        except PortTaken:
            continue
        return port
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _never_given_away() -> list[int]:
    """The ports that the kernel does not choose by itself (ip(7)), 100 at least:
    where they are fewer or cannot be known, all."""
    every = range(_FIRST, _LAST + 1)
    try:
        first, last = map(int, _GIVEN_AWAY.read_text(encoding="utf-8").split())
    except OSError:
        return list(every)
    outside = [port for port in every if not first <= port <= last]
    return outside if len(outside) >= 100 else list(every)


def require_free(host: str, port: int) -> None:
    """Returns when a server could listen on `host` and `port` now; 0 is any free port.

    Raises:
        PortTaken: somebody listens there, or this machine has no such address, or we may not.
    """
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            # As servers do: what only lingers from a connection that was closed is no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen()
    except OSError as error:
        raise PortTaken(f"cannot listen on {host}:{port}: {error.strerror}") from error
