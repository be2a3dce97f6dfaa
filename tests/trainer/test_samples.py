"""What a run shows of its trajectories."""

from __future__ import annotations

import json

import pytest
import torch

from tests.builders import scored_group, tiny_tokenizer
from trainer.batch import Batch
from trainer.objectives import Coefficients
from trainer.samples import due, samples
from trainer.scope import relative_weights


def test_a_run_of_any_length_leaves_few() -> None:
    assert [step for step in range(70) if due(step)] == [1, 2, 4, 8, 16, 32, 64]


def test_a_sample_says_what_was_written_and_how_it_was_trained() -> None:
    batch = Batch.of(
        [
            scored_group(["correct", "correct"], lengths=[2, 3]),
            scored_group(["correct", "incorrect", "unknown"], order=1, lengths=[2, 3, 1]),
        ]
    )
    coefficients = Coefficients(
        reinforce=torch.tensor([0.5, 0.5, 1.0, 0.0, 0.0]),
        distil=torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0]),
    )
    mixed, plain = samples(7, batch, coefficients, tiny_tokenizer())
    assert (mixed["step"], mixed["prompt"], mixed["reference"]) == (7, "012", "5")
    right, wrong, unknown = mixed["trajectories"]
    assert (right["outcome"], right["reinforce"], right["log_ratio"]) == ("correct", 1.0, None)
    assert (wrong["outcome"], wrong["distil"], wrong["reason"]) == ("incorrect", 1.0, "because")
    assert wrong["log_ratio"] == [0.0] * 3  # both at −1 nat
    assert len(wrong["tokens"]) == wrong["length"] == 3
    assert unknown["reinforce"] == unknown["distil"] == 0
    assert [t["reinforce"] for t in plain["trajectories"]] == [0.5, 0.5]
    assert json.dumps(mixed)


def test_weights_relative_to_their_group() -> None:
    weight = torch.tensor([0.25, 0.75, 9.0, 1.0])
    group = torch.tensor([0, 0, 0, 1])
    member = torch.tensor([True, True, False, True])
    assert relative_weights(weight, group, member).tolist() == pytest.approx([0.5, 1.5, 1.0])
