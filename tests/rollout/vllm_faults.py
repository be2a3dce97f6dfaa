"""What tests plant in vLLM's worker processes: a fault to be found out, and a counter."""

from __future__ import annotations

from typing import Any

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

    def count_tokens(self: Any) -> None:
        """From now on the tokens that the model computes are counted."""
        execute = self.model_runner.execute_model
        self.tokens = 0

        def counting(scheduled: Any, *args: Any, **more: Any) -> Any:
            self.tokens += scheduled.total_num_scheduled_tokens
            return execute(scheduled, *args, **more)

        self.model_runner.execute_model = counting

    def counted_tokens(self: Any) -> int:
        """How many they were; ends the counting."""
        del self.model_runner.execute_model
        return int(self.tokens)
