"""Figures of one or more runs, each drawn for light and for dark pages. Knows matplotlib only here.

Runs that differ in the seed alone are one line, their mean, in a band from the lowest to the
highest.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import matplotlib

matplotlib.use("Agg")  # no display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from deploy.accuracy import Estimate

Record: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Curves:
    """What is drawn of runs that differ in the seed alone."""

    label: str
    records: Sequence[Sequence[Record]]  # of each run, one a step
    evaluations: Sequence[Sequence[tuple[int, Estimate, Estimate]]]  # step, Avg@k, Pass@k


@dataclass(frozen=True, slots=True)
class Panel:
    """One figure. `metrics` are drawn with the line styles of `_STYLES`, in this order."""

    name: str
    title: str
    unit: str
    metrics: Mapping[str, str]  # metric -> how the legend calls it


PANELS = (
    Panel("accuracy", "Accuracy on training prompts", "share of samples", {"reward/accuracy": ""}),
    Panel(
        "paths", "Where trajectories go", "share of samples",
        {
            "scope/student_path_fraction": "student path (correct)",
            "scope/teacher_path_fraction": "teacher path (incorrect)",
            "scope/unknown_fraction": "unknown",
        },
    ),
    Panel(
        "ess", "Effective number of trajectories on a path", "trajectories a group",
        {"scope/student_weight_ess": "student path", "scope/teacher_weight_ess": "teacher path"},
    ),
    Panel(
        "perplexity", "Perplexity of both paths", "perplexity (geometric mean)",
        {"ppl/student": "student, of correct", "ppl/teacher": "teacher, of incorrect"},
    ),
    Panel("kl", "Sampled reverse KL to the teacher", "nats a token", {"kl/student_teacher": ""}),
    Panel("entropy", "Entropy of the policy that sampled", "nats a token", {"actor/entropy": ""}),
    Panel("length", "Length of completions", "tokens", {"response_length/mean": ""}),
    Panel("staleness", "Age of the weights that sampled", "steps", {"staleness/mean": ""}),
    Panel("throughput", "Throughput", "trained tokens a second",
          {"throughput/trained_tokens_per_s": ""}),
)  # fmt: skip

_STYLES = ("-", "--", ":")
_COLOURS = ("#3b7dd8", "#d9822b", "#3f9c5a", "#b04a8f", "#8a6d3b", "#c0392b", "#5c6bc0", "#607d8b")
_SPREAD = {"scope/student_weight": "student path", "scope/teacher_weight": "teacher path"}


def draw(groups: Sequence[Curves], *, dark: bool) -> dict[str, bytes]:
    """Every figure that the runs have numbers for, as PNG, by its name."""
    made = {"held-out": _figure("Held-out accuracy", _held_out, groups, None, dark=dark)}
    made |= {panel.name: _figure(panel.title, _lines, groups, panel, dark=dark) for panel in PANELS}
    made["weights"] = _figure(
        "Spread of the weights (10%, 50%, 90%)", _spread, groups, None, dark=dark
    )
    made["time"] = _figure("Where the time of a step goes", _time, groups, None, dark=dark)
    return {name: png for name, png in made.items() if png is not None}


def _figure(
    title: str,
    fill: Callable[[Axes, Sequence[Curves], Any], None],
    groups: Sequence[Curves],
    panel: Panel | None,
    *,
    dark: bool,
) -> bytes | None:
    ink, paper = ("#d8dee6", "#161b22") if dark else ("#24292f", "#ffffff")
    grey = "#30363d" if dark else "#d8dee4"
    settings: Any = {
        "text.color": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink,
        "axes.edgecolor": grey, "grid.color": grey, "figure.facecolor": paper,
        "axes.facecolor": paper, "legend.facecolor": paper, "legend.edgecolor": grey,
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with plt.rc_context(settings):
        figure, axes = plt.subplots(figsize=(5.2, 3.2), dpi=144, layout="constrained")
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(True, linewidth=0.6)
        fill(axes, groups, panel)
        if not axes.has_data():
            plt.close(figure)
            return None
        if fill is _time:
            figure.legend(fontsize=7, loc="outside lower center", ncols=4)
        elif len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(fontsize=7, framealpha=0.8)
        written = io.BytesIO()
        # Without the writing program's version the same numbers make the same bytes.
        figure.savefig(written, format="png", metadata={"Software": None})
        plt.close(figure)
    return written.getvalue()


def _lines(axes: Axes, groups: Sequence[Curves], panel: Panel) -> None:
    for group, colour in zip(groups, _colours(groups), strict=True):
        for (metric, name), style in zip(panel.metrics.items(), _STYLES, strict=False):
            steps, low, mean, high = _over_runs(group.records, metric)
            if not steps:
                continue
            legend = ", ".join(part for part in (group.label, name) if part)
            axes.plot(steps, mean, style, color=colour, linewidth=1.4, label=legend)
            if len(group.records) > 1:
                axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)


def _held_out(axes: Axes, groups: Sequence[Curves], _: None) -> None:
    for group, colour in zip(groups, _colours(groups), strict=True):
        for number, run in enumerate(group.evaluations):
            for index, (name, style) in enumerate((("Avg@k", "o-"), ("Pass@k", "s--"))):
                points = [(step, both[index]) for step, *both in run]
                if not points:
                    continue
                values = [estimate.value for _, estimate in points]
                errors = [
                    [e.value - e.low for _, e in points],
                    [e.high - e.value for _, e in points],
                ]
                axes.errorbar(
                    [step for step, _ in points], values, yerr=np.abs(errors), fmt=style,
                    color=colour, markersize=3, linewidth=1.2, elinewidth=0.7, capsize=2,
                    label=f"{group.label}, {name}" if number == 0 else None,
                )  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("share, with 95% intervals")


def _spread(axes: Axes, groups: Sequence[Curves], _: None) -> None:
    for group, colour in zip(groups, _colours(groups), strict=True):
        for (prefix, name), style in zip(_SPREAD.items(), _STYLES, strict=False):
            low, middle, high = (
                _over_runs(group.records, f"{prefix}_p{percent}") for percent in (10, 50, 90)
            )
            if not middle[0]:
                continue
            axes.plot(middle[0], middle[2], style, color=colour, label=f"{group.label}, {name}")
            axes.fill_between(low[0], low[2], high[2], color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel("weight / its group's mean")


def _time(axes: Axes, groups: Sequence[Curves], _: None) -> None:
    """Stacked bars of the mean seconds of each phase."""
    names = sorted(
        {
            n
            for g in groups
            for run in g.records
            for r in run
            for n in r
            if n.startswith("timing_s/")
        }
    )
    if not names:
        return
    left = np.zeros(len(groups))
    for number, name in enumerate(names):
        seconds = np.array(
            [np.mean([r.get(name, 0.0) for run in g.records for r in run] or [0]) for g in groups]
        )
        axes.barh(
            [g.label for g in groups], seconds, left=left,
            color=plt.get_cmap("tab20")(number % 20), label=name.removeprefix("timing_s/"),
        )  # fmt: skip
        left += seconds
    axes.set_xlabel("seconds a step")


def _over_runs(
    runs: Sequence[Sequence[Record]], metric: str
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps, and over the runs the lowest, mean and highest value of each."""
    by_step: dict[int, list[float]] = {}
    for record in (record for run in runs for record in run):
        value = record.get(metric)
        if isinstance(value, int | float) and math.isfinite(value):
            by_step.setdefault(int(record["step"]), []).append(float(value))
    steps = sorted(by_step)
    return (
        steps,
        [min(by_step[s]) for s in steps],
        [sum(by_step[s]) / len(by_step[s]) for s in steps],
        [max(by_step[s]) for s in steps],
    )


def _colours(groups: Sequence[Curves]) -> list[str]:
    return [_COLOURS[number % len(_COLOURS)] for number in range(len(groups))]
