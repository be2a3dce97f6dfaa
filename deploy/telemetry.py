"""All that a run measures, as Ray metrics: in Ray's dashboard, and where Prometheus scrapes it.

    learning    scope_<metric>                      the learner's record of the last step
    pipeline    scope_stream_{depth,age_seconds}    by stream
                scope_prompts                       by state: fed, trained, dead, in_flight
    stages      scope_stage_*                       by stage, added up over its workers
    faults      scope_worker_deaths_total           by role
                scope_quiet_seconds                 since the last gradient step

Ray puts `ray_` before each name. One process, the driver, exports all of them from what the run
leaves in Redis, so that a worker which dies takes no count with it. Totals are gauges that only
grow, because a gauge exists from its first look on, at zero, and Prometheus computes rates of them
all the same. What the teacher's replicas measure is in `teacher.serve`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from ray.util.metrics import Gauge

from deploy.config import RunConfig
from deploy.roles import roles
from services.stage import QUIET_S, totals
from services.streams import Ledger

# What a worker reports of itself, and what its total over all workers is called.
_TOTALS = {
    "done": "scope_stage_done_total",
    "lost": "scope_stage_lost_total",
    "failed": "scope_stage_failures_total",
    "unavailable": "scope_stage_unavailable_total",
    "busy_s": "scope_stage_busy_seconds_total",
}


class Telemetry:
    """The metrics of a run."""

    def __init__(self, config: RunConfig) -> None:
        self._run = config.name
        self._stage_names = config.pipeline.names
        self._gauges: dict[str, Gauge] = {}
        self._seen: dict[tuple[str, str], float] = {}
        self._totals: dict[tuple[str, str], float] = defaultdict(float)
        self._deaths: dict[str, int] = {role.name: 0 for role in roles(config)}
        self._step, self._stepped = -1, time.monotonic()

    def step(self, record: Mapping[str, Any]) -> None:
        """Takes in the learner's record of a step."""
        for name, value in record.items():
            if "/" in name:
                self._set(_name(name), value)

    def died(self, worker: str) -> None:
        """Counts a worker, named `<run>-<role>-<number>`, that was found dead."""
        self._deaths[worker.split("-")[-2]] += 1

    def look(self, ledger: Ledger, reports: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes in where the prompts are, and what each worker last said."""
        self._pipeline(ledger)
        self._stages(reports)
        for role, count in self._deaths.items():
            self._set("scope_worker_deaths_total", count, role=role)

    def _pipeline(self, ledger: Ledger) -> None:
        if ledger.step != self._step:
            self._step, self._stepped = ledger.step, time.monotonic()
        self._set("scope_step", ledger.step)
        self._set("scope_quiet_seconds", time.monotonic() - self._stepped)
        for name, depth in ledger.depth.items():
            self._set("scope_stream_depth", depth, stream=name)
            self._set("scope_stream_age_seconds", ledger.age_s[name], stream=name)
        for state in ("fed", "trained", "dead", "in_flight"):
            self._set("scope_prompts", getattr(ledger, state), state=state)

    def _stages(self, reports: Mapping[str, Mapping[str, Any]]) -> None:
        live = [report for report in reports.values() if time.time() - report["at"] < QUIET_S]
        for stage in self._stage_names:
            mine = [report for report in live if report["stage"] == stage]
            self._set("scope_stage_workers", len(mine), stage=stage)
            self._set("scope_stage_active", _sum(mine, "active"), stage=stage)
            waiting = sum(bool(report["waiting_for"]) for report in mine)
            self._set("scope_stage_waiting", waiting, stage=stage)
        for name, value in totals(live).items():
            self._set(_name(name), value)
        for worker, report in reports.items():
            for field in _TOTALS:
                grown = report[field] - self._seen.get((worker, field), 0.0)
                self._seen[worker, field] = report[field]
                self._totals[report["stage"], field] += grown
        for stage in self._stage_names:
            for field, name in _TOTALS.items():
                self._set(name, self._totals[stage, field], stage=stage)

    def _set(self, name: str, value: float, **tags: str) -> None:
        gauge = self._gauges.get(name)
        if gauge is None:
            gauge = self._gauges[name] = Gauge(name, tag_keys=("run", *tags))
        gauge.set(value, {"run": self._run, **tags})


def _name(metric: str) -> str:
    """`loss/mle` as `scope_loss_mle`, and `scope/unknown_fraction` as `scope_unknown_fraction`."""
    return "scope_" + metric.removeprefix("scope/").replace("/", "_")


def _sum(reports: Iterable[Mapping[str, Any]], field: str) -> float:
    return sum(float(report[field]) for report in reports)
