"""The application in front of several models, over real HTTP, before real applications of fakes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from services.errors import Unavailable
from teacher import wire
from teacher.admission import Admission, Overloaded
from teacher.app import Teacher, build_app
from teacher.auth import KeyRing
from teacher.client import BadAnswer, Target, TeacherClient
from teacher.front import Answered, Asked, Away, ask_app, build_front
from tests.teacher.fakes import FAKE_CARD, FakeScorer, fake_scores, listening
from tests.waiting import DEADLINE_S, until

KEY = {"Authorization": "Bearer the-key"}
SCALES = {"math": 1.0, "code": 2.0}
PAIR = (np.array([1, 2], np.int32), np.array([3, 40], np.int32))


@dataclass
class Model:
    """One model's own application, as its replica has it."""

    name: str
    scorer: FakeScorer
    away: Exception | None = None
    asked: list[Asked] = field(default_factory=list)

    def __post_init__(self) -> None:
        card = FAKE_CARD.model_copy(update={"id": self.name, "fingerprint": f"of-{self.name}"})
        self.app = build_app(
            [Teacher(card, self.scorer)],
            KeyRing(["the-key"]),
            max_body_bytes=10_000,
            admission=Admission(max_requests=2, max_tokens=1000),
        )

    async def ask(self, asked: Asked) -> Answered:
        self.asked.append(asked)
        if self.away is not None:
            raise self.away
        return await ask_app(self.app, asked)


@pytest.fixture
def models() -> dict[str, Model]:
    return {name: Model(name, FakeScorer(scale)) for name, scale in SCALES.items()}


@pytest.fixture
def url(models: dict[str, Model]) -> Iterator[str]:
    front = build_front(
        {name: model.ask for name, model in models.items()},
        KeyRing(["the-key"]),
        max_body_bytes=10_000,
        admission=Admission(max_requests=3, max_tokens=0),
    )
    with listening(front) as where:
        yield where


def score(url: str, **fields: Any) -> httpx.Response:
    body = {"sequences": [{"prompt": [1, 2], "completion": [3, 40]}], **fields}
    return httpx.post(f"{url}/v1/score", json=body, headers=KEY)


@pytest.mark.parametrize(("model", "answers"), [("math", "math"), ("code", "code"), (None, "math")])
@pytest.mark.parametrize("binary", [True, False])
async def test_model_chooses_who_answers_in_both_forms(
    url: str, model: str | None, answers: str, binary: bool
) -> None:
    async with TeacherClient(
        Target(url, "the-key", model), timeout_s=DEADLINE_S, binary=binary
    ) as client:
        (scores,) = await client.score([PAIR], 2)
        wanted = fake_scores([3, 40], 2, SCALES[answers])
        np.testing.assert_allclose(scores.logprobs, wanted.logprobs, rtol=1e-6)
        np.testing.assert_allclose(scores.top_logprobs, wanted.top_logprobs, rtol=1e-6)
        assert client.fingerprint == f"of-{answers}"
        assert (await client.info()).id == answers


def test_openais_client_chooses_too_and_sees_both(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="the-key", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["math", "code"]
        for name, scale in SCALES.items():
            made = client.completions.create(
                model=name, prompt=[1, 2, 3], max_tokens=0, echo=True, logprobs=0
            )
            logprobs = made.choices[0].logprobs
            assert made.model == name and logprobs is not None and logprobs.token_logprobs
            np.testing.assert_allclose(logprobs.token_logprobs[1:], [-0.02 * scale, -0.03 * scale])
        with pytest.raises(openai.NotFoundError, match="no model 'chemistry', only 'math', 'code'"):
            client.completions.create(model="chemistry", prompt=[1, 2], max_tokens=0, echo=True)


def test_errors_come_from_the_model_that_was_asked(url: str, models: dict[str, Model]) -> None:
    assert score(url, model="chemistry").json()["error"]["type"] == "unknown_model"
    assert not models["math"].asked and not models["code"].asked
    for body in (b"{", b"[1]", b'{"model": 3}', b"\xff", b"[" * 5000):
        response = httpx.post(f"{url}/v1/score", content=body, headers=KEY)
        assert (response.status_code, models["math"].asked[-1].body) == (422, body)
        assert response.json()["error"].keys() == {"type", "message", "param"}
    binary = {**KEY, "Content-Type": wire.MEDIA_TYPE}
    for body in (b"", b"x" * 7, b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{}"):
        response = httpx.post(f"{url}/v1/score", content=body, headers=binary)
        assert response.status_code == 422, body
    assert httpx.post(f"{url}/v1/score", content=b"x" * 10_001, headers=KEY).status_code == 413
    assert httpx.get(f"{url}/nowhere", headers=KEY).json()["error"]["type"] == "not_found"
    models["code"].scorer.error = RuntimeError("a secret")
    broken = score(url, model="code")
    assert (broken.status_code, broken.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in broken.text


def test_strangers_reach_no_model(url: str, models: dict[str, Model]) -> None:
    for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/score"):
        assert httpx.get(f"{url}{path}").status_code == 401
    assert not models["math"].asked
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{url}/ready").json() == {"status": "ok"}


def test_metrics_and_the_contract_are_the_model_s_own(url: str) -> None:
    score(url, model="code")
    for name, scored in (("math", 0), ("code", 1)):
        text = httpx.get(f"{url}/metrics", params={"model": name}, headers=KEY).text
        counted = 'requests_total{route="/v1/score",status="200"} 1.0' in text
        assert counted == bool(scored), name
    assert "/v1/score" in httpx.get(f"{url}/openapi.json", headers=KEY).json()["paths"]


async def test_one_model_that_is_away_does_not_take_the_other_along(
    url: str, models: dict[str, Model]
) -> None:
    models["code"].away = Away("its replica is being replaced")
    assert score(url, model="math").status_code == 200
    gone = score(url, model="code")
    assert (gone.status_code, gone.json()["error"]["type"]) == (503, "not_ready")
    assert "'code' cannot be asked now: its replica" in gone.json()["error"]["message"]
    assert httpx.get(f"{url}/ready").status_code == 503
    listed = httpx.get(f"{url}/v1/models", headers=KEY).json()
    assert [card["id"] for card in listed["data"]] == ["math"]
    async with TeacherClient(Target(url, "the-key", "code"), timeout_s=DEADLINE_S) as client:
        with pytest.raises(BadAnswer, match="does not serve 'code'"):
            await client.info()
        with pytest.raises(Unavailable, match="cannot be asked now"):
            await client.score([PAIR])
    models["math"].away = Away("so is its")
    assert httpx.get(f"{url}/v1/models", headers=KEY).status_code == 503
    models["code"].away = Overloaded("as many as may are waiting", 1)
    full = score(url, model="code")
    assert (full.status_code, full.headers["retry-after"]) == (503, "1")


async def test_who_goes_away_frees_the_place_in_front_and_the_one_behind(
    url: str, models: dict[str, Model]
) -> None:
    """And refusals of the application behind arrive with their time to come again."""
    scorer = models["code"].scorer
    scorer.held = asyncio.Event()
    body = {"model": "code", "sequences": [{"prompt": [1], "completion": [2]}]}
    async with httpx.AsyncClient(base_url=url, headers=KEY) as client:
        held = [asyncio.create_task(client.post("/v1/score", json=body)) for _ in range(2)]
        await until(lambda: len(scorer.calls) == 2)
        refused = await client.post("/v1/score", json=body)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "2 requests are held already" in refused.text
        for task in held:
            task.cancel()
        await until(lambda: scorer.cancelled == 2)
        metrics = (await client.get("/metrics", params={"model": "code"})).text
        assert "scope_teacher_cancelled_requests_total 2.0" in metrics
        assert "scope_teacher_held_requests 0.0" in metrics
        scorer.held = None
        assert (await client.post("/v1/score", json=body)).status_code == 200


async def test_past_its_own_bound_the_front_refuses_before_it_reads(
    url: str, models: dict[str, Model]
) -> None:
    for model in models.values():
        model.scorer.held = asyncio.Event()
    async with httpx.AsyncClient(base_url=url, headers=KEY) as client:

        def ask(name: str) -> asyncio.Task[httpx.Response]:
            body = {"model": name, "sequences": [{"prompt": [1], "completion": [2]}]}
            return asyncio.create_task(client.post("/v1/score", json=body))

        held = [ask("math"), ask("math"), ask("code")]
        await until(lambda: sum(len(m.scorer.calls) for m in models.values()) == 3)
        assert (await ask("code")).json()["error"]["message"] == "3 requests are held already"
        for task in held:
            task.cancel()
        await asyncio.wait(held)
