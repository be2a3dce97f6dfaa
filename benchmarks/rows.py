"""The rows of benchmarks: printed as tables, written as one JSON object a line."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.processor import processor


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `ratio` is above 1 where ours is better, whatever the unit; None where one
    side could not be measured, and `note` says why. Where both were measured in turn, `ratios`
    are those of each turn, and `ratio` is their median: a machine's speed drifts between turns
    more than within one."""

    name: str
    ours: float | None
    peer: float | None
    unit: str
    machine: str
    lower_is_better: bool = False
    note: str = ""
    ratios: tuple[float, ...] = ()

    @property
    def ratio(self) -> float | None:
        if self.ratios:
            return statistics.median(self.ratios)
        if not self.ours or not self.peer:
            return None
        return self.peer / self.ours if self.lower_is_better else self.ours / self.peer

    def json(self) -> str:
        fields = asdict(self)
        fields["ratios"] = [round(ratio, 3) for ratio in self.ratios]
        fields["ratio"] = None if self.ratio is None else round(self.ratio, 3)
        if self.ratios:
            fields["ratio_min"], fields["ratio_max"] = min(fields["ratios"]), max(fields["ratios"])
        return json.dumps(fields)


def in_turn(
    name: str, ours: Sequence[float], peer: Sequence[float], unit: str, note: str = ""
) -> Row:
    """The row of rates measured in turn, ours and the peer's of each: medians, and each turn's
    ratio."""
    ratios = tuple(mine / other for mine, other in zip(ours, peer, strict=True))
    noted = f"{len(ratios)} turns: {min(ratios):.2f} to {max(ratios):.2f}"
    return Row(
        name, statistics.median(ours), statistics.median(peer), unit, machine(),
        note="; ".join(filter(None, (noted, note))), ratios=ratios,
    )  # fmt: skip


def machine() -> str:
    """What the figures were taken on, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{processor()}, {os.cpu_count()} cores"


def show(rows: Sequence[Row]) -> str:
    """One line a row."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}  {'ours':>10}  {'peer':>10}  ratio  unit"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(
            f"{row.name:{width}}  {_number(row.ours):>10}  {_number(row.peer):>10}  {ratio:>5}  "
            f"{row.unit}{f'  ({row.note})' if row.note else ''}"
        )
    return "\n".join(lines)


def markdown(rows: Sequence[Row]) -> str:
    """The table as the pages have it."""
    lines = ["| | ours | peer | ratio | |", "|---|---|---|---|---|"]
    for row in rows:
        ratio = "" if row.ratio is None else f"**{row.ratio:.2f}**"
        cells = (row.name, _number(row.ours), _number(row.peer), ratio, row.note)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(rows: Sequence[Row], path: Path) -> None:
    path.write_text("".join(row.json() + "\n" for row in rows), encoding="utf-8")


def append(row: Row, path: Path) -> None:
    """Adds one line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(row.json() + "\n")


def figures(path: Path) -> dict[str, float | None]:
    """Our side of each row of a file, by name; none where there is no file. A last line that was
    not finished, because its writer was killed, is taken out of it."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return {row["name"]: row["ours"] for row in map(json.loads, whole.splitlines())}


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
