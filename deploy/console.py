"""What a run shows: a live table on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from deploy.evaluate import Result
from services.streams import Ledger

_PLAIN_EVERY_S = 5.0
_PLAIN_IDLE_S = 60.0  # when no step has finished since the last line

# Heading, metric, format: the columns of the live table and of the plain lines.
_COLUMNS = (
    ("accuracy", "reward/accuracy", "{:.1%}"),
    ("correct", "scope/student_path_fraction", "{:.1%}"),
    ("incorrect", "scope/teacher_path_fraction", "{:.1%}"),
    ("MLE", "loss/mle", "{:.3f}"),
    ("OPD", "loss/opd", "{:.3f}"),
    ("staleness", "staleness/mean", "{:.1f}"),
    ("tokens/s", "throughput/trained_tokens_per_s", "{:,.0f}"),
)


class RunConsole:
    """Prints progress; as a context it owns the terminal's live area."""

    def __init__(self, rich: Console | None = None) -> None:
        self._rich = rich or Console()
        self._live = Live(console=self._rich, refresh_per_second=4, transient=True)
        self._record: dict[str, Any] = {}
        self._last_plain = 0.0
        self._last_step = -1

    def __enter__(self) -> RunConsole:
        if self._rich.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, message: str) -> None:
        """One line that stays."""
        self._rich.print(message, markup=False, highlight=False, soft_wrap=True)

    def step(self, record: dict[str, Any]) -> None:
        """Takes in the metrics of a finished step."""
        self._record = record

    def progress(self, ledger: Ledger, total: int) -> None:
        """Shows where the run is."""
        if self._rich.is_terminal:
            self._live.update(self._table(ledger, total))
            return
        every = _PLAIN_IDLE_S if ledger.step == self._last_step else _PLAIN_EVERY_S
        if self._record and time.monotonic() - self._last_plain > every:
            self._last_plain, self._last_step = time.monotonic(), ledger.step
            cells = "  ".join(f"{head} {text}" for head, text in self._cells())
            self.say(f"step {ledger.step}  {cells}  {_queues(ledger)}")

    def results(self, results: dict[str, Result]) -> None:
        """The closing table: held-out accuracy before and after."""
        if not results:
            return
        k = next(iter(results.values())).score.k
        rows = []
        for label, result in results.items():
            s = result.score
            rows.append((
                label, f"step {result.version}", f"{s.avg_at_k.value:.1%}",
                f"{s.pass_at_k.value:.1%}", str(s.prompts), str(s.truncated), str(s.unknown),
            ))  # fmt: skip
        headings = ("", "weights", f"Avg@{k}", f"Pass@{k}", "prompts", "truncated", "unknown")
        self._rich.print(self._fitting("held-out accuracy", headings, rows))

    def _cells(self) -> list[tuple[str, str]]:
        return [
            (heading, form.format(self._record[name]) if name in self._record else "–")
            for heading, name, form in _COLUMNS
        ]

    def _table(self, ledger: Ledger, total: int) -> Table:
        title = f"step {ledger.step}: {ledger.consumed} of {total} prompts trained"
        headings, texts = zip(*self._cells(), strict=True)
        table = self._fitting(title, headings, [texts])
        table.caption = _queues(ledger)
        return table

    def _fitting(self, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
        """A table with its headings on top; at the side where the terminal is too narrow."""
        table = Table(title=title)
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        boundless = self._rich.options.update(width=1000)
        if self._rich.measure(table, options=boundless).maximum <= self._rich.width:
            return table
        turned = Table(title=title, show_header=False)
        for line in zip(headings, *rows, strict=True):
            turned.add_row(*line)
        return turned


def _queues(ledger: Ledger) -> str:
    depths = "  ".join(f"{name} {depth}" for name, depth in ledger.depth.items())
    return f"queues: {depths}  dead {ledger.dead}"
