"""`scope dead`: the items that a run gave up, and how to put them back to work."""

from __future__ import annotations

from pathlib import Path

from deploy.config import ConfigError
from deploy.status import open_streams
from services.errors import WireError
from services.trajectory import order_of


async def table(run_dir: Path, show: str | None) -> str:
    """All dead items, a line each; or everything about the one whose id is `show`."""
    async with open_streams(run_dir) as streams:
        items = await streams.dead()
    if show is not None:
        for item in items:
            if item.id == show:
                return f"{item.id} in {item.stream}: {item.reason}\n{item.detail}".rstrip()
        raise ConfigError(f"{run_dir} has no dead item {show}")
    if not items:
        return "no dead items"
    lines = [f"{len(items)} dead items (show one with --show ID, put all back with --requeue):"]
    for item in items:
        try:
            prompt = f"prompt {order_of(item.payload)}"
        except WireError:
            prompt = "unreadable"
        lines.append(f"  {item.id}  {prompt}, in {item.stream}: {item.reason}")
    return "\n".join(lines)


async def requeue_all(run_dir: Path) -> int:
    """Puts every dead item back at the end of the stream that it broke on."""
    async with open_streams(run_dir) as streams:
        return sum([await streams.requeue(item) for item in await streams.dead()])
