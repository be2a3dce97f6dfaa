"""Admission: prompts enter the run only as fast as the learner can still use what they become.

    fed − consumed − dead  ≤  groups_per_step × (max_staleness + 1)

and each carries the oldest weights that may sample it, so that in the order of the feed, which is
the learner's (`trainer.reader`), no token of a group is from weights more than `max_staleness`
steps older than those that learn from it (0: synchronous). Prompts that die only bring others
forward.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from rollout.prompts import PromptSource
from services.stage import Connection
from services.streams import Ledger, Streams
from services.trajectory import encode

_BATCH = 64  # prompts of one call, which blocks Redis for as long as it takes
_POLL_S = 0.05


class Feeder:
    """Feeds a run's prompts in order. It may be killed and started again at any time: how far
    it came stands in the run's ledger, and Redis refuses a prompt that was fed already.

    Args:
        connection: the run.
        source: its prompts.
        total: how many of them to feed, at most `len(source)`.
        groups_per_step, max_staleness: see above.
        fixed_sampler: whoever samples never changes, so that any weights will do.
    """

    def __init__(
        self,
        connection: Connection,
        source: PromptSource,
        *,
        total: int,
        groups_per_step: int,
        max_staleness: int,
        fixed_sampler: bool = False,
    ) -> None:
        self._connection = connection
        self._source = source
        self._total = total
        self._groups_per_step = groups_per_step
        self._max_staleness = max_staleness
        self._max_in_flight = groups_per_step * (max_staleness + 1)
        self._fixed_sampler = fixed_sampler

    async def run(self) -> None:
        """Feeds until the ledger says `total`. For how long the learner may leave it waiting is for
        whoever watches the run to say.

        Raises:
            redis.exceptions.RedisError: Redis failed through all of the client's retries.
        """
        async with self._connection.streams() as streams:
            while (ledger := await streams.ledger()).fed < self._total:
                if not await self.admit(streams, ledger):
                    await asyncio.sleep(_POLL_S)

    async def admit(self, streams: Streams, ledger: Ledger) -> int:
        """Feeds prompts that there is room for, and returns how many. Redis checks the budget
        again, as part of the step."""
        room = self._max_in_flight - (ledger.fed - ledger.consumed - ledger.dead)
        end = min(ledger.fed + min(room, _BATCH), self._total)
        payloads = [
            encode(
                replace(
                    self._source.prompt(order),
                    min_weight_version=self._oldest_weights(order - ledger.dead),
                )
            )
            for order in range(ledger.fed, end)
        ]
        if not payloads:
            return 0
        added, _ = await streams.feed(
            payloads, expected_fed=ledger.fed, max_in_flight=self._max_in_flight
        )
        return added

    def _oldest_weights(self, index: int) -> int:
        """The oldest version that may sample the prompt which is trained at `index`. Admission
        keeps it from being newer than the learner's, so nothing can wait for itself."""
        if self._fixed_sampler:
            return 0
        return max(0, index // self._groups_per_step - self._max_staleness)
