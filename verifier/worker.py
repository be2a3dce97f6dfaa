"""The worker of the verifier: sampled groups in, groups with a verdict per trajectory out.

rollouts ──▶ judge every trajectory, in the sandbox ──▶ verified
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.tasks import together
from services.trajectory import RolloutGroup, Trajectory, Verdict, VerifiedGroup
from services.worker import Post, StepWorker
from verifier.config import VerifierConfig
from verifier.judges import Judges

_TRUNCATED = {
    "incorrect": Verdict("incorrect", "truncated: no end token"),
    "mask": Verdict("unknown", "masked: truncated"),
}


class VerifierWorker(StepWorker[RolloutGroup, VerifiedGroup, VerifierConfig]):
    """One worker with its own judges. It ends when they do not start, or when programs are to be
    judged and cannot be confined here (`SandboxRefused`)."""

    takes = RolloutGroup
    settings_class = VerifierConfig

    def __init__(self, post: Post, settings: VerifierConfig) -> None:
        super().__init__(post, settings)
        self._verdicts = 0
        self._judges: Judges

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Its judges' processes."""
        async with Judges(self.settings) as self._judges:
            yield

    def details(self) -> dict[str, float]:
        """Verdicts, how long they took, and what waits for a judge."""
        return {
            **self._judges.queue(),
            "verdicts": float(self._verdicts),
            "judging_s": self.busy.seconds,
        }

    async def process(self, group: RolloutGroup) -> VerifiedGroup:
        """Judges every trajectory of the group, all at once."""
        prompt = group.prompt

        async def verdict(trajectory: Trajectory) -> Verdict:
            if trajectory.episode is not None and trajectory.episode.verdict is not None:
                return trajectory.episode.verdict
            if trajectory.finish == "length":
                return _TRUNCATED[self.settings.overlong]
            return await self._judges.judge(prompt.data_source, trajectory.text, prompt.reference)

        with self.busy:
            verdicts = await together(verdict(t) for t in group.trajectories)
        self._verdicts += len(verdicts)
        return VerifiedGroup(rollout=group, verdicts=tuple(verdicts))
