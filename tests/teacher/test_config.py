from __future__ import annotations

import pytest
from pydantic import ValidationError

from teacher.config import ContextMessage, Endpoint, TeacherConfig, TeachersConfig


def test_only_the_model_must_be_named() -> None:
    config = TeachersConfig.model_validate({"teacher": {"model": "somewhere"}})
    assert config.teachers["default"].engine.kind == "auto"
    assert config.scoring.host == "127.0.0.1"


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 8000},
        {"replicas": 0},
        {"modle": "x"},
        {"engine": {"kind": "tgi"}},
        {"endpoints": ["teacher:8000"]},
        {"endpoints": ["http://a"], "replicas": 2},
        {"endpoints": ["http://a"], "engine": {"kind": "vllm"}},
        {"autoscale": {"min_replicas": 3, "max_replicas": 2}},
        {"autoscale": {"max_replicas": 2}, "replicas": 2},
        {"ema": 0.9},
        {"refresh_steps": 2},
        {"weights": "student", "ema": 1.0},
        {"weights": "student", "ema": 0.9, "replicas": 2},
        {"weights": "student", "endpoints": ["http://a"]},
        {"weights": "student", "cache": {"url": "redis://a"}},
    ],
    ids=str,
)
def test_a_wrong_value_or_key_is_an_error(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TeacherConfig.model_validate({"model": "somewhere", **wrong})


def _several(**others: object) -> TeachersConfig:
    return TeachersConfig.model_validate({"teacher": {"model": "math"}, "teachers": others})


def test_a_row_goes_to_the_teacher_that_it_names_or_that_its_data_source_has() -> None:
    config = _several(code={"model": "c", "data_sources": ["taco", "apps"]}, proofs={"model": "p"})
    route = config.router()
    assert [*config.teachers] == ["default", "code", "proofs"]
    sources = ("taco", "apps", "code", "proofs", "gsm")
    routed = [route(None, source) for source in sources]
    assert routed == ["code", "code", "code", "proofs", "default"]
    assert route("default", "taco") == "default"
    assert route("proofs", "taco") == "proofs"
    with pytest.raises(ValueError, match=r"no teacher 'proof'; did you mean 'proofs'\?"):
        route("proof", "taco")
    with pytest.raises(ValueError, match="no teacher 'x'; only default, code, proofs"):
        route("x", "taco")


def test_teachers_of_others_are_not_served() -> None:
    config = _several(code={"model": "c", "endpoints": ["http://a"]}, proofs={"model": "p"})
    assert [*config.served] == ["default", "proofs"]
    moved = TeacherConfig(model="math", endpoints=[Endpoint(url="http://b")])
    elsewhere = config.model_copy(update={"teachers": config.teachers | {"default": moved}})
    assert [*elsewhere.served] == ["proofs"]
    alone = {"teacher": {"model": "m", "endpoints": ["http://a"]}, "scoring": {"host": "0.0.0.0"}}
    with pytest.raises(ValidationError, match=r"leave out scoring\.host"):
        TeachersConfig.model_validate(alone)


def test_without_a_default_every_data_source_needs_a_teacher() -> None:
    teachers = {"code": {"model": "c", "data_sources": ["taco"]}, "math": {"model": "m"}}
    route = TeachersConfig.model_validate({"teachers": teachers}).router()
    assert [route(None, source) for source in ("taco", "math")] == ["code", "math"]
    with pytest.raises(ValueError, match="'gsm' belongs to no teacher: call one of code, math"):
        route(None, "gsm")


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"default": {"model": "c"}}, "teacher and teachers.default are the same one"),
        ({"a-b": {"model": "c"}}, "should match pattern"),
        ({"code": {"model": "math"}}, "model 'math' belongs to 2 teachers"),
        (
            {"a": {"model": "x", "data_sources": ["b"]}, "b": {"model": "y"}},
            "data source 'b' belongs to 2 teachers",
        ),
        ({"a": {"model": "x", "endpoints": ["http://a"], "replicas": 2}}, "leave out replicas"),
        ({"a": {"model": "x", "port": 1}}, "Extra inputs"),
    ],
)
def test_teachers_that_cannot_be_told_apart_are_an_error(
    others: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        _several(**others)


def test_a_context_is_text_or_messages_or_that_of_the_row() -> None:
    def read(context: object) -> object:
        made = TeacherConfig.model_validate({"model": "m", "context": context})
        assert TeacherConfig.model_validate(made.model_dump(mode="json")) == made
        return made.context

    said = ContextMessage(content="{prompt} {solution}")
    assert read("{prompt} {solution}") == (said,)
    assert read([{"role": "system", "content": "x"}, {"content": "{prompt} {solution}"}]) == (
        ContextMessage(role="system", content="x"),
        said,
    )
    assert (read("row"), read(None)) == ("row", None)
    with pytest.raises(ValidationError):
        read([])
