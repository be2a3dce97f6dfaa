"""The contract of the REST API: a real server, a real model, and generated requests."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, settings
from pydantic import BaseModel

from teacher import wire
from teacher.admission import Admission, RateLimit
from teacher.api import ErrorBody, ModelList, ScoreResponse
from teacher.app import Teacher, build_app
from teacher.auth import KeyRing
from teacher.client import Target, TeacherClient
from teacher.completions import CompletionResponse
from teacher.config import TeacherConfig
from teacher.scorer import build_scorer, model_card
from teacher.scores import More
from tests.teacher.conftest import CONTEXT, VOCABULARY, Reference
from tests.teacher.fakes import FAKE_CARD, FakeScorer, fake_app, fake_scores, listening
from tests.waiting import DEADLINE_S, until

KEY = "test-key"


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[str]:
    config = TeacherConfig.model_validate(
        {"model": str(model_dir), "engine": {"kind": "transformers", "device": "cpu"}}
    )
    app = build_app(
        [Teacher(model_card(config), build_scorer(config))],
        KeyRing(["other-key", KEY]),
        max_body_bytes=100_000,
        admission=Admission(max_requests=100, max_tokens=10_000),
    )
    with listening(app) as url:
        yield url


@pytest.fixture
def http(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, headers={"Authorization": f"Bearer {KEY}"}) as client:
        yield client


def _score(http: httpx.Client, **fields: Any) -> httpx.Response:
    body = {"sequences": [{"prompt": [1, 2], "completion": [3]}], **fields}
    return http.post("/v1/score", json=body)


def _error(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"type", "message", "param"}
    error: dict[str, Any] = body["error"]
    return error


# ------------------------------------------------------------------------------- answers


def test_scores_equal_transformers(
    http: httpx.Client, reference: Reference, sequences: list[tuple[list[int], list[int]]]
) -> None:
    body = [{"prompt": prompt, "completion": completion} for prompt, completion in sequences]
    response = _score(http, sequences=body, top_logprobs=0)
    assert response.status_code == 200
    answer = response.json()
    assert answer.keys() == {"model", "fingerprint", "scores"}
    for (prompt, completion), score in zip(sequences, answer["scores"], strict=True):
        expected = reference.score(prompt, completion)
        np.testing.assert_allclose(score["logprobs"], expected, atol=1e-4)
        assert score["perplexity"] == pytest.approx(math.exp(-np.mean(expected)), rel=1e-3)


def test_top_logprobs_equal_transformers(http: httpx.Client, reference: Reference) -> None:
    ids = [5, 17, 3, 60, 2]
    response = _score(http, sequences=[{"prompt": ids[:2], "completion": ids[2:]}], top_logprobs=6)
    (score,) = response.json()["scores"]
    values, places = reference.table(ids)[1:-1].topk(6)
    np.testing.assert_array_equal(score["top_ids"], places)
    np.testing.assert_allclose(score["top_logprobs"], values, atol=1e-4)


@pytest.mark.parametrize("binary", [True, False])
async def test_candidates_and_entropy_equal_transformers(
    server: str, reference: Reference, binary: bool
) -> None:
    """Of a sequence of three places and one of none, in both forms."""
    async with TeacherClient(Target(server, KEY), timeout_s=DEADLINE_S, binary=binary) as client:
        pairs = [(np.array([5, 17]), np.array([3, 60, 2])), (np.array([4]), np.array([], np.int32))]
        named = np.array([[1, 2], [90, 60], [2, 0]], np.int32)
        scores, nothing = await client.score(pairs, 0, More(True, [named, named[:0]]))
    table = reference.table([5, 17, 3, 60, 2])[1:-1]
    expected = table.gather(1, torch.tensor(named).long())
    np.testing.assert_allclose(scores.candidates, expected, atol=1e-4)
    np.testing.assert_allclose(scores.entropy, -(table.exp() * table).sum(1), atol=1e-4)
    assert nothing.candidates is not None and nothing.candidates.shape == (0, 2)


def test_an_empty_completion_is_scored_as_nothing(http: httpx.Client) -> None:
    response = _score(http, sequences=[{"prompt": [1], "completion": []}])
    assert response.json()["scores"] == [{"logprobs": [], "perplexity": 1.0}]


def test_models_tells_the_fingerprint_and_the_limits(http: httpx.Client, model_dir: Path) -> None:
    (model,) = http.get("/v1/models").json()["data"]
    assert model["id"] == str(model_dir)
    assert model["fingerprint"] == _score(http, model=str(model_dir)).json()["fingerprint"]
    assert model["context_length"] == CONTEXT
    assert model["limits"] == {
        "max_sequences": 1024,
        "max_sequence_tokens": CONTEXT,
        "max_request_tokens": 1 << 20,
        "max_top_logprobs": 64,
        "vocab_size": VOCABULARY,
        "gives": ["candidates", "entropy"],
    }


# ---------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("path", ["/v1/score", "/v1/completions"])
def test_the_contract_s_examples_work(http: httpx.Client, path: str) -> None:
    contract = http.get("/openapi.json").json()["paths"][path]["post"]
    examples = contract["requestBody"]["content"]["application/json"]["schema"]["examples"]
    for example in examples:
        assert http.post(path, json=example).status_code == 200, example
    assert examples


@pytest.mark.parametrize("model", [ScoreResponse, CompletionResponse, ModelList, ErrorBody])
def test_the_contract_shows_what_is_answered(http: httpx.Client, model: type[BaseModel]) -> None:
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    for example in schemas[model.__name__]["examples"]:
        read = model.model_validate(example)
        assert json.loads(read.model_dump_json(exclude_unset=True)) == example


def test_health_needs_no_key(server: str) -> None:
    response = httpx.get(f"{server}/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/score", "/openapi.json", "/nowhere"])
def test_everything_else_needs_one(server: str, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    response = httpx.post(f"{server}{path}", headers=headers, content=b"not even JSON")
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert _error(response)["type"] == "unauthorized"


def test_each_of_several_keys_opens(server: str) -> None:
    for key in ("other-key", KEY):
        headers = {"Authorization": f"bearer {key}"}
        assert httpx.get(f"{server}/v1/models", headers=headers).status_code == 200


async def test_without_keys_nobody_is_asked_for_one(scorer: FakeScorer) -> None:
    async with _in_memory(scorer) as client:
        assert (await client.get("/v1/models")).status_code == 200


# ------------------------------------------------------------------------------ refusals

LONG = list(range(CONTEXT // 2))
ONE = {"prompt": [1], "completion": [2]}
TWO = {**ONE, "candidates": [[1, 2]]}


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"sequences": []}, 422, "sequences"),
        ({"sequences": [{"prompt": [], "completion": [1]}]}, 422, "sequences.0.prompt"),
        ({"sequences": [{"prompt": [1]}]}, 422, "sequences.0.completion"),
        ({"sequences": [{"prompt": [1, -1], "completion": []}]}, 422, "sequences.0.prompt.1"),
        ({"sequences": [{"prompt": [1, "2"], "completion": []}]}, 422, "sequences.0.prompt.1"),
        (
            {"sequences": [{"prompt": [1], "completion": [2, VOCABULARY]}]},
            422,
            "sequences.0.completion.1",
        ),
        ({"sequences": [{"prompt": [10**40], "completion": []}]}, 422, "sequences.0.prompt.0"),
        ({"top_logprobs": VOCABULARY}, 422, "top_logprobs"),
        ({"sequences": [{**ONE, "candidates": []}]}, 422, None),
        ({"sequences": [{**ONE, "candidates": [[]]}]}, 422, None),
        ({"sequences": [{**ONE, "candidates": [[1]]}, ONE]}, 422, None),
        ({"sequences": [{**ONE, "candidates": [[i]]} for i in range(2)] + [TWO]}, 422, None),
        ({"sequences": [{**ONE, "candidates": [[1, VOCABULARY]]}]}, 422, "candidates"),
        ({"sequences": [{**ONE, "candidates": [[1] * VOCABULARY]}]}, 422, "candidates"),
        ({"entropy": "yes"}, 422, "entropy"),
        ({"top_logprobs": -1}, 422, "top_logprobs"),
        ({"temperature": 0.5}, 422, "temperature"),
        ({"model": "another"}, 404, "model"),
        ({"sequences": [{"prompt": LONG, "completion": [*LONG, 1]}]}, 413, "sequences.0"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_wrong_request_is_refused_by_its_field(
    http: httpx.Client, fields: dict[str, Any], status: int, param: str | None
) -> None:
    response = _score(http, **fields)
    assert response.status_code == status
    error = _error(response)
    assert error["param"] == param
    assert error["message"]


def test_a_body_that_is_no_json_is_422(http: httpx.Client) -> None:
    response = http.post("/v1/score", content=b"{", headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert _error(response)["param"] is None


def test_a_body_that_is_no_text_is_refused_too(http: httpx.Client) -> None:
    response = http.post("/v1/score", content=b"\xff", headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert _error(response)["type"] == "invalid_json"


def test_unknown_paths_and_methods_have_the_same_error_body(http: httpx.Client) -> None:
    assert _error(http.get("/nowhere"))["type"] == "not_found"
    assert _error(http.delete("/v1/score"))["type"] == "method_not_allowed"


async def test_a_fault_of_the_server_shows_no_trace_to_the_client(scorer: FakeScorer) -> None:
    scorer.error = RuntimeError("secret detail in /some/file.py")
    async with _in_memory(scorer) as client:
        response = await client.post(
            "/v1/score", json={"sequences": [{"prompt": [1], "completion": [2]}]}
        )
    assert response.status_code == 500
    assert _error(response)["type"] == "server_error"
    assert "secret" not in response.text
    assert "Traceback" not in response.text


@pytest.mark.parametrize(
    ("last", "status"),
    [
        ([{"prompt": [100], "completion": []}], 422),
        ([{"prompt": [1] * 9, "completion": [2] * 8}], 413),
        ([{"prompt": [1] * 8, "completion": [2] * 8}] * 3, 413),
    ],
    ids=["unknown token", "too long", "too much"],
)
async def test_a_refused_request_never_reaches_the_model(
    scorer: FakeScorer, last: list[dict[str, list[int]]], status: int
) -> None:
    body = {"sequences": [{"prompt": [1], "completion": [2]}, *last]}
    async with _in_memory(scorer) as client:
        assert (await client.post("/v1/score", json=body)).status_code == status
    assert scorer.calls == []


def _in_memory(scorer: FakeScorer, keys: Sequence[str] = (), **options: Any) -> httpx.AsyncClient:
    app = fake_app(scorer, keys, **options)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://teacher")


# ---------------------------------------------------------------------------- two forms


def _binary(body: bytes, **headers: str) -> dict[str, Any]:
    return {"content": body, "headers": {"Content-Type": wire.MEDIA_TYPE, **headers}}


async def test_what_an_engine_does_not_give_is_refused(scorer: FakeScorer) -> None:
    limits = FAKE_CARD.limits.model_copy(update={"gives": []})
    card = FAKE_CARD.model_copy(update={"limits": limits})
    app = build_app(
        [Teacher(card, scorer)],
        KeyRing([]),
        max_body_bytes=10_000,
        admission=Admission(max_requests=10, max_tokens=1000),
    )
    with listening(app) as url:
        for field in ({"entropy": True}, {"sequences": [TWO]}):
            answer = httpx.post(f"{url}/v1/score", json={"sequences": [ONE], **field})
            assert answer.json()["error"]["type"] == "not_given"
    assert scorer.calls == []


async def test_each_form_of_a_request_may_be_answered_in_either(scorer: FakeScorer) -> None:
    pair = (np.array([1, 2], np.int32), np.array([3, 4], np.int32))
    request = wire.encode_request([pair], top=2)
    async with _in_memory(scorer) as client:
        plain = await client.post("/v1/score", **_binary(request))
        packed = await client.post(
            "/v1/score",
            content=wire.json_request([pair], top=2),
            headers={"Accept": f"{wire.MEDIA_TYPE}, */*;q=0.1", "Content-Type": "application/json"},
        )
    (score,) = plain.json()["scores"]
    wanted = fake_scores([3, 4], 2)
    assert packed.headers["content-type"] == wire.MEDIA_TYPE
    for answer in (
        wire.decode_answer(packed.content),
        wire.Answer("", "", [score["logprobs"]], [score["top_ids"]], [score["top_logprobs"]]),
    ):
        np.testing.assert_allclose(answer.logprobs[0], wanted.logprobs)
        np.testing.assert_array_equal(answer.top_ids[0], wanted.top_ids)
        np.testing.assert_allclose(answer.top_logprobs[0], wanted.top_logprobs)


@pytest.mark.parametrize(
    ("headers", "body", "status", "type_"),
    [
        ({"Content-Type": wire.MEDIA_TYPE}, b"garbage", 422, "invalid_request"),
        ({"Content-Type": "text/plain"}, b"{}", 415, "unknown_form"),
        ({"Content-Type": "application/json; charset=utf-8"}, b"{}", 422, "invalid_request"),
        ({}, b"{}", 422, "invalid_request"),
        ({}, b" " * 10_001, 413, "body_too_long"),
        ({"Transfer-Encoding": "chunked"}, b" " * 10_001, 413, "body_too_long"),
    ],
    ids=str,
)
async def test_other_bodies_are_refused(
    scorer: FakeScorer, headers: dict[str, str], body: bytes, status: int, type_: str
) -> None:
    async with _in_memory(scorer) as client:
        response = await client.post("/v1/score", content=body, headers=headers)
    assert response.status_code == status
    assert _error(response)["type"] == type_
    assert scorer.calls == []


# ------------------------------------------------------------------------------- too much


async def test_what_is_held_is_bounded_and_the_next_is_told_to_come_again(
    scorer: FakeScorer,
) -> None:
    scorer.held = asyncio.Event()
    body = {"sequences": [{"prompt": [1], "completion": [2] * 9}]}
    async with _in_memory(scorer, max_requests=3, max_tokens=25) as client:
        asked = [asyncio.create_task(client.post("/v1/score", json=body)) for _ in range(2)]
        await until(lambda: len(scorer.calls) == 2)
        too_many_tokens = await client.post("/v1/score", json=body)
        small = {"sequences": [{"prompt": [1], "completion": [2]}]}
        asked.append(asyncio.create_task(client.post("/v1/score", json=small)))
        await until(lambda: len(scorer.calls) == 3)
        too_many_requests = await client.post("/v1/score", content=b"never read")
        for refused in (too_many_tokens, too_many_requests):
            assert refused.status_code == 503
            assert _error(refused)["type"] == "overloaded"
            assert int(refused.headers["retry-after"]) >= 1
        scorer.held.set()
        assert [response.status_code for response in await asyncio.gather(*asked)] == [200] * 3
        scorer.held = None
        assert (await client.post("/v1/score", json=body)).status_code == 200


async def test_a_key_past_its_share_waits_while_others_are_served(scorer: FakeScorer) -> None:
    body = {"sequences": [{"prompt": [1], "completion": [2] * 9}]}
    limit = RateLimit(tokens_per_s=0.1)  # and six saved up
    async with _in_memory(scorer, ["one", "two"], rate_limit=limit) as client:

        async def ask(key: str) -> httpx.Response:
            headers = {"Authorization": f"Bearer {key}"}
            return await client.post("/v1/score", json=body, headers=headers)

        assert (await ask("one")).status_code == 200  # leaves a debt
        refused = await ask("one")
        assert (refused.status_code, _error(refused)["type"]) == (429, "rate_limited")
        assert int(refused.headers["retry-after"]) == 30  # the longest that anybody is told
        assert (await ask("two")).status_code == 200


async def test_a_caller_that_goes_away_frees_its_place(scorer: FakeScorer) -> None:
    scorer.held = asyncio.Event()
    body = {"sequences": [{"prompt": [1], "completion": [2]}]}
    with listening(fake_app(scorer, max_requests=1)) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            asked = asyncio.create_task(client.post("/v1/score", json=body))
            await until(lambda: len(scorer.calls) == 1)
            asked.cancel()
            await until(lambda: scorer.cancelled == 1)
            scorer.held = None

            async def served() -> bool:
                return (await client.post("/v1/score", json=body)).status_code == 200

            while not await served():
                await asyncio.sleep(0.01)
            assert (
                "scope_teacher_cancelled_requests_total 1.0" in (await client.get("/metrics")).text
            )


async def test_a_call_that_the_server_cancels_is_counted_as_one_whose_caller_went_away(
    scorer: FakeScorer,
) -> None:
    scorer.held = asyncio.Event()
    body = {"sequences": [{"prompt": [1], "completion": [2]}]}
    async with _in_memory(scorer) as client:  # its app runs in the task of the call
        asked = asyncio.create_task(client.post("/v1/score", json=body))
        await until(lambda: len(scorer.calls) == 1)
        asked.cancel()
        await until(lambda: scorer.cancelled == 1)
        await asyncio.wait({asked})
        told = (await client.get("/metrics")).text
    assert "scope_teacher_cancelled_requests_total 1.0" in told
    assert "scope_teacher_held_requests 0.0" in told


async def test_ready_and_metrics_tell_how_it_goes(scorer: FakeScorer) -> None:
    async with _in_memory(scorer, ["key"]) as client:
        assert (await client.get("/ready")).status_code == 200
        assert (await client.get("/metrics")).status_code == 401
        headers = {"Authorization": "Bearer key"}
        body = {"sequences": [{"prompt": [1, 2], "completion": [3, 4, 5]}]}
        await client.post("/v1/score", json=body, headers=headers)
        text = (await client.get("/metrics", headers=headers)).text
        assert 'scope_teacher_read_tokens_total{model="fake-teacher"} 5.0' in text
        assert 'scope_teacher_scored_tokens_total{model="fake-teacher"} 3.0' in text
        assert 'scope_teacher_requests_total{route="/v1/score",status="200"} 1.0' in text
        scorer.error = RuntimeError()
        response = await client.get("/ready")
        assert (response.status_code, _error(response)["type"]) == (503, "not_ready")


async def test_the_model_of_a_request_chooses_among_several() -> None:
    first, second = FakeScorer(), FakeScorer()
    other = FAKE_CARD.model_copy(update={"id": "other-teacher", "fingerprint": "beef"})
    app = build_app(
        [Teacher(FAKE_CARD, first), Teacher(other, second)],
        KeyRing([]),
        max_body_bytes=10_000,
        admission=Admission(max_requests=10, max_tokens=100),
    )
    body = {"sequences": [{"prompt": [1], "completion": [2]}]}
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://teacher") as client:
        listed = (await client.get("/v1/models")).json()["data"]
        assert [card["id"] for card in listed] == ["fake-teacher", "other-teacher"]
        assert (await client.post("/v1/score", json=body)).json()["fingerprint"] == "f00d"
        named = {**body, "model": "other-teacher"}
        assert (await client.post("/v1/score", json=named)).json()["fingerprint"] == "beef"
        missing = await client.post("/v1/score", json={**body, "model": "third"})
        assert missing.status_code == 404
    assert (len(first.calls), len(second.calls)) == (1, 1)


# ------------------------------------------------------------------- generated requests


@schemathesis.serializer(wire.MEDIA_TYPE)
def _any_bytes(_: object, value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


contract = schemathesis.openapi.from_asgi("/openapi.json", fake_app(FakeScorer()))


@contract.parametrize()
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_request_breaks_the_server_or_its_schema(case: schemathesis.Case[Any]) -> None:
    case.call_and_validate(
        checks=[
            schemathesis.checks.not_a_server_error,
            schemathesis.checks.response_schema_conformance,
            schemathesis.checks.status_code_conformance,
        ]
    )
