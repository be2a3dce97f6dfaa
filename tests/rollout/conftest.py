"""A tiny student, and weights of it as the learner publishes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from services.models import probe_tokens
from services.weights import Weights
from tests.builders import VOCAB, save_tiny


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("student"))


def full_logprobs(
    model: PreTrainedModel, token_ids: Sequence[int], temperature: float = 1.0
) -> torch.Tensor:
    """Log-probs of `token_ids[1:]` by one plain forward: independent of any engine."""
    with torch.no_grad():
        logits = model(torch.tensor([list(token_ids)])).logits[0, :-1].double()
    table = torch.log_softmax(logits / temperature, -1)
    return table.gather(1, torch.tensor(token_ids[1:])[:, None]).squeeze(1)


def published(model: PreTrainedModel, version: int, *, fault: float = 0.0) -> Weights:
    """`model` as a version; its probe is off by `fault` nats."""
    probe = probe_tokens(VOCAB)
    logprobs = full_logprobs(model, probe) + fault
    return Weights.flatten(version, model.named_parameters(), probe, logprobs.tolist())
