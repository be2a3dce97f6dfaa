"""`scope doctor` on this machine: every finding comes from the real thing."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis

from deploy.config import RunConfig, load
from deploy.doctor import Finding, _shared_memory, examine_machine
from services.redis_server import EmbeddedRedis
from tests.deploy.conftest import ROOT, scope


def config(*overrides: str) -> RunConfig:
    return load(ROOT / "deploy/runs/demo.yaml", overrides)


def findings(settings: RunConfig | None, what: str) -> list[Finding]:
    return [found for found in examine_machine(settings) if found.what == what]


def test_what_the_demo_needs_is_here() -> None:
    found = list(examine_machine(config()))
    assert not [f for f in found if f.verdict == "fault"]
    assert "starts and answers" in next(f.said for f in found if f.what == "Redis")
    assert {"packages", "open files", "/dev/shm", "run directory"} <= {f.what for f in found}


def test_a_redis_that_would_lose_prompts_is_a_fault(redis_server: EmbeddedRedis) -> None:
    client = redis.Redis.from_url(redis_server.url)
    client.config_set("maxmemory", "1gb")
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        found = findings(config(f"redis.url={redis_server.url}"), "Redis")
    finally:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "0")
        client.close()
    assert [f.verdict for f in found] == ["ok", "fault"]


@pytest.mark.parametrize(("place", "verdict"), [("shared", "ok"), ("a file/shared", "fault")])
def test_a_file_goes_to_the_storage_and_back(tmp_path: Path, place: str, verdict: str) -> None:
    (tmp_path / "a file").touch()
    storage = tmp_path / place
    (found,) = findings(config(f"trainer.checkpoint.storage={storage}"), "checkpoint storage")
    assert found.verdict == verdict
    assert not storage.exists() or not list(storage.iterdir())


@pytest.mark.slow  # pyarrow asks an S3 that is not there for ten seconds
def test_no_key_of_a_storage_url_is_shown() -> None:
    url = "s3://id:secret@bucket/runs?endpoint_override=127.0.0.1:1&scheme=http"
    (found,) = findings(config(f"trainer.checkpoint.storage={url}"), "checkpoint storage")
    assert found.verdict == "fault"
    assert found.said.startswith("s3://bucket/runs: ") and "secret" not in found.said


def test_gpus_that_are_not_there_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    (found,) = findings(config("trainer.resources.gpus=1"), "GPU")
    assert found.verdict == "fault" and "reserves 1" in found.said


def test_a_machine_without_shared_memory_is_told_so(tmp_path: Path) -> None:
    found = _shared_memory(tmp_path / "shm")
    assert found.verdict == "note" and "there is none" in found.said


@pytest.mark.slow
def test_a_run_is_refused_by_a_redis_that_would_lose_prompts(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()
    client = redis.Redis.from_url(server.url)
    client.config_set("maxmemory", "1gb")
    client.config_set("maxmemory-policy", "allkeys-random")
    client.close()
    where = f"redis.url={server.url}"
    done = scope("run", "deploy/runs/demo.yaml", where, f"runs_dir={tmp_path}/runs")
    asked = scope("doctor", "deploy/runs/demo.yaml", where)
    server.stop()
    assert done.returncode == 1
    assert "scope: redis.url: it throws keys away when its memory is full" in done.stderr
    assert asked.returncode == 1 and "fault Redis: it throws keys away" in asked.stdout
