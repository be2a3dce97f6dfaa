"""The command as a user meets it, and mistakes that end in one sentence."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from deploy.config import dump, load
from services.redis_server import EmbeddedRedis, connect
from services.streams import Streams, claim
from services.trajectory import encode, order_of
from tests.builders import prompt
from tests.deploy.conftest import ROOT, SCOPE, Here, scope, short
from tests.deploy.driver import DEMO, Driver
from tests.waiting import DEADLINE_S


def test_check_prints_the_config_and_what_a_run_would_do(here: Here) -> None:
    done = here("check", "deploy/runs/demo.yaml", "trainer.max_steps=3")
    assert done.returncode == 0, done.stderr
    assert "tau: 1.0" in done.stdout
    assert "ok: 48 prompts in all, 3 steps" in done.stderr


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("student=/nowhere", "scope: /nowhere is not a model directory: it has no config.json"),
        ("data.path=/nowhere.parquet", "scope: there is no file /nowhere.parquet"),
        ("sampling.max_tokens=100000", "past the student's context of"),
    ],
)
def test_what_cannot_work_is_one_sentence(here: Here, override: str, sentence: str) -> None:
    done = here("check", "deploy/runs/demo.yaml", override)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_an_argument_that_vllm_does_not_have_is_one_sentence(here: Here) -> None:
    engine = "rollout.engine={kind: vllm, args: {max_num_seq: 8}}"
    done = here("check", "deploy/runs/demo.yaml", engine)
    assert done.returncode == 1
    assert done.stderr == (
        "scope: rollout.engine.args.max_num_seq: vLLM's engine has no argument 'max_num_seq'; "
        "did you mean 'max_num_seqs'?\n"
    )


@pytest.mark.parametrize("command", ["run", "teacher"])
def test_a_port_that_is_taken_is_one_sentence_before_anything_starts(
    here: Here, command: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        settings = [f"scoring.port={port}"]
        if command == "run":
            settings.append(f"runs_dir={tmp_path}")
        done = here(command, "deploy/runs/demo.yaml", *settings)
    assert done.returncode == 1
    assert done.stderr == (
        f"scope: the teacher cannot listen on 127.0.0.1:{port}: Address already in use; stop what "
        f"is there, or set another scoring.port (0 takes a free one)\n"
    )
    assert not [*tmp_path.iterdir()]  # no run directory either


@pytest.mark.parametrize("library", ["pydantic_core", "libtorch_cpu"])
def test_ctrl_c_while_python_imports_is_one_line(tmp_path: Path, library: str) -> None:
    """Before and after the config is read. Torch's imports swallow a KeyboardInterrupt."""
    run = Driver(tmp_path / "log", "run", DEMO, *short(tmp_path))
    run.wait_for(lambda: run.maps(library))
    status, _ = run.interrupt(signal.SIGINT)
    assert (status, run.said) == (130, "scope: interrupted\n")


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
    async with Streams(connect(server.url), "demo") as streams:
        await streams.create()
        await streams.feed([encode(prompt(0))], expected_fed=0, max_in_flight=1)
        (item,) = await claim([streams], "prompts", "w", count=1, block_ms=100)
        await streams.bury(item, "rollout: too long", "Traceback: line 3")
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
    async with Streams(connect(server.url), "demo") as streams:
        ((stream, _, payload),) = await streams.items()
        assert (stream, order_of(payload)) == ("prompts", 0)
        assert (await streams.ledger()).exact
    server.stop()


@pytest.mark.parametrize("locale", ["C", "POSIX", "C.ISO-8859-1"])
def test_output_does_not_die_of_a_terminal_that_knows_no_unicode(
    locale: str, tmp_path: Path
) -> None:
    config = tmp_path / "für→.yaml"
    config.write_text("name: x\nschüler→: y\n", encoding="utf-8")
    done = subprocess.run(
        [SCOPE, "check", config], capture_output=True, cwd=ROOT,
        env=os.environ | {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )  # fmt: skip
    said = done.stderr.decode("ascii")
    assert done.returncode == 1
    assert said.startswith("scope: ") and said.count("\n") == 1
    assert r"sch\xfcler\u2192" in said


FULL = """
import asyncio, sys
from pathlib import Path
from deploy.config import dump, load
from deploy.status import read_status, render
run = Path("/mnt")
config = load(Path("deploy/runs/demo.yaml"), ["redis.url=" + sys.argv[1]])
(run / "config.yaml").write_text(dump(config), encoding="utf-8")
try:
    with (run / "filler").open("wb") as filler:
        while True:
            filler.write(b"x" * 4096)
            filler.flush()
except OSError:
    print(render(asyncio.run(read_status(run))))
"""


def test_status_shows_that_a_full_redis_and_a_full_disk_are_waited_for(tmp_path: Path) -> None:
    """A real Redis past its maxmemory, and a real file system of a tenth of a megabyte."""
    server = EmbeddedRedis(tmp_path)
    server.start()
    client = redis.Redis.from_url(server.url)
    client.config_set("maxmemory", 1)
    done = subprocess.run(
        ["bwrap", "--dev-bind", "/", "/", "--size", "100000", "--tmpfs", "/mnt",
         sys.executable, "-c", FULL, server.url],
        capture_output=True, text=True, timeout=DEADLINE_S, cwd=ROOT,
    )  # fmt: skip
    client.close()
    server.stop()
    assert "all wait for Redis: it is full" in done.stdout, done.stderr
    assert "the run directory's disk is full: its records wait in Redis for room" in done.stdout
