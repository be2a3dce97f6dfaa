"""A few trajectories of a run, for people to look at: what was written, and what became of it.

Taken at steps 1, 2, 4, 8, …, so that a run of any length leaves a bounded number, most of them from
where it changes most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from services.trajectory import ScoredGroup
from trainer.batch import Batch
from trainer.objectives.base import Coefficients

GROUPS = 2  # of a step
MOST_TOKENS = 1024  # of a trajectory that are shown


def due(step: int) -> bool:
    """Whether step `step` (from 1) leaves samples: a power of two."""
    return step > 0 and step & (step - 1) == 0


def samples(
    step: int, batch: Batch, coefficients: Coefficients, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Some groups of the batch as plain JSON, those with both verdicts first.

    Each trajectory has its tokens as text, where the teacher scored it `log_ratio`, log π_T −
    log π_S of each sampled token in nats (π_S as it sampled; of its chunk, where the teacher has
    another tokenizer), and how it was trained. `heard` are the places of the tokens that the
    environment wrote.
    """
    indices = sorted(range(len(batch.groups)), key=lambda i: (not is_mixed(batch.groups[i]), i))
    starts = [0]
    for group in batch.groups:
        starts.append(starts[-1] + len(group.rollout.trajectories))
    return [
        {
            "step": step,
            "prompt": tokenizer.decode(batch.groups[i].prompt.token_ids.tolist()),
            "reference": batch.groups[i].prompt.reference[:MOST_TOKENS],
            "data_source": batch.groups[i].prompt.data_source,
            "weight_version": batch.groups[i].rollout.weight_version,
            "trajectories": _trajectories(
                batch.groups[i],
                coefficients.reinforce[starts[i] : starts[i + 1]].tolist(),
                coefficients.distil[starts[i] : starts[i + 1]].tolist(),
                tokenizer,
            ),
        }
        for i in indices[:GROUPS]
    ]


def is_mixed(group: ScoredGroup) -> bool:
    """Whether it has correct and incorrect trajectories."""
    return {"correct", "incorrect"} <= {v.outcome for v in group.verified.verdicts}


def _trajectories(
    group: ScoredGroup,
    reinforce: Sequence[float],
    distil: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    samples = []
    for index, (trajectory, verdict) in enumerate(
        zip(group.rollout.trajectories, group.verified.verdicts, strict=True)
    ):
        samples.append(
            {
                "tokens": [tokenizer.decode([t]) for t in trajectory.token_ids[:MOST_TOKENS]],
                "length": len(trajectory.token_ids),
                "log_ratio": _log_ratio(group, index),
                "heard": np.flatnonzero(~trajectory.sampled[:MOST_TOKENS]).tolist(),
                "turns": trajectory.episode.turns if trajectory.episode else 1,
                "tool_errors": trajectory.episode.tool_errors if trajectory.episode else 0,
                "outcome": verdict.outcome,
                "reason": verdict.reason,
                "finish": trajectory.finish,
                "reinforce": reinforce[index],
                "distil": distil[index],
            }
        )
    return samples


def _log_ratio(group: ScoredGroup, index: int) -> list[float | None] | None:
    """Of each token, or of the chunk that it belongs to; None where there is none."""
    trajectory, teacher = group.rollout.trajectories[index], group.teacher_logprobs.get(index)
    if teacher is None:
        return None
    ratio, known = teacher - trajectory.logprobs, trajectory.sampled
    if (chunks := group.chunks.get(index)) is not None:
        known = chunks >= 0
        of_chunk = np.bincount(chunks.clip(0), np.where(known, ratio, 0.0))
        ratio = of_chunk[chunks.clip(0)]
    shown = zip(ratio[:MOST_TOKENS], known[:MOST_TOKENS], strict=True)
    return [round(float(x), 3) if own else None for x, own in shown]
