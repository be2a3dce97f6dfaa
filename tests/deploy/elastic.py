"""A cluster that grows and shrinks under a run: `make elastic`, as root, with iproute2 installed.

The autoscaler that the cloud files use brings the nodes, of the types of deploy/clusters/aws.yaml,
one rollout worker on each of type `rollout`. `scope scale rollout=3` must add two of them, `scope
scale rollout=1` give two back while the run goes on, which must finish with an exact ledger; and
after it every node but the head must go. Only the machines are Ray's fake ones: raylets on this
machine, in namespaces of their own, so that whatever is stopped or killed is theirs.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)

from services.redis_server import EmbeddedRedis
from tests.deploy.hosts import ROOT, TOKEN, VENV, Story, run

STEPS, GROUPS, IDLE_S = 120, 16, 15
DEADLINE_S = 240  # for each thing that is waited for; a raylet takes half a minute on two cores

# In namespaces of its own; $1 is a directory. Nothing that it mounts is seen outside.
_APART = """
set -eu
mount --make-rprivate /
mkdir -p /tmp/ray
mount --bind "$1" /tmp/ray
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
shift
exec "$@"
"""


_LISTS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files",
    "rsync_exclude", "rsync_filter",
)  # fmt: skip


def nodes_file(directory: Path) -> Path:
    """The node types of aws.yaml, on machines that are processes."""
    cloud = yaml.safe_load((ROOT / "deploy/clusters/aws.yaml").read_text())
    types = {
        name: {key: value for key, value in made.items() if key != "node_config"}
        | {"node_config": {}, "resources": {"CPU": 4, "object_store_memory": 10**8}}
        for name, made in cloud["available_node_types"].items()
    }
    for name, made in types.items():
        made["resources"] |= cloud["available_node_types"][name]["resources"]
    types[FAKE_HEAD_NODE_TYPE] = types.pop(cloud["head_node_type"])
    config = {
        "cluster_name": "elastic",
        "provider": {
            "type": "external",  # the wheel lacks a file that the type `fake_multinode` reads
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "launch_multiple": True,
            "disable_node_updaters": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": "127.0.0.1:6379",
        },
        "available_node_types": types,
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "max_workers": cloud["max_workers"],
        "upscaling_speed": cloud["upscaling_speed"],
        "idle_timeout_minutes": IDLE_S / 60,
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{key: [] for key in _LISTS},
        "file_mounts_sync_continuously": False,
    }
    file = directory / "nodes.yaml"
    file.write_text(json.dumps(config))
    return file


def start_head(directory: Path) -> None:
    environment = os.environ | {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",  # as `ray up` has it
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    run(
        "ray", "start", "--head", "--node-ip-address=127.0.0.1", "--port=6379", "--num-cpus=0",
        f"--autoscaling-config={nodes_file(directory)}", "--disable-usage-stats",
        "--include-dashboard=true", env=environment,
    )  # fmt: skip


def workers() -> Counter[str]:
    """How many nodes there are of each role."""
    roles = ("learner", "teacher", "rollout")
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Counter(role for node in alive for role in roles if role in node)


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            said = subprocess.run(["ray", "status", "-v"], capture_output=True, text=True)
            raise AssertionError(f"not within {DEADLINE_S} s: {what}\n{said.stdout}")
        time.sleep(0.2)


@contextlib.contextmanager
def submitted(directory: Path, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """The demo on the cluster at hand, with the roles on the nodes that are meant for them."""
    output = directory / "run.log"
    going = subprocess.Popen(
        [
            "scope", "run", "deploy/runs/demo.yaml", "--address", "auto", f"redis.url={url}",
            f"runs_dir={directory}/runs", f"trainer.max_steps={STEPS}",
            f"trainer.groups_per_step={GROUPS}", "evaluation=null", "ray.num_cpus=null",
            f"ray.wait_for_nodes_s={DEADLINE_S}", "rollout.workers=1",
            "rollout.resources.custom={rollout: 1}", "trainer.resources.custom={learner: 0.01}",
            "verifier.resources.custom={learner: 0.01}",
            "teacher.resources.custom={teacher: 0.01}", "trainer.checkpoint.every_steps=8",
        ],
        stdout=output.open("w"), stderr=subprocess.STDOUT, cwd=ROOT,
    )  # fmt: skip
    try:
        yield going
        code = going.wait(timeout=2 * DEADLINE_S)
        assert code == 0, f"the run failed:\n{output.read_text()[-3000:]}"
    except AssertionError as error:
        raise AssertionError(f"{error}\n{output.read_text()[-3000:]}") from None


def follow(directory: Path, story: Story) -> None:
    """The whole story; raises when something is not as it must be."""
    redis = EmbeddedRedis(directory / "redis")
    redis.start()
    start_head(directory)
    ray.init(address="127.0.0.1:6379", log_to_driver=False, logging_level="ERROR")
    story.say("the head is up")
    run_dir = directory / "runs/demo"
    with submitted(directory, redis.url) as going:

        def step() -> int:
            assert going.poll() is None, "the run ended early"
            ledger = run_dir / "ledger.json"
            return int(json.loads(ledger.read_text())["step"]) if ledger.exists() else -1

        until(lambda: step() >= 1, "the run's first step")
        assert workers() == {"learner": 1, "teacher": 1, "rollout": 1}, workers()
        story.say(f"step {step()}: a node for each role was brought")

        def scale(count: int, what: str) -> None:
            run("scope", "scale", run_dir, f"rollout={count}", cwd=ROOT)
            story.say(f"step {step()}: scope scale rollout={count}")
            until(lambda: step() >= 0 and workers()["rollout"] == count, f"nodes {what}")
            now = step()
            story.say(f"step {now}: two nodes were {what}")
            until(lambda: step() > now, "a step on them")

        scale(3, "added")
        scale(1, "given back")
    story.say("the run is done")
    said = run("scope", "status", run_dir, "--json", cwd=ROOT).stdout
    found: dict[str, Any] = json.loads(said)
    assert found["step"] == STEPS
    assert found["fed"] == found["trained"] == STEPS * GROUPS
    assert (found["dead"], found["in_flight"]) == (0, 0)
    story.say(
        f"fed {found['fed']} = trained {found['trained']} + dead {found['dead']} + in flight "
        f"{found['in_flight']}"
    )
    until(lambda: not workers(), "every node given back after the run")
    story.say("only the head is left")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside is None:
        directory = Path(tempfile.mkdtemp(prefix="scope-elastic-", dir="/var/tmp"))
        (directory / "ray").mkdir()
        print(f"logs: {directory}", flush=True)
        subprocess.run(
            ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
             "bash", "-c", _APART, "apart", directory / "ray", sys.executable, "-m",
             "tests.deploy.elastic", *sys.argv[1:], "--inside", directory],
            check=True, cwd=ROOT,
            env=os.environ
            | {"PATH": f"{VENV}/bin:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
            | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN},
        )  # fmt: skip
        shutil.rmtree(directory)
        return
    story = Story()
    follow(options.inside, story)
    if options.json:
        report = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, Ray {ray.__version__}",
            "idle_timeout_s": IDLE_S,
            "seconds": story.seconds,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
