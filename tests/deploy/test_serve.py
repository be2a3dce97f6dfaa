"""A teacher on a Ray cluster of its own, another with other tokens that is killed, and a run that
asks both over REST and serves nothing itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest

from services.metrics import read
from services.ports import free_port
from tests.deploy.conftest import ROOT, SCOPE, scope
from tests.deploy.driver import Driver, step_of
from tests.deploy.pairs import write
from tests.waiting import DEADLINE_S

pytestmark = pytest.mark.slow

KEY, OLD_KEY = "of-another-team", "still-valid"
SEQUENCES = {"sequences": [{"prompt": [5, 9, 12], "completion": [7, 1]}]}
STEPS, GROUPS, N = 12, 16, 8


@dataclass(frozen=True)
class Served:
    url: str
    session: Path

    @property
    def scored(self) -> int:
        """Requests for scores that its replicas answered, by Ray Serve's own log."""
        logs = self.session.glob("logs/serve/replica_*")
        answered = re.compile(r"POST \S*/v1/score 200")
        return sum(len(answered.findall(log.read_text())) for log in logs)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    sessions = tempfile.mkdtemp(prefix="ray-")  # sockets' paths are short
    server = subprocess.Popen(
        [SCOPE, "teacher", "deploy/runs/demo.yaml"], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"SCOPE_TEACHER_KEYS": f"{OLD_KEY},{KEY}", "RAY_TMPDIR": sessions},
    )  # fmt: skip
    assert server.stdout is not None
    said = server.stdout.readline()
    found = re.match(r"serving \S+ at (\S+) with a bearer key", said)
    assert found, said
    yield Served(found[1], Path(sessions, "ray/session_latest"))
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=DEADLINE_S) == 0
    shutil.rmtree(sessions)


@contextmanager
def serving(directory: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The teacher of pairs of digits."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.deploy.pairs", directory, str(port)], cwd=ROOT
    )
    try:
        yield server
    finally:
        server.kill()
        server.wait()


def write_rows(file: Path) -> Path:
    """The demo's first prompts, of two data sources in turn."""
    table = pq.read_table(ROOT / "examples/arithmetic/train.parquet").to_pylist()[: STEPS * GROUPS]
    made = [
        row | {"data_source": source}
        for row, source in zip(table, cycle(("arithmetic", "pairs")), strict=False)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return file


def test_a_student_learns_from_teachers_elsewhere_alone(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER_TEAM_KEY", KEY)
    before = served.scored
    model, port = write(tmp_path / "pairs"), free_port("127.0.0.1")
    teachers = {
        "default": {
            "model": "examples/arithmetic/teacher",
            "endpoints": [{"url": served.url, "key_env": "OTHER_TEAM_KEY"}],
        },
        "pairs": {
            "model": str(model), "tokenizer": "own", "data_sources": ["pairs"],
            "endpoints": [f"http://127.0.0.1:{port}"],
        },
    }  # fmt: skip
    run = tmp_path / "demo"
    with serving(model, port) as first:
        driver = Driver(
            tmp_path / "log", "run", "deploy/runs/demo.yaml", f"runs_dir={tmp_path}",
            "teacher=null", f"teachers={json.dumps(teachers)}", f"sampling.n={N}",
            f"data.path={write_rows(tmp_path / 'rows.jsonl')}", f"trainer.max_steps={STEPS}",
            f"trainer.groups_per_step={GROUPS}", "trainer.checkpoint.every_steps=100",
            "trainer.objective={kind: opd}", "trainer.optimizer.lr=5e-4",
            "trainer.optimizer.warmup_steps=2", "evaluation=null", "ray.dashboard=false",
        )  # fmt: skip
        driver.wait_for(lambda: step_of(run) >= STEPS // 3)
        first.kill()
        with serving(model, port):
            assert driver.end() == 0, driver.said
    assert f"teacher: {served.url}\n" in driver.said
    status = json.loads(scope("status", run, "--json").stdout)
    assert status["fed"] == status["trained"] == STEPS * GROUPS
    assert (status["dead"], status["in_flight"]) == (0, 0)
    # OPD has every answer scored: one request a group to that server, and nobody serves here.
    assert served.scored - before == STEPS * GROUPS / 2
    assert not (run / "logs/serve").exists()
    records = read(run)
    assert all(record["ppl/teacher"] > 1 for record in records)
    accuracy = [record["reward/accuracy"] for record in records]
    assert np.mean(accuracy[-3:]) > np.mean(accuracy[:3]) + 0.1, accuracy


def test_each_of_its_keys_lets_a_caller_in(served: Served) -> None:
    assert httpx.get(f"{served.url}/health").status_code == 200
    for key in (OLD_KEY, KEY):
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{served.url}/v1/score", json=SEQUENCES, headers=headers)
        assert answer.status_code == 200
        (score,) = answer.json()["scores"]
        assert len(score["logprobs"]) == 2


def test_without_a_key_that_server_scores_nothing(served: Served) -> None:
    before = served.scored
    assert httpx.post(f"{served.url}/v1/score", json=SEQUENCES).status_code == 401
    assert served.scored == before
