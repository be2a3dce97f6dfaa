"""Roles on a real Ray cluster of several nodes, whose GPUs exist in Ray's books only."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from deploy.config import ConfigError, load
from deploy.placement import bundle, reservations
from services.config import Resources
from tests.deploy.conftest import ROOT
from tests.waiting import DEADLINE_S

PAPER = ROOT / "deploy/runs/qwen3-1.7b.yaml"


def test_the_learner_is_placed_first_and_packed() -> None:
    found = reservations(load(PAPER))
    assert [(role.name, role.count, role.strategy) for role in found] == [
        ("learner rank", 2, "PACK"),
        ("teacher replica", 2, "SPREAD"),
        ("rollout worker", 4, "SPREAD"),
        ("verifier worker", 4, "SPREAD"),
    ]
    assert str(found[0]) == "2 × learner rank with 4 CPU and 1 GPU"


def test_replicas_are_reserved_of_every_teacher_that_the_run_serves_and_asks() -> None:
    def replicas(*overrides: str) -> dict[str, int]:
        found = reservations(load(PAPER, overrides))
        return {role.name: role.count for role in found if "teacher" in role.name}

    several = (
        "teachers.code={model: c, replicas: 3}",
        "teachers.proofs={model: p, autoscale: {min_replicas: 2, max_replicas: 8}}",
        "teachers.other={model: o, endpoints: ['http://o']}",
    )
    assert replicas(*several) == {
        "teacher replica": 2, "teacher replica (code)": 3, "teacher replica (proofs)": 2,
    }  # fmt: skip
    assert replicas("teacher={model: t, endpoints: ['http://t']}") == {}
    for kind in ("grpo", "rft", "kd"):
        assert replicas(*several, f"trainer.objective.kind={kind}") == {}
    assert replicas("teacher=null", "trainer.objective.kind=grpo") == {}


def test_kd_reserves_a_worker_that_samples_from_the_student_for_evaluations() -> None:
    demo = ROOT / "deploy/runs/demo.yaml"
    assert "evaluation worker" not in {role.name for role in reservations(load(demo))}
    kd = reservations(load(demo, ["trainer.objective={kind: kd}"]))
    assert (kd[-1].name, kd[-1].count) == ("evaluation worker", 1)


def test_a_bundle_has_ray_s_names_and_no_zeros() -> None:
    assert bundle(Resources(cpus=0, gpus=0.25, custom={"spot": 1})) == {"GPU": 0.25, "spot": 1}


@pytest.mark.parametrize("room", ["rollout", "teacher"])
def test_an_engine_of_several_gpus_reserves_all_of_them(room: str) -> None:
    parallel = [f"{room}.engine.args.tensor_parallel_size=2"]
    with pytest.raises(ConfigError, match=rf"{room}.engine.args ask for 2 GPUs .* reserves 1"):
        load(PAPER, parallel)
    assert load(PAPER, [*parallel, f"{room}.resources.gpus=2"])


@pytest.mark.parametrize("room", ["rollout", "teacher", "trainer"])
def test_small_models_share_a_gpu(room: str) -> None:
    found = reservations(load(PAPER, [f"{room}.resources.gpus=0.25"]))
    assert [role.bundle["GPU"] for role in found if role.bundle.get("GPU", 1) < 1] == [0.25]


# In a process of its own: a process can be in one Ray cluster at a time, and the other tests' is
# another.
CLUSTER = """
    import asyncio, sys, time
    from pathlib import Path
    import ray
    from ray.cluster_utils import Cluster
    from deploy.config import load
    from deploy.crew import Crew
    from deploy.placement import NoRoom, Reservation, reservations, wait_for_room
    from services.config import Config, StageConfig
    from services.stage import Connection
    from tests.deploy.idle import idle_role
    from services.weight_store import start_store

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=4, num_gpus=4, resources={"gpu_node": 1})
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")

    def refusal(*wanted, timeout_s=2):
        # What was just let go takes Ray a moment to hand out again.
        everything = {kind: ray.cluster_resources()[kind] for kind in ("CPU", "GPU")}
        while any(ray.available_resources().get(k, 0) < n for k, n in everything.items()):
            time.sleep(0.1)
        try:
            asyncio.run(wait_for_room(wanted, timeout_s=timeout_s, say=print))
        except NoRoom as error:
            return str(error)
        raise AssertionError(f"there is room for {wanted}")

    def fits(*wanted):
        asyncio.run(wait_for_room(wanted, timeout_s=600, say=print))

    learner = Reservation("learner rank", 4, {"GPU": 1.0}, "PACK")
    engine = Reservation("rollout worker", 1, {"GPU": 4.0})

    # Packed on one node, the learner leaves a whole one for an engine of four GPUs.
    fits(learner, engine)
    # Spread, four single GPUs leave two on each node.
    scattered = refusal(Reservation("teacher replica", 4, {"GPU": 1.0}), engine, timeout_s=6)
    assert "no room for 1 × rollout worker with 4 GPU" in scattered, scattered
    assert "the most GPU free on one node is 2" in scattered, scattered
    assert "the cluster has 3 nodes" in scattered and "4 CPU and 4 GPU" in scattered, scattered
    # Too much in all.
    assert "2 GPU are missing" in refusal(Reservation("rollout worker", 10, {"GPU": 1.0}))
    # Enough in all, nowhere enough at once.
    odd = refusal(Reservation("rollout worker", 3, {"GPU": 2.5}))
    assert "its nodes have room for 2" in odd, odd
    # Four shares of each GPU.
    fits(Reservation("rollout worker", 32, {"GPU": 0.25}))
    # A role of only some nodes, and one of none.
    fits(Reservation("rollout worker", 2, {"gpu_node": 1.0, "CPU": 4.0}))
    assert "the most tpu free on one node is 0" in refusal(Reservation("x", 1, {"tpu": 1.0}))
    # A node that joins in time ends the wait, which is told of meanwhile.
    async def joins():
        said = []
        big = Reservation("learner rank", 3, {"GPU": 4.0}, "PACK")
        wait = asyncio.create_task(wait_for_room([big], timeout_s=600, say=said.append))
        while not said:
            await asyncio.sleep(0.1)
        cluster.add_node(num_cpus=1, num_gpus=4, wait=False)
        await wait
        return said
    (said,) = asyncio.run(joins())
    assert "room for 3 × learner rank with 4 GPU: 4 GPU are missing" in said, said
    # A laptop: every role on shares of one GPU, and not on less.
    cluster.add_node(num_cpus=2, num_gpus=1, resources={"laptop": 1})
    rooms = ("trainer", "teacher", "rollout", "verifier")
    def on_the_laptop(share):
        own = [f"{room}.resources.custom={{laptop: 0.01}}" for room in rooms]
        shares = [f"{room}.resources.gpus={share}" for room in rooms[:3]]
        return reservations(load(Path("deploy/runs/demo.yaml"), own + shares))
    fits(*on_the_laptop(0.3))
    assert "rollout worker with 0.5 CPU and 0.4 GPU" in refusal(*on_the_laptop(0.4), timeout_s=6)
    # Workers land on different nodes.
    async def nodes():
        connection = Connection("redis://nowhere", "spread", StageConfig())
        crew = Crew(connection, print)
        crew.staff(idle_role("rollout", 2, cpus=1, custom={"gpu_node": 0.01}), Config())
        names = [f"spread-rollout-{number}" for number in range(2)]
        found = await asyncio.gather(*(ray.get_actor(n).node.remote() for n in names))
        for name in names:
            ray.kill(ray.get_actor(name))
        return found
    assert len(set(asyncio.run(nodes()))) == 2
    # The weight store, which reserves nothing, keeps no node but the head from being given back.
    stores = [start_store(f"store-{number}") for number in range(5)]
    node = lambda _: ray.get_runtime_context().get_node_id()
    head = next(n["NodeID"] for n in ray.nodes() if "node:__internal_head__" in n["Resources"])
    assert set(ray.get([s.__ray_call__.remote(node) for s in stores])) == {head}
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.slow
def test_what_a_cluster_has_room_for_is_ray_s_own_answer(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CLUSTER)],
        capture_output=True, text=True, cwd=ROOT, timeout=DEADLINE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
