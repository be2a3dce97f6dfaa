"""What decoding costs: seconds of a forward by how many answers it takes one token further."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_KEPT = 0.9  # of the mean so far, when another batch comes: the first ones warm up


class Pace:
    """Measured by an engine, for `scope plan`: how long a step would sample with more or fewer
    answers at once. One thread writes it, others may read.

    Attributes:
        forwards: of decoding, so far.
        alone_s: seconds of one with a single answer in it; None before it is known.
    """

    def __init__(self) -> None:
        self.forwards = 0
        self.alone_s: float | None = None

    def saw(self, rows: Sequence[int], seconds: Sequence[float]) -> None:
        """The forwards of a batch whose answers finish one after the other: how many each took
        further, and how long it took. A line is laid through them (least squares)."""
        self.forwards += len(rows)
        if not rows or max(rows) < 2 * min(rows):  # too much alike for a line
            return
        slope, fixed = np.polyfit(rows, seconds, 1)
        alone_s = float(np.clip(fixed + slope, 0.0, np.mean(seconds)))
        before = alone_s if self.alone_s is None else self.alone_s
        self.alone_s = _KEPT * before + (1 - _KEPT) * alone_s
