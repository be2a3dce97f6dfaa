"""OpenAI's own client against the real application: it scores without knowing that it is ours."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import pytest_asyncio

from teacher.admission import Admission
from teacher.app import Teacher, build_app
from teacher.auth import KeyRing
from teacher.config import TeacherConfig
from teacher.scorer import build_scorer, model_card
from tests.teacher.conftest import CONTEXT, VOCABULARY, Reference
from tests.teacher.fakes import listening

IDS = [5, 17, 3, 60, 2]


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[str]:
    config = TeacherConfig.model_validate(
        {"model": str(model_dir), "engine": {"kind": "transformers", "device": "cpu"}}
    )
    app = build_app(
        [Teacher(model_card(config), build_scorer(config))],
        KeyRing(["key"]),
        max_body_bytes=100_000,
        admission=Admission(max_requests=100, max_tokens=10_000),
    )
    with listening(app) as url:
        yield url


@pytest_asyncio.fixture
async def client(server: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="key", max_retries=0) as made:
        yield made


async def _complete(client: openai.AsyncOpenAI, **fields: Any) -> Any:
    (model,) = (await client.models.list()).data
    return await client.completions.create(model=model.id, **fields)


async def test_an_echoed_prompt_has_the_log_probs_of_transformers(
    client: openai.AsyncOpenAI, reference: Reference
) -> None:
    answer = await _complete(client, prompt=IDS, max_tokens=0, echo=True, logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == [f"token_id:{id_}" for id_ in IDS]
    assert logprobs.token_logprobs[0] is logprobs.top_logprobs[0] is None
    np.testing.assert_allclose(
        logprobs.token_logprobs[1:], reference.score(IDS[:1], IDS[1:]), atol=1e-4
    )
    table = reference.table(IDS)
    for place, top in enumerate(logprobs.top_logprobs[1:]):
        values, ids = table[place].topk(3)
        for value, id_ in zip(values.tolist(), ids.tolist(), strict=True):
            assert top[f"token_id:{id_}"] == pytest.approx(value, abs=1e-4)
        own = logprobs.token_logprobs[1 + place]
        assert top[logprobs.tokens[1 + place]] == own
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(IDS), 0)


async def test_the_one_generated_token_is_the_most_likely_one(
    client: openai.AsyncOpenAI, reference: Reference
) -> None:
    """As evaluation harnesses ask: one token too many, which they drop."""
    prompts = [IDS, [7], IDS[:3]]
    answer = await _complete(
        client, prompt=prompts, max_tokens=1, echo=True, logprobs=1, temperature=0, seed=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        value, best = reference.table(prompt)[-1].max(0)
        assert choice.logprobs.tokens == [f"token_id:{id_}" for id_ in [*prompt, int(best)]]
        assert choice.logprobs.token_logprobs[-1] == pytest.approx(float(value), abs=1e-4)
        np.testing.assert_allclose(
            choice.logprobs.token_logprobs[1:-1],
            reference.score(prompt[:1], prompt[1:]),
            atol=1e-4,
        )
    alone = await _complete(client, prompt=IDS, max_tokens=1, logprobs=0)
    assert alone.choices[0].logprobs.tokens == [answer.choices[0].logprobs.tokens[-1]]


async def test_vllms_prompt_logprobs_are_served(
    client: openai.AsyncOpenAI, reference: Reference
) -> None:
    answer = await _complete(client, prompt=IDS, max_tokens=1, extra_body={"prompt_logprobs": 2})
    first, *others = answer.choices[0].prompt_logprobs
    assert first is None
    table = reference.table(IDS)
    for place, (id_, entries) in enumerate(zip(IDS[1:], others, strict=True)):
        expected = table[place]
        assert entries[str(id_)]["logprob"] == pytest.approx(float(expected[id_]), abs=1e-4)
        ranked = {entry["rank"]: int(name) for name, entry in entries.items()}
        best = expected.topk(2).indices.tolist()
        assert (ranked[1], ranked[2]) == tuple(best)
    assert answer.choices[0].logprobs is None


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"prompt": "text"}, 422, "prompt"),
        ({"prompt": []}, 422, "prompt"),
        ({"prompt": [[1], []]}, 422, "prompt.1"),
        ({"prompt": [1, -1]}, 422, "prompt.0.1"),
        ({"prompt": [1, VOCABULARY]}, 422, "prompt.0.1"),
        ({"prompt": [1] * (CONTEXT + 1)}, 413, "prompt.0"),
        ({"prompt": [1] * CONTEXT, "max_tokens": 1}, 413, "prompt.0"),
        ({"prompt": [1], "max_tokens": 2}, 422, "max_tokens"),
        ({"prompt": [1], "n": 2}, 422, "n"),
        ({"prompt": [1], "logprobs": 65}, 422, "logprobs"),
        ({"prompt": [1], "model": "another"}, 404, "model"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_is_not_served_is_refused_in_openais_form(
    client: openai.AsyncOpenAI, fields: dict[str, Any], status: int, param: str
) -> None:
    (model,) = (await client.models.list()).data
    asked = {"model": model.id, "max_tokens": 0, "echo": True, "logprobs": 1, **fields}
    with pytest.raises(openai.APIStatusError) as raised:
        await client.completions.create(**asked)
    assert raised.value.status_code == status
    assert raised.value.param == param
    assert raised.value.type


async def test_a_wrong_key_is_refused_in_openais_form(server: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="x", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            await stranger.models.list()
