"""The teacher on a Ray cluster of its own, and a run on another that asks it over REST."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from services.metrics import read
from tests.deploy.conftest import ROOT, SCOPE, scope
from tests.waiting import DEADLINE_S

pytestmark = pytest.mark.slow

KEY, OLD_KEY = "of-another-team", "still-valid"
SEQUENCES = {"sequences": [{"prompt": [5, 9, 12], "completion": [7, 1]}]}
STEPS, GROUPS = 3, 8


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


def test_a_run_is_scored_by_the_teacher_of_another_cluster_alone(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER_TEAM_KEY", KEY)
    before = served.scored
    teacher = {
        "model": "examples/arithmetic/teacher",
        "endpoints": [{"url": served.url, "key_env": "OTHER_TEAM_KEY"}],
    }
    done = scope(
        "run", "deploy/runs/demo.yaml", f"runs_dir={tmp_path}", f"teacher={json.dumps(teacher)}",
        f"trainer.max_steps={STEPS}", f"trainer.groups_per_step={GROUPS}", "evaluation=null",
        "trainer.objective={kind: opd}", "ray.dashboard=false",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"teacher: {served.url}\n" in done.stdout
    status = json.loads(scope("status", tmp_path / "demo", "--json").stdout)
    assert status["fed"] == status["trained"] == STEPS * GROUPS
    assert (status["dead"], status["in_flight"]) == (0, 0)
    # OPD has every answer scored: one request a group to that server, and nobody serves here.
    assert served.scored - before == STEPS * GROUPS
    assert not (tmp_path / "demo/logs/serve").exists()
    assert all(record["ppl/teacher"] > 1 for record in read(tmp_path / "demo"))


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
