"""Redis and checkpoint after every kind of loss: each order ends up in exactly one place."""

from __future__ import annotations

import uuid
from collections import Counter
from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from deploy.restore import restore
from services.pipeline import PIPELINE
from services.redis_server import EmbeddedRedis
from services.streams import Streams, claim
from services.trajectory import Prompt, Record, decode, encode, order_of
from tests.builders import prompt, scored_group
from trainer.checkpoint import Progress, ranges

TOTAL = 8


def item(stream: str, order: int) -> Record:
    """The prompt of `order` as it lies in `stream`."""
    scored = scored_group(["correct"], order=order)
    return {
        "prompts": scored.prompt,
        "rollouts": scored.rollout,
        "verified": scored.verified,
        "scored": scored,
    }[stream]


async def place(streams: Streams, order: int, where: str) -> None:
    """Feeds the next prompt and moves it to `where`: a stream, `dead` or `trained`."""
    await streams.feed([encode(prompt(order))], expected_fed=order, max_in_flight=1000)
    (held,) = await claim([streams], "prompts", "w", count=1, block_ms=100)
    if where == "dead":
        await streams.bury(held, "broken")
    elif where == "trained":
        await streams.settle("prompts", [held.id])
    elif where == "prompts":
        await streams.release(held, "w", "")
    else:
        await streams.hand_off(held, where, encode(item(where, order)))  # type: ignore[arg-type]


async def whereabouts(streams: Streams) -> Counter[int | None]:
    """How often each order is in flight or dead."""
    found = Counter(order_of(payload) for _, _, payload in await streams.items())
    found.update(order_of(d.payload) for d in await streams.dead())
    return found


places = st.sampled_from([*PIPELINE.streams, "dead", "trained"])


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    history=st.lists(places, max_size=TOTAL),
    covered=st.sets(st.integers(0, TOTAL - 1)),
)
async def test_every_order_is_in_exactly_one_place(
    redis_server: EmbeddedRedis, history: list[str], covered: set[int]
) -> None:
    """`covered` is independent of what Redis holds: lost, ahead, behind and torn all at once."""
    client = Redis.from_url(redis_server.url)
    streams = Streams(client, f"restore-{uuid.uuid4()}")
    await streams.create()
    for order, where in enumerate(history):
        await place(streams, order, where)
    await restore(streams, Progress(3, [], ranges(covered)), lambda o: prompt(o))
    ledger = await streams.ledger()
    assert ledger.exact
    assert ledger.trained == ledger.consumed == len(covered)
    counted = await whereabouts(streams)
    for order in range(ledger.fed):
        assert counted[order] + (order in covered) == 1, order
    assert all(order in range(ledger.fed) for order in counted)
    await client.aclose()


async def test_an_ordinary_resume_changes_nothing(streams: Streams) -> None:
    for order, where in enumerate(["trained", "scored", "rollouts", "dead", "prompts"]):
        await place(streams, order, where)
    before = await streams.items()
    mended = await restore(streams, Progress(1, [], [(0, 1)]), lambda o: prompt(o))
    assert (mended.fed_again, mended.taken_out) == (0, 0)
    assert await streams.items() == before


async def test_a_fresh_run_is_left_alone(streams: Streams) -> None:
    mended = await restore(streams, None, lambda o: prompt(o))
    assert (mended.fed_again, mended.taken_out) == (0, 0)
    assert (await streams.ledger()).fed == 0


async def test_what_is_fed_again_waits_for_no_weights(streams: Streams) -> None:
    await restore(
        streams, Progress(9, [], [(1, 3)]), lambda o: replace(prompt(o), min_weight_version=7)
    )
    ((_, _, payload),) = await streams.items()
    assert decode(Prompt, payload).min_weight_version == 0


async def test_prompts_for_later_weights_do_not_stand_before_those_that_lead_there(
    streams: Streams,
) -> None:
    """As after a torn checkpoint: workers that wait for version 7 would leave order 1 no room."""
    await place(streams, 0, "trained")
    await place(streams, 1, "trained")
    later = encode(replace(prompt(2), min_weight_version=7))
    await streams.feed([later], expected_fed=2, max_in_flight=1000)
    await restore(streams, Progress(1, [], [(0, 1)]), lambda o: prompt(o))
    found = [decode(Prompt, payload) for _, _, payload in await streams.items()]
    assert [(p.order, p.min_weight_version) for p in found] == [(1, 0), (2, 0)]
