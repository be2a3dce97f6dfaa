"""The contract of the REST API: a real server, a real model, and generated requests."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from teacher.app import build_app
from teacher.auth import KeyRing
from teacher.config import TeacherConfig
from teacher.scorer import build_scorer, model_card
from tests.teacher.conftest import CONTEXT, VOCABULARY, Reference
from tests.teacher.fakes import FAKE_CARD, FakeScorer, listening

KEY = "test-key"


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[str]:
    config = TeacherConfig.model_validate(
        {"model": str(model_dir), "engine": {"kind": "transformers", "device": "cpu"}}
    )
    app = build_app(build_scorer(config), KeyRing(["other-key", KEY]), model_card(config))
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
        "vocab_size": VOCABULARY,
    }


# ---------------------------------------------------------------------------------- keys


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
        ({"top_logprobs": 5}, 422, "top_logprobs"),
        ({"temperature": 0.5}, 422, "temperature"),
        ({"model": "another"}, 404, "model"),
        ({"sequences": [{"prompt": LONG, "completion": [*LONG, 1]}]}, 413, "sequences.0"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_wrong_request_is_refused_by_its_field(
    http: httpx.Client, fields: dict[str, Any], status: int, param: str
) -> None:
    response = _score(http, **fields)
    assert response.status_code == status
    error = _error(response)
    assert error["param"] == param
    assert error["message"]


def test_the_refusal_of_alternatives_says_what_is_supported(http: httpx.Client) -> None:
    assert "only 0 is supported" in _error(_score(http, top_logprobs=1))["message"]


def test_a_body_that_is_no_json_is_422(http: httpx.Client) -> None:
    response = http.post("/v1/score", content=b"{", headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert _error(response)["param"] is None


def test_a_body_that_is_no_text_is_refused_too(http: httpx.Client) -> None:
    response = http.post("/v1/score", content=b"\xff", headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert _error(response)["type"] == "bad_request"


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


async def test_a_refused_request_never_reaches_the_model(scorer: FakeScorer) -> None:
    body = {"sequences": [{"prompt": [1], "completion": [2]}, {"prompt": [100], "completion": []}]}
    async with _in_memory(scorer) as client:
        assert (await client.post("/v1/score", json=body)).status_code == 422
    assert scorer.calls == []


def _in_memory(scorer: FakeScorer) -> httpx.AsyncClient:
    app = build_app(scorer, KeyRing([]), FAKE_CARD)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://teacher")


# ------------------------------------------------------------------- generated requests

contract = schemathesis.openapi.from_asgi(
    "/openapi.json", build_app(FakeScorer(), KeyRing([]), FAKE_CARD)
)


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
