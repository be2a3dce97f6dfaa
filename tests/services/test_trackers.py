"""W&B in its offline mode and MLflow with a store on this machine, both for real."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from services import trackers
from services.metrics import Recorder, read
from services.trackers import BackgroundTracker
from tests.waiting import DEADLINE_S

SETTINGS = {"trainer": {"objective": {"kind": "scope", "tau": 1.0}}, "seed": 3}


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracker has all the time that this machine takes to import and to store."""
    for name in ("_REACH_S", "_CLOSE_S"):
        monkeypatch.setattr(trackers, name, DEADLINE_S)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    made = tmp_path / "runs" / "demo"
    made.mkdir(parents=True)
    return made


def track(kind: str, run_dir: Path, steps: range) -> None:
    """A run, or the resumption of one, that does these steps."""
    with Recorder(run_dir, trackers.start([kind], run_dir, "demo", SETTINGS)) as recorder:
        for step in steps:
            recorder.write(
                {"step": step, "time": 1.0, "loss/mle": 1.0 / step, "ppl/teacher": float("nan")}
            )


def test_mlflow_has_every_step_and_a_resumed_run_goes_on(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    track("mlflow", run_dir, range(1, 4))
    track("mlflow", run_dir, range(3, 6))  # from a checkpoint at step 2
    client = MlflowClient(f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("scope")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "demo"
    assert run.info.status == "FINISHED"
    assert run.data.params == {
        "trainer.objective.kind": "scope", "trainer.objective.tau": "1.0", "seed": "3"
    }  # fmt: skip
    history = client.get_metric_history(run.info.run_id, "loss/mle")
    assert {m.step: m.value for m in history} == {s: 1.0 / s for s in range(1, 6)}
    assert sorted(m.step for m in history) == [1, 2, 3, 3, 4, 5]
    assert "ppl/teacher" not in run.data.metrics


def test_wandb_has_every_step_and_a_resumed_run_goes_on(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    track("wandb", run_dir, range(1, 4))
    # A resumed run is another process: W&B's own, which knows runs by their ids, ends as well.
    wandb.teardown()
    track("wandb", run_dir, range(3, 6))
    wandb.teardown()  # returns when that process has written everything
    files = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1  # one id: `wandb sync` puts them together
    first, second = ([*_wandb_rows(file)] for file in files)
    assert [row["step"] for row in first] == [1, 2, 3]
    assert [row["step"] for row in second] == [3, 4, 5]
    assert [row["loss/mle"] for row in second] == pytest.approx([1 / 3, 1 / 4, 1 / 5])


def _wandb_rows(file: Path) -> Iterator[dict[str, Any]]:
    """What was logged, from W&B's own file: LevelDB's log of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # too little for a header is padding
            place += 32768 - place % 32768
        size = int.from_bytes(data[place + 4 : place + 6], "little")
        last = data[place + 6] in (1, 4)
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if last:
            record = Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {i.key or i.nested_key[0]: json.loads(i.value_json) for i in items}


_UNREACHABLE = """
import logging, sys
from pathlib import Path
from services import trackers
logging.basicConfig(level=logging.WARNING)
trackers._REACH_S = 2.0
run_dir = Path(sys.argv[1])
told = trackers.start(["wandb", "mlflow"], run_dir, "demo", {})
for step in range(1, 101):
    for tracker in told:
        tracker.log({"loss/mle": 1.0}, step)
told[0].close(failed=False, timeout_s=600.0)  # W&B ends by itself, offline
told[1].close(failed=False, timeout_s=2.0)
"""


def test_servers_that_cannot_be_reached_hold_up_nobody(run_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _UNREACHABLE, str(run_dir)], capture_output=True, text=True,
        env={
            "HOME": str(run_dir), "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40,
            "MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # The run went through its steps to the end although none could be sent: MLflow's are in
    # metrics.jsonl alone; W&B keeps its own until they can be sent.
    assert "mlflow: 100 of 100 steps were not sent" in done.stderr, done.stderr
    (file,) = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    assert len([*_wandb_rows(file)]) == 100


class Flaky:
    """A tracker that fails every other time."""

    def __init__(self) -> None:
        self.calls, self.told, self.ended = 0, [], False  # type: ignore[var-annotated]

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.calls += 1
        if self.calls % 2:
            raise OSError("not now")
        self.told.append(step)

    def close(self, *, failed: bool) -> None:
        self.ended = failed


def test_what_failed_is_sent_again_in_order(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "_FIRST_RETRY_S", 0.01)
    flaky = Flaky()
    background = BackgroundTracker("mlflow", lambda: flaky)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 11):
            background.log({}, step)
        background.close(failed=True)
    assert flaky.told == [*range(1, 11)]
    assert flaky.ended
    assert "mlflow: not now; trying again beside the training" in caplog.text


def test_a_run_that_fails_says_so_to_its_trackers_and_keeps_its_records(run_dir: Path) -> None:
    flaky = Flaky()
    flaky.calls = 1
    with (
        pytest.raises(RuntimeError, match="broke"),
        Recorder(run_dir, [BackgroundTracker("mlflow", lambda: flaky)]) as recorder,
    ):
        recorder.write({"step": 1, "loss/mle": 2.0})
        raise RuntimeError("broke")
    assert flaky.ended and flaky.told == [1]
    assert [record["step"] for record in read(run_dir)] == [1]


def test_what_is_not_installed_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trackers.missing(["wandb", "mlflow"]) == []
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    (sentence,) = trackers.missing(["wandb"])
    assert sentence == ("trackers names wandb, which is not installed: pip install -e '.[wandb]'")


class Broken:
    """A tracker with a fault of its own."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        raise KeyError(step)

    def close(self, *, failed: bool) -> None: ...


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_a_broken_tracker_did_not_send_is_said(caplog: pytest.LogCaptureFixture) -> None:
    tracker = BackgroundTracker("mlflow", Broken)
    for step in range(1, 4):
        tracker.log({"loss/mle": 1.0}, step)
    tracker.close(failed=False)
    assert "3 of 3 steps were not sent" in caplog.text
