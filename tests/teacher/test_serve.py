from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from ray import serve

from services.models import load_model
from services.redis_server import EmbeddedRedis
from teacher.admission import Admission
from teacher.app import Teacher, build_app
from teacher.auth import InsecureAddress, KeyRing
from teacher.client import Target, TeacherClient
from teacher.config import CacheConfig, TeachersConfig
from teacher.metrics import Metrics
from teacher.serve import TeacherFailed, deploy_teacher, remembering, stop_teacher
from tests.teacher.conftest import CONTEXT, Reference
from tests.teacher.fakes import FAKE_CARD, FakeScorer
from tests.waiting import DEADLINE_S, until


def _config(model: Path | str, scoring: object = None, **fields: object) -> TeachersConfig:
    engine = {"kind": "transformers", "device": "cpu"}
    teacher = {"model": str(model), "engine": engine, **fields}
    return TeachersConfig.model_validate({"teacher": teacher, "scoring": scoring or {"port": 0}})


def test_other_machines_are_not_served_without_a_key(model_dir: Path) -> None:
    with pytest.raises(InsecureAddress):
        deploy_teacher(_config(model_dir, {"host": "0.0.0.0", "port": 0}), [], name="open")


async def test_the_metrics_count_what_the_cache_saved(
    scorer: FakeScorer, redis_server: EmbeddedRedis
) -> None:
    metrics, settings = Metrics(), CacheConfig(url=redis_server.url)
    card = FAKE_CARD.model_copy(update={"fingerprint": uuid.uuid4().hex})  # no other test's
    remembered = remembering(scorer, card, settings, metrics)
    app = build_app(
        [Teacher(card, remembered)],
        KeyRing([]),
        max_body_bytes=10_000,
        admission=Admission(max_requests=10, max_tokens=100),
        metrics=metrics,
    )
    body = {"sequences": [{"prompt": [1], "completion": [i]} for i in (2, 3)]}
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://teacher") as client:
        first, again, third = [(await client.post("/v1/score", json=body)).json() for _ in range(3)]
        text = (await client.get("/metrics")).text
    assert first == again == third
    assert len(scorer.calls) == 1
    for outcome, times in (("hit", 4.0), ("miss", 2.0)):
        labels = f'{{model="{card.id}",outcome="{outcome}"}}'
        assert f"scope_teacher_cache_sequences_total{labels} {times}" in text
    await remembered.close()


@pytest.fixture
def cluster(ray_cluster: None) -> Iterator[None]:
    """The cluster, without any application once the test is done."""
    yield
    for name in serve.status().applications:
        serve.delete(name)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
async def test_the_deployed_teacher_scores_like_transformers(
    model_dir: Path, reference: Reference, sequences: list[tuple[list[int], list[int]]]
) -> None:
    url = deploy_teacher(_config(model_dir), ["the-key"], name="teacher", route_prefix="/t")
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{url}/v1/models").status_code == 401
    async with TeacherClient(Target(url, "the-key"), timeout_s=DEADLINE_S) as client:
        card = await client.info()
        assert card.id == str(model_dir)
        scores = await client.score(
            [(np.array(p, np.int32), np.array(c, np.int32)) for p, c in sequences]
        )
    for (prompt, completion), score in zip(sequences, scores, strict=True):
        np.testing.assert_allclose(score.logprobs, reference.score(prompt, completion), atol=1e-4)
    assert client.fingerprint == card.fingerprint


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
async def test_a_teacher_with_broken_weights_is_a_fault_and_shows_no_trace(
    model_dir: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    model = load_model(str(model_dir))
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] = float("nan")
    shutil.copytree(model_dir, broken)
    model.save_pretrained(broken)
    url = deploy_teacher(_config(broken), [], name="broken")
    body = {"sequences": [{"prompt": [1], "completion": [2]}]}
    response = httpx.post(f"{url}/v1/score", json=body)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "no_logprobs"
    assert "Traceback" not in response.text


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_teacher_that_cannot_start_says_what_its_replica_said() -> None:
    with pytest.raises(TeacherFailed, match="ModelError: /no/such/model is not a model"):
        deploy_teacher(_config("/no/such/model"), [], name="missing")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_teacher_that_finds_no_room_is_given_up_at_the_deadline(model_dir: Path) -> None:
    config = _config(
        model_dir, {"port": 0, "start_timeout_s": 3.0}, resources={"cpus": 64}, drain_s=1.0
    )
    with pytest.raises(TeacherFailed, match="not healthy within 3 s; it last said"):
        deploy_teacher(config, [], name="huge")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_second_port_in_one_cluster_is_refused(model_dir: Path) -> None:
    deploy_teacher(_config(model_dir), [], name="first")
    with pytest.raises(TeacherFailed, match="already listens on"):
        deploy_teacher(_config(model_dir, {"port": 1}), [], name="second")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
async def test_at_ten_times_its_capacity_it_says_so_recovers_and_drains(model_dir: Path) -> None:
    """Four requests are held at once and forty keep asking; then one goes away, one is cut off by
    its caller, and the last is finished although the teacher is told to stop."""
    url = deploy_teacher(
        _config(model_dir, max_ongoing_requests=4, drain_s=DEADLINE_S), [], name="busy"
    )
    work = {"sequences": [{"prompt": [1], "completion": [2] * (CONTEXT - 1)}] * 16}
    long = {"sequences": work["sequences"] * 64}
    answers: list[tuple[int, str]] = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=DEADLINE_S, limits=limits) as client:

        async def keep_asking() -> None:
            while sum(status == 200 for status, _ in answers) < 20:
                response = await client.post("/v1/score", json=work)
                answers.append((response.status_code, response.headers.get("retry-after", "")))

        await asyncio.gather(*(keep_asking() for _ in range(40)))
        assert {status for status, _ in answers} == {200, 503}
        assert all(int(retry) >= 1 for status, retry in answers if status == 503)
        assert (await client.post("/v1/score", json=work)).status_code == 200  # at once again

        cut_off = asyncio.create_task(client.post("/v1/score", json=long))
        await _metric(client, "scope_teacher_held_requests 1.0")
        cut_off.cancel()
        await _metric(client, "scope_teacher_cancelled_requests_total 1.0")
        await _metric(client, "scope_teacher_held_requests 0.0")

        last = asyncio.create_task(client.post("/v1/score", json=long))
        await _metric(client, "scope_teacher_held_requests 1.0")
        await asyncio.to_thread(stop_teacher, "busy")
        assert last.done()
        assert (await last).status_code == 200


async def _metric(client: httpx.AsyncClient, line: str) -> None:
    """Waits until the teacher says so of itself."""

    async def said() -> bool:
        return line in (await client.get("/metrics")).text

    await until(said, every_s=0.05)
