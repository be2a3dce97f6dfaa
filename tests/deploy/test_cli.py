"""The command as a user meets it: the teacher alone, and mistakes that end in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deploy.config import dump, load
from services.redis_server import EmbeddedRedis, connect
from services.streams import Streams, claim
from services.trajectory import encode, order_of
from tests.builders import prompt
from tests.deploy.conftest import ROOT, SCOPE, scope


@pytest.fixture
def teacher_url() -> Iterator[str]:
    """`scope teacher` on a free port, with two keys."""
    server = subprocess.Popen(
        [SCOPE, "teacher", "deploy/runs/demo.yaml", "teacher.port=0"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"SCOPE_TEACHER_KEYS": "old-key,new-key"},
    )  # fmt: skip
    assert server.stdout is not None
    line = next(line for line in server.stdout if line.startswith("serving"))
    yield line.split(" at ")[1].split()[0]
    server.terminate()
    assert server.wait(timeout=60) == 0
    server.stdout.close()


@pytest.mark.slow
def test_the_teacher_is_served_alone(teacher_url: str) -> None:
    body = {"sequences": [{"prompt": [5, 9, 12], "completion": [7, 1]}]}
    assert httpx.get(f"{teacher_url}/health").status_code == 200
    assert httpx.post(f"{teacher_url}/v1/score", json=body).status_code == 401
    for key in ("old-key", "new-key"):
        answer = httpx.post(
            f"{teacher_url}/v1/score", json=body, headers={"Authorization": f"Bearer {key}"}
        )
        assert answer.status_code == 200
        (score,) = answer.json()["scores"]
        assert len(score["logprobs"]) == 2


@pytest.mark.slow
def test_check_prints_the_config_and_what_a_run_would_do() -> None:
    done = scope("check", "deploy/runs/demo.yaml", "trainer.max_steps=3")
    assert done.returncode == 0, done.stderr
    assert "tau: 1.0" in done.stdout
    assert "ok: 48 prompts in all, 3 steps" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("student=/nowhere", "scope: /nowhere is not a model directory: it has no config.json"),
        ("data.path=/nowhere.parquet", "scope: there is no file /nowhere.parquet"),
        ("sampling.max_tokens=100000", "past the student's context of"),
        (
            "rollout.engine={kind: vllm, args: {max_num_seq: 8}}",
            "rollout.engine.args.max_num_seq: vLLM's engine has no argument 'max_num_seq'; "
            "did you mean 'max_num_seqs'?",
        ),
    ],
)
def test_what_cannot_work_is_one_sentence(override: str, sentence: str) -> None:
    done = scope("check", "deploy/runs/demo.yaml", override)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_directory_that_is_no_run_is_one_sentence(tmp_path: Path) -> None:
    done = scope("status", tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"scope: cannot read {tmp_path}/config.yaml: No such file or directory\n"


def test_a_missing_package_says_what_to_do() -> None:
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "from deploy.cli import main; main(['check', 'deploy/runs/demo.yaml'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.endswith("is missing or broken: run `make install`\n")
    assert "Traceback" not in done.stderr


@pytest.fixture
async def stopped_run(tmp_path: Path) -> Path:
    """A run directory with one dead prompt, whose private Redis is not running."""
    (tmp_path / "config.yaml").write_text(dump(load(ROOT / "deploy/runs/demo.yaml")))
    server = EmbeddedRedis(tmp_path / "redis")
    server.start()
    streams = Streams(connect(server.url), "demo")
    await streams.create()
    await streams.feed([encode(prompt(0))], expected_fed=0, max_in_flight=1)
    (item,) = await claim([streams], "prompts", "w", count=1, block_ms=100)
    await streams.bury(item, "rollout: too long", "Traceback: line 3")
    await streams.redis.aclose()
    server.stop()
    return tmp_path


async def test_the_dead_are_listed_shown_and_put_back(stopped_run: Path) -> None:
    listed = scope("dead", stopped_run)
    assert "1 dead items" in listed.stdout
    assert "prompt 0, in prompts: rollout: too long" in listed.stdout
    id_ = listed.stdout.split("\n")[1].split()[0]
    assert "Traceback: line 3" in scope("dead", stopped_run, "--show", id_).stdout
    assert "has no dead item 1-1" in scope("dead", stopped_run, "--show", "1-1").stderr
    assert scope("dead", stopped_run, "--requeue").stdout == "1 items put back\n"
    assert scope("dead", stopped_run).stdout == "no dead items\n"
    server = EmbeddedRedis(stopped_run / "redis")
    server.start()
    streams = Streams(connect(server.url), "demo")
    ((stream, _, payload),) = await streams.items()
    assert (stream, order_of(payload)) == ("prompts", 0)
    assert (await streams.ledger()).exact
    await streams.redis.aclose()
    server.stop()
