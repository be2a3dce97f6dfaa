from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from services.metrics import Recorder, read


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


def test_a_torn_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "los')
    assert read(tmp_path) == [{"step": 1}]
