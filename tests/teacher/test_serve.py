from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from ray import serve

from services.models import load_model
from teacher.auth import InsecureAddress
from teacher.client import Target, TeacherClient
from teacher.config import TeacherConfig
from teacher.serve import TeacherFailed, deploy_teacher
from tests.teacher.conftest import Reference


def _config(model: Path | str, **fields: object) -> TeacherConfig:
    engine = {"kind": "transformers", "device": "cpu"}
    values = {"model": str(model), "engine": engine, "port": 0, **fields}
    return TeacherConfig.model_validate(values)


def test_other_machines_are_not_served_without_a_key(model_dir: Path) -> None:
    with pytest.raises(InsecureAddress):
        deploy_teacher(_config(model_dir, host="0.0.0.0"), [], name="open")


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
    client = TeacherClient(Target(url, "the-key"), timeout_s=60.0)
    card = await client.info()
    assert card.id == str(model_dir)
    scores = await client.score(
        [(np.array(p, np.int32), np.array(c, np.int32)) for p, c in sequences]
    )
    await client.aclose()
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
    config = _config(model_dir, resources={"cpus": 64}, start_timeout_s=3.0)
    with pytest.raises(TeacherFailed, match="not healthy within 3 s; it last said"):
        deploy_teacher(config, [], name="huge")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_second_port_in_one_cluster_is_refused(model_dir: Path) -> None:
    deploy_teacher(_config(model_dir), [], name="first")
    with pytest.raises(TeacherFailed, match="already listens on"):
        deploy_teacher(_config(model_dir, port=1), [], name="second")
