"""Kills random parts of a real run with `kill -9`, and reports what became of it.

    python -m tests.deploy.chaos --kills 100 --seed 0 --json report.json      (make chaos)

A kill waits until the run makes progress, so that each one is recovered from before the next.
After that, whole nodes die under two more runs that share a Ray cluster and a Redis.
At the end every prompt must have been trained exactly once in the surviving history: the last
checkpoint's own list of prompts and the metrics of its steps are the witnesses.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

from services.metrics import read
from services.redis_server import EmbeddedRedis

ROOT = Path(__file__).parents[2]
SCOPE = Path(sys.executable).parent / "scope"
GROUPS_PER_STEP = 4
STEPS_PER_KILL = 12  # a recovery takes two or three
RECOVERY_S = 600.0  # past this a kill was not recovered from
SLEEP_S = 6.0  # how long a stopped worker sleeps: past its lease
NODE = "ray node"

# What a role's process is called. A Ray actor names its process after its class.
ROLES = {
    "rollout worker": "ray::RolloutWorker",
    "verifier worker": "ray::VerifierWorker",
    "judge": "verifier.judge",
    "teacher worker": "ray::TeacherWorker",
    "serve replica": "ray::ServeReplica",
    "serve proxy": "ray::ProxyActor",
    "learner rank": "ray::RayTrainWorker",
    "weight store": "ray::WeightStore",
    "redis": "-server unixsocket",
    "driver": "",
    "stopped rollout worker": "ray::RolloutWorker",  # SIGSTOP, and SIGCONT after the take-over
}


@dataclass
class Report:
    """What happened; `lost` and `duplicated` must be 0."""

    seed: int
    recovery_s: dict[str, list[float]] = field(default_factory=dict)
    fed: int = 0
    trained: int = 0
    dead: int = 0
    lost: int = 0
    duplicated: int = 0

    def recovered(self, role: str, seconds: float) -> None:
        """Counts one kill of `role`."""
        self.recovery_s.setdefault(role, []).append(seconds)
        print(f"{role}: {seconds:.1f} s", flush=True)

    def lines(self) -> list[str]:
        """One line a role, then the ledger."""
        made = [
            f"{role:24} {len(times):4} kills, recovery median "
            f"{statistics.median(times):5.1f} s, worst {max(times):5.1f} s"
            for role, times in sorted(self.recovery_s.items())
        ]
        return [
            *made,
            f"fed {self.fed}, trained {self.trained}, dead {self.dead}, lost {self.lost}, "
            f"duplicated {self.duplicated}",
        ]


class ChaosRun:
    """One run of the demo's topology with small steps, and the means to hurt it."""

    def __init__(
        self,
        directory: Path,
        *overrides: str,
        steps: int,
        name: str = "demo",
        own_cluster: bool = True,
    ) -> None:
        self.directory = directory / name
        self.total = steps * GROUPS_PER_STEP
        self._own_cluster = own_cluster
        self._log = (directory / f"{name}.log").open("w")
        self._driver = self._start(
            "run", ROOT / "deploy/runs/demo.yaml", f"runs_dir={directory}", f"name={name}",
            f"trainer.max_steps={steps}", f"trainer.groups_per_step={GROUPS_PER_STEP}",
            f"data.epochs={-(-self.total // 4096)}", "sampling.n=2", "evaluation=null",
            "trainer.checkpoint.every_steps=10", "ray.dashboard=false", "stage.lease_s=3",
            "trainer.max_failures=1000", "stage.max_deliveries=1000", *overrides,
        )  # fmt: skip

    def _start(self, *arguments: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [SCOPE, *map(str, arguments)], cwd=ROOT, stdout=self._log, stderr=subprocess.STDOUT
        )

    @property
    def finished(self) -> bool:
        """Whether the run has ended; raises if it failed."""
        code = self._driver.poll()
        if code not in (None, 0):
            raise AssertionError(f"the run failed:\n{Path(self._log.name).read_text()[-4000:]}")
        return code == 0

    @property
    def step(self) -> int:
        path = self.directory / "ledger.json"
        return int(json.loads(path.read_text())["step"]) if path.exists() else 0

    def wait_for_progress(self, steps: int) -> None:
        """Until `steps` more steps are done. A learner that went back counts from there."""
        deadline = time.monotonic() + RECOVERY_S
        last, gained = self.step, 0
        while gained < steps and not self.finished:
            if time.monotonic() > deadline:
                raise AssertionError(f"no progress for {RECOVERY_S:.0f} s at step {last}")
            time.sleep(0.05)
            step = self.step
            gained, last = gained + max(0, step - last), step

    def kill(self, role: str) -> bool:
        """Kills one process of `role`; False if there is none just now."""
        if role == "driver":
            self._driver.kill()
            self._driver.wait()
            self._driver = self._start("resume", self.directory)
            return True
        victims = [p for p in self._processes() if ROLES[role] in _title(p)]
        if not victims:
            return False
        victim = victims[0]
        if role.startswith("stopped"):
            victim.suspend()
            time.sleep(SLEEP_S)
            victim.resume()
        else:
            os.kill(victim.pid, signal.SIGKILL)
        return True

    def _processes(self) -> list[psutil.Process]:
        """All of its cluster, which the driver started, or this process."""
        try:
            root = psutil.Process(self._driver.pid if self._own_cluster else None)
            return root.children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def close(self) -> None:
        """Ends the run however it stands."""
        self._driver.terminate()
        try:
            self._driver.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._driver.kill()
        self._log.close()


def chaos(directory: Path, roles: list[str], *, seed: int) -> Report:
    """Starts a run, kills `roles` one after the other, and lets it end."""
    report = Report(seed)
    run = ChaosRun(directory, steps=STEPS_PER_KILL * (len(roles) + 1))
    try:
        run.wait_for_progress(1)
        for role in roles:
            if run.finished:
                break
            started = time.monotonic()
            if run.kill(role):
                run.wait_for_progress(2)
                report.recovered(role, time.monotonic() - started)
        while not run.finished:
            run.wait_for_progress(1)
    finally:
        run.close()
    _audit(run, report)
    return report


class SharedCluster:
    """Runs that share one Ray cluster and one Redis. All that computes lives on one node beside the
    head, which is killed whole; a new node takes its place, as an autoscaler would bring it."""

    def __init__(self, directory: Path, names: Sequence[str], *, steps: int) -> None:
        self.redis = EmbeddedRedis(directory / "redis")
        self.redis.start()
        self._cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self._node = self._cluster.add_node(num_cpus=8)
        shared = [f"ray.address={self._cluster.address}", f"redis.url={self.redis.url}"]
        self.runs = [
            ChaosRun(directory, *shared, steps=steps, name=name, own_cluster=False)
            for name in names
        ]

    def kill_node(self) -> None:
        """`kill -9` of the node's raylet, with which every process on it dies."""
        self._cluster.remove_node(self._node, allow_graceful=False)
        self._node = self._cluster.add_node(num_cpus=8)

    def close(self) -> None:
        for run in self.runs:
            run.close()
        self._cluster.shutdown()
        self.redis.stop()


def shared_chaos(
    directory: Path, names: Sequence[str], victims: Sequence[str]
) -> dict[str, Report]:
    """Kills `victims`, each `NODE` or a role, under runs that share a cluster, and lets them end: a
    report for each name."""
    cluster = SharedCluster(directory, names, steps=STEPS_PER_KILL * (len(victims) + 1))
    reports = [Report(seed=0) for _ in cluster.runs]
    both = list(zip(cluster.runs, reports, strict=True))
    try:
        for run in cluster.runs:
            run.wait_for_progress(2)
        for victim in victims:
            started = time.monotonic()
            if victim == NODE:
                cluster.kill_node()
            elif not cluster.runs[0].kill(victim):
                continue
            for run, report in both:
                run.wait_for_progress(2)
                report.recovered(victim, time.monotonic() - started)
        for run in cluster.runs:
            while not run.finished:
                run.wait_for_progress(1)
    finally:
        cluster.close()
    for run, report in both:
        _audit(run, report)
    return {run.directory.name: report for run, report in both}


def _audit(run: ChaosRun, report: Report) -> None:
    """Counts from what the run left behind, not from what it believed."""
    ledger = json.loads((run.directory / "ledger.json").read_text())
    report.fed, report.trained, report.dead = (ledger[k] for k in ("fed", "trained", "dead"))
    (newest,) = sorted((run.directory / "checkpoints").glob("step-*"))[-1:]
    covered = json.loads((newest / "state.json").read_text())["progress"]["covered"]
    orders = [o for first, end in covered for o in range(first, end)]
    records = read(run.directory)
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    report.lost = run.total - len(set(orders)) - report.dead
    report.duplicated = int(sum(r["batch/groups"] for r in records)) - len(orders)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # gone meanwhile
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--nodes", type=int, default=5, help="kills of a whole node besides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    dice = random.Random(options.seed)
    roles = [dice.choice(list(ROLES)) for _ in range(options.kills)]
    with tempfile.TemporaryDirectory() as directory:
        reports = {"demo": chaos(Path(directory), roles, seed=options.seed)}
    if options.nodes:
        with tempfile.TemporaryDirectory() as directory:
            reports |= shared_chaos(Path(directory), ["one", "two"], [NODE] * options.nodes)
    for name, report in reports.items():
        print(f"run {name!r}:", *report.lines(), sep="\n  ")
    if options.json:
        options.json.write_text(json.dumps({n: asdict(r) for n, r in reports.items()}, indent=1))
    sys.exit(any(report.lost or report.duplicated for report in reports.values()))


if __name__ == "__main__":
    main()
