"""The worker of the verifier: sampled groups in, groups with a verdict per trajectory out.

rollouts ──▶ decode ─▶ judge every trajectory, in the sandbox ─▶ encode ──▶ verified
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from services.stage import EVAL, Busy, Connection, Stage, new_consumer
from services.trajectory import RolloutGroup, Trajectory, Verdict, VerifiedGroup, decode, encode
from verifier.config import VerifierConfig
from verifier.judges import Judges

_TRUNCATED = {
    "incorrect": Verdict("incorrect", "truncated: no end token"),
    "mask": Verdict("unknown", "masked: truncated"),
}


class VerifierWorker:
    """One worker with its own judges. `name` is for logs and status; it need not be unique."""

    def __init__(self, connection: Connection, config: VerifierConfig, name: str) -> None:
        self._connection = connection
        self._config = config
        self._name = name
        self._stopping = asyncio.Event()
        self._busy = Busy()
        self._verdicts = 0

    async def run(self) -> None:
        """Works until `stop`; then finishes the groups that it holds.

        Raises:
            Unavailable: the judges do not start.
            SandboxRefused: programs are to be judged, and cannot be confined here.
            PatienceExceeded, redis.exceptions.RedisError: see `Stage.run`.
        """
        config = self._config
        async with AsyncExitStack() as resources:
            lanes = [self._connection.streams(EVAL), self._connection.streams()]
            for lane in lanes:
                resources.push_async_callback(lane.redis.aclose)
            judges = await resources.enter_async_context(Judges(config))

            async def process(payload: bytes) -> bytes:
                with self._busy:
                    return encode(await self._verify(decode(RolloutGroup, payload), judges))

            await Stage(
                name="verifier",
                # Never the name of a worker before: what that one held must go stale, not be ours.
                consumer=new_consumer(self._name),
                lanes=lanes,
                source="rollouts",
                target="verified",
                process=process,
                capacity=config.capacity,
                config=self._connection.config,
                stopping=self._stopping,
                details=lambda: {**judges.queue(), **self._details()},
            ).run()

    async def stop(self) -> None:
        """Lets `run` finish what it holds and return."""
        self._stopping.set()

    def _details(self) -> dict[str, float]:
        return {
            "workers": 1.0,
            "verdicts": float(self._verdicts),
            "judging_s": self._busy.seconds,
        }

    async def _verify(self, group: RolloutGroup, judges: Judges) -> VerifiedGroup:
        prompt = group.prompt

        async def verdict(trajectory: Trajectory) -> Verdict:
            if trajectory.finish == "length":
                return _TRUNCATED[self._config.overlong]
            return await judges.judge(prompt.data_source, trajectory.text, prompt.reference)

        try:
            async with asyncio.TaskGroup() as tasks:
                judging = [tasks.create_task(verdict(t)) for t in group.trajectories]
        except ExceptionGroup as failures:
            # One failure ends the whole group's work; the stage decides by its type what follows.
            raise failures.exceptions[0] from failures
        self._verdicts += len(judging)
        return VerifiedGroup(rollout=group, verdicts=tuple(task.result() for task in judging))
