from __future__ import annotations

import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import fsspec
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.builders import scored_group, tiny_model
from tests.object_stores import gcs
from tests.waiting import DEADLINE_S, wait_until
from trainer.batch import Batch
from trainer.checkpoint import CheckpointFailed, Progress, Saver, latest, ranges
from trainer.config import OptimizerConfig, TrainerConfig
from trainer.learner import Learner
from trainer.storage import Storage

MEMORY = "memory://bucket/run"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with gcs(tmp_path_factory.mktemp("gcs")) as url:
        yield url


@pytest.fixture(params=["disk", "object store", "gs://"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "disk":
        return Storage(tmp_path)
    if request.param == "gs://":
        url: str = request.getfixturevalue("bucket")
        return Storage(url.format(uuid.uuid4().hex), below="demo")
    files = fsspec.filesystem("memory")
    if files.exists("/bucket"):
        files.rm("/bucket", recursive=True)
    return Storage(MEMORY)


def state(step: int) -> dict[str, Tensor]:
    return {"model.w": torch.full((100, 10), float(step)), "step": torch.tensor(step)}


def saved(storage: Storage, *steps: int, keep_last: int = 2, keep_every: int | None = None) -> None:
    saver = Saver(storage, keep_last=keep_last, keep_every=keep_every)
    for step in steps:
        progress = Progress(step, [f"{step}-0"], [(0, 4 * step), (50, 51)])
        saver.save(state(step), progress, lambda path: (path / "config.json").write_text("{}"))
        assert saver.finish() == progress
    saver.close()


def loaded_step(storage: Storage) -> int:
    """The step of the newest whole one, after a look at its tensors."""
    found = latest(storage)
    assert found is not None
    filled = state(0)
    found.load(filled)
    assert bool((filled["model.w"] == float(found.progress.step)).all())
    return int(filled["step"])


def test_the_newest_is_found_and_old_ones_go(storage: Storage) -> None:
    saved(storage, 1, 2, 3)
    found = latest(storage)
    assert found is not None
    assert found.progress == Progress(step=3, entries=["3-0"], covered=[(0, 12), (50, 51)])
    assert storage.names() == ["step-000002", "step-000003"]
    assert loaded_step(storage) == 3


def test_those_of_every_so_many_steps_stay_with_their_model(storage: Storage) -> None:
    saved(storage, *range(1, 8), keep_last=1, keep_every=3)
    assert storage.names() == ["step-000003", "step-000006", "step-000007"]
    assert storage.read("step-000003/model/config.json") == b"{}"
    assert not storage.exists("step-000007/model")


def test_nothing_of_a_save_stays_in_memory(tmp_path: Path) -> None:
    """The copy is three times the model: without a GPU it is not kept for the next save."""
    saver = Saver(Storage(tmp_path), keep_last=1)
    large = {"model.w": torch.ones(50_000_000), "step": torch.tensor(1)}
    saver.save(state(1), Progress(1, [], []))  # what the first save of all loads stays
    saver.finish()
    resident = psutil.Process().memory_info
    before = resident().rss
    saver.save(large, Progress(2, [], []))
    saver.finish()
    # The thread lets go of the copy a moment after it has said that it is done.
    wait_until(lambda: resident().rss - before < large["model.w"].nbytes / 2)
    saver.close()


@pytest.mark.parametrize("victim", ["__0_0.distcp", ".metadata", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_a_torn_one_falls_back_to_the_one_before(
    storage: Storage, victim: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    saved(storage, 1, 2)
    file = f"step-000002/{victim}"
    data = storage.read(file)
    if damage == "missing":
        storage.adapter().rm_file(file)
    else:
        storage.write(file, data[: len(data) // 2])
    assert loaded_step(storage) == 1
    assert "step-000002 cannot be used" in caplog.text
    saved(storage, 2)  # what comes after takes its place
    assert loaded_step(storage) == 2


def test_a_history_that_was_given_up_goes(storage: Storage) -> None:
    saved(storage, 1, 2, 5)
    saved(storage, 3)  # continued from 2
    assert storage.names() == ["step-000002", "step-000003"]


def test_no_checkpoint_is_none(storage: Storage, tmp_path: Path) -> None:
    assert latest(storage) is None
    (tmp_path / ".step-000001.tmp").mkdir()
    assert latest(Storage(tmp_path)) is None
    saved(Storage(tmp_path), 2)
    assert Storage(tmp_path).names() == ["step-000002"]


def test_a_url_of_a_directory_is_that_directory(tmp_path: Path) -> None:
    saved(Storage(f"file://{tmp_path}"), 1)
    assert loaded_step(Storage(tmp_path)) == 1
    assert Storage(f"file://{tmp_path}").renames


def test_what_people_are_shown_of_a_url_holds_no_keys() -> None:
    url = "s3://key:secret@bucket/scope/?region=us-east-1&endpoint_override=localhost"
    assert Storage(url, below="demo").where == "s3://bucket/scope/demo"


@given(st.sets(st.integers(0, 60)))
def test_ranges_hold_exactly_the_orders(orders: set[int]) -> None:
    made = ranges(orders)
    assert list(Progress(0, [], made).orders) == sorted(orders)
    assert all(a[1] < b[0] for a, b in pairwise(made))


def test_training_goes_on_while_one_is_written(tmp_path: Path) -> None:
    """What is written is the state at `save`, whatever becomes of it afterwards."""
    entered, released = threading.Event(), threading.Event()

    def slow_model(path: Path) -> None:
        entered.set()
        assert released.wait(30)

    saver = Saver(Storage(tmp_path), keep_last=2, keep_every=1)
    trained = state(4)
    saver.save(trained, Progress(4, [], []), slow_model)
    trained["model.w"].zero_()  # the next step
    assert entered.wait(30)
    assert not saver.idle
    assert latest(Storage(tmp_path)) is None
    released.set()
    assert saver.finish() is not None
    saver.close()
    assert loaded_step(Storage(tmp_path)) == 4


FULL = """
import torch
from trainer.checkpoint import CheckpointFailed, Progress, Saver, latest
from trainer.storage import Storage
storage = Storage("/mnt/checkpoints")
saver = Saver(storage, keep_last=2)
small, big = ({"w": torch.ones(n)} for n in (100, 1 << 20))  # 4 MiB on a disk of 1
for step, state in ((1, small), (2, big), (2, big), (3, small)):
    saver.save(state, Progress(step, [], []))
    try:
        saver.finish()
    except CheckpointFailed as error:
        print(error)
    print(storage.names(), latest(storage).progress.step)
saver.close()
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_one_before_and_the_room(tmp_path: Path) -> None:
    """On a real file system of one megabyte."""
    done = subprocess.run(
        ["bwrap", "--dev-bind", "/", "/", "--size", "1000000", "--tmpfs", "/mnt",
         sys.executable, "-W", "ignore", "-c", FULL],
        capture_output=True, text=True, timeout=DEADLINE_S, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one = "['step-000001'] 1"
    first, error, after, again, after_again, last = done.stdout.splitlines()
    assert first == after == after_again == one
    assert error == again
    assert "step-000002 could not be written" in error
    assert "No space left on device" in error
    assert error.endswith("the newest complete one is /mnt/checkpoints/step-000001")
    assert last == "['step-000001', 'step-000003'] 3"


def learner(seed: int = 0, *, offload: bool = False) -> Learner:
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=3, schedule="cosine", offload=offload)
    config = TrainerConfig(optimizer=optimizer)
    return Learner(tiny_model(seed), config, temperature=1.0, total_steps=4)


@pytest.mark.parametrize("offload", [False, True], ids=["", "moments on the host"])
def test_training_continues_bit_for_bit(storage: Storage, offload: bool) -> None:
    batches = [
        Batch.of([scored_group(["correct", "correct", "incorrect"], order=i)]) for i in range(4)
    ]
    straight = learner()
    expected = [straight.step(*straight.plans(b))["loss/mle"] for b in batches]
    first = learner()
    got = [first.step(*first.plans(b))["loss/mle"] for b in batches[:2]]
    saver = Saver(storage, keep_last=1)
    saver.save(first.state(), Progress(2, [], []))
    saver.finish()
    saver.close()
    found = latest(storage)
    assert found is not None
    second = learner(seed=1, offload=offload)
    filled = second.state()
    found.load(filled)
    second.load_state(filled)
    got += [second.step(*second.plans(b))["loss/mle"] for b in batches[2:]]
    assert got == expected
    for a, b in zip(second.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    saved(Storage(tmp_path), 1)
    found = latest(Storage(tmp_path))
    assert found is not None
    with pytest.raises(CheckpointFailed, match=r"step-000001 cannot be loaded: .*model.lm_head"):
        found.load({"model.lm_head": torch.zeros(3)})
