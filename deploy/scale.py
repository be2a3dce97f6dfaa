"""`scope scale`: more or fewer workers of a role, while a run goes on.

The wish is left in the run's Redis, where its driver finds it and hires or lets go.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deploy.config import ConfigError
from deploy.status import open_streams
from services.pipeline import PIPELINE, Pipeline


def parse(wishes: Sequence[str], pipeline: Pipeline = PIPELINE) -> dict[str, int]:
    """`rollout=8` as {"rollout": 8}.

    Raises:
        ConfigError: no such role, or no number of at least 1.
    """
    known = pipeline.names
    wanted = {}
    for wish in wishes:
        role, _, count = wish.partition("=")
        if role not in known or not count.isdecimal() or int(count) < 1:
            raise ConfigError(
                f"{wish!r} is not ROLE=COUNT: the roles are {', '.join(known)}, and of each "
                f"there is at least one worker"
            )
        wanted[role] = int(count)
    return wanted


async def scale(run_dir: Path, wishes: Sequence[str]) -> None:
    """Leaves the wishes. They hold until others, also for a run that is stopped and resumed.

    Raises:
        ConfigError: not a run directory, or as in `parse`.
    """
    async with open_streams(run_dir) as streams:
        for role, count in parse(wishes, streams.pipeline).items():
            await streams.want(role, count)
