"""What a run shows: a live table on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console as RichConsole
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


class Console:
    """Prints progress; as a context it owns the terminal's live area."""

    def __init__(self, rich: RichConsole | None = None) -> None:
        self._rich = rich or RichConsole()
        self._live = Live(console=self._rich, refresh_per_second=4, transient=True)
        self._record: dict[str, Any] = {}
        self._last_plain = 0.0
        self._last_step = -1

    def __enter__(self) -> Console:
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
        table = Table(title="held-out accuracy")
        for heading in ("", "weights", f"Avg@{k}", f"Pass@{k}", "prompts", "truncated", "unknown"):
            table.add_column(heading, justify="right")
        for label, result in results.items():
            s = result.score
            table.add_row(
                label, f"step {result.version}", f"{s.avg_at_k.value:.1%}",
                f"{s.pass_at_k.value:.1%}", str(s.prompts), str(s.truncated), str(s.unknown),
            )  # fmt: skip
        self._rich.print(table)

    def _cells(self) -> list[tuple[str, str]]:
        return [
            (heading, form.format(self._record[name]) if name in self._record else "–")
            for heading, name, form in _COLUMNS
        ]

    def _table(self, ledger: Ledger, total: int) -> Table:
        table = Table(title=f"step {ledger.step}: {ledger.consumed} of {total} prompts trained")
        cells = self._cells()
        for heading, _ in cells:
            table.add_column(heading, justify="right")
        table.add_row(*(text for _, text in cells))
        table.caption = _queues(ledger)
        return table


def _queues(ledger: Ledger) -> str:
    depths = "  ".join(f"{name} {depth}" for name, depth in ledger.depth.items())
    return f"queues: {depths}  dead {ledger.dead}"
