"""The learner's end of transfers that leave the host out: vLLM's own NCCL and IPC engines.

    learner ─ announces a version ─▶ WeightStore ─▶ rollout worker, which stops sampling and asks
    Pusher ◀── asks ── WeightStore ── calls, one by one ──▶ the same methods of its AsyncLLM
      └──────────────── tensors, from GPU to GPU ─────────────────────▶ vLLM's processes

vLLM's sending engine drives the transfer through a client with the methods of `AsyncLLM`. Ours
hands each call to the rollout worker through the store, so that the two sides need no other
connection, and a worker that died holds up nobody but its own thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from services.ports import free_port
from services.weight_store import Ask
from services.weights import Weights, views

log = logging.getLogger(__name__)

Backend: TypeAlias = Literal["nccl", "ipc"]

SENDER = "weight-send"  # name of the threads that send, one an ask
_POLL_S = 2.0  # how long the store holds a request for asks; how soon a close is noticed
_ANSWER_S = 120.0  # past it the store is taken for hung
_PAUSE_S = 1.0
_CALL_TIMEOUT_S = 600.0  # a whole model's broadcast, and the groups that are finished before it


_MOST_ON_DEVICE = 2  # versions: the newest, and the one before for engines that read it still


@dataclass(eq=False)
class _Version:
    """One version that engines are sent."""

    announcement: Weights  # all but the tensors
    flat: torch.Tensor  # [bytes] uint8, on the device as a rule
    senders: int = 0  # threads that read it


class Pusher:
    """Sends the newest version to every engine that asks for it.

    Args:
        store: handle of the `services.weight_store.WeightStore`.
        device: where the tensors are sent from.
        open_end: this side's end of a transfer to an engine of so many GPUs; see `end_of`.
    """

    def __init__(
        self, store: Any, device: torch.device, open_end: Callable[[int], TrainerInitInfo]
    ) -> None:
        self._store = store
        self._device = device
        self._open_end = open_end
        self._versions: list[_Version] = []  # the newest last, and older ones that are being sent
        self._changing = threading.Lock()
        self._ends: dict[str, Any] = {}  # member -> vLLM's sending engine
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="weight-push", daemon=True)
        self._thread.start()

    def offer(self, weights: Weights) -> Weights:
        """Makes `weights` what is sent from now on; gives what is to be published of them. Returns
        when they lie on the device. Where two older versions are still being sent, which takes
        engines that hang, these are left on the host and go up tensor by tensor for each engine."""
        announcement, flat = weights.announcement(), weights.flat()
        with self._changing:
            self._versions = [one for one in self._versions if one.senders]
            if len(self._versions) < _MOST_ON_DEVICE:
                flat = flat.to(self._device)  # waited for: engines read it on streams of their own
            self._versions.append(_Version(announcement, flat))
        return announcement

    def close(self) -> None:
        """Answers nobody any more."""
        self._closed.set()
        self._thread.join()

    def _serve(self) -> None:
        while not self._closed.is_set():
            try:
                ask = ray.get(self._store.next_ask.remote(_POLL_S), timeout=_POLL_S + _ANSWER_S)
            except (GetTimeoutError, RayActorError):  # it hangs, or is being restarted
                self._closed.wait(_PAUSE_S)
                continue
            if ask is not None:
                threading.Thread(target=self._send, args=(ask,), name=SENDER, daemon=True).start()

    @contextmanager
    def _newest(self) -> Iterator[_Version]:
        """The newest version, which inside of this stays as it is, whatever is offered."""
        with self._changing:
            version = self._versions[-1]
            version.senders += 1
        try:
            yield version
        finally:
            with self._changing:
                version.senders -= 1
                if not version.senders and version is not self._versions[-1]:
                    self._versions.remove(version)

    def _send(self, ask: Ask) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread
        with self._newest() as version:
            try:
                end = self._ends.get(ask.member)
                if end is None:
                    end = self._ends[ask.member] = self._connect(ask)
                end.source.version, end.client.announcement = version, version.announcement
                end.send_weights()
            except (GetTimeoutError, RayActorError, RayTaskError, RuntimeError) as error:
                # The engine gives up too, and its worker is replaced by one that asks anew.
                log.warning("weights could not be sent to %s: %s", ask.member, error)
                self._ends.pop(ask.member, None)
            else:
                end.source.version = None  # whose memory is to be had again

    def _connect(self, ask: Ask) -> Any:
        """vLLM's sending engine, connected with the processes of the engine that asks."""
        return WeightTransferTrainerFactory.trainer_init(
            self._open_end(ask.world_size),
            client=_Client(self._store, ask.member),
            source=_Source(self._device),
        )


def end_of(backend: Backend) -> Callable[[int], TrainerInitInfo]:
    """What vLLM's sending engine of `backend` is told, by the number of the receiver's GPUs. Each
    engine has a group of its own with the learner: one that dies breaks no other's."""
    if backend == "ipc":
        return lambda world_size: IPCTrainerInitInfo(rank=0, packed=True)
    return lambda world_size: NCCLTrainerInitInfo(
        rank=0,
        master_address=ray.util.get_node_ip_address(),
        master_port=free_port(),
        world_size=1 + world_size,
    )


class _Source(WeightSource):
    """One version as vLLM's sending engines read it."""

    def __init__(self, device: torch.device) -> None:
        self.version: _Version | None = None
        self._device = device

    def metadata(self) -> list[ParamMeta]:
        return [
            ParamMeta(name, getattr(torch, dtype), shape)
            for name, dtype, shape in self._sent.announcement.manifest
        ]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in views(self._sent.announcement.manifest, self._sent.flat):
            yield name, tensor.to(self._device, non_blocking=True)  # most are there already

    @property
    def _sent(self) -> _Version:
        assert self.version is not None, "nothing is being sent"
        return self.version


class _Client:
    """vLLM's `VLLMWeightSyncClient`: each call is made by one rollout worker, on its AsyncLLM."""

    announcement: Weights  # of the version that is being sent

    def __init__(self, store: Any, member: str) -> None:
        self._store, self._member = store, member

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        self._call("start_weight_update", None)

    def update_weights(self, update_info: Any) -> None:
        self._call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish_weight_update", self.announcement)

    def _call(self, method: str, argument: Any) -> None:
        made = self._store.call.remote(self._member, method, argument)
        ray.get(made, timeout=_CALL_TIMEOUT_S)
