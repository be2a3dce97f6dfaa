"""Which prompts of a run are dead, for the learner, which trains in the order of the feed."""

from __future__ import annotations

from collections.abc import Set

from services.errors import WireError
from services.streams import Streams
from services.trajectory import order_of


class Deaths:
    """The orders of the dead prompts. A dead item may be corrupted, so that it does not tell its
    own; then it is one that was fed and is nowhere else."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._known: dict[str, int | None] = {}  # by the entry in `dead`; None: unreadable
        self._deduced: set[int] = set()

    async def orders(self, covered: Set[int]) -> Set[int]:
        """The dead as far as they can be told now; `covered` are those that are trained."""
        if await self._read():
            self._deduced = set()
        unreadable = sum(order is None for order in self._known.values())
        known = {order for order in self._known.values() if order is not None}
        if unreadable > len(self._deduced):
            self._deduced = await self._nowhere(covered | known)
        return known | self._deduced

    async def _read(self) -> bool:
        """Reads what is new among the dead; whether anything changed."""
        new = await self._streams.dead(after=max(self._known, key=_entry_order, default="0"))
        self._known |= {item.id: order_in(item.payload) for item in new}
        # Nothing new can hide that one was put back to work: then there are fewer than we know.
        if len(self._known) == (await self._streams.ledger()).dead:
            return bool(new)
        self._known = {item.id: order_in(item.payload) for item in await self._streams.dead()}
        return True

    async def _nowhere(self, elsewhere: Set[int]) -> set[int]:
        """Orders that were fed and are in no stream; none while another item cannot be read."""
        fed = (await self._streams.ledger()).fed  # before the items: later ones do not matter
        in_flight = {order_in(payload) for _, _, payload in await self._streams.items()}
        if None in in_flight:
            return set()
        return {order for order in range(fed) if order not in elsewhere and order not in in_flight}


def order_in(payload: bytes) -> int | None:
    """The order of the prompt that an item is about; None for corrupted bytes."""
    try:
        return order_of(payload)
    except WireError:
        return None


def _entry_order(entry: str) -> tuple[int, ...]:
    return tuple(map(int, entry.split("-")))
