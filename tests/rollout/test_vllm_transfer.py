"""The file through which engines of one node load the same weights."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
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


class Writing(torch.nn.Module):
    """Loads as gpt-oss does: one matrix in two parts, past the loader, and the bias through it."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.zeros(3, 2), requires_grad=False)
        self.offset = torch.nn.Parameter(torch.zeros(2), requires_grad=False)

    def load_weights(self, matrix: torch.Tensor, offset: torch.Tensor) -> None:
        self.matrix[:1].copy_(matrix[:1])
        self.matrix.data.narrow(0, 1, 2).copy_(matrix[1:])
        loader = getattr(self.offset, "weight_loader", default_weight_loader)
        loader(self.offset, offset)


def default_weight_loader(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
    param.data.copy_(loaded_weight)


@pytest.mark.parametrize("kept", [True, False])
def test_what_a_model_writes_past_its_loaders_is_loaded(kept: bool) -> None:
    """Without it vLLM puts the old tensors back. The kernels' tensors stay where they are."""
    from vllm.model_executor.model_loader import reload

    from rollout.vllm_transfer import DirectWrites

    model = torch.nn.Sequential(Writing())
    reload.record_metadata_for_reloading(model)
    before: Any = model[0].matrix
    for version in (1.0, 2.0):
        matrix = torch.arange(6.0).view(3, 2) + version
        reload.initialize_layerwise_reload(model)
        with DirectWrites(model) if kept else nullcontext():
            model[0].load_weights(matrix, torch.full((2,), version))
        reload.finalize_layerwise_reload(model, None)
        assert model[0].matrix is before and model[0].offset.tolist() == [version] * 2
        assert torch.equal(model[0].matrix, matrix) is kept
