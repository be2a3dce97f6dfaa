"""The dashboard, its queries and the alerts, put to a real Prometheus."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deploy import dashboards
from tests.deploy.conftest import ROOT, ScrapedRun, scope

QUERIES = [
    pytest.param(query, id=f"{panel['title']}: {legend}")
    for row in dashboards.panels()
    for panel in row["panels"]
    if not panel.get("optional")
    for legend, query in panel["queries"].items()
]


def answers(run: ScrapedRun, query: str) -> list[Any]:
    """Every series that a query has anywhere in the run."""
    answer = httpx.get(
        f"{run.prometheus}/api/v1/query_range",
        params={"query": query, "start": run.started, "end": run.ended, "step": "1s"},
    ).json()
    assert answer["status"] == "success", answer
    series: list[Any] = answer["data"]["result"]
    return series


@pytest.mark.slow
@pytest.mark.parametrize("query", QUERIES)
def test_every_panel_has_data(scraped_run: ScrapedRun, query: str) -> None:
    asked = query.replace("$__rate_interval", "5s").replace("$run", ".*")
    series = answers(scraped_run, asked)
    values = [float(value) for one in series for _, value in one["values"]]
    assert [value for value in values if value == value], asked  # anything but NaN


@pytest.mark.slow
def test_what_prometheus_has_is_what_happened(scraped_run: ScrapedRun) -> None:
    """The last values, against the run's own records."""
    record = json.loads((scraped_run.directory / "metrics.jsonl").read_text().splitlines()[-2])

    def seen(metric: str) -> set[float]:
        return {float(v) for one in answers(scraped_run, metric) for _, v in one["values"]}

    assert record["reward/accuracy"] in seen("ray_scope_reward_accuracy")
    assert record["step"] in seen("ray_scope_step")
    assert seen('ray_scope_prompts{state="dead"}') == {0.0}


def test_promtool_finds_no_fault(tmp_path: Path) -> None:
    done = scope("monitoring", "up", tmp_path)
    assert done.returncode == 0, done.stderr
    promtool = shutil.which("promtool")
    assert promtool, "apt-get install prometheus"
    for arguments in (["config", tmp_path / "prometheus.yml"], ["rules", tmp_path / "alerts.yml"]):
        checked = subprocess.run(
            [promtool, "check", *map(str, arguments)], capture_output=True, text=True
        )
        assert checked.returncode == 0, checked.stderr


ALERTS = {
    "ScopeStalled": [
        ('ray_scope_quiet_seconds{run="demo"}', "1000x20"),
        ('ray_scope_prompts{run="demo", state="in_flight"}', "5x20"),
    ],
    "ScopeDeadPrompts": [('ray_scope_prompts{run="demo", state="dead"}', "0x5 3x15")],
    "ScopeTeacherErrors": [
        ('ray_scope_stage_failures_total{run="demo", stage="teacher"}', "0+6x20"),
        ('ray_scope_stage_unavailable_total{run="demo", stage="teacher"}', "0+0x20"),
    ],
    "ScopeLogprobMismatch": [('ray_scope_sampling_logp_difference{run="demo"}', "0.3x20")],
    "ScopeWorkersDie": [('ray_scope_worker_deaths_total{run="demo", role="rollout"}', "0+1x20")],
}


def test_each_alert_goes_off_on_its_fault_alone(tmp_path: Path) -> None:
    rules = ROOT / "deploy/monitoring/alerts.yml"
    shutil.copy(rules, tmp_path)
    known = [rule["alert"] for rule in yaml.safe_load(rules.read_text())["groups"][0]["rules"]]
    assert set(known) == set(ALERTS)
    tests = []
    for fault, series in ALERTS.items():
        checks = [
            {"expr": f'count(ALERTS{{alertname="{alert}", alertstate="firing"}}) or vector(0)',
             "eval_time": "14m",
             "exp_samples": [{"labels": "{}", "value": int(alert == fault)}]}
            for alert in known
        ]  # fmt: skip
        inputs = [{"series": name, "values": values} for name, values in series]
        tests.append({"interval": "1m", "input_series": inputs, "promql_expr_test": checks})
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": ["alerts.yml"], "tests": tests}))
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_panel_covers_another() -> None:
    panels = dashboards.dashboard()["panels"]
    cells = [
        (x, y)
        for panel in panels
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert len({panel["id"] for panel in panels}) == len(panels)
