"""Is there room for every role? Ray itself is asked, before anything is started.

    learner              ranks packed on the fewest nodes, all or none
    teacher replicas     spread over the nodes
    rollout, verifier    spread over the nodes

Each role in turn is reserved as a placement group while those before it hold theirs, so that the
answer counts fragmentation and whatever else the cluster runs. A reservation that has to wait is
what an autoscaler brings nodes for. At the end all are let go, and the roles start in this order.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from deploy.config import RunConfig
from deploy.roles import roles
from services.config import DEFAULT_TEACHER, HEAD, Resources
from services.errors import RunFailed
from trainer.objectives.kinds import objective

_FIRST_WORD_S = 3.0
_REPEAT_S = 30.0
_SLOW_RAY_S = 60.0
_POLL_S = 0.1

Bundle = Mapping[str, float]


class NoRoom(RunFailed):
    """The cluster cannot hold the run; the message says what is missing and what there is."""


@dataclass(frozen=True)
class Reservation:
    """`count` actors that reserve one `bundle` of Ray resources each."""

    name: str
    count: int
    bundle: Bundle
    strategy: Literal["PACK", "SPREAD"] = "SPREAD"

    def __str__(self) -> str:
        return f"{self.count} × {self.name} with {amounts(self.bundle)}"


def reservations(config: RunConfig) -> list[Reservation]:
    """What a run reserves, the hardest to place first."""
    chosen = objective(config.trainer.objective)
    asked = config.served if chosen.teacher != "none" else {}
    return [
        Reservation("learner rank", config.trainer.ranks, bundle(config.trainer.resources), "PACK"),
        *(
            Reservation(_replica(name), one.least_replicas, bundle(one.resources))
            for name, one in asked.items()
        ),
        *(
            Reservation(f"{role.name} worker", role.workers, bundle(role.resources))
            for role in roles(config)
            if role.resources != HEAD  # where there is always room
        ),
    ]


def _replica(teacher: str) -> str:
    return "teacher replica" + ("" if teacher == DEFAULT_TEACHER else f" ({teacher})")


def bundle(resources: Resources) -> Bundle:
    """Resources by Ray's names, without those that are zero."""
    named = {"CPU": resources.cpus, "GPU": resources.gpus, **resources.custom}
    return {name: amount for name, amount in named.items() if amount}


async def wait_for_room(
    wanted: Sequence[Reservation], *, timeout_s: float, say: Callable[[str], None]
) -> None:
    """Returns as soon as the cluster has room for all of `wanted` at once.

    Args:
        timeout_s: how long to wait for nodes that may join and work that may end.
        say: is told what is waited for.

    Raises:
        NoRoom: it has not.
    """
    deadline = time.monotonic() + timeout_s
    held: list[Any] = []
    try:
        for role in wanted:
            if role.bundle:  # a placement group cannot reserve nothing
                bundles = [dict(role.bundle)] * role.count
                held.append(placement_group(bundles, strategy=role.strategy))
                await _until_placed(held[-1], role, deadline, say)
    finally:
        for group in held:
            remove_placement_group(group)


def reserved() -> set[str]:
    """Ids of the cluster's placement groups that have their resources."""
    return {id_ for id_, group in placement_group_table().items() if group["state"] == "CREATED"}


async def _until_placed(
    group: Any, role: Reservation, deadline: float, say: Callable[[str], None]
) -> None:
    next_word = time.monotonic() + _FIRST_WORD_S
    while not group.wait(0):  # of whole seconds, and in a thread it would outlive a Ctrl-C
        now = time.monotonic()
        # A busy Ray can be slow to place what there is room for.
        if now > deadline + (_SLOW_RAY_S if _room(role) >= role.count else 0.0):
            raise NoRoom(
                f"the cluster has no room for {role}: {_shortage(role)}; {_cluster()}. Ask for "
                f"less, add nodes, or wait longer for them (ray.wait_for_nodes_s)"
            )
        if now > next_word:
            next_word = now + _REPEAT_S
            say(f"waiting up to {deadline - now:.0f} s for room for {role}: {_shortage(role)}")
        await asyncio.sleep(_POLL_S)


def _shortage(role: Reservation) -> str:
    """What keeps a role from being placed, in words."""
    free = available_resources_per_node().values()
    for name, amount in role.bundle.items():
        largest = max((node.get(name, 0.0) for node in free), default=0.0)
        if largest < amount:
            return f"the most {name} free on one node is {largest:g}"
    for name, amount in role.bundle.items():
        total = sum(node.get(name, 0.0) for node in free)
        if total < amount * role.count:
            return f"{amount * role.count - total:g} {name} are missing"
    return f"what is free lies scattered: its nodes have room for {_room(role)}"


def _room(role: Reservation) -> int:
    """How many of a role's actors what is free now has room for."""
    return sum(_copies(role.bundle, node) for node in available_resources_per_node().values())


def _copies(wanted: Bundle, node: Bundle) -> int:
    return min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in wanted.items())


def _cluster() -> str:
    """Every node with what it has, and what of it is free."""
    free = available_resources_per_node()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    lines = [
        f"{node['NodeManagerAddress']} has {amounts(_own(node['Resources']))}, of which "
        f"{amounts(_own(free.get(node['NodeID'], {})))} free"
        for node in nodes
    ]
    return f"the cluster has {len(nodes)} nodes: " + ", ".join(lines)


def _own(resources: Bundle) -> Bundle:
    """Without memory, the names of nodes and Ray's entries for placement groups."""
    return {
        name: amount
        for name, amount in resources.items()
        if name not in ("memory", "object_store_memory")
        and ":" not in name
        and "_group_" not in name
    }


def amounts(resources: Bundle) -> str:
    """`4 CPU and 1 GPU`."""
    return " and ".join(f"{amount:g} {name}" for name, amount in sorted(resources.items())) or "0"
