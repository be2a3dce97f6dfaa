"""What a run shows on terminals of every width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from deploy.console import RunConsole
from deploy.evaluate import Result, Tally
from services.streams import Ledger

RECORD = {
    "reward/accuracy": 0.31,
    "scope/student_path_fraction": 0.3,
    "scope/teacher_path_fraction": 0.7,
    "loss/mle": 1.2345,
    "loss/opd": -0.1,
    "staleness/mean": 1.0,
    "throughput/trained_tokens_per_s": 12345.0,
}

TALLY = Tally("a", "sums", samples=16, correct=5, unknown=0, truncated=0, weight_version=0)
RESULT = Result(0, (TALLY,))


@pytest.mark.parametrize("width", [40, 80])
def test_no_figure_is_cut(width: int) -> None:
    shown = io.StringIO()
    console = RunConsole(Console(file=shown, width=width, force_terminal=True, color_system=None))
    console.step(RECORD)
    depths = {"prompts": 1, "rollouts": 2, "verified": 3, "scored": 44}
    ledger = Ledger(fed=100, trained=50, consumed=50, dead=1, step=7, depth=depths, age_s={})
    console._rich.print(console._table(ledger, 960))
    console.results({"before": RESULT, "after": RESULT})
    text = shown.getvalue()
    assert max(map(len, text.splitlines())) <= width
    for figure in ("accuracy", "31.0%", "incorrect", "70.0%", "1.234", "-0.100", "12,345"):
        assert figure in text
    for figure in ("before", "after", "step 0", "31.2%", "truncated"):
        assert figure in text
