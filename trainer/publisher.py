"""Hands each version of the weights to the weight store, beside the training."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import ray
import tenacity
from ray.exceptions import GetTimeoutError, RayActorError
from ray.train.torch import get_device

from services.weight_store import hand_over
from services.weights import Weights

if TYPE_CHECKING:
    from services.weight_push import Pusher

log = logging.getLogger(__name__)

Transfer: TypeAlias = Literal["auto", "store", "nccl", "ipc"]

_PUBLISH_TIMEOUT_S = 300.0
_PUBLISH_RETRY_S = 0.5
_LOOK_AFTER_S = 5.0


class Publisher:
    """Hands versions to the weight store beside the training, one at a time, and keeps the last,
    because a store that was restarted must be given it again."""

    def __init__(self, store: Any, pusher: Pusher | None) -> None:
        self.published: Weights
        self._store = store
        self._pusher = pusher
        self._thread = ThreadPoolExecutor(1, "publish")
        self._handing_over: Future[None] | None = None
        self._looked = time.monotonic()

    def publish(self, weights: Weights) -> None:
        """Begins to hand over; `wait` must have been called before."""
        self.published = weights
        self._handing_over = self._thread.submit(self._hand_over, weights)

    def wait(self) -> None:
        """Returns when the store owns what was published.

        Raises:
            RayActorError: the store did not come back.
        """
        if self._handing_over is not None:
            self._handing_over.result()
            self._handing_over = None

    def look_after_store(self) -> None:
        """Publishes again when the store was restarted: without weights nothing is sampled, and
        without samples there would be no next step to publish after."""
        if time.monotonic() - self._looked < _LOOK_AFTER_S:
            return
        self._looked = time.monotonic()
        self.wait()
        try:
            held = ray.get(self._store.version.remote(), timeout=_LOOK_AFTER_S)
        except (RayActorError, GetTimeoutError) as error:
            log.warning("the weight store cannot be reached: %s", error)
            return
        if held is None:
            self.publish(self.published)

    def _hand_over(self, weights: Weights) -> None:
        if self._pusher is not None:
            weights = self._pusher.offer(weights)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(RayActorError),  # it is being restarted
            wait=tenacity.wait_fixed(_PUBLISH_RETRY_S),
            stop=tenacity.stop_after_delay(_PUBLISH_TIMEOUT_S),
            reraise=True,
        )
        retrying(hand_over, self._store, weights, _PUBLISH_TIMEOUT_S)


def pusher(store: Any, transfer: Transfer) -> Pusher | None:
    """Who sends the weights to vLLM, where they do not go through the store."""
    if transfer != "nccl" and transfer != "ipc":
        return None
    from services.weight_push import Pusher, end_of  # vLLM, which is not installed everywhere

    return Pusher(store, get_device(), end_of(transfer))
