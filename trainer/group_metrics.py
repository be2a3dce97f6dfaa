"""What can be said of a step's groups before any mathematics: lengths, verdicts, staleness."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from services.trajectory import Episode, ScoredGroup
from trainer.learner import Metrics
from trainer.samples import is_mixed


def group_metrics(groups: Sequence[ScoredGroup], version: int) -> Metrics:
    """One step's figures by name.

    Args:
        groups: what the step trains on.
        version: of the weights that it trains, from which staleness counts.
    """
    trajectories = [t for g in groups for t in g.rollout.trajectories]
    outcomes = [v.outcome for g in groups for v in g.verified.verdicts]
    count = len(trajectories)
    lengths = np.array([t.sampled_count for t in trajectories])
    incorrect = lengths[[outcome == "incorrect" for outcome in outcomes]]
    known = [(g, _known_tokens(g)) for g in groups]
    mixed = sum(tokens for g, tokens in known if is_mixed(g))
    return {
        "batch/groups": float(len(groups)),
        # What GRPO learns from: of the tokens with a verdict, prompts included.
        "batch/mixed_token_fraction": mixed / max(1, sum(tokens for _, tokens in known)),
        "reward/accuracy": outcomes.count("correct") / count,
        "scope/unknown_fraction": outcomes.count("unknown") / count,
        "staleness/mean": float(np.mean([version - g.rollout.mean_weight_version for g in groups])),
        "staleness/max": float(max(version - g.rollout.weight_version for g in groups)),
        "prompt_length/mean": float(np.mean([len(g.rollout.prompt.token_ids) for g in groups])),
        "response_length/mean": float(lengths.mean()),
        "response_length/incorrect_mean": float(incorrect.mean()) if len(incorrect) else math.nan,
        "response_length/max": float(lengths.max()),
        "response_length/truncated_fraction": sum(t.finish == "length" for t in trajectories)
        / count,
        # Of the policy that sampled, estimated from what it sampled.
        "actor/entropy": -float(
            np.mean(np.concatenate([t.logprobs[t.sampled] for t in trajectories]))
        ),
        **_teacher_metrics(groups, version),
        **_episode_metrics([t.episode for t in trajectories if t.episode is not None]),
    }


def _teacher_metrics(groups: Sequence[ScoredGroup], version: int) -> Metrics:
    """What was scored, and, of a teacher with the student's weights, how many steps older than the
    learner's those are."""
    ages = [version - g.teacher_version for g in groups if g.teacher_version is not None]
    scored = sum(len(logprobs) for g in groups for logprobs in g.teacher_logprobs.values())
    return {
        "teacher/scored_tokens": float(scored),
        **({"teacher/weights_age": float(np.mean(ages))} if ages else {}),
    }


def _episode_metrics(episodes: Sequence[Episode]) -> Metrics:
    """Means over the trajectories in which an environment took part; nothing without any."""
    if not episodes:
        return {}
    return {
        "episode/turns": float(np.mean([e.turns for e in episodes])),
        "episode/tool_errors": float(np.mean([e.tool_errors for e in episodes])),
        "episode/tool_seconds": float(np.mean([e.tool_seconds for e in episodes])),
    }


def _known_tokens(group: ScoredGroup) -> int:
    """Prompt and completion tokens of the trajectories that are correct or incorrect."""
    indices = group.verified.indices("correct", "incorrect")
    trajectories = group.rollout.trajectories
    prompt = len(group.rollout.prompt.token_ids)
    return sum(prompt + len(trajectories[index].token_ids) for index in indices)
