"""Makes Redis agree with the checkpoint that a run continues from.

Most resumed runs need nothing: what the checkpoint does not contain is still in Redis. But Redis
may be lost, or have been put back to an older state, or the newest checkpoint may be torn, after
its groups were acknowledged. Then some prompts are in neither, or in both. The checkpoint says
which prompts it has learned from; that is the surviving history, and the rest follows:

    in the checkpoint and in flight   ─▶ taken out of Redis
    fed once, and in neither          ─▶ fed again
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from services.streams import Streams
from services.trajectory import Prompt, decode, encode
from trainer.checkpoint import Progress
from trainer.deaths import order_in


@dataclass(frozen=True, slots=True)
class Restored:
    """What had to be mended."""

    fed_again: int
    taken_out: int


async def restore(
    streams: Streams, progress: Progress | None, prompt: Callable[[int], Prompt]
) -> Restored:
    """Mends a run that is not working. `prompt` gives the prompt at an order of the feed.

    Afterwards every order below the feeder's cursor is in exactly one place: the checkpoint, a
    stream, or the dead.
    """
    await streams.create()
    await streams.abandon(re.compile(".*"))  # whoever worked on it is gone
    if progress is not None:
        await streams.settle(streams.results, progress.entries)
    covered = set(progress.orders) if progress is not None else set()
    held, taken_out = await _in_flight(streams, covered)
    ledger = await streams.ledger()
    fed = max([ledger.fed, *(order + 1 for order in covered | held)])
    missing = [order for order in range(fed) if order not in covered and order not in held]
    if missing:
        missing = sorted(missing + await _take_out_early(streams, progress.step if progress else 0))
    # No older weights will ever be published again, so there are none to wait for.
    payloads = [encode(replace(prompt(order), min_weight_version=0)) for order in missing]
    await streams.restore(fed=fed, trained=len(covered), payloads=payloads)
    return Restored(len(missing), taken_out)


async def _in_flight(streams: Streams, covered: set[int]) -> tuple[set[int], int]:
    """Orders that are in flight or dead, each once, and how many items had to go for that:
    those that the checkpoint holds, doubles, and corrupted ones, whose order is fed again."""
    held: set[int] = set()
    taken_out = 0
    for stream, id_, payload in await streams.items():
        order = order_in(payload)
        if order is None or order in covered or order in held:
            await streams.discard(stream, id_)
            taken_out += 1
        else:
            held.add(order)
    for dead in await streams.dead():
        order = order_in(dead.payload)
        if order is None or order in covered or order in held:
            await streams.forget(dead)
            taken_out += 1
        else:
            held.add(order)
    return held, taken_out


async def _take_out_early(streams: Streams, step: int) -> list[int]:
    """Takes out the prompts that wait for weights of a step after `step`, and says which: only
    what is fed again leads there, and behind them it would find no worker free."""
    early = []
    for stream, id_, payload in await streams.items():
        if stream == streams.pipeline.source:
            prompt = decode(Prompt, payload)
            if prompt.min_weight_version > step:
                await streams.discard(stream, id_)
                early.append(prompt.order)
    return early
