"""A stage of one's own, as a user writes one: see docs/architecture.md."""

from __future__ import annotations

from pathlib import Path

from services.config import Config
from services.errors import BadItem
from services.trajectory import VerifiedGroup
from services.worker import StepWorker
from tests.waiting import until


class FilterSettings(Config):
    every: int = 3
    """Gives up every so many prompts of the feed, the first included."""
    gate: Path | None = None
    """Holds what it has until this file exists, so that a test can look at it meanwhile."""


class Filter(StepWorker[VerifiedGroup, VerifiedGroup, FilterSettings]):
    takes = VerifiedGroup
    settings_class = FilterSettings
    passed = 0

    def details(self) -> dict[str, float]:
        return {"passed": float(self.passed)}

    async def process(self, group: VerifiedGroup) -> VerifiedGroup:
        if self.settings.gate is not None:
            await until(self.settings.gate.exists)
        if group.prompt.order % self.settings.every == 0:
            raise BadItem("filtered")
        self.passed += 1
        return group
