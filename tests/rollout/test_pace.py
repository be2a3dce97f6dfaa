from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.pace import Pace
from rollout.rows import Request
from rollout.transformers_engine import sample_groups
from services.trajectory import Sampling
from tests.builders import tiny_model


@given(
    fixed=st.floats(1e-5, 1.0),
    slope=st.floats(0.0, 0.1),
    rows=st.lists(st.integers(1, 256), min_size=2, max_size=40),
)
def test_one_answer_costs_what_the_line_says(fixed: float, slope: float, rows: list[int]) -> None:
    pace = Pace()
    pace.saw(rows, [fixed + slope * count for count in rows])
    assert pace.forwards == len(rows)
    if max(rows) < 2 * min(rows):
        assert pace.alone_s is None
    else:
        assert pace.alone_s == pytest.approx(fixed + slope, rel=1e-6)


def test_the_first_batches_are_forgotten() -> None:
    pace = Pace()
    pace.saw([4, 2, 1], [9.0, 9.0, 9.0])  # while the engine warms up
    for _ in range(100):
        pace.saw([4, 2, 1], [0.4, 0.2, 0.1])
    assert pace.alone_s == pytest.approx(0.1, rel=0.01)


def test_noise_never_makes_a_forward_cost_less_than_nothing() -> None:
    pace = Pace()
    pace.saw([1, 100], [0.0, 1.0])
    pace.saw([50, 100], [0.001, 1.0])
    assert pace.alone_s is not None and pace.alone_s >= 0


def test_a_batch_is_seen_forward_by_forward() -> None:
    requests = [Request([5], Sampling(n=3, max_tokens=limit)) for limit in (4, 9)]
    pace = Pace()
    seen: list[int] = []
    pace.saw = lambda rows, seconds: seen.extend(rows)  # type: ignore[method-assign]
    groups = sample_groups(tiny_model(0), requests, [1], pace)
    lengths = [len(c.token_ids) for group in groups for c in group]
    # The first token comes from the prompt's own forward.
    assert seen == [sum(n > step for n in lengths) for step in range(1, max(lengths))]
