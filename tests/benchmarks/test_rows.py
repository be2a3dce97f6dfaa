"""The rows of the benchmarks: what they say of figures taken in turn."""

from __future__ import annotations

import json

import pytest

from benchmarks.rows import Row, in_turn, markdown, show


def test_ratio_is_the_median_of_turns_and_not_the_ratio_of_medians() -> None:
    row = in_turn("peer", [1200.0, 300.0, 900.0], [300.0, 100.0, 450.0], "tokens/s", "micro 8")
    assert (row.ours, row.peer) == (900.0, 300.0)
    assert row.ratios == (4.0, 3.0, 2.0)
    assert row.ratio == 3.0
    written = json.loads(row.json())
    assert (written["ratio"], written["ratio_min"], written["ratio_max"]) == (3.0, 2.0, 4.0)
    assert written["ratios"] == [4.0, 3.0, 2.0]
    assert row.note == "3 turns: 2.00 to 4.00; micro 8"
    assert markdown([row]).splitlines()[2] == (
        "| peer | 900 | 300 | **3.00** | 3 turns: 2.00 to 4.00; micro 8 |"
    )


def test_turns_that_lack_a_side_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        in_turn("peer", [1.0, 2.0], [1.0], "tokens/s")


def test_row_without_a_peer_has_no_ratio() -> None:
    row = Row("gpu", None, None, "", "a machine", note="no GPU here")
    assert json.loads(row.json())["ratio"] is None
    assert markdown([row]).splitlines()[2] == "| gpu | – | – |  | no GPU here |"
    assert "no GPU here" in show([row])
