"""Two models behind one address on real Ray Serve: chosen, scaled, killed and cut off each by
itself."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from ray import serve
from ray.serve.schema import ReplicaState

from teacher.client import Target, TeacherClient
from teacher.config import TeachersConfig
from teacher.serve import deploy_teacher, stop_teacher
from tests.builders import save_tiny
from tests.teacher.conftest import CONTEXT, VOCABULARY, Reference
from tests.waiting import DEADLINE_S, until

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

NAME, KEY = "several", {"Authorization": "Bearer the-key"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("models")
    shape: dict[str, Any] = {"vocab": VOCABULARY, "context": CONTEXT, "spread": 0.5}
    return {n: str(save_tiny(directory / n, seed, **shape)) for seed, n in enumerate("ab")}


@pytest.fixture(scope="module")
def url(ray_cluster: None, models: dict[str, str]) -> Iterator[str]:
    engine = {"kind": "transformers", "device": "cpu"}
    settings: dict[str, Any] = {"engine": engine, "resources": {"cpus": 0.1}, "batch_tokens": 256}
    delays = {"upscale_delay_s": 0.5, "downscale_delay_s": 1.0}
    scale = {"max_replicas": 2, "target_requests": 2.0, **delays}
    code = {"model": models["b"], "autoscale": scale, **settings}
    teachers = {"default": {"model": models["a"], **settings}, "code": code}
    config = TeachersConfig.model_validate({"teachers": teachers, "scoring": {"port": 0}})
    yield deploy_teacher(config, ["the-key"], name=NAME, route_prefix="/both")
    serve.delete(NAME)


def replicas(deployment: str) -> dict[ReplicaState, int]:
    found: dict[ReplicaState, int] = (
        serve.status().applications[NAME].deployments[deployment].replica_states
    )
    return found


@asynccontextmanager
async def asking(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S, headers=KEY) as client:
        yield client


def work(model: str, sequences: int) -> dict[str, Any]:
    return {"model": model, "sequences": [{"prompt": [1], "completion": [2] * 63}] * sequences}


async def test_each_model_scores_like_transformers_under_its_own_name(
    url: str, models: dict[str, str]
) -> None:
    assert {*serve.status().applications[NAME].deployments} == {
        "teacher", "teacher-default", "teacher-code",
    }  # fmt: skip
    assert httpx.post(f"{url}/v1/score", json=work(models["b"], 1)).status_code == 401
    pair = ([1, 2, 3], [4, 50, 96])
    said = []
    for directory in models.values():
        async with TeacherClient(Target(url, "the-key", directory), timeout_s=DEADLINE_S) as client:
            (scores,) = await client.score(
                [(np.array(pair[0], np.int32), np.array(pair[1], np.int32))]
            )
            expected = Reference(Path(directory)).score(*pair)
            np.testing.assert_allclose(scores.logprobs, expected, atol=1e-4)
            assert (await client.info()).fingerprint == client.fingerprint
            said.append(client.fingerprint)
    assert said[0] != said[1]


async def test_more_requests_in_flight_bring_a_second_replica_that_goes_away_again(
    url: str, models: dict[str, str]
) -> None:
    async def grown() -> bool:
        return replicas("teacher-code").get(ReplicaState.RUNNING) == 2

    async def shrunk() -> bool:
        return replicas("teacher-code") == {ReplicaState.RUNNING: 1}

    assert await shrunk()
    async with asking(url) as client:
        enough = asyncio.Event()

        async def keep_asking() -> None:
            while not enough.is_set():
                answer = await client.post("/v1/score", json=work(models["b"], 256))
                assert answer.status_code == 200

        load = [asyncio.create_task(keep_asking()) for _ in range(8)]
        await until(grown)
        assert replicas("teacher-default") == {ReplicaState.RUNNING: 1}
        enough.set()
        await asyncio.gather(*load)
    await until(shrunk)


async def test_who_goes_away_frees_the_place_behind_the_front(
    url: str, models: dict[str, str]
) -> None:
    async with asking(url) as client:

        async def metric(line: str) -> bool:
            return line in (await client.get("/metrics", params={"model": models["b"]})).text

        cut_off = asyncio.create_task(client.post("/v1/score", json=work(models["b"], 1024)))
        await until(lambda: metric("scope_teacher_held_requests 1.0"))
        cut_off.cancel()
        await until(lambda: metric("scope_teacher_cancelled_requests_total 1.0"))
        await until(lambda: metric("scope_teacher_held_requests 0.0"))


async def test_one_model_s_death_is_not_the_other_s(url: str, models: dict[str, str]) -> None:
    async with asking(url) as client:

        async def score(name: str) -> int:
            return (await client.post("/v1/score", json=work(models[name], 1))).status_code

        async def back() -> bool:
            return await score("b") == 200

        (victim,) = [p for p in psutil.process_iter(["cmdline"]) if _is_replica(p, "teacher-code")]
        os.kill(victim.pid, signal.SIGKILL)
        for _ in range(10):
            assert await score("a") == 200
        await until(back)
        last = asyncio.create_task(client.post("/v1/score", json=work(models["b"], 1024)))
        held = "scope_teacher_held_requests 1.0"

        async def holds() -> bool:
            return held in (await client.get("/metrics", params={"model": models["b"]})).text

        await until(holds)
        await asyncio.to_thread(stop_teacher, NAME)
        assert (await last).status_code == 200  # finished, although it was told to stop


def _is_replica(process: psutil.Process, deployment: str) -> bool:
    """Of this cluster: its processes descend from this one."""
    name = " ".join(process.info["cmdline"] or ())
    ours = os.getpid() in [parent.pid for parent in process.parents()]
    return f"ServeReplica:{NAME}:{deployment}" in name and ours
