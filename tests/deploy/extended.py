"""The demo with what a user may add to it, all in one run on real Ray, Serve and Redis: a stage of
one's own, and a second model that scores the rows of one data source and reads more than the
student. Its objective asks for all that a teacher tells: log-probs of the student's most likely
tokens, and the entropy."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import redis
import yaml

from deploy.scale import scale
from deploy.status import read_status, render
from services.trajectory import ScoredGroup, decode
from tests.deploy.driver import DEMO, ROOT, Driver

MODELS = {name: ROOT / f"examples/arithmetic/{name}" for name in ("teacher", "student")}
STEP = (
    "{name: filter, after: verifier, worker: 'tests.deploy.filters:Filter', settings: {every: 3}, "
    "resources: {cpus: 0.1}}"
)
STEPS, GROUPS = 2, 16
PROMPTS = STEPS * GROUPS
FILTERED = range(0, PROMPTS, 3)
OTHER = {
    "model": str(MODELS["student"]), "engine": {"kind": "transformers"},
    "resources": {"cpus": 0.5}, "data_sources": ["chains"], "context": "{reference};{prompt}",
}  # fmt: skip
NAMED = 2  # the row that names its teacher


@dataclass(frozen=True)
class Extended:
    """A finished run, and what was seen of it on the way."""

    directory: Path
    asked: list[str]
    """The prompts, in the order of the feed."""
    shown: str
    """Its status while two filters held what they had."""
    said: str
    scored: dict[int, ScoredGroup]
    """Every group that was scored, by its order."""


def start(runs: Path) -> Extended:
    """Runs it: with one filter at first, then two, who let go of nothing until both were seen."""
    run, gate, rows = runs / "demo", runs / "open", write_rows(runs / "rows.jsonl")
    driver = Driver(
        runs / "log", "run", DEMO, f"runs_dir={runs}", f"trainer.max_steps={STEPS}",
        f"trainer.groups_per_step={GROUPS}", "trainer.checkpoint.every_steps=100",
        "evaluation=null", "ray.dashboard=false", f"data.path={rows}", "data.shuffle=false",
        f"steps=[{gated(gate)}]",
        "max_dead_fraction=0.5", "trainer.objective.kind=eopd", "trainer.objective.top_k=4",
        "trainer.objective.top_k_of=student",
        f"teachers.other={yaml.safe_dump(OTHER, default_flow_style=True)}", PYTHONPATH=str(ROOT),
    )  # fmt: skip
    address = run / "redis/url"
    try:
        driver.wait_for(lambda: address.exists() and address.read_text())
        driver.wait_for(lambda: at_work(run) == ["demo-filter-0"])
        asyncio.run(scale(run, ["filter=2"]))
        driver.wait_for(lambda: at_work(run) == ["demo-filter-0", "demo-filter-1"])
        shown = render(asyncio.run(read_status(run)))
    finally:
        gate.touch()  # whatever was found, the run ends
    scored = collect(run, PROMPTS - len(FILTERED), lambda: driver.ended)
    assert driver.end() == 0, driver.said
    asked = [json.loads(line)["prompt"][0]["content"] for line in rows.read_text().splitlines()]
    return Extended(run, asked, shown, driver.said, scored)


def gated(gate: Path) -> str:
    """The row of a filter that holds what it has until `gate` exists."""
    return STEP.replace("every: 3", f"every: 3, gate: '{gate}'")


def write_rows(file: Path) -> Path:
    """Some of the demo's prompts: of two data sources, and one that names its teacher."""
    table = pq.read_table(ROOT / "examples/arithmetic/train.parquet").to_pylist()[:PROMPTS]
    made = []
    for number, row in enumerate(table):
        source = "chains" if number % 2 else "arithmetic"
        extra = {"teacher": "other"} if number == NAMED else {}
        made.append({**row, "data_source": source, "extra_info": {"index": number, **extra}})
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return file


def at_work(run: Path) -> list[str]:
    """The filters that report, from within the run, that they hold items."""
    reports = asyncio.run(read_status(run))["workers"]
    return sorted(
        name.rpartition("-")[0]
        for name, report in reports.items()
        if report["stage"] == "filter" and report["active"]
    )


def collect(run: Path, count: int, ended: Callable[[], object]) -> dict[int, ScoredGroup]:
    """The first `count` scored groups of a run by their order: the learner takes none out of the
    stream before its checkpoint, which is to be at the end."""
    address, client, last = run / "redis/url", None, "-"
    found: dict[int, ScoredGroup] = {}
    while not ended() and len(found) < count:
        if client is None and address.exists():
            client = redis.Redis.from_url(address.read_text())
        if client is not None:
            entries: Any = client.xrange("scope:{demo}:scored", min=last)
            for entry, fields in entries:
                group = decode(ScoredGroup, fields[b"item"])
                found[group.prompt.order] = group
                last = f"({entry.decode()}"
        time.sleep(0.05)
    return found
