"""`scope doctor` on this machine: every finding comes from the real thing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import redis
import torch

from deploy.config import RunConfig, load
from deploy.doctor import (
    Finding,
    _compiler,
    _devices,
    _disks,
    _models,
    _redis,
    _sandboxes,
    _shared_memory,
    compiler_trouble,
    examine_machine,
)
from services.redis_server import EmbeddedRedis
from tests.deploy.conftest import ROOT, Here


def config(*overrides: str) -> RunConfig:
    return load(ROOT / "deploy/runs/demo.yaml", overrides)


Look = Callable[[RunConfig | None], Iterable[Finding]]


def findings(look: Look, settings: RunConfig | None, what: str) -> list[Finding]:
    """Of one look alone: all of them take seconds."""
    return [found for found in look(settings) if found.what == what]


def test_what_the_demo_needs_is_here() -> None:
    found = list(examine_machine(config()))
    assert not [f for f in found if f.verdict == "fault"]
    assert "starts and answers" in next(f.said for f in found if f.what == "Redis")
    assert {"packages", "open files", "/dev/shm", "run directory"} <= {f.what for f in found}


def test_a_compiler_is_tried_with_pythons_headers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (found,) = findings(_compiler, None, "C compiler")
    assert found.verdict == "ok"
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))  # no headers there
    (found,) = findings(_compiler, None, "C compiler")
    assert found.verdict == "note" and "Python.h" in found.said and "python3-dev" in found.said
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiler_trouble().startswith("none, and Triton needs one on a GPU: apt-get install gcc")


def test_family_and_layout_of_each_model_are_said(tmp_path: Path) -> None:
    (student, teacher) = _models(config())
    assert (student.what, student.verdict) == ("student", "ok")
    assert student.said.startswith("qwen3; layout packed; attention: ")
    assert (teacher.what, teacher.verdict) == ("teacher", "ok")
    wrong = {"model_type": "prophetnet", "vocab_size": 24}
    (tmp_path / "config.json").write_text(json.dumps(wrong), encoding="utf-8")
    (student, _) = _models(config(f"student={tmp_path}"))
    assert student.verdict == "fault"
    assert student.said.startswith("prophetnet models are not supported: ")


def test_a_redis_that_would_lose_prompts_is_a_fault(redis_server: EmbeddedRedis) -> None:
    client = redis.Redis.from_url(redis_server.url)
    client.config_set("maxmemory", "1gb")
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        found = findings(_redis, config(f"redis.url={redis_server.url}"), "Redis")
    finally:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "0")
        client.close()
    assert [f.verdict for f in found] == ["ok", "fault"]


@pytest.mark.parametrize(("place", "verdict"), [("shared", "ok"), ("a file/shared", "fault")])
def test_a_file_goes_to_the_storage_and_back(tmp_path: Path, place: str, verdict: str) -> None:
    (tmp_path / "a file").touch()
    storage = tmp_path / place
    (found,) = findings(
        _disks, config(f"trainer.checkpoint.storage={storage}"), "checkpoint storage"
    )
    assert found.verdict == verdict
    assert not storage.exists() or not list(storage.iterdir())


@pytest.mark.slow  # pyarrow asks an S3 that is not there for ten seconds
def test_no_key_of_a_storage_url_is_shown() -> None:
    url = "s3://id:secret@bucket/runs?endpoint_override=127.0.0.1:1&scheme=http"
    (found,) = findings(_disks, config(f"trainer.checkpoint.storage={url}"), "checkpoint storage")
    assert found.verdict == "fault"
    assert found.said.startswith("s3://bucket/runs: ") and "secret" not in found.said


def test_gpus_that_are_not_there_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    (found,) = findings(_devices, config("trainer.resources.gpus=1"), "GPU")
    assert found.verdict == "fault" and "reserves 1" in found.said


OPEN_MODULE = """NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""


@pytest.mark.parametrize(
    ("said", "cuda", "wanted"),
    [
        ("570.133.20", "13.0", "is 570.133.20 and torch {} is built for CUDA 13.0, which wants "
         "driver 580 or newer"),
        ("535.104", "12.8", "CUDA 12.8, yet torch sees no GPU: see nvidia-smi, and CUDA_VISIBLE"),
        (OPEN_MODULE, "13.0", "is 580.65.06 and torch {} is built for CUDA 13.0, yet torch sees"),
        (OPEN_MODULE, None, "built for the CPU only: install the build for CUDA"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("source", ["file", "command"])
def test_a_driver_that_torch_cannot_use_is_a_fault_with_both_versions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, said: str, cuda: str | None,
    wanted: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.version.cuda", cuda)
    file = tmp_path / "version"
    file.write_text(said, encoding="utf-8")
    if source == "file":
        monkeypatch.setattr("services.engines._DRIVER", file)
    else:
        command = tmp_path / "nvidia-smi"
        command.write_text(f"#!/bin/sh\nexec cat {file}\n", encoding="utf-8")
        command.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (found,) = findings(_devices, None, "GPU")
    assert found.verdict == "fault" and wanted.format(torch.__version__) in found.said


def test_a_machine_without_shared_memory_is_told_so(tmp_path: Path) -> None:
    found = _shared_memory(tmp_path / "shm")
    assert found.verdict == "note" and "there is none" in found.said


def test_a_run_is_refused_by_a_redis_that_would_lose_prompts(here: Here, tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()
    client = redis.Redis.from_url(server.url)
    client.config_set("maxmemory", "1gb")
    client.config_set("maxmemory-policy", "allkeys-random")
    client.close()
    where = f"redis.url={server.url}"
    done = here("run", "deploy/runs/demo.yaml", where, f"runs_dir={tmp_path}/runs")
    asked = here("doctor", "deploy/runs/demo.yaml", where)
    server.stop()
    assert done.returncode == 1
    assert "scope: redis.url: it throws keys away when its memory is full" in done.stderr
    assert asked.returncode == 1 and "fault Redis: it throws keys away" in asked.stdout


@pytest.mark.parametrize(
    ("override", "verdict"),
    [
        ("sampling.n=8", "note"),
        ("verifier.kinds.own=code", "fault"),
        ("environment.kind=python", "fault"),
    ],
)
def test_a_sandbox_that_the_run_needs_and_cannot_have_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, override: str, verdict: str
) -> None:
    settings = config(override)
    monkeypatch.setenv("PATH", str(tmp_path))  # where no bwrap is
    (found,) = findings(_sandboxes, settings, "sandbox bubblewrap")
    assert found.verdict == verdict
