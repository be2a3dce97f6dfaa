"""The page is made of what the run directories hold, and of nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from deploy.config import ConfigError, dump, load
from deploy.evaluate import Result, Tally
from deploy.report import group, read_run, write
from tests.deploy.conftest import ROOT

STEPS = 3
HOSTILE = "</script><script>alert(1)</script>"


def a_run(runs: Path, name: str, correct: int, *overrides: str) -> Path:
    """A directory as a run leaves it: 4 held-out prompts, `correct` of 4 samples of each."""
    directory = runs / name
    directory.mkdir()
    config = load(ROOT / "deploy/runs/demo.yaml", [f"name={name}", *overrides])
    (directory / "config.yaml").write_text(dump(config))
    lines = [
        {
            "step": step, "reward/accuracy": 0.1 * step, "scope/student_weight_p10": 0.5,
            "scope/student_weight_p50": 1.0, "scope/student_weight_p90": 1.5,
            "timing_s/wait_groups": 1.0, "ppl/student": float("nan"),
        }
        for step in range(1, STEPS + 1)
    ]  # fmt: skip
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for label, version, right in (("before", 0, 1), ("after", STEPS, correct)):
        tallies = tuple(Tally(f"0-{i}", "sums", 4, right, 0, 0, version) for i in range(4))
        Result(version, tallies).write(directory, label)
    sample = {
        "step": 1, "prompt": "1+1=", "reference": "2", "data_source": "sums", "weight_version": 0,
        "trajectories": [
            {
                "tokens": ["2", HOSTILE], "length": 2, "log_ratio": [-1.5, 0.25],
                "outcome": "incorrect", "reason": "3 is not 2", "finish": "stop",
                "reinforce": 0.0, "distil": 0.7,
            }
        ],
    }  # fmt: skip
    (directory / "trajectories.jsonl").write_text(json.dumps(sample) + "\n")
    return directory


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    directories = [
        a_run(runs, "one", 3),
        a_run(runs, "other", 2, "trainer.objective.kind=opd"),
        a_run(runs, "two", 3, "seed=1"),
    ]
    return write(directories, runs / "report")


def test_runs_that_differ_in_the_seed_are_one_group(page: Path) -> None:
    runs = page.parent.parent
    groups = group([read_run(runs / name) for name in ("one", "other", "two")])
    assert [(g.label, [r.name for r in g.runs]) for g in groups] == [
        ("scope", ["one", "two"]),
        ("opd", ["other"]),
    ]


def test_final_accuracy_and_paired_differences(page: Path) -> None:
    text = page.read_text()
    assert "75.0% [75.0%, 75.0%]" in text  # every prompt alike: no interval over prompts
    assert "<td>scope: after − before</td><td>+50.0 [+50.0, +50.0] points</td>" in text
    assert "<td>opd − scope</td><td>-25.0 [-25.0, -25.0] points</td>" in text


def test_the_page_needs_nothing_else(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert "http" not in re.sub(r"data:[^\"]*", "", text)
    names = {file.name for file in page.parent.glob("*.png")}
    assert names >= {"accuracy.png", "weights.png", "held-out.png", "time.png"}
    assert "entropy.png" not in names  # these runs have no numbers of it
    assert text.count('media="(prefers-color-scheme: dark)" srcset="data:') == len(names)


def test_what_a_model_wrote_stays_text(page: Path) -> None:
    text = page.read_text()
    assert HOSTILE not in text
    (samples,) = re.findall(r'id="samples">(.*?)</script>', text)
    (shown,) = json.loads(samples)["one"]
    assert shown["trajectories"][0]["tokens"] == ["2", HOSTILE]


def test_a_run_without_a_step_is_one_sentence(tmp_path: Path) -> None:
    directory = a_run(tmp_path, "young", 1)
    (directory / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="has not made a step yet"):
        read_run(directory)
