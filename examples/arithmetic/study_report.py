"""The study's tables and plots, from `results/` alone.

    python -m examples.arithmetic.study_report

writes `results/summary.json` and the PNGs, and prints the tables of docs/study.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from deploy.accuracy import Estimate, over_prompts, over_seeds, pass_at_k
from examples.arithmetic.study import (
    ABLATIONS,
    METHODS,
    RATIOS,
    RESULTS,
    SAMPLES,
    read_runs,
)
from examples.arithmetic.ways import held_out, ways

KS = (1, 2, 4, 8, 16, 32)
QUARTILES = 4
DIGITS = 4
Runs: TypeAlias = Mapping[str, Mapping[int, Sequence[int]]]  # experiment -> seed -> correct


def passed(correct: Sequence[int], k: int) -> float:
    """Mean unbiased Pass@k over the prompts; at k = 1 it is Avg@32."""
    return float(np.mean([pass_at_k(SAMPLES, c, k) for c in correct]))


def by_experiment(records: Sequence[Mapping[str, Any]]) -> Runs:
    grouped: dict[str, dict[int, Sequence[int]]] = {}
    for record in records:
        grouped.setdefault(record["experiment"], {})[record["seed"]] = record["correct"]
    return grouped


def over_runs(runs: Runs, name: str, k: int) -> Estimate:
    """Pass@k, with Student's interval over the seeds."""
    return over_seeds([passed(correct, k) for correct in runs[name].values()])


def difference(runs: Runs, name: str, k: int, reference: str = "scope") -> Estimate:
    """Pass@k of `name` minus that of `reference`, paired by seed: the same prompts in the same
    order, and the same random numbers."""
    seeds = sorted(runs[name].keys() & runs[reference].keys())
    return over_seeds([passed(runs[name][s], k) - passed(runs[reference][s], k) for s in seeds])


def recovered(records: Sequence[Mapping[str, Any]], ratio: float) -> list[Estimate]:
    """For each quartile of the teacher's perplexity, lowest first: the share of continuations
    that came back to the right answer; the interval is over trajectories."""
    ordered = sorted(records, key=lambda r: r["teacher_nll"])
    parts = np.array_split(np.array([r[f"recovered at {ratio:g}"] for r in ordered]), QUARTILES)
    return [over_prompts((part / 4).tolist()) for part in parts]


def on_closed(runs: Runs) -> Runs:
    """The same runs, with the held-out prompts alone that cannot be worked out as they stand."""
    closed = [index for index, problem in enumerate(held_out()) if problem not in ways(problem)]
    return {
        name: {seed: [correct[index] for index in closed] for seed, correct in seeds.items()}
        for name, seeds in runs.items()
    }


def separation(records: Sequence[Mapping[str, Any]]) -> float:
    """How well the teacher's perplexity tells trajectories after which it was taught bad advice
    from other wrong ones: the area under the ROC curve, 0.5 where it does not."""
    bad, other = (
        np.array([r["teacher_nll"] for r in records if r["misread"] == misread])
        for misread in (True, False)
    )
    above = (bad[:, None] > other).mean() + 0.5 * (bad[:, None] == other).mean()
    return round(float(above), DIGITS)


def recovered_by_advice(records: Sequence[Mapping[str, Any]], ratio: float) -> list[Estimate]:
    """As `recovered`, of trajectories after which the teacher's advice is good, and bad."""
    return [
        over_prompts([r[f"recovered at {ratio:g}"] / 4 for r in records if r["misread"] == misread])
        for misread in (False, True)
    ]


def _rounded(e: Estimate) -> list[float]:
    return [round(x, DIGITS) for x in e]


def summary(
    runs: Runs, before: Mapping[str, Sequence[int]], wrong: Sequence[Any]
) -> dict[str, Any]:
    """Every figure that docs/study.md quotes; a value and its 95% interval each."""
    closed = on_closed(runs)
    closed_before = on_closed({name: {0: correct} for name, correct in before.items()})
    return {
        "before": {
            name: {f"pass@{k}": round(passed(correct, k), DIGITS) for k in KS}
            | {
                f"closed pass@{k}": round(passed(closed_before[name][0], k), DIGITS)
                for k in (1, SAMPLES)
            }
            for name, correct in before.items()
        },
        "runs": {
            name: {
                "seeds": len(seeds),
                **{f"pass@{k}": _rounded(over_runs(runs, name, k)) for k in KS},
                "avg@32 minus scope's": _rounded(difference(runs, name, 1)),
                "pass@32 minus scope's": _rounded(difference(runs, name, SAMPLES)),
                "closed pass@32": _rounded(over_runs(closed, name, SAMPLES)),
                "closed pass@32 minus scope's": _rounded(difference(closed, name, SAMPLES)),
            }
            for name, seeds in runs.items()
        },
        "recovery": {
            f"{ratio:g}": [_rounded(e) for e in recovered(wrong, ratio)] for ratio in RATIOS
        },
        "bad advice": {
            "trajectories": sum(r["misread"] for r in wrong),
            "of": len(wrong),
            "separation": separation(wrong),
            "recovered after good and bad": {
                f"{ratio:g}": [_rounded(e) for e in recovered_by_advice(wrong, ratio)]
                for ratio in RATIOS
            },
        },
    }


# ------------------------------------------------------------------------------------ tables


def table(runs: Runs, names: Sequence[str]) -> str:
    """One row an experiment, in Markdown."""
    lines = [
        "| | seeds | Avg@32 | Pass@32 | Pass@32, closed | Avg@32 − SCOPE's | Pass@32 − SCOPE's |",
        "|---|---|---|---|---|---|---|",
    ]
    closed = on_closed(runs)
    for name in (n for n in names if n in runs):
        both = (
            ("–", "–")
            if name == "scope"
            else (points(difference(runs, name, 1)), points(difference(runs, name, SAMPLES)))
        )
        lines.append(
            f"| {name} | {len(runs[name])} | {percent(over_runs(runs, name, 1))} "
            f"| {percent(over_runs(runs, name, SAMPLES))} "
            f"| {percent(over_runs(closed, name, SAMPLES))} | {both[0]} | {both[1]} |"
        )
    return "\n".join(lines)


def by_k(runs: Runs, names: Sequence[str]) -> str:
    """Pass@k at every k, in Markdown."""
    lines = ["| | " + " | ".join(f"k = {k}" for k in KS) + " |", "|---" * (len(KS) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(percent(over_runs(runs, name, k)) for k in KS) + " |"
        for name in names
        if name in runs
    ]
    return "\n".join(lines)


def percent(e: Estimate) -> str:
    return f"{100 * e.value:.1f} ± {50 * (e.high - e.low):.1f}"


def points(e: Estimate) -> str:
    return f"{100 * e.value:+.1f} ± {50 * (e.high - e.low):.1f}"


# ------------------------------------------------------------------------------------- plots


def plot_pass_at_k(runs: Runs, before: Mapping[str, Sequence[int]]) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.8), dpi=110, layout="constrained")
    for name in (m.name for m in METHODS if m.name in runs):
        estimates = [over_runs(runs, name, k) for k in KS]
        axes.plot(KS, [e.value for e in estimates], "o-", markersize=3, label=name)
        axes.fill_between(KS, [e.low for e in estimates], [e.high for e in estimates], alpha=0.12)
    for name, style in (("student", "k--"), ("teacher", "k:")):
        axes.plot(KS, [passed(before[name], k) for k in KS], style, label=f"{name}, untrained")
    axes.set(xscale="log", xlabel="k", ylabel="Pass@k, held out", xticks=KS, xticklabels=KS)
    axes.minorticks_off()
    axes.legend(fontsize=8)
    _save(figure, "pass-at-k")


def plot_recovery(records: Sequence[Any]) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.4), dpi=110, layout="constrained")
    positions = np.arange(QUARTILES)
    for number, ratio in enumerate(RATIOS):
        estimates = recovered(records, ratio)
        axes.bar(
            positions + 0.26 * (number - 1), [e.value for e in estimates], 0.24,
            yerr=np.abs([(e.value - e.low, e.high - e.value) for e in estimates]).T,
            capsize=2, error_kw={"linewidth": 0.8}, label=f"first {ratio:.0%} kept",
        )  # fmt: skip
    axes.set(
        xticks=positions, ylabel="continuations that recover",
        xticklabels=["lowest", "second", "third", "highest"],
        xlabel="quartile of the teacher's perplexity of the wrong trajectory",
    )  # fmt: skip
    axes.legend(fontsize=8)
    _save(figure, "recovery")


def plot_differences(runs: Runs) -> None:
    names = [e.name for e in (*METHODS, *ABLATIONS) if e.name in runs and e.name != "scope"]
    figure, both = plt.subplots(
        1, 2, figsize=(8, 0.32 * len(names) + 1), dpi=110, sharey=True, layout="constrained"
    )
    for axes, k, title in zip(both, (1, SAMPLES), ("Avg@32", "Pass@32"), strict=True):
        estimates = [difference(runs, name, k) for name in names]
        middle = np.array([100 * e.value for e in estimates])
        half = np.array([50 * (e.high - e.low) for e in estimates])
        axes.errorbar(
            middle, range(len(names)), xerr=np.where(np.isfinite(half), half, 0), fmt="o",
            markersize=4, capsize=2,
        )  # fmt: skip
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set(xlabel=f"{title} minus SCOPE's, points", yticks=range(len(names)))
        axes.set_yticklabels(names)
    both[0].invert_yaxis()
    _save(figure, "differences")


def _save(figure: Any, name: str) -> None:
    figure.savefig(RESULTS / f"{name}.png", metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    runs = by_experiment(read_runs())
    before = json.loads((RESULTS / "before.json").read_text(encoding="utf-8"))
    wrong = json.loads((RESULTS / "recovery.json").read_text(encoding="utf-8"))
    results = summary(runs, before, wrong)
    (RESULTS / "summary.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot_pass_at_k(runs, before)
    plot_recovery(wrong)
    plot_differences(runs)
    print(table(runs, [e.name for e in METHODS]), end="\n\n")
    print(table(runs, ["scope", *(e.name for e in ABLATIONS)]), end="\n\n")
    print(by_k(runs, [e.name for e in METHODS]), end="\n\n")
    for ratio in RATIOS:
        print(ratio, "  ".join(map(str, recovered(wrong, ratio))))


if __name__ == "__main__":
    main()
