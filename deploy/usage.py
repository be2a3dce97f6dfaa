"""The processor time that each role of a run has used on this machine.

A process counts for the role that its name tells (Ray names its actors' processes after their
class), or else for that of whoever started it: a verifier's judges are the verifier's, vLLM's
engine is that of its worker. What no role's is `other`: the driver, Ray and its dashboard.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress

import psutil

from services.pipeline import PIPELINE, Pipeline

_OTHERS = {
    "ray::ServeReplica": "teacher",
    "ray::ProxyActor": "teacher",  # one request a group goes through it
    "ray::RayTrainWorker": "learner",
    "ray::WeightStore": "learner",
    "redis-server": "redis",
    "valkey-server": "redis",
}
OTHER = "other"


def cpu_seconds(root: int | None = None, pipeline: Pipeline = PIPELINE) -> dict[str, float]:
    """`cpu_s/<role>` of the process `root` (this one) and all that come from it, since their start,
    with what their ended children used. Nothing where there is no such process."""
    seconds: defaultdict[str, float] = defaultdict(float)
    names = {f"ray::{step.worker_name}": step.name for step in pipeline.steps} | _OTHERS
    roles: dict[int, str] = {}
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(root or os.getpid())
        for process in [first, *first.children(recursive=True)]:  # parents before their children
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied), process.oneshot():
                role = _role(process, names) or roles.get(process.ppid(), OTHER)
                roles[process.pid] = role
                seconds[f"cpu_s/{role}"] += sum(
                    process.cpu_times()[:4]
                )  # without waiting for disks
    return dict(seconds)


def _role(process: psutil.Process, names: Mapping[str, str]) -> str | None:
    try:
        line = process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # a zombie has none
        return None
    # Redis writes its address behind its path, Ray an actor's method behind its class.
    program = line[0].partition(" ")[0].rpartition("/")[2] if line else ""
    return next((role for start, role in names.items() if program.startswith(start)), None)
