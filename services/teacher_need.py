"""Which answers the teacher must see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

from services.trajectory import Outcome

TeacherNeed: TypeAlias = Literal["incorrect", "all", "none"]

# An unknown verdict enters no path of any objective, so it is never paid for.
SCORED: Mapping[TeacherNeed, tuple[Outcome, ...]] = {
    "incorrect": ("incorrect",),
    "all": ("correct", "incorrect"),
    "none": (),
}
"""The verdicts of the trajectories that are scored, by what the objective needs."""
