"""Verdicts are remembered by answer and reference, and the oldest are forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.trajectory import Verdict
from tests.waiting import DEADLINE_S
from verifier.cache import VerdictCache
from verifier.judge_pool import JudgePool
from verifier.math_answer import compare
from verifier.math_answer import judge as math_judge

RIGHT, WRONG = Verdict("correct", "it is"), Verdict("incorrect", "it is not")

# Slower than any deadline until a file is there; one line for each answer.
_BUSY = """
import pathlib
from services.trajectory import Verdict

def judge(completion, reference):
    directory = pathlib.Path(reference)
    while not (directory / "idle").exists():
        pass
    with (directory / "answers").open("a") as file:
        file.write("correct\\n")
    return Verdict("correct", "had the time")
"""


def test_the_one_that_was_asked_for_the_longest_ago_is_forgotten() -> None:
    cache = VerdictCache(2)
    cache.put(RIGHT, "math", "1", "1")
    cache.put(WRONG, "math", "2", "1")
    assert cache.get("math", "1", "1") == RIGHT
    cache.put(WRONG, "math", "3", "1")
    assert cache.get("math", "2", "1") is None
    assert cache.get("math", "1", "1") == RIGHT
    assert len(cache) == 2


def test_no_two_keys_are_taken_for_one() -> None:
    cache = VerdictCache(10)
    cache.put(RIGHT, "math", "1", "2")
    assert cache.get("math", "12", "") is None
    assert cache.get("math", '1", "2', "") is None
    assert cache.get("exact", "1", "2") is None


def test_nothing_is_remembered_where_nothing_shall_be() -> None:
    cache = VerdictCache(0)
    cache.put(RIGHT, "1", "1")
    assert cache.get("1", "1") is None


async def test_a_completion_is_judged_once() -> None:
    async with JudgePool({"math"}, cached_verdicts=8) as pool:
        first = await pool.judge("math", r"At last \boxed{\frac{1}{2}}", "0.5")
        assert first.outcome == "correct"
    # The judges are gone, so that nobody but the memory can answer.
    assert await pool.judge("math", r"At last \boxed{\frac{1}{2}}", "0.5") == first


def test_an_answer_is_compared_once_however_it_was_reached() -> None:
    compare.cache_clear()
    first = math_judge(r"At last \boxed{\frac{2}{4}}", "0.5")
    assert math_judge(r"I guess \boxed{\frac{2}{4}}!", "0.5") is first
    assert compare.cache_info().misses == 1


async def test_an_unknown_is_judged_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that was too busy for an answer once is asked again when it comes again."""
    (tmp_path / "busy.py").write_text(_BUSY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    async with JudgePool({"busy:judge"}, deadline_s=0.2, cached_verdicts=8) as pool:
        first = await pool.judge("busy:judge", "42", str(tmp_path))
        assert first == Verdict("unknown", "the judge took longer than 0.2 s")
        (tmp_path / "idle").touch()
        monkeypatch.setattr(pool, "_deadline_s", DEADLINE_S)
        second = await pool.judge("busy:judge", "42", str(tmp_path))
        assert second == await pool.judge("busy:judge", "42", str(tmp_path))
        assert second.outcome == "correct"
    assert (tmp_path / "answers").read_text() == "correct\n"
