"""A few trajectories of a run, for people to look at: what was written, and what became of it.

Taken at steps 1, 2, 4, 8, …, so that a run of any length leaves a bounded number, most of them from
where it changes most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from services.trajectory import ScoredGroup
from trainer.batch import Batch
from trainer.objectives import Coefficients

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
    log π_S of each token in nats (π_S as it sampled), and how it was trained.
    """
    places = sorted(range(len(batch.groups)), key=lambda i: (not is_mixed(batch.groups[i]), i))
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
        for i in places[:GROUPS]
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
    found = []
    for place, (trajectory, verdict) in enumerate(
        zip(group.rollout.trajectories, group.verified.verdicts, strict=True)
    ):
        teacher = group.teacher_logprobs.get(place)
        ratio = None if teacher is None else (teacher - trajectory.logprobs)[:MOST_TOKENS]
        found.append(
            {
                "tokens": [tokenizer.decode([t]) for t in trajectory.token_ids[:MOST_TOKENS]],
                "length": len(trajectory.token_ids),
                "log_ratio": None if ratio is None else [round(float(x), 3) for x in ratio],
                "outcome": verdict.outcome,
                "reason": verdict.reason,
                "finish": trajectory.finish,
                "reinforce": reinforce[place],
                "distil": distil[place],
            }
        )
    return found
