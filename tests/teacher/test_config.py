from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from teacher.config import TeacherConfig


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
