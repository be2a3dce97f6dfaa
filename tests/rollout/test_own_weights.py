"""A model directory's own weights, as an engine takes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rollout.own_weights import OwnWeights
from rollout.transformers_engine import sequence_logprobs
from services.models import load_model
from services.weights import check_probe
from tests.builders import save_tiny


async def test_they_are_the_directorys_and_are_given_once(tmp_path: Path) -> None:
    path = str(save_tiny(tmp_path))
    feed = OwnWeights(path)
    weights = await feed.next(0.01)
    assert weights is not None and weights.version == 0
    model = load_model(path)
    for name, tensor in weights.tensors():
        torch.testing.assert_close(tensor, model.get_parameter(name), rtol=0, atol=0)
    check_probe(weights, sequence_logprobs(model, weights.probe_ids), tolerance=1e-4)
    assert await feed.next(0.01) is None


async def test_what_differs_is_found_out(tmp_path: Path) -> None:
    weights = await OwnWeights(str(save_tiny(tmp_path))).next(0.01)
    assert weights is not None
    other = load_model(str(save_tiny(tmp_path / "other", seed=1)))
    with pytest.raises(RuntimeError, match="differ from the learner's"):
        check_probe(weights, sequence_logprobs(other, weights.probe_ids), tolerance=1e-4)
