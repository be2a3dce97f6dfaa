"""The whole example, from nothing to a table.

    python -m examples.smollm.distil        or: make smollm

    fetch the model ─▶ write the stories ─▶ measure it ─▶ scope run ─▶ measure what came out

Every part that is done is not done again: whatever ended it, the same command goes on from there,
within the run from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from deploy.accuracy import Estimate, over_prompts
from examples.smollm import fetch, task
from examples.smollm.measure import HEAD, Tally, measure, row
from services.disk import write_whole

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).parent / "run.yaml"
COOL = 0.3  # the temperature at which the untrained model keeps to the form as well


def run(directory: Path, overrides: Sequence[str]) -> None:
    """`scope run`, or `scope resume` where there is one, until the student is exported."""
    if (directory / "export" / "tokenizer_config.json").exists():  # written last
        return
    scope = [str(Path(sys.executable).with_name("scope"))]
    if (directory / "config.yaml").exists():
        command = [*scope, "resume", str(directory)]
    else:
        name, runs = directory.name, directory.parent
        command = [*scope, "run", str(CONFIG), f"name={name}", f"runs_dir={runs}", *overrides]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise SystemExit(f"smollm: the run ended early: the same command goes on with {directory}")


@dataclass(frozen=True, slots=True)
class Measured:
    """What `measure` says of held-out stories, kept in a folder."""

    folder: Path
    stories: int

    def tallies(
        self, name: str, model: Path, *, hints: bool = False, cool: bool = False
    ) -> list[Tally]:
        kept = self.folder / f"{name}-{self.stories}.json"
        if not kept.exists():
            print(f"smollm: {name}: {self.stories} held-out stories …", flush=True)
            problems = task.distinct(task.HELD_OUT, task.HELD_OUT_SEED, self.stories)
            temperature = COOL if cool else 1.0
            tallies = measure(str(model), problems, hints=hints, temperature=temperature)
            write_whole(kept, json.dumps([asdict(t) for t in tallies]))
        return [Tally(**fields) for fields in json.loads(kept.read_text(encoding="utf-8"))]


def gained(before: Sequence[Tally], after: Sequence[Tally]) -> Estimate:
    """What Avg@8 rose by, paired by story."""
    pairs = zip(before, after, strict=True)
    return over_prompts([a.correct / a.samples - b.correct / b.samples for b, a in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs" / "smollm")
    parser.add_argument("--stories", type=int, default=task.HELD_OUT_PROMPTS, help="held-out ones")
    parser.add_argument("overrides", nargs="*", help="of run.yaml: section.key=value")
    options = parser.parse_args()
    torch.set_num_threads(1)
    directory: Path = options.run_dir.resolve()
    fetch.main()
    task.write_data(task.BUILD)
    results = directory.with_name(f"{directory.name}-measured")
    results.mkdir(parents=True, exist_ok=True)
    held_out = Measured(results, options.stories)
    before = held_out.tallies("before", fetch.MODEL)
    teacher = held_out.tallies("with-solution", fetch.MODEL, hints=True)
    before_cool = held_out.tallies("before-cool", fetch.MODEL, cool=True)
    run(directory, options.overrides)
    after = held_out.tallies("after", directory / "export")
    after_cool = held_out.tallies("after-cool", directory / "export", cool=True)
    print(HEAD)
    print(row("before", before))
    print(row("after", after))
    print(row("teacher: before, with the solution", teacher))
    print(row(f"before, at temperature {COOL}", before_cool))
    print(row(f"after, at temperature {COOL}", after_cool))
    print(f"\nAvg@8 rose by {gained(before, after)}, at temperature {COOL} by "
          f"{gained(before_cool, after_cool)}")  # fmt: skip


if __name__ == "__main__":
    main()
