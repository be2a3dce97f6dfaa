"""What a run shows of its trajectories."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from services.trajectory import Episode
from tests.builders import scored_group, tiny_tokenizer
from trainer.batch import Batch
from trainer.group_metrics import group_metrics
from trainer.objectives.base import Coefficients
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


def test_a_chunk_is_shown_with_each_of_its_tokens() -> None:
    group = scored_group(["incorrect"], lengths=[4])
    scores = {0: np.array([-3.5, 0, -1, 0], np.float32)}
    group = replace(group, teacher_logprobs=scores, chunks={0: np.array([0, 0, 1, -1], np.int32)})
    none = Coefficients(reinforce=torch.zeros(1), distil=torch.zeros(1))
    (shown,) = samples(1, Batch.of([group]), none, tiny_tokenizer())[0]["trajectories"]
    assert (shown["log_ratio"], shown["heard"]) == ([-1.5, -1.5, 0.0, None], [])


def test_how_old_the_teacher_s_weights_are_is_a_metric() -> None:
    groups = [replace(scored_group(["incorrect"]), teacher_version=v) for v in (3, 4, None)]
    assert group_metrics(groups, version=5)["teacher/weights_age"] == 1.5
    assert "teacher/weights_age" not in group_metrics(groups[2:], version=5)


def test_what_the_environment_wrote_is_shown_as_its_own() -> None:
    group = scored_group(["incorrect"], lengths=[4])
    (t,) = group.rollout.trajectories
    mask = np.array([True, False, False, True])
    t = replace(t, mask=mask, episode=Episode(turns=2, tool_errors=1, tool_seconds=0.5))
    rollout = replace(group.rollout, trajectories=(t,))
    group = replace(group, verified=replace(group.verified, rollout=rollout))
    none = Coefficients(reinforce=torch.zeros(1), distil=torch.zeros(1))
    (shown,) = samples(1, Batch.of([group]), none, tiny_tokenizer())[0]["trajectories"]
    assert (shown["heard"], shown["turns"], shown["tool_errors"]) == ([1, 2], 2, 1)
    assert shown["log_ratio"] == [0.0, None, None, 0.0]
    metrics = group_metrics([group], version=1)
    assert metrics["episode/turns"] == 2.0 and metrics["response_length/mean"] == 2.0
    assert (metrics["episode/tool_errors"], metrics["episode/tool_seconds"]) == (1.0, 0.5)
    assert not any(name.startswith("episode/") for name in group_metrics([scored_group(
        ["correct"])], version=1))  # fmt: skip


def test_weights_relative_to_their_group() -> None:
    weight = torch.tensor([0.25, 0.75, 9.0, 1.0])
    group = torch.tensor([0, 0, 0, 1])
    member = torch.tensor([True, True, False, True])
    assert relative_weights(weight, group, member).tolist() == pytest.approx([0.5, 1.5, 1.0])
