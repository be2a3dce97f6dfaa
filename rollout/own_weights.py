"""The weights of a model directory as they are, for whoever samples without a learner."""

from __future__ import annotations

import asyncio

from services import packed
from services.models import load_model, load_tokenizer, probe_tokens
from services.weights import Weights


class OwnWeights:
    """A `services.weights.WeightFeed` that gives a directory's weights once, as version 0."""

    def __init__(self, model_path: str) -> None:
        self._model_path = model_path
        self._given = False

    async def next(self, timeout_s: float) -> Weights | None:
        """See `WeightFeed`."""
        if self._given:
            await asyncio.sleep(timeout_s)
            return None
        self._given = True
        return await asyncio.to_thread(read_weights, self._model_path)


def read_weights(model_path: str) -> Weights:
    """A directory's weights, with the log-probs of the probe that engines check them by."""
    model = packed.prepare(load_model(model_path))
    vocab_size = model.config.get_text_config().vocab_size
    probe = probe_tokens(vocab_size, load_tokenizer(model_path))
    (logprobs,) = packed.score(model, [probe], [1])
    return Weights.flatten(0, model.named_parameters(), probe, logprobs)
