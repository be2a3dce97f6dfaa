"""How an engine is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rollout.config import RolloutConfig
from rollout.engine import build_engine, check_engine
from rollout.transformers_engine import TransformersEngine
from services.engines import EngineError
from services.models import ModelError
from services.trajectory import Sampling
from tests.builders import tiny_model
from tests.rollout.conftest import published


def config(**engine: Any) -> RolloutConfig:
    return RolloutConfig.model_validate({"engine": engine})


@pytest.mark.parametrize("kind", ["auto", "transformers"])
async def test_a_directory_becomes_an_engine(student: Path, kind: str) -> None:
    engine = build_engine(config(kind=kind, device="cpu"), str(student))
    assert isinstance(engine, TransformersEngine)
    await engine.load_weights(published(tiny_model(3), 1))
    sampled = await engine.sample([2, 3], Sampling(n=2, max_tokens=200))
    assert {c.finish for c in sampled.completions} == {"stop"}  # it knows the end token
    await engine.close()


def test_arguments_that_would_be_ignored_are_refused(student: Path) -> None:
    with pytest.raises(EngineError, match="takes no arguments, got a"):
        build_engine(config(kind="transformers", args={"a": 1}), str(student))


def test_settings_of_vllm_are_refused_before_anything_is_loaded(student: Path) -> None:
    for wrong in ({"args": {"a": 1}}, {"in_flight": "keep"}):
        with pytest.raises(EngineError):
            check_engine(config(kind="transformers", **wrong), str(student))


def test_groups_in_flight_are_kept_by_vllm_only(student: Path) -> None:
    with pytest.raises(EngineError, match=r"'keep' needs rollout\.engine\.kind 'vllm'"):
        build_engine(config(kind="transformers", in_flight="keep"), str(student))


def test_vllm_that_is_not_installed_says_what_to_install(
    student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.engines.find_spec", lambda name: None)
    with pytest.raises(EngineError, match="not installed: install the extra 'vllm'"):
        build_engine(config(kind="vllm"), str(student))


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        build_engine(config(kind="transformers"), str(tmp_path))
