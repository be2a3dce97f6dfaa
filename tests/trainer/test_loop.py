"""A rank of the loop, apart from learning: checkpoints that may fail, and time that adds up."""

from __future__ import annotations

import logging
import resource
from pathlib import Path

import pytest

from services.models import load_model, load_tokenizer, write_model
from tests.builders import scored_group, tiny_model
from trainer.batch import Batch
from trainer.checkpoint import CheckpointFailed, Progress, latest
from trainer.config import CheckpointConfig, TrainerConfig
from trainer.group_metrics import group_metrics
from trainer.learner import Clock, Learner
from trainer.loop import ExportFailed, LogpWatch, _Saves, checkpoints_of, exporting
from trainer.storage import Storage


@pytest.fixture
def learner() -> Learner:
    made = Learner(tiny_model(), TrainerConfig(), temperature=1.0)
    made.step(*made.plans(Batch.of([scored_group(["correct", "incorrect"])])))
    return made


def test_a_save_that_fails_does_not_end_the_training(
    learner: Learner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    in_the_way = tmp_path / "checkpoints"
    in_the_way.write_text("a file where the directory should be")
    saves = _Saves(learner, Storage(in_the_way), CheckpointConfig(every_steps=1))
    progress = Progress(1, ["1-0"], [(0, 1)])
    assert saves.due
    saves.begin(progress)
    assert saves.take() is None
    assert saves.failures == 1
    assert "step-000001 could not be written" in caplog.text
    assert "the newest complete one is not to be found" in caplog.text
    with pytest.raises(CheckpointFailed, match="could not be written"):
        saves.last(progress)  # there is no later one that could make up for it
    in_the_way.unlink()
    assert saves.last(progress) == progress
    assert saves.last(progress) is None  # it is durable already
    saves.close()
    assert latest(Storage(in_the_way)) is not None


def test_a_failed_save_that_nobody_took_is_not_the_next_ones(
    learner: Learner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    saves = _Saves(learner, Storage(tmp_path), CheckpointConfig())
    assert saves.take() is None
    assert saves.idle
    saves.begin()
    assert saves.take() == Progress(1, [], [])
    assert saves.take() is None
    assert not caplog.records
    saves.close()


def test_a_run_has_a_directory_of_its_own_on_shared_storage(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "demo"
    assert checkpoints_of(CheckpointConfig(), run).where == str(run / "checkpoints")
    shared = checkpoints_of(CheckpointConfig(storage=f"file://{tmp_path}/nfs/"), run)
    shared.adapter().mkdir("step-000001")
    assert (tmp_path / "nfs" / "demo" / "step-000001").is_dir()
    assert shared.where == f"file://{tmp_path}/nfs/demo"


def test_every_instant_is_in_one_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("trainer.learner.time.perf_counter", lambda: now)
    clock = Clock()
    for name, seconds in (("wait_groups", 1.0), ("publish", 2.0), ("wait_groups", 4.0)):
        now += seconds
        clock.lap(name)
    assert clock.take() == {"timing_s/wait_groups": 5.0, "timing_s/publish": 2.0}
    assert clock.take() == {}


def test_a_disagreement_about_log_probs_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = LogpWatch(0.1)
    seen = [watch.see(difference) for difference in (0.05, 0.2, 0.3, 0.05, 0.4)]
    assert [list(metrics.values()) for metrics in seen] == [[0.0], [1.0], [1.0], [0.0], [1.0]]
    assert [record.getMessage()[:54] for record in caplog.records] == [
        "rollout's log-probs differ from the learner's by 0.2 n",
        "rollout's log-probs differ from the learner's by 0.4 n",
    ]


def test_groups_with_both_verdicts_are_counted_by_their_tokens() -> None:
    groups = [
        scored_group(["correct", "incorrect", "unknown"], lengths=[3, 5, 40]),
        scored_group(["correct", "correct", "unknown"], lengths=[7, 9, 40]),
        scored_group(["incorrect", "unknown", "unknown"], lengths=[6, 40, 40]),
    ]
    prompt = len(groups[0].rollout.prompt.token_ids)
    mixed, known = 2 * prompt + 3 + 5, 5 * prompt + 3 + 5 + 7 + 9 + 6
    found = group_metrics(groups, 0)["batch/mixed_token_fraction"]
    assert found == pytest.approx(mixed / known)
    nothing = group_metrics([scored_group(["unknown"])], 0)
    assert nothing["batch/mixed_token_fraction"] == 0


def test_an_export_without_room_is_one_sentence_and_leaves_no_half_a_model(tmp_path: Path) -> None:
    """The system refuses files past a tenth of a megabyte."""
    path = "examples/arithmetic/student"
    model = load_model(path)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
    try:
        with (
            pytest.raises(ExportFailed, match=f"exported to {tmp_path}/export: .*too large"),
            exporting(tmp_path / "export") as folder,
        ):
            write_model(folder, model.config, model.state_dict(), load_tokenizer(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert [*tmp_path.iterdir()] == []
