"""A run on several hosts: `make hosts`, as root, with openssh-server, rsync and iproute2 installed.

    laptop ── bridge ──┬── head     learner, driver, Redis
     ray up,           ├── first    rollout              ◀── cut off in the middle of the run
     scope run         └── second   rollout, teacher

Each host is a network namespace with an address, processes, mounts, a home and an sshd of its own.
The real `ray up` brings the cluster up from the real deploy/clusters/onprem.yaml, of which only the
addresses and the key are ours; `scope run --address` submits the demo; one host is cut off, and its
work taken over; it is plugged in again, and a worker more sent there; and the run must finish with
an exact ledger. What a host logged is kept when it does not.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml

ROOT = Path(__file__).parents[2]
VENV = Path(sys.executable).parent.parent
STEPS, GROUPS, CUT_AT = 500, 16, 3
LAPTOP = "scope-laptop"
TOKEN = "0123456789abcdef0123456789abcdef"

# Runs in the host's network namespace; $1 is its directory. Nothing that it mounts is seen outside.
_BOOT = """
set -eu
mount --make-rprivate /
mkdir -p /etc/scope /run/sshd /tmp/ray /tmp/ray_tmp_mount
mount --bind "$1/passwd" /etc/passwd
mount --bind "$1/etc" /etc/scope
mount --bind "$1/ray" /tmp/ray
mount --bind "$1/mounts" /tmp/ray_tmp_mount
mount -t tmpfs tmpfs /dev/shm
exec /usr/sbin/sshd -D -e -f /dev/null -h "$1/hostkey" -o StrictModes=no -o UsePAM=no \
    -o PidFile=none -o AuthorizedKeysFile="$1/authorized_keys" -o PermitUserEnvironment=no
"""


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    resources: dict[str, int]

    @property
    def namespace(self) -> str:
        return f"scope-{self.name}"


HOSTS = (
    Host("head", "10.213.0.10", {"learner": 1}),
    Host("first", "10.213.0.11", {"rollout": 1}),
    Host("second", "10.213.0.12", {"rollout": 1, "teacher": 1}),
)
HEAD = f"http://{HOSTS[0].address}:8265"


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, **options
    )
    if done.returncode:
        raise RuntimeError(f"{command} failed: {done.stdout[-3000:]} {done.stderr[-3000:]}")
    return done


@contextlib.contextmanager
def network() -> Iterator[None]:
    """The laptop's namespace with a bridge in it, and each host's plugged in."""
    with contextlib.ExitStack() as stack:

        def namespace(name: str) -> None:
            run("ip", "netns", "add", name)
            stack.callback(run, "ip", "netns", "del", name)
            run("ip", "-n", name, "link", "set", "lo", "up")

        namespace(LAPTOP)
        run("ip", "-n", LAPTOP, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", LAPTOP, "addr", "add", "10.213.0.1/24", "dev", "bridge")
        run("ip", "-n", LAPTOP, "link", "set", "bridge", "up")
        for host in HOSTS:
            namespace(host.namespace)
            run(
                "ip", "-n", LAPTOP, "link", "add", host.name, "type", "veth",
                "peer", "name", "eth0", "netns", host.namespace,
            )  # fmt: skip
            run("ip", "-n", LAPTOP, "link", "set", host.name, "master", "bridge", "up")
            run("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            run("ip", "-n", host.namespace, "link", "set", "eth0", "up")
            run("ip", "-n", host.namespace, "route", "add", "default", "via", "10.213.0.1")
        yield


@contextlib.contextmanager
def booted(host: Host, directory: Path) -> Iterator[None]:
    """A host with its sshd; at the end every process of it is killed."""
    home = directory / host.name
    (home / "scope/.venv").mkdir(parents=True)  # as set-up leaves it
    for part in VENV.iterdir():
        if part.name not in ("bin", "installed"):
            (home / "scope/.venv" / part.name).symlink_to(part)
    (home / "scope/.venv/bin").mkdir()
    for program in (VENV / "bin").iterdir():
        (home / "scope/.venv/bin" / program.name).symlink_to(program)
    (home / "scope/.venv/installed").touch()
    for part in ("etc", "ray", "mounts"):
        (home / part).mkdir()
    (home / "etc/resources").write_text(json.dumps(host.resources))
    (home / "passwd").write_text(
        f"root:*:0:0:root:{home}:/bin/bash\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n"
    )
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / "hostkey")
    shutil.copy(directory / "key.pub", home / "authorized_keys")
    sshd = subprocess.Popen(
        ["ip", "netns", "exec", host.namespace, "unshare", "--mount", "--pid", "--fork",
         "--kill-child", "--mount-proc", "bash", "-c", _BOOT, "boot", str(home)],
        stderr=(home / "sshd.log").open("w"),
    )  # fmt: skip
    try:
        yield
    finally:
        sshd.kill()  # `--kill-child`: with it the first process of its namespace, and so all
        sshd.wait()


def laptop(directory: Path, *command: str | Path, **options: Any) -> subprocess.Popen[str]:
    """A command as the user at the laptop gives it."""
    environment = os.environ | {
        "HOME": str(directory / "laptop"),
        "PATH": f"{VENV}/bin:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_TMPDIR": str(directory / "laptop"),
        "OMP_NUM_THREADS": "1",
    }
    arguments = ["ip", "netns", "exec", LAPTOP, *map(str, command)]
    return subprocess.Popen(arguments, env=environment, cwd=ROOT, text=True, **options)


def status(directory: Path, name: str) -> dict[str, Any]:
    asked = laptop(
        directory, "scope", "status", directory / "runs" / name, "--json", "--address", HEAD,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    said, _ = asked.communicate(timeout=120)
    found: dict[str, Any] = json.loads(said)
    return found


def sampled(found: dict[str, Any], worker: str) -> bool:
    """Whether a worker has finished anything."""
    return any(
        report["done"] for name, report in found["workers"].items() if name.startswith(worker)
    )


def prepare(directory: Path) -> Path:
    """The laptop's home, and the cluster's file with our addresses and key."""
    (directory / "laptop/.ray").mkdir(parents=True)
    (directory / "laptop/.ray/auth_token").write_text(TOKEN)
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / "key")
    cluster = yaml.safe_load((ROOT / "deploy/clusters/onprem.yaml").read_text())
    addresses = [host.address for host in HOSTS]
    cluster["provider"] |= {"head_ip": addresses[0], "worker_ips": addresses[1:]}
    cluster["auth"] = {"ssh_user": "root", "ssh_private_key": str(directory / "key")}
    file = directory / "onprem.yaml"
    file.write_text(yaml.safe_dump(cluster))
    return file


class Story:
    """What happened and when, in seconds from the start; told as it happens."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.seconds: dict[str, float] = {}

    def say(self, what: str) -> None:
        self.seconds[what] = round(time.monotonic() - self._started, 1)
        print(f"{self.seconds[what]:5.0f} s  {what}", flush=True)


@dataclass(frozen=True)
class Submitted:
    """The run on the cluster, as the laptop sees it."""

    directory: Path
    process: subprocess.Popen[str]

    def said(self) -> str:
        return (self.directory / "run.log").read_text()

    def step(self) -> int:
        """How far it is; raises when it has ended."""
        assert self.process.poll() is None, f"the run ended early:\n{self.said()[-3000:]}"
        ledger = self.directory / "runs/demo/ledger.json"
        return int(json.loads(ledger.read_text())["step"]) if ledger.exists() else -1


def submit(directory: Path) -> Submitted:
    process = laptop(
        directory, "scope", "run", "deploy/runs/demo.yaml", "--address", HEAD,
        f"runs_dir={directory}/runs", f"redis.url=redis://{HOSTS[0].address}:6380",
        f"trainer.max_steps={STEPS}", f"trainer.groups_per_step={GROUPS}", "evaluation=null",
        "ray.num_cpus=null", "ray.wait_for_nodes_s=240", "rollout.workers=2",
        # A host has room for two rollout workers: a third can only be on the one that came back.
        "trainer.resources.custom={learner: 0.01}", "rollout.resources.custom={rollout: 0.5}",
        "teacher.resources.custom={teacher: 0.01}", "scoring.host=0.0.0.0",
        "stage.lease_s=5", "trainer.checkpoint.every_steps=80", "data.epochs=30",
        stdout=(directory / "run.log").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    return Submitted(directory, process)


def follow(directory: Path, cluster: Path, story: Story) -> None:
    """The whole story; raises when something is not as it must be."""
    log = directory / "ray-up.log"
    up = laptop(
        directory, "ray", "up", "-y", "--no-config-cache", cluster,
        stdout=log.open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert up.wait(timeout=300) == 0, f"ray up failed:\n{log.read_text()[-3000:]}"
    story.say("ray up is done")
    submitted = submit(directory)
    for wanted, what in ((0, "the workers are up"), (CUT_AT, "cutting one host off")):
        while submitted.step() < wanted:
            time.sleep(0.2)
        story.say(f"step {submitted.step()}: {what}")
    cut(submitted, story)
    plug_in(submitted, story)
    ended = submitted.process.wait(timeout=600)
    assert ended == 0, f"the run failed:\n{submitted.said()[-3000:]}"
    story.say("the run is done")
    check(directory, story)


def cut(submitted: Submitted, story: Story) -> None:
    """Cuts a host off and waits until its work is taken over."""
    run("ip", "-n", LAPTOP, "link", "set", HOSTS[1].name, "down")
    died = re.compile(r"^demo-rollout-\d+ died; starting it again$", re.MULTILINE)
    while not died.search(submitted.said()):
        submitted.step()
        time.sleep(0.2)
    story.say("the rollout worker of that host was found dead")


def plug_in(submitted: Submitted, story: Story) -> None:
    """Brings the host back and waits until it works again."""
    run("ip", "-n", LAPTOP, "link", "set", HOSTS[1].name, "up")
    story.say("the host is plugged in again")
    directory = submitted.directory
    asked = laptop(
        directory, "scope", "scale", directory / "runs/demo", "rollout=3", "--address", HEAD
    )
    assert asked.wait(timeout=60) == 0
    while not sampled(status(directory, "demo"), "demo-rollout-2"):
        submitted.step()
    story.say(
        f"step {submitted.step()}: a third rollout worker, for which only that host has room, "
        f"sampled"
    )


def check(directory: Path, story: Story) -> None:
    """The ledger of the finished run."""
    found = status(directory, "demo")
    assert found["step"] == STEPS
    assert found["fed"] == found["trained"] == STEPS * GROUPS
    assert (found["dead"], found["in_flight"]) == (0, 0)
    assert (directory / "runs/demo/export/config.json").exists()
    story.say(
        f"fed {found['fed']} = trained {found['trained']} + dead {found['dead']} + in flight "
        f"{found['in_flight']}, and the student was exported"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="scope-hosts-", dir="/var/tmp"))
    story = Story()
    print(f"hosts' files and logs: {directory}", flush=True)
    with contextlib.ExitStack() as stack:
        cluster = prepare(directory)
        stack.enter_context(network())
        for host in HOSTS:
            stack.enter_context(booted(host, directory))
        follow(directory, cluster, story)
    shutil.rmtree(directory)
    if options.json:
        report = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, Ray {ray.__version__}",
            "hosts": {host.name: host.resources for host in HOSTS},
            "seconds": story.seconds,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
