"""Ports of this machine."""

from __future__ import annotations

import socket


class PortTaken(RuntimeError):
    """Nobody can listen there; the message says on what, and why."""


def free_port(host: str = "") -> int:
    """A TCP port of `host` (an address of this machine; all of them) that nobody listens on now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


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
