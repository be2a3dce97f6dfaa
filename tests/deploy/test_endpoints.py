"""Servers that speak as `vllm serve` does, of a real model, and some of them a little wrong."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from fastapi import Body, FastAPI
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from deploy.endpoints import examine
from deploy.teachers import identify
from services.errors import WorkerFailed
from services.models import fingerprint
from teacher.config import TeacherConfig
from teacher.pool import Servers, TeacherPool, targets
from tests.builders import save_tiny
from tests.teacher.fakes import FAKE_CARD, FakeScorer, fake_app, listening
from tests.waiting import DEADLINE_S
from trainer.objectives.config import ObjectiveConfig

MAX_LOGPROBS = 20  # of one place, as `vllm serve` has it
Serve = Callable[[float], str]  # a server whose log-probs are so many nats off


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), vocab=300)


def vllm_like(model: Path, off: float) -> FastAPI:
    app, loaded = FastAPI(), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    @app.get("/v1/models")
    def models() -> Any:
        return {"object": "list", "data": [{"id": "x"}]}

    @app.post("/v1/completions")
    def completions(body: Annotated[Any, Body()]) -> Any:
        choices = []
        if (top := body["prompt_logprobs"]) > MAX_LOGPROBS:  # its words, and its status
            error = {"type": "BadRequestError", "message": f"greater than allowed: {MAX_LOGPROBS}"}
            return JSONResponse({"error": error}, 400)
        for index, ids in enumerate(body["prompt"]):
            with torch.no_grad():
                rows = torch.log_softmax(loaded(torch.tensor([ids])).logits[0], -1) - off
            told = [
                {i: {"logprob": float(row[i])} for i in {*row.topk(top).indices.tolist(), id_}}
                for row, id_ in zip(rows, ids[1:], strict=False)
            ]
            choices.append({"index": index, "prompt_logprobs": [None, *told]})
        return {"model": "x", "choices": choices}

    return app


@pytest.fixture
def serve(model: Path) -> Iterator[Serve]:
    with ExitStack() as stack:
        yield lambda off: stack.enter_context(listening(vllm_like(model, off)))


def teacher(model: Path | str, *urls: str, **settings: Any) -> TeacherConfig:
    return TeacherConfig.model_validate({"model": str(model), "endpoints": urls, **settings})


@pytest.mark.parametrize("wrong_first", [True, False])
def test_the_model_at_hand_says_who_is_wrong(model: Path, serve: Serve, wrong_first: bool) -> None:
    wrong, right = serve(0.2), serve(0.01)
    order = (wrong, right) if wrong_first else (right, wrong)
    assert examine(teacher(model, *order)).problems == [
        f"{wrong} serves another model: on a fixed sequence it is 0.20 nats off {model} on this "
        f"machine"
    ]
    assert examine(teacher(model, right)).problems == []
    assert examine(teacher(model, *order, endpoint_tolerance=0.3)).problems == []


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ({"kind": "opd", "divergence": "jsd", "top_k": MAX_LOGPROBS}, []),
        (
            {"kind": "opd", "divergence": "jsd", "top_k": MAX_LOGPROBS + 1},
            [r"URL does not give the 21 most likely .* asks for: .* greater than allowed: 20"],
        ),
        ({"kind": "vopd", "top_k": 4}, [r"^URL does not score the tokens that the student finds"]),
        ({"kind": "vopd", "top_k": 4, "top_k_of": "teacher"}, []),
        (
            {"kind": "eopd", "top_k": 4},
            [r"^URL tells no entropy over the vocabulary: set"],
        ),
        ({"kind": "eopd", "top_k": 4, "entropy": "top_k"}, []),
    ],
    ids=str,
)
def test_what_a_vllm_serve_does_not_give_is_said_before_the_run(
    model: Path, serve: Serve, objective: dict[str, Any], said: list[str]
) -> None:
    url = serve(0.0)
    found = examine(teacher(model, url), ObjectiveConfig.model_validate(objective)).problems
    assert len(found) == len(said)
    for problem, pattern in zip(found, said, strict=True):
        assert re.search(pattern.replace("URL", re.escape(url)), problem)


def test_a_server_of_ours_tells_what_it_gives(tmp_path: Path) -> None:
    asked = ObjectiveConfig.model_validate({"kind": "vopd", "top_k": 6})
    with listening(fake_app(FakeScorer())) as url:
        (problem,) = examine(teacher("/not/here", url), asked).problems
    assert problem.startswith(f"{url} gives at most 5 tokens at each place, and")
    assert "top_k is 6" in problem


def test_elsewhere_the_majority_does(serve: Serve) -> None:
    wrong, *right = (serve(off) for off in (0.2, 0.0, 0.01))
    found = examine(teacher("/not/here", wrong, *right))
    assert found.problems == [
        f"{wrong} serves another model: on a fixed sequence it is 0.20 nats off most of the others"
    ]


def test_two_that_differ_are_both_named(serve: Serve) -> None:
    one, other = serve(0.0), serve(0.3)
    (problem,) = examine(teacher("/not/here", one, other)).problems
    assert f"on a fixed sequence {other} is 0.30 nats off {one}; leave" in problem
    assert not examine(teacher("/not/here", one, other, endpoint_tolerance=0.5)).problems


def test_the_config_may_say_which_one_is_right(serve: Serve) -> None:
    one, other = serve(0.0), serve(0.3)
    chosen = teacher("/not/here", one, other).model_copy(update={"reference": other})
    assert examine(chosen).problems == [
        f"{one} serves another model: on a fixed sequence it is 0.30 nats off the reference {other}"
    ]
    with pytest.raises(ValidationError, match="reference is 'http://x', and must be one of"):
        TeacherConfig.model_validate({"model": "x", "endpoints": [one], "reference": "http://x"})


def test_of_servers_of_ours_too() -> None:
    card = FAKE_CARD.model_copy(update={"fingerprint": "beef"})
    other = fake_app(FakeScorer(), card=card)
    with listening(fake_app(FakeScorer())) as one, listening(other) as two:
        chosen = teacher("/not/here", one, two).model_copy(update={"reference": two})
        assert examine(chosen).problems == [
            f"{one} serves another model than {two}: its fingerprint is f00d, not beef"
        ]
        found = identify(chosen)
    assert found is not None
    assert found.model == "beef"


async def test_one_that_comes_later_is_held_to_the_right_answer(model: Path, serve: Serve) -> None:
    """Whoever answers first is believed no more than the others."""
    wrong, right = serve(0.2), serve(0.0)
    probe = (await asyncio.to_thread(examine, teacher(model, right))).probe
    late = teacher(model, wrong)
    async with TeacherPool(Servers(targets(late, {}), DEADLINE_S, None, None, probe)) as pool:
        pair = (np.array([1, 2], np.int32), np.array([3, 4], np.int32))
        with pytest.raises(WorkerFailed, match=rf"{wrong} is another model: .* 0\.20 nats off"):
            await pool.score([pair])


def test_a_server_of_ours_is_asked_where_the_model_is_at_hand(model: Path) -> None:
    with listening(fake_app(FakeScorer())) as url:
        assert examine(teacher(model, url)).problems == [
            f"{url} serves another model than {model}: its fingerprint is f00d, not "
            f"{fingerprint(str(model)).model}"
        ]


def test_one_that_is_down_is_told_of(model: Path) -> None:
    found = examine(teacher(model, "http://127.0.0.1:1"))
    assert found.problems == []
    assert len(found.warnings) == 1
    assert "http://127.0.0.1:1" in found.warnings[0]
