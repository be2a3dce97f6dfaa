"""A stage of one's own, as a user writes one: see docs/architecture.md."""

from __future__ import annotations

from services.config import Config
from services.errors import BadItem
from services.trajectory import VerifiedGroup
from services.worker import StepWorker


class FilterSettings(Config):
    every: int = 3
    """Gives up every so many prompts of the feed, the first included."""


class Filter(StepWorker[VerifiedGroup, VerifiedGroup, FilterSettings]):
    takes = VerifiedGroup
    settings_class = FilterSettings
    passed = 0

    def details(self) -> dict[str, float]:
        return {"passed": float(self.passed)}

    async def process(self, group: VerifiedGroup) -> VerifiedGroup:
        if group.prompt.order % self.settings.every == 0:
            raise BadItem("filtered")
        self.passed += 1
        return group
