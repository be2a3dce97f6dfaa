"""A fault to plant in vLLM's worker processes, for tests that must see it found out."""

from __future__ import annotations

from rollout import vllm_transfer

_repack = vllm_transfer.repack_vocabulary


class FaultyWorker(vllm_transfer.WorkerExtension):
    """Its methods run in each worker."""

    def forget_repacking(self) -> None:
        """From now on an update leaves the packed output matrix as it was."""
        vllm_transfer.repack_vocabulary = lambda model: None

    def remember_repacking(self) -> None:
        """Updates are whole again."""
        vllm_transfer.repack_vocabulary = _repack
