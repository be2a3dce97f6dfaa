"""One run whose teacher is the student itself, which reads the worked solution before the prompt
and is killed in the middle, on real Ray, Serve and Redis, as a user starts it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from services.metrics import read
from services.models import load_model, load_tokenizer
from services.trajectory import ScoredGroup
from tests.deploy.conftest import ROOT, SCOPE, scope
from tests.deploy.extended import collect
from tests.deploy.test_two_teachers import logprobs
from tests.waiting import DEADLINE_S, wait_until

STEPS, GROUPS, N = 16, 16, 8
READER = ROOT / "examples/arithmetic/reader"


def replica(run: subprocess.Popen[str]) -> psutil.Process | None:
    for process in psutil.Process(run.pid).children(recursive=True):
        try:
            if "ray::ServeReplica" in " ".join(process.cmdline()):
                return process
        except psutil.NoSuchProcess:
            continue
    return None


def check_scores(group: ScoredGroup, solution: str) -> None:
    """The first version's scores are those of the model's plain forward after what it read; a
    later version's are not, so it followed the student."""
    tokenizer, first = load_tokenizer(str(READER)), load_model(str(READER))
    shown = tokenizer.decode(group.prompt.token_ids.tolist())
    before = np.array(tokenizer(f"{solution},{shown}")["input_ids"], np.int32)
    np.testing.assert_array_equal(group.prompt.teacher_ids, before)
    for index, scores in group.teacher_logprobs.items():
        completion = group.rollout.trajectories[index].token_ids
        table = logprobs(first, before, completion).numpy()
        expected = table[np.arange(len(completion)), completion]
        assert np.allclose(scores, expected, atol=1e-4) == (group.teacher_version == 0)


@pytest.mark.slow
def test_a_student_learns_from_itself_what_it_was_shown(tmp_path: Path) -> None:
    with (tmp_path / "stdout").open("w") as stdout:
        run = subprocess.Popen(
            [
                SCOPE, "run", "deploy/runs/demo.yaml", f"runs_dir={tmp_path}", "evaluation=null",
                f"trainer.max_steps={STEPS}", f"trainer.groups_per_step={GROUPS}",
                f"sampling.n={N}", "trainer.optimizer.lr=3e-4", "trainer.optimizer.warmup_steps=2",
                "trainer.checkpoint.every_steps=100", "ray.dashboard=false", "data.shuffle=false",
                f"student={READER}", f"teacher.model={READER}", "teacher.weights=student",
                "teacher.context='{solution},{prompt}'",
            ],
            cwd=ROOT, stdout=stdout, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        directory = tmp_path / "demo"
        groups = collect(directory, STEPS // 3 * GROUPS, lambda: run.poll() is not None)
        wait_until(lambda: replica(run) or run.poll() is not None).kill()
        groups |= collect(directory, STEPS * GROUPS, lambda: run.poll() is not None)
        code = run.wait(timeout=DEADLINE_S)
    assert code == 0, (tmp_path / "stdout").read_text()
    total = STEPS * GROUPS
    assert sorted(groups) == list(range(total))
    versions = {group.teacher_version for group in groups.values()} - {None}
    assert {0} < versions <= {*range(STEPS + 1)}
    table = pq.read_table(ROOT / "examples/arithmetic/train.parquet").slice(0, total).to_pylist()
    of_each = {group.teacher_version: order for order, group in groups.items()}
    for version in versions:
        order = of_each[version]
        check_scores(groups[order], table[order]["extra_info"]["solution"])
    status = json.loads(scope("status", tmp_path / "demo", "--json").stdout)
    assert (status["fed"], status["trained"]) == (total, total)
    assert (status["dead"], status["in_flight"]) == (0, 0)
    accuracy = [record["reward/accuracy"] for record in read(tmp_path / "demo")]
    assert np.mean(accuracy[-4:]) > np.mean(accuracy[:4]) + 0.1, accuracy
