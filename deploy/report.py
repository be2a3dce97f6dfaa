"""`scope report`: one self-contained page about one or more runs, from their directories alone.

run directories ──▶ grouped: equal but for the seed ──▶ figures, tables, trajectories ──▶ page
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any

from deploy import figures
from deploy.accuracy import Estimate, over_prompts, pass_at_k
from deploy.config import ConfigError, load
from deploy.evaluate import Result
from services import metrics

_NOT_COMPARED = ("name", "seed", "runs_dir", "redis", "ray", "stage")
_LEAST_LABEL = "run"


@dataclass(frozen=True)
class RunData:
    """What a run directory tells."""

    name: str
    settings: dict[str, Any]  # flat: section.key
    records: list[dict[str, Any]]
    evaluations: dict[str, Result]  # label -> result
    samples: list[dict[str, Any]]

    @property
    def final(self) -> Result | None:
        """The evaluation of the newest weights."""
        return max(self.evaluations.values(), key=lambda r: r.version, default=None)


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ in nothing but the seed, and what sets them apart from the others."""

    label: str
    runs: list[RunData]


def read_run(directory: Path) -> RunData:
    """Reads a run directory.

    Raises:
        ConfigError: it is none, or the run has not made a step yet.
    """
    config = load(directory / "config.yaml")
    records = metrics.read(directory)
    if not records:
        raise ConfigError(f"{directory} has no metrics: the run has not made a step yet")
    evaluations = {
        file.stem.removeprefix("evaluation-"): Result.of_json(
            json.loads(file.read_text(encoding="utf-8"))
        )
        for file in sorted(directory.glob("evaluation-*.json"))
    }
    settings = _flat(config.model_dump(mode="json"))
    return RunData(config.name, settings, records, evaluations, metrics.read_samples(directory))


def write(directories: Sequence[Path], out: Path) -> Path:
    """Writes `index.html` and the figures as PNG into `out`; returns the page.

    Raises:
        ConfigError: see `read_run`.
    """
    groups = group([read_run(directory) for directory in directories])
    out.mkdir(parents=True, exist_ok=True)
    curves = [_curves(g) for g in groups]
    light, dark = figures.draw(curves, dark=False), figures.draw(curves, dark=True)
    for name, png in light.items():
        (out / f"{name}.png").write_bytes(png)
    runs = [run for g in groups for run in g.runs]
    page = Template((Path(__file__).parent / "report.html").read_text(encoding="utf-8")).substitute(
        title=escape(", ".join(g.label for g in groups)),
        runs=escape(", ".join(run.name for run in runs)),
        finals=_finals(groups),
        differences=_differences(groups),
        figures="\n".join(_picture(name, light[name], dark[name]) for name in light),
        settings=_settings(groups),
        # In a script element "</" ends it, and "<!--<script" makes it go on past its end.
        samples=json.dumps({run.name: run.samples for run in runs}).replace("<", "\\u003c"),
    )
    (out / "index.html").write_text(page, encoding="utf-8")
    return out / "index.html"


def group(runs: Sequence[RunData]) -> list[RunGroup]:
    """Puts runs together that differ in the seed alone, and names the groups by the settings in
    which they differ from one another."""

    def key(run: RunData) -> str:
        compared = {k: v for k, v in run.settings.items() if k.split(".")[0] not in _NOT_COMPARED}
        return json.dumps(compared, sort_keys=True)

    indices = {key(run): index for index, run in reversed(list(enumerate(runs)))}
    ordered = sorted(runs, key=lambda run: indices[key(run)])
    sets = [list(some) for _, some in groupby(ordered, key)]
    firsts = [json.loads(key(some[0])) for some in sets]
    names = sorted({name for first in firsts for name in first})
    differing = [n for n in names if len({json.dumps(f.get(n)) for f in firsts}) > 1]
    # The kind says it best, where that is what differs.
    differing = [n for n in differing if n.endswith("objective.kind")] or differing[:3]
    return [
        RunGroup(_label(some, first, differing), some)
        for some, first in zip(sets, firsts, strict=True)
    ]


def _label(runs: Sequence[RunData], settings: dict[str, Any], differing: Sequence[str]) -> str:
    if not differing:
        return runs[0].name
    if len(differing) == 1 and differing[0].endswith("objective.kind"):
        return str(settings[differing[0]])
    return ", ".join(f"{name.rpartition('.')[2]} {settings.get(name)}" for name in differing)


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _curves(some: RunGroup) -> figures.Curves:
    return figures.Curves(
        label=some.label,
        records=[run.records for run in some.runs],
        evaluations=[
            sorted(
                (r.version, r.score.avg_at_k, r.score.pass_at_k) for r in run.evaluations.values()
            )
            for run in some.runs
        ],
    )


# --------------------------------------------------------------------------------- accuracy


def _finals(groups: Sequence[RunGroup]) -> str:
    rows = []
    for some in groups:
        for run in some.runs:
            if (result := run.final) is None:
                continue
            s = result.score
            rows.append(
                [
                    some.label, run.name, str(result.version), str(s.k), str(s.avg_at_k),
                    str(s.pass_at_k), str(s.pass_at_k_bootstrap), str(s.prompts),
                    str(s.truncated), str(s.unknown),
                ]
            )  # fmt: skip
    headings = (
        "", "run", "step", "k", "Avg@k", "Pass@k", "Pass@k, bootstrap", "prompts", "truncated",
        "unknown",
    )  # fmt: skip
    return _table(headings, rows) if rows else "<p>No run was evaluated.</p>"


def _differences(groups: Sequence[RunGroup]) -> str:
    """What training changed, and what sets each group apart from the first, prompt by prompt."""
    rows = []
    for some in groups:
        before = [run.evaluations["before"] for run in some.runs if "before" in run.evaluations]
        rows += _difference(f"{some.label}: after − before", _finals_of(some), before)
    for other in groups[1:]:
        title = f"{other.label} − {groups[0].label}"
        rows += _difference(title, _finals_of(other), _finals_of(groups[0]))
    if not rows:
        return "<p>Nothing to compare.</p>"
    return _table(("", "Avg@k", "Pass@k", "prompts"), rows)


def _finals_of(some: RunGroup) -> list[Result]:
    return [run.final for run in some.runs if run.final is not None]


def _difference(title: str, ours: Sequence[Result], theirs: Sequence[Result]) -> list[list[str]]:
    """One row, or none where no prompt is in both."""
    mine, other = _by_prompt(ours), _by_prompt(theirs)
    common = sorted(mine.keys() & other.keys())
    if not common:
        return []
    average, passed = (
        over_prompts([mine[prompt][index] - other[prompt][index] for prompt in common])
        for index in (0, 1)
    )
    return [[title, _signed(average), _signed(passed), str(len(common))]]


def _by_prompt(results: Sequence[Result]) -> dict[str, tuple[float, float]]:
    """Avg@k and Pass@k of each prompt, means over the runs (of the same k)."""
    by_task: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        for t in result.tallies:
            values = (t.correct / t.samples, pass_at_k(t.samples, t.correct, t.samples))
            by_task.setdefault(t.id, []).append(values)
    return {
        prompt: (sum(v[0] for v in values) / len(values), sum(v[1] for v in values) / len(values))
        for prompt, values in by_task.items()
        if len(values) == len(results)
    }


def _signed(e: Estimate) -> str:
    return f"{100 * e.value:+.1f} [{100 * e.low:+.1f}, {100 * e.high:+.1f}] points"


# ------------------------------------------------------------------------------------- HTML


def _picture(name: str, light: bytes, dark: bytes) -> str:
    def uri(png: bytes) -> str:
        return "data:image/png;base64," + base64.b64encode(png).decode()

    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{uri(dark)}">'
        f'<img src="{uri(light)}" alt="{escape(name)}" loading="lazy"></picture>'
    )


def _settings(groups: Sequence[RunGroup]) -> str:
    """The settings in which the groups differ."""
    names = sorted({name for g in groups for name in g.runs[0].settings})
    rows = []
    for name in names:
        values = [str(g.runs[0].settings.get(name, "–")) for g in groups]
        if len(set(values)) > 1 and name.split(".")[0] not in _NOT_COMPARED:
            rows.append([name, *values])
    if not rows:
        return "<p>The runs differ in the seed at most.</p>"
    return _table(("setting", *(g.label for g in groups)), rows)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
