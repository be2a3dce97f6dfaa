from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from teacher.config import Endpoint, TeacherConfig


def test_only_the_model_must_be_named() -> None:
    config = TeacherConfig(model="somewhere")
    assert config.engine.kind == "auto"
    assert config.host == "127.0.0.1"


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70_000},
        {"replicas": 0},
        {"modle": "x"},
        {"engine": {"kind": "tgi"}},
        {"endpoints": ["teacher:8000"]},
        {"endpoints": ["http://a"], "replicas": 2},
        {"endpoints": ["http://a"], "engine": {"kind": "vllm"}},
        {"autoscale": {"min_replicas": 3, "max_replicas": 2}},
        {"autoscale": {"max_replicas": 2}, "replicas": 2},
    ],
    ids=str,
)
def test_a_wrong_value_or_key_is_an_error(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TeacherConfig.model_validate({"model": "somewhere", **wrong})


def _several(**others: object) -> TeacherConfig:
    return TeacherConfig.model_validate({"model": "math", "others": others})


def test_a_row_goes_to_the_teacher_that_it_names_or_that_its_data_source_has() -> None:
    config = _several(code={"model": "c", "data_sources": ["taco", "apps"]}, proofs={"model": "p"})
    route = config.router()
    assert [*config.named] == ["default", "code", "proofs"]
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
    elsewhere = config.model_copy(update={"endpoints": [Endpoint(url="http://b")]})
    assert [*elsewhere.served] == ["proofs"]


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"default": {"model": "c"}}, "may not be called 'default'"),
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


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("teacher.config", {"torch", "ray", "transformers", "numpy", "fastapi"}),
        ("teacher.worker", {"torch", "ray", "transformers", "fastapi"}),
        ("teacher.app", {"torch", "ray", "transformers"}),
    ],
)
def test_importing_a_module_loads_only_what_it_needs(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; found = {heavy} & sys.modules.keys(); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
