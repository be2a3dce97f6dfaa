"""Does `scope plan` predict what happens? One real run gives the rates, others are predicted.

    python -m benchmarks.plan [--json FILE] [--only NAME …] [--runs DIRECTORY]

Each row is a run of the demo in another configuration: what the plan said before it started, and
what it then did, in seconds a step, its first fifth and its emptying pipeline left out. All run on
this machine alone, which must have nothing else to do, and learn so little that answers stay what
they are. The first row is the run that gave the rates (does the arithmetic add up?), the last the
same once more (how much is the machine's own doing?). `cores` is what a run's processes used: far
less than there are, where the plan says that the cores limit, means that others used them. Each run
takes most of a minute; those that --runs has already are not repeated.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.rows import machine
from deploy import plan
from deploy.config import load
from deploy.rates import of_run
from services.metrics import read

DEMO = Path("deploy/runs/demo.yaml")
STEPS, BASE_STEPS = 30, 50
COMMON = (
    "ray.dashboard=false", "evaluation=null", "trainer.optimizer.lr=1.0e-9",
    "trainer.checkpoint.every_steps=1000",
)  # fmt: skip
VARIANTS: dict[str, tuple[str, ...]] = {
    "as measured": (),
    "max_staleness 0": ("trainer.max_staleness=0",),
    "objective opd": ("trainer.objective.kind=opd",),
    "n 4": ("sampling.n=4",),
    "groups_per_step 32": ("trainer.groups_per_step=32",),
    "2 rollout workers": ("rollout.workers=2",),
    "the same again": (),
}


def train(runs: Path, name: str, overrides: tuple[str, ...]) -> Path:
    """Runs the demo, unless it was run before; its directory."""
    if (runs / name / "export").exists():
        return runs / name
    shutil.rmtree(runs / name, ignore_errors=True)  # of a run that was cut off
    command = "import sys; from deploy.cli import main; main(sys.argv[1:])"
    steps = BASE_STEPS if name == "base" else STEPS
    arguments = ["run", str(DEMO), f"runs_dir={runs}", f"name={name}", *COMMON, *overrides]
    subprocess.run(
        [sys.executable, "-c", command, *arguments, f"trainer.max_steps={steps}"],
        check=True, stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return runs / name


def measured(run_dir: Path) -> tuple[float, float]:
    """Seconds a step of a finished run, and the cores that its processes kept busy meanwhile. Left
    out are its first fifth, and its last steps, for which nobody samples any more."""
    records = read(run_dir)
    under_way = load(run_dir / "config.yaml").trainer.max_staleness + 1
    settled = records[max(2, len(records) // 5) : -under_way]
    first, last = settled[0], settled[-1]
    took = last["time"] - first["time"]
    used = sum(last[name] - first[name] for name in first if name.startswith("cpu_s/"))
    return took / (len(settled) - 1), used / took


def rows(names: tuple[str, ...], kept: Path | None) -> list[dict[str, object]]:
    """Every variant, predicted and run."""
    results: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = kept or Path(temporary)
        base = train(directory, "base", ())
        rates = of_run(base).model_copy(update={"about": f"a run of the demo, {BASE_STEPS} steps"})
        for name in names:
            config = load(DEMO, [*COMMON, *VARIANTS[name]])
            made = plan.make(config, rates, cores=os.cpu_count() or 1)
            # The run that gave the rates is also a check of the arithmetic: that it adds up.
            own = base
            if name != "as measured":
                own = train(directory, name.replace(" ", "-"), VARIANTS[name])
            step_s, used = measured(own)
            results.append(
                {"name": name, "predicted_s": round(made.step_s, 4),
                 "measured_s": round(step_s, 4), "ratio": round(made.step_s / step_s, 3),
                 "cores": round(used, 2), "unit": "s a step",
                 "limit": made.limit.partition(":")[0].partition(",")[0],
                 "machine": machine(), "date": datetime.date.today().isoformat()}
            )  # fmt: skip
            print(json.dumps(results[-1]), flush=True)
        results.append({"name": "rates", **rates.model_dump()})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--runs", type=Path)
    options = parser.parse_args()
    results = rows(tuple(options.only), options.runs)
    table = Table(title="seconds a step")
    for heading in ("run", "predicted", "measured", "ratio", "cores", "limited by"):
        table.add_column(heading)
    for row in results[:-1]:
        keys = ("name", "predicted_s", "measured_s", "ratio", "cores", "limit")
        table.add_row(*(str(row[key]) for key in keys))
    Console().print(table)
    if options.json:
        options.json.write_text(
            "".join(json.dumps(row) + "\n" for row in results), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
