"""`scope monitoring up`: Prometheus and Grafana, set up for a Ray cluster and our dashboard.

prometheus.yml                       finds every node's metrics by the cluster's dashboard
alerts.yml                           stall, dead prompts, teacher errors, log-prob mismatch
grafana/datasources, dashboards/     provisioning, and the dashboard as JSON
compose.yaml                         both servers as containers
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from deploy import yaml_file

_SOURCES = Path(__file__).parent / "monitoring"
_COLUMNS, _HEIGHT = 4, 7  # panels in a row of the dashboard, which is 24 units wide
PROMETHEUS = "http://localhost:9090"


def panels() -> list[dict[str, Any]]:
    """The rows of the dashboard, as `panels.yaml` has them."""
    rows: list[dict[str, Any]] = yaml_file.read(_SOURCES / "panels.yaml")
    return rows


def write(directory: Path, address: str, *, interval_s: int = 10) -> None:
    """Writes all of it.

    Args:
        directory: made if need be; its files are replaced.
        address: of the cluster's dashboard, such as http://127.0.0.1:8265.
        interval_s: between two scrapes.
    """
    directory = directory.resolve()
    for name in ("alerts.yml", "compose.yaml"):
        _write(directory / name, (_SOURCES / name).read_text(encoding="utf-8"))
    _write(directory / "prometheus.yml", _dump(_prometheus(address, interval_s)))
    grafana = directory / "grafana"
    _write(grafana / "datasources/scope.yaml", _dump(_datasource()))
    _write(grafana / "dashboards/scope.yaml", _dump(_provider()))
    _write(grafana / "dashboards/scope.json", json.dumps(dashboard(), indent=1))


def dashboard() -> dict[str, Any]:
    """The dashboard in Grafana's own JSON."""
    made: list[dict[str, Any]] = []
    y = 0
    for row in panels():
        made.append(
            {"type": "row", "title": row["row"], "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}}
        )
        y += 1
        for number, panel in enumerate(row["panels"]):
            x = number % _COLUMNS * (24 // _COLUMNS)
            made.append(_panel(panel, x, y + number // _COLUMNS * _HEIGHT))
        y += -(-len(row["panels"]) // _COLUMNS) * _HEIGHT
    for number, panel in enumerate(made):
        panel["id"] = number + 1
    return {
        "uid": "scope",
        "title": "SCOPE",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_run_variable()]},
        "panels": made,
    }


def _panel(panel: dict[str, Any], x: int, y: int) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": panel["title"],
        "datasource": {"type": "prometheus", "uid": "scope"},
        "gridPos": {"x": x, "y": y, "w": 24 // _COLUMNS, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel["unit"], "custom": {"fillOpacity": 8}}},
        "targets": [
            {"refId": chr(ord("A") + number), "expr": expression, "legendFormat": legend}
            for number, (legend, expression) in enumerate(panel["queries"].items())
        ],
    }


def _run_variable() -> dict[str, Any]:
    return {
        "name": "run",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "scope"},
        "query": {"query": "label_values(ray_scope_step, run)", "refId": "run"},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _prometheus(address: str, interval_s: int) -> dict[str, Any]:
    discovery: dict[str, Any] = {
        "url": f"{address.rstrip('/')}/api/prometheus/sd",
        "refresh_interval": f"{interval_s}s",
    }
    if token := _token_file():
        # The type although it is the default: for discovery, Prometheus 2.42 forgets it.
        discovery["authorization"] = {"type": "Bearer", "credentials_file": str(token)}
    return {
        "global": {
            "scrape_interval": f"{interval_s}s",
            "evaluation_interval": f"{interval_s}s",
        },
        "rule_files": ["alerts.yml"],
        "scrape_configs": [{"job_name": "ray", "http_sd_configs": [discovery]}],
    }


def _token_file() -> Path | None:
    """Where Ray keeps this user's token for clusters that ask for one."""
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    return file if file.exists() else None


def _datasource() -> dict[str, Any]:
    source = {"name": "SCOPE", "uid": "scope", "type": "prometheus", "url": PROMETHEUS}
    return {"apiVersion": 1, "datasources": [{**source, "access": "proxy", "isDefault": True}]}


def _provider() -> dict[str, Any]:
    options = {"path": "/etc/scope/grafana/dashboards"}
    return {"apiVersion": 1, "providers": [{"name": "scope", "type": "file", "options": options}]}


def _dump(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False)


def _write(file: Path, content: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")
