"""Commands for a run on a cluster that asks for a token, as real Ray jobs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.config import dump, load
from services.ports import free_port
from services.redis_server import EmbeddedRedis
from tests.deploy.conftest import ROOT, SCOPE
from tests.waiting import DEADLINE_S

pytestmark = pytest.mark.slow

LEDGER = {
    "fed": 48, "trained": 32, "dead": 1, "in_flight": 15, "step": 3, "consumed": 32, "as_of": 0.0,
    "streams": {"scored": {"depth": 15, "age_s": 1.0}},
}  # fmt: skip


@dataclass(frozen=True)
class Head:
    address: str
    environment: dict[str, str]

    def scope(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCOPE, *arguments, "--address", self.address],
            capture_output=True, text=True, timeout=DEADLINE_S, cwd="/",
            env=self.environment | environment,
        )  # fmt: skip


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A cluster of one node, whose home holds the directory of a run that was stopped."""
    home = tmp_path_factory.mktemp("home")
    run_dir = home / "runs/demo"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(dump(load(ROOT / "deploy/runs/demo.yaml")))
    (run_dir / "ledger.json").write_text(json.dumps(LEDGER))
    (home / "examples").symlink_to(ROOT / "examples")
    ports: set[int] = set()
    while len(ports) < 4:
        ports.add(free_port("127.0.0.1"))
    port, dashboard, client, agent = ports
    temporary = tempfile.mkdtemp(prefix="ray-")  # sockets' paths are short
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef",
        "SCOPE_HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    server = subprocess.Popen(
        [
            "ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=1",
            f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={agent}",  # where jobs are submitted
            f"--temp-dir={temporary}", "--object-store-memory=100000000",
        ],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    made = Head(f"http://127.0.0.1:{dashboard}", environment)
    # Whatever answers first may still be without what runs jobs: a whole one is waited for.
    while "cannot read runs/none/config.yaml" not in made.scope("status", "runs/none").stdout:
        assert server.poll() is None
        time.sleep(0.5)
    yield made
    server.terminate()
    server.wait()
    shutil.rmtree(temporary)


def test_status_comes_from_where_the_run_is(head: Head) -> None:
    done = head.scope("status", "runs/demo")
    assert done.returncode == 0, done.stderr
    assert "step 3  fed 48 = trained 32 + dead 1 + in flight 15" in done.stdout


def test_a_wrong_token_and_a_failed_command_are_sentences(head: Head) -> None:
    refused = head.scope("status", "runs/demo", RAY_AUTH_TOKEN="f" * 32)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith(f"scope: the cluster at {head.address} refuses access")
    assert refused.stderr.count("\n") == 1
    failed = head.scope("status", "runs/none")
    assert failed.returncode == 1
    assert "cannot read runs/none/config.yaml" in failed.stdout


def test_what_a_command_prints_comes_back_as_it_is(head: Head) -> None:
    done = head.scope("status", "runs/demo", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["fed"] == LEDGER["fed"]


def test_ray_job_submit_runs_what_the_docs_say(head: Head) -> None:
    done = subprocess.run(
        ["ray", "job", "submit", f"--address={head.address}", "--",
         "sh", "-c", 'cd "$SCOPE_HOME" && scope status runs/demo'],
        env=head.environment, capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step 3  fed 48" in done.stdout


def test_ctrl_c_asks_before_it_stops_a_remote_run(
    head: Head, tmp_path: Path, redis_server: EmbeddedRedis
) -> None:
    """A real run, which waits for more CPUs than the cluster has."""
    waiting = "room for 1 × learner rank"
    left = _interrupted(
        head, waiting, "n", "run", str(ROOT / "deploy/runs/demo.yaml"), f"runs_dir={tmp_path}",
        "trainer.resources.cpus=64", "ray.num_cpus=null", "ray.wait_for_nodes_s=600",
        f"redis.url={redis_server.url}",
    )  # fmt: skip
    assert "also stop the run on the cluster?" in left
    (again,) = re.findall(r"it goes on; see it again with: scope (follow \S+)", left)
    assert (tmp_path / "demo/config.yaml").exists()
    stopped = _interrupted(head, waiting, "y", *again.split())
    assert "it goes on" not in stopped
    assert f"interrupted; continue with: scope resume {tmp_path}/demo" in stopped


def _interrupted(head: Head, line: str, answer: str, *command: str) -> str:
    """What a command says that is interrupted when it has printed `line`."""
    process = subprocess.Popen(
        [SCOPE, *command, "--address", head.address],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=head.environment, cwd="/",
    )  # fmt: skip
    assert process.stdout is not None
    said = ""
    while line not in said:
        said += process.stdout.readline()
        assert process.poll() is None, said
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(f"{answer}\n", timeout=DEADLINE_S)
    return said + rest
