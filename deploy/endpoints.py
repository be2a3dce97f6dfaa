"""Do the servers of somebody else's that hold a teacher hold the same model, and the right one?

Servers of this project tell a fingerprint. The others are asked about one fixed sequence, and what
is right is no race: what the model itself says where it is on this machine, else what the config's
`reference` says, or most of them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from deploy.config import ConfigError
from deploy.teachers import ASK_S
from services.models import at_hand, fingerprint, load_model, memory_for
from services.trajectory import LogProbs
from teacher.api import Limits
from teacher.config import TeacherConfig
from teacher.openai_client import PROBE, apart
from teacher.pool import MissingKey, Servers, ask, targets
from trainer.objectives.config import ObjectiveConfig


@dataclass
class Agreement:
    """What came out: what the right model says of the probe, and what is wrong or to be known."""

    probe: LogProbs | None = None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def lacks(who: str, chosen: ObjectiveConfig, limits: Limits | None = None) -> list[str]:
    """What an objective asks of a place that a teacher does not give, one sentence each; `limits`
    are None where a server is none of ours."""
    gives = limits.gives if limits else []
    missing = []
    if chosen.teacher_entropy and "entropy" not in gives:
        missing.append(
            f"{who} tells no entropy over the vocabulary: set trainer.objective.entropy: top_k, or "
            f"score with the transformers engine"
        )
    if chosen.student_top and "candidates" not in gives:
        missing.append(
            f"{who} does not score the tokens that the student finds most likely: set "
            f"trainer.objective.top_k_of: teacher, or score with the transformers engine"
        )
    if limits and chosen.top_tokens > limits.max_top_logprobs:
        missing.append(
            f"{who} gives at most {limits.max_top_logprobs} tokens at each place, and "
            f"trainer.objective.top_k is {chosen.top_tokens}: lower it, or raise the teacher's "
            f"max_top_logprobs"
        )
    return missing


def examine(teacher: TeacherConfig, chosen: ObjectiveConfig | None = None) -> Agreement:
    """Asks every endpoint of a teacher for what the objective will. Those that are down are only
    told of: they are compared when they come up.

    Raises:
        ConfigError: a key of theirs is missing.
    """
    try:
        top = chosen.teacher_top if chosen else 0
        answers = asyncio.run(ask(Servers(targets(teacher, os.environ), ASK_S), top))
    except MissingKey as error:
        raise ConfigError(str(error)) from None
    here = at_hand(teacher.model)
    agreement = Agreement()
    agreement.warnings += [
        f"an endpoint was not compared: {one.failed}" for one in answers if one.failed
    ]
    for one in answers:
        if chosen and not one.failed:
            agreement.problems += lacks(one.url, chosen, one.card.limits if one.card else None)
        if one.refusal:
            agreement.problems.append(
                f"{one.url} does not give the {top} most likely tokens that trainer.objective asks "
                f"for: {one.refusal}"
            )
    cards = {one.url: one.card.fingerprint for one in answers if one.card is not None}
    right = fingerprint(teacher.model).model if here else cards.get(teacher.reference)
    if right is not None:
        agreement.problems += [
            f"{url} serves another model than {teacher.model if here else teacher.reference}: its "
            f"fingerprint is {other}, not {right}"
            for url, other in cards.items()
            if other != right
        ]
    probes = {one.url: one.probe for one in answers if one.probe is not None}
    if not probes:
        return agreement
    if here and memory_for(teacher.model):
        agreement.probe, whose = _own(teacher.model), f"{teacher.model} on this machine"
    elif teacher.reference in probes:
        agreement.probe, whose = probes[teacher.reference], f"the reference {teacher.reference}"
    else:
        agreement.probe, whose = _majority(probes, teacher.endpoint_tolerance), "most of the others"
    if here and not memory_for(teacher.model):
        agreement.warnings.append(
            f"{teacher.model} does not fit into this machine's memory: its endpoints are compared "
            f"with one another only"
        )
    if agreement.probe is None:
        agreement.problems.append(_undecided(teacher.model, probes))
        return agreement
    agreement.problems += [
        f"{url} serves another model: on a fixed sequence it is {nats:.2f} nats off {whose}"
        for url, probe in probes.items()
        if (nats := apart(probe, agreement.probe)) > teacher.endpoint_tolerance
    ]
    return agreement


def _majority(probes: Mapping[str, LogProbs], tolerance: float) -> LogProbs | None:
    """What more than half of them say; None where nobody has so many on its side."""

    def friends(probe: LogProbs) -> int:
        return sum(apart(probe, other) <= tolerance for other in probes.values())

    best = max(probes.values(), key=friends)
    return best if 2 * friends(best) > len(probes) else None


def _undecided(model: str, probes: Mapping[str, LogProbs]) -> str:
    first, *others = probes
    differences = ", ".join(
        f"{url} is {apart(probes[url], probes[first]):.2f} nats off {first}" for url in others
    )
    return (
        f"the endpoints of {model} serve different models, and no majority says which is right: "
        f"on a fixed sequence {differences}; leave the wrong ones out, or name the right one as "
        f"the teacher's reference"
    )


def _own(path: str) -> LogProbs:
    """What the model itself says of the probe, in float32."""
    import torch

    model = load_model(path)
    ids = torch.tensor([PROBE])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    own: LogProbs = logprobs.gather(1, ids[0, 1:, None])[:, 0].numpy().astype(np.float32)
    return own
