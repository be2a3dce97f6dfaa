"""Avg@k and Pass@k of sampled answers, with 95% intervals. Pure functions on counts.

Two kinds of chance are told apart. Intervals of Avg@k and of the unbiased Pass@k come from
drawing *prompts* again: what another set of such prompts would have given. The interval of the
bootstrap Pass@k comes from drawing *samples* again, as the authors of SCOPE do: what other samples
for these prompts would have given.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
RESAMPLES = 1000


class Estimate(NamedTuple):
    """A value with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that one of `k` of the samples is correct: the unbiased estimator
    1 − C(n − c, k) / C(n, k) of Chen et al., arXiv 2107.03374."""
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def average(correct: Sequence[int], samples: Sequence[int]) -> Estimate:
    """Avg@k: the mean over prompts of the share of samples that is correct."""
    return over_prompts([c / n if n else 0.0 for c, n in zip(correct, samples, strict=True)])


def passed(correct: Sequence[int], samples: Sequence[int], k: int) -> Estimate:
    """Pass@k by the unbiased estimator; a prompt with fewer samples than `k` counts as all
    that it has."""
    return over_prompts(
        [pass_at_k(n, c, min(k, n)) if n else 0.0 for c, n in zip(correct, samples, strict=True)]
    )


def passed_bootstrap(correct: Sequence[int], samples: Sequence[int], k: int) -> Estimate:
    """Pass@k as the authors' evaluation has it: `RESAMPLES` times `k` samples of each prompt are
    drawn with replacement, and a prompt passes when one of them is correct. It is lower than the
    unbiased one, because the same sample may be drawn twice."""
    if not len(correct):
        return Estimate(0.0, 0.0, 0.0)
    share = np.asarray(correct) / np.maximum(np.asarray(samples), 1)
    drawn = np.random.default_rng(0).binomial(k, share, (RESAMPLES, len(share)))
    means = (drawn > 0).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(means.mean()), float(low), float(high))


def over_prompts(values: Sequence[float]) -> Estimate:
    """The mean of one value a prompt; its interval is the bootstrap's over prompts."""
    if not len(values):
        return Estimate(0.0, 0.0, 0.0)
    array = np.asarray(values, np.float64)
    indices = np.random.default_rng(0).integers(0, len(array), (RESAMPLES, len(array)))
    low, high = np.quantile(array[indices].mean(axis=1), [0.025, 0.975])
    return Estimate(float(array.mean()), float(low), float(high))


# Two-sided 95% quantiles of Student's t for 1, 2, … degrees of freedom; the normal one past them.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of one value a seed, with Student's interval; of one seed the interval is all."""
    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Estimate(mean, -np.inf, np.inf)
    t = _T[len(array) - 2] if len(array) - 2 < len(_T) else 1.96
    half = t * float(array.std(ddof=1)) / len(array) ** 0.5
    return Estimate(mean, mean - half, mean + half)
