"""The teacher on a Ray cluster of its own, and a run on another that asks it over REST."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.metrics import read
from tests.deploy.conftest import ROOT, SCOPE, scope

pytestmark = pytest.mark.slow

KEY = "of-another-team"
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
        env=os.environ | {"SCOPE_TEACHER_KEYS": KEY, "RAY_TMPDIR": sessions},
    )  # fmt: skip
    assert server.stdout is not None
    said = server.stdout.readline()
    found = re.match(r"serving \S+ at (\S+) with a bearer key", said)
    assert found, said
    yield Served(found[1], Path(sessions, "ray/session_latest"))
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=60) == 0
    shutil.rmtree(sessions)


def test_a_run_is_scored_by_the_teacher_of_another_cluster_alone(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER_TEAM_KEY", KEY)
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
    assert served.scored == STEPS * GROUPS
    assert not (tmp_path / "demo/logs/serve").exists()
    assert all(record["ppl/teacher"] > 1 for record in read(tmp_path / "demo"))


def test_without_its_key_that_server_scores_nothing(served: Served) -> None:
    before = served.scored
    request = urllib.request.Request(
        f"{served.url}/v1/score",
        data=b'{"sequences": [{"prompt": [5], "completion": [7]}]}',
        headers={"Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request)
    assert served.scored == before
