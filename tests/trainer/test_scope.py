"""SCOPE's weights against numbers worked out by hand from the paper's equations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.scope import effective_sample_size, path_weights

# Perplexities 2, 4 and 8.
NLL = torch.log(torch.tensor([2.0, 4.0, 8.0]))
ONE_GROUP = torch.zeros(3, dtype=torch.long)
ALL = torch.ones(3, dtype=torch.bool)


def weights(**options: object) -> list[float]:
    defaults = {"group": ONE_GROUP, "member": ALL, "higher_ppl_higher_weight": True}
    return path_weights(NLL, **{**defaults, **options}).tolist()  # type: ignore[arg-type]


def test_student_path_is_proportional_to_perplexity() -> None:
    # 2/14, 4/14, 8/14
    assert weights() == pytest.approx([1 / 7, 2 / 7, 4 / 7])


def test_teacher_path_is_proportional_to_inverse_perplexity() -> None:
    # (1/2, 1/4, 1/8) / (7/8)
    assert weights(higher_ppl_higher_weight=False) == pytest.approx([4 / 7, 2 / 7, 1 / 7])


def test_tau_is_an_exponent_of_the_perplexity() -> None:
    # τ = 1/2 squares: 4, 16, 64 of 84.   τ = 2 takes roots: √2, 2, 2√2 of 2 + 3√2.
    assert weights(tau=0.5) == pytest.approx([4 / 84, 16 / 84, 64 / 84])
    root = math.sqrt(2.0)
    total = 2 + 3 * root
    assert weights(tau=2.0) == pytest.approx([root / total, 2 / total, 2 * root / total])


def test_released_normalisation_has_mean_one() -> None:
    assert weights(normalization="released") == pytest.approx([3 / 7, 6 / 7, 12 / 7])


def test_only_members_share_the_weight() -> None:
    member = torch.tensor([True, False, True])
    assert weights(member=member) == pytest.approx([2 / 10, 0.0, 8 / 10])


def test_groups_are_normalised_apart() -> None:
    group = torch.tensor([0, 1, 1])
    assert weights(group=group) == pytest.approx([1.0, 4 / 12, 8 / 12])


def test_a_path_of_one_weighs_one_and_an_empty_path_nothing() -> None:
    group = torch.tensor([0, 1, 1])
    member = torch.tensor([True, False, False])
    assert weights(group=group, member=member) == [1.0, 0.0, 0.0]
    assert weights(member=~ALL) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("higher", [True, False])
def test_extreme_perplexities_do_not_overflow(higher: bool) -> None:
    nll = torch.tensor([0.0, 500.0, 2000.0])  # exp(89) is already infinite in float32
    w = path_weights(nll, ONE_GROUP, ALL, tau=0.25, higher_ppl_higher_weight=higher)
    assert w.tolist() == ([0.0, 0.0, 1.0] if higher else [1.0, 0.0, 0.0])


def test_numbers_outside_the_path_are_never_read() -> None:
    nll = torch.tensor([1.0, math.nan, math.inf])
    member = torch.tensor([True, False, False])
    w = path_weights(nll, ONE_GROUP, member, higher_ppl_higher_weight=False)
    assert w.tolist() == [1.0, 0.0, 0.0]


def test_effective_sample_size_counts_the_trajectories_that_matter() -> None:
    w = torch.tensor([0.5, 0.5, 1.0])
    group = torch.tensor([0, 0, 1])
    # (1)²/(½) = 2 in the first group, 1 in the second
    assert float(effective_sample_size(w, group, ALL)) == pytest.approx(1.5)
    assert float(effective_sample_size(torch.zeros(3), group, ~ALL)) == 0.0


@given(
    nll=st.lists(st.floats(0, 1e4), min_size=1, max_size=20),
    data=st.data(),
    tau=st.floats(0.05, 10),
    higher=st.booleans(),
)
def test_weights_of_a_path_sum_to_one_and_follow_the_order(
    nll: list[float], data: st.DataObject, tau: float, higher: bool
) -> None:
    size = len(nll)
    group = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)))
    member = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    values = torch.tensor(nll)
    w = path_weights(values, group, member, tau=tau, higher_ppl_higher_weight=higher)
    assert bool(torch.isfinite(w).all())
    assert bool((w >= 0).all())
    assert bool((w[~member] == 0).all())
    for g in group.unique():
        members = (group == g) & member
        if members.any():
            assert float(w[members].sum()) == pytest.approx(1.0, abs=1e-5)
            order = values[members].argsort(stable=True)
            ranked = w[members][order] if higher else w[members][order].flip(0)
            assert bool((ranked.diff() >= -1e-6).all())
