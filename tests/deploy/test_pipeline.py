"""The demo's topology on real Ray, Serve, Redis and Ray Train, as a user starts it."""

from __future__ import annotations

import json
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.evaluate import Result
from services.metrics import read, read_samples
from tests.deploy.conftest import GROUPS, ROOT, STEPS, scope

METRICS = {
    "reward/accuracy",
    "scope/student_path_fraction",
    "scope/teacher_path_fraction",
    "scope/unknown_fraction",
    "scope/student_weight_ess",
    "scope/teacher_weight_ess",
    "loss/mle",
    "loss/opd",
    "scope/student_weight_p50",
    "scope/teacher_weight_p90",
    "actor/entropy",
    "kl/student_teacher",
    "ppl/student",
    "ppl/teacher",
    "is_ratio/mean",
    "is_ratio/capped_fraction",
    "staleness/mean",
    "response_length/mean",
    "response_length/truncated_fraction",
    "actor/grad_norm",
    "timing_s/wait_groups",
    "timing_s/forward_backward",
    "timing_s/optimizer",
    "timing_s/publish",
    "throughput/trained_tokens_per_s",
    "queue/prompts",
    "queue/rollouts",
    "queue/verified",
    "queue/scored",
    "queue/dead",
    "sampling/logp_difference",
}


pytestmark = pytest.mark.slow


def test_the_ledger_is_exact_and_nothing_is_trained_twice(run_dir: Path) -> None:
    done = scope("status", run_dir, "--json")
    status = json.loads(done.stdout)
    assert (status["fed"], status["trained"], status["dead"]) == (STEPS * GROUPS, STEPS * GROUPS, 0)
    assert status["in_flight"] == 0
    assert status["step"] == STEPS
    assert all(stream["depth"] == 0 for stream in status["streams"].values())


def test_the_exported_student_loads_in_transformers_and_has_learned(run_dir: Path) -> None:
    trained = AutoModelForCausalLM.from_pretrained(run_dir / "export")
    student = AutoModelForCausalLM.from_pretrained(
        ROOT / "examples/arithmetic/student", dtype=torch.float32
    )
    changed = [
        not torch.equal(p, trained.get_parameter(name)) for name, p in student.named_parameters()
    ]
    assert all(changed)
    assert AutoTokenizer.from_pretrained(run_dir / "export").decode([2, 3])


def test_every_step_has_every_metric(run_dir: Path) -> None:
    records = read(run_dir)
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    for record in records:
        assert record.keys() >= METRICS
        # Synchronous: the engine samples from the very weights that the learner has.
        assert record["staleness/mean"] == 0
        assert record["sampling/logp_difference"] < 1e-4
        assert record["is_ratio/mean"] == pytest.approx(1.0, abs=1e-4)


def test_the_phases_of_a_step_add_up_to_its_wall_time(run_dir: Path) -> None:
    for before, after in pairwise(read(run_dir)):
        phases = sum(value for name, value in after.items() if name.startswith("timing_s/"))
        assert phases == pytest.approx(after["time"] - before["time"], abs=0.05)


def test_the_run_directory_holds_everything(run_dir: Path) -> None:
    names = {path.name for path in run_dir.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "export", "logs"}
    assert (run_dir / "checkpoints" / f"step-{STEPS:06d}" / "state.json").exists()
    assert "password" not in (run_dir / "config.yaml").read_text().replace("password_file", "")


def test_it_was_evaluated_while_it_trained(run_dir: Path) -> None:
    meanwhile = [Result.of_json(json.loads(f.read_text())) for f in run_dir.glob("*-step-*.json")]
    assert meanwhile
    for result in meanwhile:
        assert 2 <= result.version <= STEPS
        assert len(result.tallies) == 16
        assert all(tally.weight_version >= result.version for tally in result.tallies)


def test_it_shows_some_trajectories(run_dir: Path) -> None:
    shown = read_samples(run_dir)
    assert {sample["step"] for sample in shown} == {1, 2, 4}
    for trajectory in (t for sample in shown for t in sample["trajectories"]):
        scored = trajectory["outcome"] == "incorrect"
        assert (trajectory["log_ratio"] is not None) == scored == (trajectory["distil"] > 0)


def test_it_shows_progress_and_closes_with_held_out_accuracy(run_dir: Path) -> None:
    shown = (run_dir / "stdout").read_text()
    assert "Avg@8" in shown
    assert "Pass@8" in shown
    assert str(run_dir / "export") in shown
    before = json.loads((run_dir / "evaluation-before.json").read_text())
    after = json.loads((run_dir / "evaluation-after.json").read_text())
    assert (before["prompts"], before["k"], before["version"]) == (16, 8, 0)
    assert after["version"] == STEPS


def test_nothing_is_left_running(run_dir: Path) -> None:
    assert not (run_dir / "redis" / "url").exists()
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(run_dir) not in listing
