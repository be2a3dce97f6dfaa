"""Tries what has broken runs, or could, against real short runs of the demo, and prints the table.

    python -m tests.trials [--only WORD]      (make trials; an hour on two quiet cores)

Rows that a test of the suite already shows name it, and are run by pytest; the others start the
command as a user does. A row is one line of `TRIALS`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import libfaketime
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from services.metrics import read
from services.models import load_tokenizer
from services.redis_server import EmbeddedRedis, connect
from tests.deploy.driver import ROOT, SCOPE, Driver, step_of
from tests.waiting import wait_until

STEPS, GROUPS = 4, 8
TEACHER = ROOT / "examples/arithmetic/teacher"
Act = Callable[[Path], str]  # in a directory of its own: what happened; or AssertionError


@dataclass(frozen=True)
class Trial:
    """One row."""

    name: str
    expected: str
    act: Act


def short(directory: Path, *overrides: str) -> list[str]:
    """Arguments of a run of some steps."""
    return [
        "run", "deploy/runs/demo.yaml", f"runs_dir={directory}", f"trainer.max_steps={STEPS}",
        f"trainer.groups_per_step={GROUPS}", "trainer.checkpoint.every_steps=2",
        "evaluation.prompts=16", "ray.dashboard=false", *overrides,
    ]  # fmt: skip


# --------------------------------------------------------------------------- what a trial may do


def tested(*names: str) -> Act:
    """Tests of the suite that show it."""

    def act(_: Path) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--no-header", *names],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        last = done.stdout.strip().splitlines()[-1]
        assert done.returncode == 0, last
        return last

    return act


def trains(*overrides: str, around: Sequence[str] = (), **environment: str) -> Act:
    """A run trains every prompt once, and exports."""

    def act(directory: Path) -> str:
        log = directory / "log"
        run = Driver(log, *short(directory, *overrides), around=around, **environment)
        return trained(run, directory / "demo")

    return act


def trained(run: Driver, directory: Path) -> str:
    """Waits for a run's end, which must be a good one."""
    started = time.monotonic()
    assert run.end() == 0, run.said[-2000:]
    return audited(directory) + f" in {time.monotonic() - started:.0f} s"


def audited(directory: Path) -> str:
    """The ledger of a finished run is even, and every step has its record."""
    ledger = json.loads((directory / "ledger.json").read_text(encoding="utf-8"))
    assert ledger["fed"] == ledger["trained"] == ledger["step"] * GROUPS, ledger
    assert [r["step"] for r in read(directory)] == [*range(1, ledger["step"] + 1)]
    assert (directory / "export/config.json").exists()
    return f"trained {ledger['trained']} of {ledger['fed']} prompts"


def says(sentence: str, *arguments: str | Path, around: Sequence[str] = (), **env: str) -> Act:
    """The command ends with this sentence alone."""

    def act(directory: Path) -> str:
        done = Driver(directory / "log", *arguments, around=around, **env)
        status = done.end()
        assert status == 1, f"ended with {status}: {done.said[-500:]}"
        assert "Traceback" not in done.said, done.said[-500:]
        last = done.said.strip().splitlines()[-1]
        assert sentence in last, last
        return last

    return act


# -------------------------------------------------------------------------------------- trials


# Ten moments of a run, from its imports to its export.
MOMENTS: dict[str, Callable[[Driver, Path], object]] = {
    "imports": lambda run, _: run.maps("libtorch_cpu"),
    "preflight has ended": lambda run, _: "run directory" in run.said,
    "Ray starts": lambda run, _: run.runs("gcs_server"),
    "Ray Train starts": lambda run, _: run.runs("ray::TrainController"),
    "a rank starts": lambda run, _: run.runs("ray::RayTrainWorker"),
    "the teacher loads": lambda run, _: run.runs("ray::ServeReplica"),
    "evaluates before": lambda run, _: "evaluating before" in run.said,
    "trains": lambda _, directory: step_of(directory) > 0,
    "a checkpoint is written": lambda run, directory: (
        "accuracy" in run.said and [*(directory / "checkpoints").glob("*")]
    ),
    "exports": lambda _, directory: (directory / "export").exists(),
}


def interrupted(first: signal.Signals, second: signal.Signals) -> Act:
    """One run, stopped at each moment in turn by one signal or the other, and resumed."""

    def act(directory: Path) -> str:
        # A busy machine makes some steps between a moment and the signal.
        runs, slowest, longer = directory / "demo", 0.0, [f"trainer.max_steps={8 * STEPS}"]
        for number, (name, moment) in enumerate(MOMENTS.items()):
            arguments = ["resume", runs] if runs.exists() else short(directory, *longer)
            run = Driver(directory / "log", *arguments)
            run.wait_for(partial(moment, run, runs))
            status, seconds = run.interrupt(second if number % 2 else first)
            slowest = max(slowest, seconds)
            assert status == 130 or (name == "exports" and not status), f"{name}: {run.said[-500:]}"
            assert "Traceback" not in run.said, f"{name}: {run.said[-500:]}"
            wait_until(lambda run=run: not run.left())  # Ray's last ones end after their raylet
            print(f"  {name}: ended in {seconds:.1f} s", flush=True)
        final = Driver(directory / "log", "resume", runs)
        return f"{trained(final, runs)}; slowest to end {slowest:.1f} s"

    return act


def bigger_teacher(directory: Path) -> str:
    """64 more rows of the output matrix than the student has."""
    model = AutoModelForCausalLM.from_pretrained(TEACHER)
    model.resize_token_embeddings(model.config.vocab_size + 64)
    return trains_from(
        directory, model, "trainer.objective={kind: opd, divergence: reverse_kl, top_k: 8}"
    )


def certain_teacher(directory: Path) -> str:
    """100 steps over the two most likely tokens of a teacher that is all but certain."""
    model = AutoModelForCausalLM.from_pretrained(TEACHER)
    with torch.no_grad():
        norm = model.get_decoder().norm.weight
        norm.mul_(20.0)  # and with it every logit
    said = trains_from(
        directory, model, "trainer.objective={kind: opd, divergence: reverse_kl, top_k: 2}",
        "trainer.max_steps=100", "evaluation=null", "trainer.checkpoint.every_steps=50",
    )  # fmt: skip
    norms = [record["actor/grad_norm"] for record in read(directory / "demo")]
    assert len(norms) == 100
    assert all(math.isfinite(norm) for norm in norms)
    return f"{said}; largest gradient norm {max(norms):.2g}"


def trains_from(directory: Path, model: torch.nn.Module, *overrides: str) -> str:
    """A run with a teacher of this model."""
    path = directory / "teacher"
    model.save_pretrained(path)  # type: ignore[operator]
    load_tokenizer(str(TEACHER)).save_pretrained(path)
    return trains(f"teacher.model={path}", *overrides)(directory)


def full_disk(directory: Path) -> str:
    """A disk that is full from step 1 until somebody makes room."""
    small = ["bwrap", "--dev-bind", "/", "/", "--size", "60000000", "--tmpfs", "/mnt"]
    log = directory / "log"
    run = Driver(log, *short(Path("/mnt"), "trainer.max_steps=12"), around=small)
    inside = run.inside() / "mnt"
    run.wait_for(lambda: step_of(inside / "demo") > 0)
    filler = inside / "filler"
    with suppress_full(), filler.open("wb") as stream:
        while True:
            stream.write(b"x" * 4096)
            stream.flush()
    run.wait_for(lambda: "waits to be written" in run.said)
    filler.unlink()
    assert run.end() == 0, run.said[-2000:]
    return "waited, and went on when there was room"


@contextmanager
def suppress_full() -> Iterator[None]:
    """Ends quietly when the disk is full."""
    try:
        yield
    except OSError as error:
        assert error.errno == 28, error


def full_redis(directory: Path) -> str:
    """A Redis of one's own whose maxmemory is reached at step 1, and raised later."""
    server = EmbeddedRedis(directory / "redis")
    server.start()
    try:
        run = Driver(directory / "log", *short(directory, f"redis.url={server.url}"))
        run.wait_for(lambda: step_of(directory / "demo") > 0)
        _configure(server, "1mb")
        wait_until(lambda: "all wait for Redis: it is full" in _status(directory))
        said = next(line for line in _status(directory).splitlines() if "all wait" in line)
        _configure(server, "0")
        return f"{trained(run, directory / 'demo')}; status:{said}"
    finally:
        server.stop()


def _configure(server: EmbeddedRedis, maxmemory: str) -> None:
    import asyncio

    async def configure() -> None:
        async with connect(server.url) as client:
            await client.config_set("maxmemory", maxmemory)

    asyncio.run(configure())


def _status(directory: Path) -> str:
    done = subprocess.run(
        [SCOPE, "status", directory / "demo"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout


@contextmanager
def listener(port: int) -> Iterator[int]:
    """Somebody who listens there and says nothing."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        yield taken.getsockname()[1]


def port_taken(directory: Path) -> str:
    with listener(0) as port:
        return says("cannot listen on", *short(directory, f"scoring.port={port}"))(directory)


def dashboard_port_taken(directory: Path) -> str:
    with ExitStack() as stack:
        with suppress(OSError):  # somebody else has it: as good
            stack.enter_context(listener(8265))
        return trains("ray.dashboard=true")(directory)


def all_at_once(directory: Path) -> str:
    """What is odd about a machine, in one run."""
    runs = _made(directory / "mit Leerzeichen, Ümläuten {und} 'mehr'")
    odd = trains("ray.dashboard=true", around=[*READ_ONLY, *USER], HOME="/nonexistent", **NARROW)
    with ExitStack() as stack:
        with suppress(OSError):
            stack.enter_context(listener(8265))
        return odd(runs)


def with_text(text: str | bytes, sentence: str, **environment: str) -> Act:
    """A config with this at its end."""

    def act(directory: Path) -> str:
        path = directory / "run.yaml"
        demo = (ROOT / "deploy/runs/demo.yaml").read_bytes()
        path.write_bytes(demo + (text.encode() if isinstance(text, str) else text))
        return says(sentence, "check", path, **environment)(directory)

    return act


def stopped_engine(directory: Path) -> str:
    """vLLM's own process stops answering in the middle of a run, as one on a hung GPU does."""
    log, runs = directory / "log", directory / "demo"
    patience = ("rollout.engine.kind=vllm", "trainer.stall_timeout_s=60", "evaluation=null")
    run = Driver(log, *short(directory, *patience))
    run.wait_for(lambda: step_of(runs) > 0)
    (core,) = [p for p in run.processes() if "EngineCore" in " ".join(p.cmdline())]
    core.suspend()
    assert run.end() == 1, run.said[-500:]
    said = run.said.strip().splitlines()[-1]
    assert "scope resume" in said and "Traceback" not in run.said, run.said[-1500:]
    wait_until(lambda: not run.left())
    return f"{said}; then {trained(Driver(log, 'resume', runs), runs)}"


def two_of_one_name(directory: Path) -> str:
    """Each gets a directory of its own."""
    runs = [Driver(directory / f"log-{number}", *short(directory)) for number in (1, 2)]
    assert [run.end() for run in runs] == [0, 0], [run.said[-1000:] for run in runs]
    return "; ".join(audited(directory / name) for name in ("demo", "demo-2"))


def clock_set_back(directory: Path) -> str:
    """By an hour, for every process of the run, after step 1."""
    offset = directory / "offset"
    offset.write_text("+0\n", encoding="utf-8")
    library = Path(libfaketime.__file__).parent / "vendor/libfaketime/src/libfaketime.so.1"
    run = Driver(
        directory / "log", *short(directory, "trainer.max_steps=8"),
        LD_PRELOAD=str(library), FAKETIME_TIMESTAMP_FILE=str(offset), FAKETIME_NO_CACHE="1",
        DONT_FAKE_MONOTONIC="1",
    )  # fmt: skip
    run.wait_for(lambda: step_of(directory / "demo") > 0)
    offset.write_text("-3600\n", encoding="utf-8")
    return trained(run, directory / "demo")


def no_tmpdir(directory: Path) -> str:
    """Python itself falls back to another directory; Ray does not."""
    return says("where TMPDIR tells it", *short(directory), TMPDIR="/proc")(directory)


def empty_run(directory: Path) -> str:
    """One that was interrupted before its first step."""
    shutil.copy(ROOT / "deploy/runs/demo.yaml", directory / "config.yaml")
    return says("has not made a step yet", "report", directory)(directory)


# A namespace, because the Python of whoever tries may be in a home that is closed to others.
USER = ["--unshare-user", "--uid", "1000", "--gid", "1000"]
READ_ONLY = ["bwrap", "--dev-bind", "/", "/", "--ro-bind", str(ROOT), str(ROOT)]
NO_HOME = ["bwrap", "--dev-bind", "/", "/", "--ro-bind", str(Path.home()), str(Path.home())]
NARROW = {"COLUMNS": "40", "LINES": "20", "TTY_COMPATIBLE": "1"}
CHECK = ("check", "deploy/runs/demo.yaml")
TRIALS = (
    Trial("a key twice in YAML", "refused with both lines",
          with_text("trainer: {max_steps: 3}\n", "twice")),
    Trial("a teacher with 64 more rows", "trains", bigger_teacher),
    Trial("an answer of a million characters", "a verdict in milliseconds a kilobyte",
          tested("tests/verifier", "-k", "megabyte or million or hostile or nested")),
    Trial("staleness", "never over max_staleness", tested("tests/deploy/test_staleness.py")),
    Trial("servers that differ", "names and nats", tested("tests/deploy/test_endpoints.py")),
    Trial("a full disk", "waits", full_disk),
    Trial("a full Redis", "waits, and status names it", full_redis),
    Trial("the teacher's port is taken", "one sentence before Ray", port_taken),
    Trial("a config in Latin-1", "one sentence", with_text("# für\n".encode("latin-1"), "UTF-8")),
    Trial("an ASCII locale", "trains", trains(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")),
    Trial("a tab in YAML", "one sentence", with_text("\tname: x\n", "tab")),
    Trial("a directory as data", "one sentence",
          says("name its files", *CHECK, "data.path=examples")),
    Trial("odd rows", "file and row", tested("tests/rollout/test_prompts.py")),
    Trial("max_steps=3", "trainer.max_steps", says("trainer.max_steps", *CHECK, "max_steps=3")),
    Trial("Ctrl-C and SIGTERM at ten moments", "ends in 15 s, leaves nothing, resumes",
          interrupted(signal.SIGINT, signal.SIGTERM)),
    Trial("SIGTERM and Ctrl-C at ten moments", "ends in 15 s, leaves nothing, resumes",
          interrupted(signal.SIGTERM, signal.SIGINT)),
    Trial("a hostile report", "shown as text", tested("tests/deploy/test_report_browser.py")),
    Trial("vLLM at both ends", "trains",
          trains("rollout.engine.kind=vllm", "teacher.engine.kind=vllm")),
    Trial("a vLLM engine core that is stopped", "ends with a sentence, resumes", stopped_engine),
    Trial("a teacher that is all but certain", "finite gradients", certain_teacher),
    Trial("all that is odd about a machine at once", "trains", all_at_once),
    Trial("HOME is not writable", "trains", trains(around=NO_HOME)),
    Trial("TMPDIR is not writable", "one sentence", no_tmpdir),
    Trial("a read-only checkout", "trains", trains(around=READ_ONLY)),
    Trial("a user who is not root", "trains",
          trains(around=[*READ_ONLY, *USER], HOME="/nonexistent")),
    Trial("spaces and umlauts", "trains",
          lambda directory: trains()(_made(directory / "mit Leerzeichen, Ümläuten {und} 'mehr'"))),
    Trial("a terminal of 40 columns", "trains", trains(**NARROW)),
    Trial("two runs of one name together", "both train", two_of_one_name),
    Trial("a report of an empty run", "one sentence", empty_run),
    Trial("a clock that is set back", "trains", clock_set_back),
    Trial("8265 is taken", "trains", dashboard_port_taken),
)  # fmt: skip


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    options = parser.parse_args()
    os.umask(0o022)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    table = Table("trial", "what happened", "expected", "ok", title="trials")
    faults = 0
    for trial in TRIALS:
        if options.only not in trial.name:
            continue
        print(f"{trial.name} …", flush=True)
        directory = Path(tempfile.mkdtemp(prefix="scope-trial-"))
        directory.chmod(0o755)
        try:
            happened, ok = trial.act(directory), True
            shutil.rmtree(directory, ignore_errors=True)
        except Exception as error:  # a row like any other
            happened, ok = f"{error} (see {directory})", False
        faults += not ok
        print(f"  {'ok' if ok else 'FAULT'}: {happened}", flush=True)
        table.add_row(trial.name, happened[-300:], trial.expected, "yes" if ok else "NO")
    Console(width=160).print(table)
    sys.exit(min(faults, 1))


if __name__ == "__main__":
    main()
