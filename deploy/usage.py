"""The processor time that each role of a run has used on this machine, from /proc.

A process counts for the role that its name tells (Ray names its actors' processes after their
class), or else for that of whoever started it: a verifier's judges are the verifier's, vLLM's
engine is that of its worker. What no role's is `other`: the driver, Ray and its dashboard.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ROLES = {
    "ray::RolloutWorker": "rollout",
    "ray::VerifierWorker": "verifier",
    "ray::TeacherWorker": "teacher",
    "ray::ServeReplica": "teacher",
    "ray::ProxyActor": "teacher",  # one request a group goes through it
    "ray::RayTrainWorker": "learner",
    "ray::WeightStore": "learner",
    "redis-server": "redis",
}
OTHER = "other"


class _Process(NamedTuple):
    parent: int
    seconds: float  # with those of its children that have ended


def cpu_seconds(root: int | None = None) -> dict[str, float]:
    """`cpu_s/<role>` of the process `root` (this one) and all that come from it, since their start.
    Nothing where there is no /proc."""
    processes = _processes()
    found: defaultdict[str, float] = defaultdict(float)
    children: defaultdict[int, list[int]] = defaultdict(list)
    for pid, process in processes.items():
        children[process.parent].append(pid)
    left = [(root or os.getpid(), OTHER)]
    while left:
        pid, role = left.pop()
        if pid in processes:
            role = _role(pid) or role
            found[f"cpu_s/{role}"] += processes[pid].seconds
            left += [(child, role) for child in children[pid]]
    return dict(found)


def _processes() -> dict[int, _Process]:
    ticks = os.sysconf("SC_CLK_TCK")
    found = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The command, in brackets, may hold anything.
            fields = entry.read_bytes().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # ended, or hidden
            continue
        seconds = sum(map(int, fields[11:15])) / ticks
        found[int(entry.parent.name)] = _Process(int(fields[1]), seconds)
    return found


def _role(pid: int) -> str | None:
    try:
        name = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # Redis writes its address behind its path, Ray an actor's method behind its class.
    program = name.replace("\0", " ").partition(" ")[0].rpartition("/")[2]
    return next((role for start, role in ROLES.items() if program.startswith(start)), None)
