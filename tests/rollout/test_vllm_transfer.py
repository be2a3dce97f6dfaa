"""The file through which engines of one node load the same weights."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch

from services.weights import Weights

pytestmark = pytest.mark.usefixtures("vllm")

WEIGHTS = Weights.flatten(3, [("p", torch.arange(1 << 16))], [1, 2], [-0.5])


def shared(directory: Path, weights: Weights = WEIGHTS) -> Any:
    from rollout.vllm_transfer import shared

    return shared(weights, directory)


def test_engines_of_one_node_share_a_file_that_is_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truncate, written = os.ftruncate, []
    monkeypatch.setattr(
        os, "ftruncate", lambda file, size: (written.append(file), truncate(file, size))
    )
    together = Barrier(4)

    def load() -> tuple[str, bytes]:
        together.wait()
        with shared(tmp_path) as update:
            together.wait()
            return update["path"], Path(update["path"]).read_bytes()

    with ThreadPoolExecutor(4) as engines:
        came = {future.result() for future in [engines.submit(load) for _ in range(4)]}
    assert len(written) == 1
    ((_, content),) = came
    assert content == WEIGHTS.buffer.tobytes()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_engine_left_is_written_anew_and_removed(tmp_path: Path) -> None:
    half, other = (tmp_path / f"scope-weights-{name}" for name in (WEIGHTS.serial, "older"))
    half.write_bytes(b"half")
    other.write_bytes(b"of a run that was killed")
    with shared(tmp_path) as update:
        assert Path(update["path"]).read_bytes() == WEIGHTS.buffer.tobytes()
    assert not list(tmp_path.iterdir())


def test_what_another_process_uses_is_left_alone(tmp_path: Path) -> None:
    used = tmp_path / "scope-weights-used"
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_SH)"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{hold}; print(flush=True); input()", used],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    with shared(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == [used]
    holder.communicate(b"\n")
    with shared(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["nccl", "ipc"])
def test_what_vllm_sends_itself_takes_the_names_of_a_multimodal_checkpoint(backend: str) -> None:
    """Of its own messages, which both ends would otherwise read with the text model's names."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo

    from rollout.vllm_engine import renamed

    names = {"model.norm.weight": "model.language_model.norm.weight"}
    told = {
        "names": [*names, "lm_head.weight"],
        "dtype_names": ["float32"] * 2,
        "shapes": [[2]] * 2,
    }
    kind = {"nccl": NCCLWeightTransferUpdateInfo, "ipc": IPCWeightTransferUpdateInfo}[backend]
    made = kind(**renamed(told | ({} if backend == "nccl" else {"ipc_handles": [{}, {}]}), names))
    assert made.names == ["model.language_model.norm.weight", "lm_head.weight"]
    assert renamed({"manifest": []}, names) == {"manifest": []}  # our own transfer's
