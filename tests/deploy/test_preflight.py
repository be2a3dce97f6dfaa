"""What is said before anything starts, of models on this machine and of those on servers."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from deploy.config import ConfigError, RunConfig
from deploy.preflight import Preflight, check, in_own_process
from services.models import fingerprint
from teacher.admission import Admission
from teacher.app import Teacher, build_app
from teacher.auth import KeyRing
from teacher.config import TeacherConfig
from teacher.scorer import model_card
from tests.builders import VOCAB, save_tiny
from tests.teacher.fakes import FakeScorer, listening

ROWS = ("sums", "code", "sums")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student, two teachers for it, and one with another tokenizer."""
    directory = tmp_path_factory.mktemp("models")
    made = {
        name: save_tiny(directory / name, seed) for seed, name in enumerate(("student", "a", "b"))
    }
    return made | {"odd": save_tiny(directory / "odd", 3, vocab=VOCAB - 1)}


Checked = Callable[..., Preflight]


@pytest.fixture
def checked(models: dict[str, Path], tmp_path: Path) -> Checked:
    """Checks a run of three rows, with these teachers."""

    def run(teacher: Any, *, kind: str = "opd", named: str | None = None) -> Preflight:
        rows = [
            {
                "prompt": [{"role": "user", "content": "1+2="}],
                "data_source": source,
                "reward_model": {"ground_truth": "3"},
                "extra_info": {"teacher": named} if source == "code" else {},
            }
            for source in ROWS
        ]
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return check(
            RunConfig.model_validate(
                {
                    "name": "test",
                    "student": str(models["student"]),
                    "data": {"path": file, "max_prompt_tokens": 16, "shuffle": False},
                    "sampling": {"n": 2, "max_tokens": 8},
                    "rollout": {"engine": {"kind": "transformers"}},
                    "verifier": {"kind": "exact"},
                    "teacher": teacher,
                    "trainer": {"objective": {"kind": kind}},
                }
            )
        )

    return run


def of(model: Path, **others: Path) -> dict[str, Any]:
    """A teacher section."""
    engine = {"kind": "transformers"}
    section: dict[str, Any] = {"model": str(model), "engine": engine}
    if others:
        section["others"] = {n: {"model": str(m), "engine": engine} for n, m in others.items()}
    return section


def test_every_teacher_is_compared_with_the_student(
    models: dict[str, Path], checked: Checked
) -> None:
    found = checked(of(models["a"], code=models["b"]))
    assert found.fingerprints == {
        "default": fingerprint(str(models["a"])).model, "code": fingerprint(str(models["b"])).model,
    }  # fmt: skip
    assert [found.train.prompt(order).teacher for order in range(3)] == [
        "default",
        "code",
        "default",
    ]
    with pytest.raises(ConfigError, match=r"^teacher code: the tokenizers differ: .* 24 .* 23"):
        checked(of(models["a"], code=models["odd"]))
    with pytest.raises(ConfigError, match=r"^the tokenizers differ"):
        checked(of(models["odd"]))
    with pytest.raises(ConfigError, match=r"/nowhere is not a model directory"):
        checked(of(models["a"], code=Path("/nowhere")))


def test_a_row_that_names_no_teacher_of_the_run_is_one_sentence(
    models: dict[str, Path], checked: Checked
) -> None:
    teachers = of(models["a"], coding=models["b"])
    assert checked(teachers, named="coding").train.prompt(1).teacher == "coding"
    with pytest.raises(ConfigError) as caught:
        checked(teachers, named="codin")
    assert str(caught.value).endswith(
        "rows.jsonl, line 2: extra_info.teacher: this run has no teacher 'codin'; "
        "did you mean 'coding'?"
    )
    assert checked(teachers, named="codin", kind="grpo")  # asks none


@pytest.mark.parametrize("kind", ["grpo", "rft"])
def test_an_objective_that_asks_no_teacher_needs_none(checked: Checked, kind: str) -> None:
    for teacher in (None, of(Path("/nowhere"))):
        assert checked(teacher, kind=kind).fingerprints == {}


@pytest.mark.parametrize("kind", ["scope", "opd", "kdrl", "kd"])
def test_the_others_need_one(checked: Checked, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"^the objective '{kind}' needs a teacher: set teacher"):
        checked(None, kind=kind)


def test_kd_samples_from_one_teacher_that_is_here(
    models: dict[str, Path], checked: Checked
) -> None:
    assert checked(of(models["a"]), kind="kd").fingerprints == {}
    with pytest.raises(ConfigError, match=r"'kd' samples from one teacher: leave out others"):
        checked(of(models["a"], code=models["b"]), kind="kd")
    with pytest.raises(ConfigError, match=r"^the tokenizers differ"):
        checked(of(models["odd"]), kind="kd")
    with pytest.raises(ConfigError, match=r"/nowhere is not a model directory"):
        checked({"model": "/nowhere", "endpoints": ["http://127.0.0.1:1"]}, kind="kd")


# -------------------------------------------------- a model that only its servers have


Serve = Callable[[FastAPI], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:
        yield lambda app: stack.enter_context(listening(app))


def ours(model: Path) -> FastAPI:
    """A server of this project, as it describes itself."""
    card = model_card(TeacherConfig(model=str(model)))
    return build_app(
        [Teacher(card, FakeScorer())],
        KeyRing(["the-key"]),
        max_body_bytes=10_000,
        admission=Admission(max_requests=10, max_tokens=1000),
    )


def vllms() -> FastAPI:
    """What `vllm serve` tells of its models."""
    app = FastAPI()
    app.add_api_route("/v1/models", lambda: {"object": "list", "data": [{"id": "x"}]})
    return app


def elsewhere(*urls: str) -> dict[str, Any]:
    ends = [{"url": url, "key_env": "TEACHER_KEY"} for url in urls]
    return {"model": "/not/here", "endpoints": ends}


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "the-key")


def test_a_server_of_ours_tells_all_that_is_compared(
    models: dict[str, Path], checked: Checked, serve: Serve
) -> None:
    a, b, odd = (serve(ours(models[name])) for name in ("a", "b", "odd"))
    found = checked(elsewhere(a, serve(vllms())))
    assert found.fingerprints == {"default": fingerprint(str(models["a"])).model}
    assert found.warnings == []
    with pytest.raises(ConfigError, match=r"^the tokenizers differ: the student's has 24 tokens"):
        checked(elsewhere(odd))
    with pytest.raises(ConfigError, match=r"^the endpoints of /not/here serve different models$"):
        checked(elsewhere(a, b))


def test_what_a_server_does_not_tell_is_said_and_not_compared(
    checked: Checked, serve: Serve
) -> None:
    found = checked(elsewhere(serve(vllms())))
    assert found.fingerprints == {"default": None}
    assert found.warnings == [
        "the teacher is not on this machine and its servers do not tell: its tokenizer, "
        "vocabulary, end tokens and chat template could not be compared with the student's"
    ]


def test_without_directory_and_server_nothing_can_be_said(checked: Checked) -> None:
    with pytest.raises(ConfigError, match=r"^/not/here is not on this machine, and .* reached"):
        checked(elsewhere("http://127.0.0.1:1"))


def test_a_directory_at_hand_asks_no_server(models: dict[str, Path], checked: Checked) -> None:
    teacher = {**elsewhere("http://127.0.0.1:1"), "model": str(models["a"])}
    assert checked(teacher).fingerprints == {"default": fingerprint(str(models["a"])).model}


def test_a_missing_key_is_one_sentence(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY")
    with pytest.raises(ConfigError, match="TEACHER_KEY, which is not set"):
        checked(elsewhere("http://127.0.0.1:1"))


def test_who_does_not_answer_in_time_is_killed() -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        in_own_process(3.0, time.sleep, 60)
    assert time.monotonic() - started < 30
    assert not multiprocessing.active_children()


def test_what_another_process_says_comes_back() -> None:
    assert in_own_process(60.0, os.getppid) == os.getpid()
