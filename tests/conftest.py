"""What the tests of all rooms share: one real Redis a session, one clean run a test."""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from pathlib import Path

# The tests are small: more threads than one only fight with each other on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")

import pytest
import pytest_asyncio

from services.config import StageConfig
from services.redis_server import EmbeddedRedis, connect
from services.stage import Connection
from services.streams import Streams


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
        redis_server.url, f"test-{uuid.uuid4().hex[:8]}", StageConfig(lease_s=0.4, patience_s=2.0)
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


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray of this machine alone, and whatever Serve runs on it."""
    import ray
    from ray import serve

    ray.init("local", num_cpus=2, include_dashboard=False)
    yield
    serve.shutdown()
    ray.shutdown()
