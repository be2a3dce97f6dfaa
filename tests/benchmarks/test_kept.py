"""Measurements outlive an interruption, one by one."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.kept import Kept


def never() -> float:
    raise AssertionError("measured again")


def test_finished_measurement_outlives_an_interruption(tmp_path: Path) -> None:
    path = tmp_path / "rows.measured.jsonl"
    Kept(path, "tokens/s").rate("tiny", "choosing", 8, measure=lambda: 12.5)
    with pytest.raises(KeyboardInterrupt):
        Kept(path, "tokens/s").rate("tiny", "choosing", 16, measure=interrupted)
    again = Kept(path, "tokens/s")
    assert again.rate("tiny", "choosing", 8, measure=never) == 12.5
    assert again.rate("tiny", "choosing", 16, measure=lambda: 20.0) == 20.0


def interrupted() -> float:
    raise KeyboardInterrupt


def test_forgotten_turn_is_measured_again_and_the_new_one_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.measured.jsonl"
    kept = Kept(path, "tokens/s")
    for turn in ("turn 1", "turn 2"):
        kept.rate("tiny", turn, "ours", measure=lambda: 10.0)
    kept.forget("tiny", "turn 2")
    assert kept.has("tiny", "turn 1", "ours")
    assert not kept.has("tiny", "turn 2", "ours")
    kept.rate("tiny", "turn 2", "ours", measure=lambda: 30.0)
    again = Kept(path, "tokens/s")
    assert again.rate("tiny", "turn 1", "ours", measure=never) == 10.0
    assert again.rate("tiny", "turn 2", "ours", measure=never) == 30.0


def test_without_a_path_nothing_is_written(tmp_path: Path) -> None:
    assert Kept(None, "tokens/s").rate("tiny", measure=lambda: 1.0) == 1.0
    assert not list(tmp_path.iterdir())
