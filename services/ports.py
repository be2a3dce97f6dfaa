"""Ports of this machine."""

from __future__ import annotations

import random
import socket
from pathlib import Path

# Above the ports that `ray start` gives its workers, below those of Kubernetes' services.
_OURS = range(20_000, 30_000)
_CONNECTIONS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_TRIES = 100


class PortTaken(RuntimeError):
    """Nobody can listen there; the message says on what, and why."""


def free_port(host: str = "") -> int:
    """A TCP port of `host` (an address of this machine; all of them) that nobody listens on now.

    Where the kernel allows, it is one from which nobody connects either: a port that is given to
    connections may be gone before a server starts, above all on a busy machine.
    """
    ports = _never_given_away()
    for port in random.SystemRandom().sample(ports, min(_TRIES, len(ports))):
        try:
            require_free(host, port)
        except PortTaken:
            continue
        return port
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _never_given_away() -> list[int]:
    """Those of `_OURS` that the kernel gives to no connection (ip(7)); none where it is not known
    which those are."""
    try:
        first, last = map(int, _CONNECTIONS.read_text(encoding="utf-8").split())
    except OSError:
        return []
    return [port for port in _OURS if not first <= port <= last]


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
