from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from services.metrics import Recorder, read, read_samples
from tests.waiting import DEADLINE_S


def test_records_come_back_and_reach_tensorboard(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for step in (1, 2):
            recorder.write({"step": step, "time": 0.0, "reward/accuracy": step / 10})
    assert [r["reward/accuracy"] for r in read(tmp_path)] == [0.1, 0.2]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("reward/accuracy")] == [1, 2]


def test_a_step_trained_again_replaces_what_followed(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for step in (1, 2, 3):
            recorder.write({"step": step, "life": 1})
    with Recorder(tmp_path) as recorder:
        recorder.write({"step": 2, "life": 2})
    assert read(tmp_path) == [{"step": 1, "life": 1}, {"step": 2, "life": 2}]


def test_what_has_no_value_is_null_in_the_file_and_nan_to_its_readers(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    with Recorder(tmp_path) as recorder:
        recorder.write({"step": 1, "ppl/teacher": math.nan, "ppl/student": math.inf, "loss/mle": 1})
        recorder.show([{"step": 1, "prompt": "1+1=", "log_ratio": [0.5, -math.inf, None]}])
    for name in ("metrics.jsonl", "trajectories.jsonl"):
        json.loads((tmp_path / name).read_text(), parse_constant=refuse)
    (record,) = read(tmp_path)
    assert math.isnan(record["ppl/teacher"]) and math.isnan(record["ppl/student"])
    assert record["loss/mle"] == 1
    assert read_samples(tmp_path)[0]["log_ratio"] == [0.5, None, None]


def test_a_record_of_an_earlier_version_is_read_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "ppl/teacher": NaN}\n')
    assert math.isnan(read(tmp_path)[0]["ppl/teacher"])
    with Recorder(tmp_path) as recorder:
        recorder.write({"step": 2})
    assert [record["step"] for record in read(tmp_path)] == [1, 2]


def test_a_torn_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "los')
    assert read(tmp_path) == [{"step": 1}]


FULL = """
from pathlib import Path
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from services.metrics import Recorder, read
run = Path("/mnt/run")
run.mkdir()
filler = Path("/mnt/filler")
with Recorder(run) as recorder:
    recorder.write({"step": 1, "a/b": 1.0})
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    step = 2
    try:
        while step < 1000:  # the last pages have some room yet
            recorder.write({"step": step, "a/b": 1.0, "text": 500 * "x"})
            step += 1
    except OSError as error:
        print(error.strerror)
    whole = [record["step"] for record in read(run)] == [*range(1, step)]
    print(whole and run.joinpath("metrics.jsonl").read_bytes().endswith(b"}\\n"))
    filler.unlink()
    recorder.write({"step": step, "a/b": 1.0})
print([record["step"] for record in read(run)] == [*range(1, step + 1)])
seen = EventAccumulator(str(run / "tensorboard")).Reload().Scalars("a/b")
print({event.step for event in seen} == {*range(1, step + 1)})
"""


def test_a_full_disk_tears_no_record_and_what_tensorboard_missed_comes_later() -> None:
    """On a real file system of one megabyte."""
    done = subprocess.run(
        ["bwrap", "--dev-bind", "/", "/", "--size", "1000000", "--tmpfs", "/mnt",
         sys.executable, "-W", "ignore", "-c", FULL],
        capture_output=True, text=True, timeout=DEADLINE_S, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["No space left on device", "True", "True", "True"]
