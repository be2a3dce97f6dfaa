"""`scope eval`: what it refuses, how it goes on, and one real evaluation."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from deploy.config import ConfigError, load
from deploy.evaluate import Result, Tally
from deploy.examine import Examination, prepare
from deploy.roles import roles, settings
from rollout.own_weights import OwnWeights
from rollout.worker import RolloutSettings
from services.pipeline import EVAL
from tests.builders import save_tiny
from tests.deploy.conftest import ROOT, Here, scope

STUDENT = str(ROOT / "examples/arithmetic/student")
DEMO = ROOT / "deploy/runs/demo.yaml"


def prepared(out: Path, **options: object) -> Examination:
    arguments = {"model": STUDENT, "k": 4, "benchmarks": {}, "out": out} | options
    return prepare(load(DEMO), **arguments)  # type: ignore[arg-type]


def test_a_second_call_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    first = prepared(tmp_path)
    done = Tally(first.source.prompt(0).id, "arithmetic", 4, 1, 0, 0, 0)
    torn = json.dumps(asdict(done))[:20]
    (tmp_path / "tallies.jsonl").write_text(json.dumps(asdict(done)) + "\n" + torn)
    second = prepared(tmp_path)
    assert second.finished == (done,)
    assert second._left() == list(range(1, 256))


def test_a_folder_holds_one_evaluation(tmp_path: Path) -> None:
    prepared(tmp_path)
    with pytest.raises(ConfigError, match="another evaluation: sampling differ"):
        prepared(tmp_path, k=8)
    with pytest.raises(ConfigError, match="another evaluation: model differ"):
        prepared(tmp_path, model=str(ROOT / "examples/arithmetic/teacher"))


def test_a_benchmark_is_judged_by_its_kind(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"problem": "1+2", "answer": 3}\n')
    model = str(save_tiny(tmp_path / "model"))
    config = load(DEMO, ["evaluation.data.max_prompt_tokens=200"])
    made = prepare(config, model, k=4, benchmarks={"aime24": file}, out=tmp_path / "out")
    assert made.config.verifier.kind_of("aime24") == "math"
    (rollout, _) = roles(made.config, EVAL)
    told = settings(made.config, rollout, OwnWeights(model), {})
    assert isinstance(told, RolloutSettings)
    assert told.model_path == model  # and not the student of the run
    assert made.source.prompt(0).reference == "3"
    with pytest.raises(ConfigError, match="no benchmark 'aime23'"):
        prepared(tmp_path / "other", benchmarks={"aime23": file})


@pytest.mark.slow
def test_a_model_is_evaluated_without_a_learner(here: Here, tmp_path: Path) -> None:
    config = load(DEMO)
    assert config.evaluation is not None
    rows = tmp_path / "some.jsonl"
    rows.write_text(
        "".join(
            json.dumps(
                {
                    "prompt": [{"role": "user", "content": f"{a}+2-1="}],
                    "data_source": f"sums-{a % 2}",
                    "reward_model": {"ground_truth": str(a + 1)},
                }
            )
            + "\n"
            for a in range(10, 18)
        )
    )
    done = scope(
        "eval", DEMO, f"evaluation.data.path={rows}", "--model", STUDENT, "--k", "8",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sums-0" in done.stdout and "Avg@8" in done.stdout
    result = Result.read(tmp_path / "out", "result")
    assert result is not None
    assert (result.score.prompts, result.score.k) == (8, 8)
    assert 0.05 < result.score.avg_at_k.value < 0.8  # Avg@8 of the demo's student is 33%
    again = here(
        "eval", DEMO, f"evaluation.data.path={rows}", "--model", STUDENT, "--k", "8",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert again.returncode == 0
    assert Result.read(tmp_path / "out", "result") == result
