"""A free port can be listened on."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from services.ports import PortTaken, free_port, require_free


@pytest.mark.parametrize("host", ["", "127.0.0.1"])
def test_a_free_port_can_be_listened_on(host: str) -> None:
    with socket.create_server((host, free_port(host))) as server:
        assert server.getsockname()[1] > 1023


def test_no_connection_is_made_from_a_free_port() -> None:
    given = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8")
    first, last = map(int, given.split())
    assert not any(first <= free_port() <= last for _ in range(100))


@pytest.mark.parametrize("given", ["1024 65535", None])
def test_where_the_kernel_gives_away_all_a_port_is_still_found(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, **_: str) -> str:
        if given is None:
            raise FileNotFoundError(path)
        return given

    monkeypatch.setattr(Path, "read_text", read)
    require_free("127.0.0.1", free_port("127.0.0.1"))


@pytest.mark.parametrize("host", ["", "127.0.0.1", "::1", "localhost"])
def test_a_port_that_somebody_listens_on_is_taken_until_they_stop(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        port = server.getsockname()[1]
        with pytest.raises(PortTaken, match=f"{host}:{port}: Address already in use"):
            require_free(host, port)
        # A connection that the server closes first lingers, and keeps nobody from listening.
        with socket.create_connection((host or "127.0.0.1", port)) as client:
            server.accept()[0].close()
            assert client.recv(1) == b""
    require_free(host, port)
    require_free(host, 0)


def test_an_address_of_another_machine_is_one_sentence() -> None:
    with pytest.raises(PortTaken, match=r"192\.0\.2\.1:0: Cannot assign requested address"):
        require_free("192.0.2.1", 0)
