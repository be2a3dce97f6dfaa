from __future__ import annotations

import json
import math
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from services.metrics import Recorder, read, read_samples


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
