"""What the tests of all rooms share: one real Redis a session, one clean run a test; and how they
are split over the processes of `make test`."""

from __future__ import annotations

import os
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# The tests are small: more threads than one only fight with each other on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
# Ray's own default, 15, leaves its workers a twentieth of a processor that others want as well.
os.environ.setdefault("RAY_worker_niceness", "0")

import httpx
import pytest
import pytest_asyncio

from services.config import StageConfig
from services.redis_server import EmbeddedRedis, connect
from services.stage import Connection
from services.streams import Streams
from tests.waiting import DEADLINE_S

# httpx's own default gives a server five seconds.
for phase in ("connect", "read", "write", "pool"):
    setattr(httpx.Client.__init__.__kwdefaults__["timeout"], phase, DEADLINE_S)

# Fixtures that cost more than their tests, and the files whose tests share them.
STARTED_ONCE = {
    "extended_run": ("deploy/test_own_step", "deploy/test_two_teachers"),
    "scraped_run": (
        "deploy/test_dashboards", "deploy/test_pipeline", "deploy/test_plan", "deploy/test_resume",
        "deploy/test_wheel",
    ),
    "ray_cluster": (
        "deploy/test_scale", "services/test_weight_push", "services/test_weight_store",
        "teacher/test_serve", "teacher/test_serve_several",
    ),
}  # fmt: skip
# Runs that hold gigabytes: one at a time.
LARGE = ("deploy/test_vllm_pipeline", "examples/test_smollm_run")
SHARE_OF = {
    f"tests/{file}.py": name
    for name, files in (STARTED_ONCE | {"large": LARGE}).items()
    for file in files
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`pytest -n 2`: a file stays in one process, and so do all that share an expensive fixture."""
    from xdist.scheduler import LoadFileScheduling

    class ByFixture(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return SHARE_OF.get(file, file)

    config.option.loadscopereorder = False  # as sorted below
    return ByFixture(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with slow tests first where processes share the work: none ends long after another."""
    for item in items:
        if label := getattr(item, "operation_label", None):  # schemathesis gives all one name
            item._id = item.id.with_params(label)
        for fixture in STARTED_ONCE.keys() & set(item.fixturenames):
            file = item.location[0]
            assert SHARE_OF.get(file) == fixture, f"{file} uses {fixture}: add it to STARTED_ONCE"
    names = Counter(item.nodeid for item in items)
    twice = [name for name, count in names.items() if count > 1]
    assert not twice, f"pytest-xdist would run only one of those called {twice}"
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def connection(redis_server: EmbeddedRedis) -> Connection:
    """A run of its own on the session's Redis, with short leases."""
    return Connection(
        redis_server.url,
        f"test-{uuid.uuid4().hex[:8]}",
        StageConfig(lease_s=2.0, patience_s=DEADLINE_S),
    )


@pytest_asyncio.fixture
async def streams(connection: Connection) -> AsyncIterator[Streams]:
    client = connect(connection.redis_url)
    made = Streams(client, connection.run)
    await made.create()
    yield made
    await client.aclose()


@pytest.fixture(scope="session")
def vllm() -> None:
    """Tests that need vLLM name this, and fail with one sentence where it is not installed."""
    if not find_spec("vllm"):
        pytest.fail("vLLM is not installed: make install brings its CPU build", pytrace=False)


@pytest.fixture(scope="session")
def deepmath() -> Path:
    """1,000 real rows of the authors' training sample."""
    return Path(__file__).parents[2] / "shared" / "data" / "deepmath-sample-a.parquet"


@pytest.fixture(scope="module")
def ray_cluster() -> None:
    """A Ray of this machine alone, and whatever Serve runs on it: one for all files that share
    it, until the hook below ends it."""
    import ray

    from teacher.serve import ENVIRONMENT

    if ray.is_initialized():
        return
    os.environ.update(ENVIRONMENT | os.environ)
    # Replicas come and go within seconds of what calls for them, rather than tens of them.
    os.environ.setdefault("RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "0.5")
    ray.init("local", num_cpus=2, include_dashboard=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Ends that Ray after the last test that shares it: Serve's processes, doing nothing, take a
    tenth of a processor from all that comes after."""
    yield
    this, other = (SHARE_OF.get(one.location[0]) if one else None for one in (item, nextitem))
    if this != "ray_cluster" or other == "ray_cluster":
        return
    import ray
    from ray import serve

    if ray.is_initialized():
        serve.shutdown()
        ray.shutdown()
