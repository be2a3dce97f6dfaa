"""The objectives that see tokens as their papers write them: one trajectory at a time, in plain
Python and autograd. The learner's gradients must be these."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from services.trajectory import ScoredGroup, TopTokens
from tests.builders import VOCAB, scored_group, tiny_model
from trainer.config import TrainerConfig
from trainer.objectives.config import ObjectiveConfig

KNOWN = ("correct", "incorrect")


@dataclass(frozen=True)
class Row:
    """One trajectory's sampled tokens as lists, and its group."""

    student: list[float]
    teacher: list[float]
    behaviour: list[float]
    correct: bool
    group: Sequence[bool]  # correct or not, of those with a known verdict
    student_top: list[list[float]]  # of the most likely tokens, and their tail
    teacher_top: list[list[float]]
    entropy: list[float]  # the teacher's, over the vocabulary

    @property
    def log_ratio(self) -> list[float]:
        return [t - s for t, s in zip(self.teacher, self.student, strict=True)]

    @property
    def share(self) -> float:
        return 1 / len(self.group)


Advantages: TypeAlias = list[float]


def power_opd(row: Row) -> Advantages:
    alpha = 0.5
    pairs = zip(row.teacher, row.student, strict=True)
    return [row.share * (math.exp(t) ** alpha - math.exp(s) ** alpha) for t, s in pairs]


def iw_opd(row: Row) -> Advantages:
    a = [t - b for t, b in zip(row.teacher, row.behaviour, strict=True)]
    whole = sum(map(abs, a))
    weights = [1 + 0.5 * (1 - sum(map(abs, a[:t])) / whole) for t in range(len(a))]
    return [row.share * w * x for w, x in zip(weights, a, strict=True)]


def sg_opd(row: Row) -> Advantages:
    sign = 1 if row.correct else -1
    return [row.share * (1.8 if sign * a > 0 else 0.5) * a for a in row.log_ratio]


def vopd(row: Row) -> Advantages:
    """The reward minus the value, which is E_S[log π_T − log π_S]."""
    values = [
        sum(math.exp(s) * (t - s) for s, t in zip(*tops, strict=True))
        for tops in zip(row.student_top, row.teacher_top, strict=True)
    ]
    return [row.share * (a - v) for a, v in zip(row.log_ratio, values, strict=True)]


def ta_opd(row: Row) -> Advantages:
    tops = list(zip(row.student_top, row.teacher_top, strict=True))
    differ = [sum(math.exp(s) * (s - t) for s, t in zip(*top, strict=True)) for top in tops]
    mass = [1 - math.exp(theirs[-1]) for _, theirs in tops]
    score = [d * m for d, m in zip(_robust(differ), _robust(mass), strict=True)]
    kept = sorted(range(len(score)), key=lambda t: (-score[t], t))[: max(1, len(score) // 4)]
    return [row.share * a if t in kept else 0.0 for t, a in enumerate(row.log_ratio)]


def _robust(values: list[float]) -> list[float]:
    low, high = np.quantile(values, [0.05, 0.95])
    return [min(1.0, max(0.0, (v - low) / max(high - low, 1e-12))) for v in values]


def opsa(row: Row) -> Advantages:
    count = max(1, len(row.student) // 4)
    kept = sorted(range(len(row.student)), key=lambda t: (row.student[t], t))[:count]
    return [-0.5 * row.share if t in kept else 0.0 for t in range(len(row.student))]


def tgopd(row: Row) -> Advantages:
    """The teacher finds the incorrect answers of the first group likelier, and the others have no
    difference to learn from: GRPO's reward minus its mean."""
    advantage = row.share * (row.correct - sum(row.group) / len(row.group))
    return [advantage] * len(row.student)


def tgopd_trusting(row: Row) -> Advantages:
    """With a margin that every teacher keeps: OPD where there are both kinds of answers."""
    mixed = len(set(row.group)) > 1
    return [row.share * a if mixed else 0.0 for a in row.log_ratio]


def eopd(row: Row) -> Advantages:
    return [row.share * a for a in row.log_ratio]


def eopd_forward_kl(row: Row) -> list[float]:
    return [row.share if h > 1.0 else 0.0 for h in row.entropy]


def gated_forward_kl(row: Row) -> list[float]:
    return [row.share / (1 + math.exp(-(h - 1.0) / 0.5)) for h in row.entropy]


def nothing(row: Row) -> Advantages:
    return [0.0] * len(row.student)


def everywhere(row: Row) -> list[float]:
    return [row.share] * len(row.student)


def srpo(row: Row) -> Advantages:
    """On the correct, (1 − mean) / deviation; 0 where there is none."""
    mean = sum(row.group) / len(row.group)
    deviation = math.sqrt(mean * (1 - mean))
    found = row.share * (1 - mean) / deviation if row.correct and deviation else 0.0
    return [found] * len(row.student)


def srpo_reverse_kl(row: Row) -> list[float]:
    weights = [math.exp(-0.5 * h) for h in row.entropy]
    mean = sum(weights) / len(weights)
    return [0.0 if row.correct else row.share * w / mean for w in weights]


def first_error(row: Row) -> Advantages:
    """Correct: 1 over their number. Incorrect: their log-ratio from the first token on that the
    teacher finds a nat less likely."""
    same = sum(c == row.correct for c in row.group)
    if row.correct:
        return [1 / same] * len(row.student)
    wrong = [t for t, a in enumerate(row.log_ratio) if a < -1.0]
    start = wrong[0] if wrong else len(row.student)
    return [a / same if t >= start else 0.0 for t, a in enumerate(row.log_ratio)]


Formula: TypeAlias = Callable[[Row], Advantages]

KINDS: dict[str, tuple[dict[str, Any], Formula]] = {
    "power_opd": ({"kind": "power_opd", "alpha": 0.5}, power_opd),
    "iw_opd": ({"kind": "iw_opd"}, iw_opd),
    "sg_opd": ({"kind": "sg_opd", "disagree": 0.5}, sg_opd),
    "vopd": ({"kind": "vopd", "top_k": VOCAB}, vopd),
    "vopd over some": ({"kind": "vopd", "top_k": 4}, vopd),
    "ta_opd": ({"kind": "ta_opd", "top_k": 4, "fraction": 0.25}, ta_opd),
    "opsa": ({"kind": "opsa", "fraction": 0.25}, opsa),
    "tgopd": ({"kind": "tgopd"}, tgopd),
    "tgopd that trusts": ({"kind": "tgopd", "margin": -100.0}, tgopd_trusting),
    "eopd": ({"kind": "eopd", "top_k": 4, "entropy_threshold": 1.0}, eopd),
    "eopd with a gate": (
        {"kind": "eopd", "top_k": VOCAB, "entropy_threshold": 1.0, "entropy_width": 0.5}, eopd
    ),
    "reverse_kl over the student's": (
        {"kind": "opd", "divergence": "reverse_kl", "top_k": 4, "top_k_of": "student"}, nothing
    ),
    "srpo": ({"kind": "srpo", "top_k": VOCAB, "beta": 0.5}, srpo),
    "first_error": (
        {"kind": "scope", "first_error": 1.0, "use_seq_weights": False}, first_error
    ),
}  # fmt: skip
"""Settings, and the formula."""

DIVERGENCES: dict[str, Callable[[Row], list[float]]] = {
    "eopd": eopd_forward_kl,
    "eopd with a gate": gated_forward_kl,
    "reverse_kl over the student's": everywhere,
    "srpo": srpo_reverse_kl,
}
"""The weights of the divergence over the most likely tokens that is added to the loss."""


def config_of(kind: str, micro_batch_tokens: int = 10_000, **trainer: Any) -> TrainerConfig:
    return TrainerConfig(
        objective=ObjectiveConfig.model_validate(KINDS[kind][0]),
        micro_batch_tokens=micro_batch_tokens,
        **trainer,
    )


def groups(kind: str) -> list[ScoredGroup]:
    """Mixed with a mask, all correct, all wrong with an unknown one; one token, and many. The
    teacher's log-probs differ from token to token."""
    config = config_of(kind).objective
    k, of_student = config.top_tokens or 1, config.student_top > 0
    made = [
        scored_group(
            ["correct", "incorrect", "incorrect", "correct"], lengths=[4, 9, 1, 12], score=KNOWN
        ),
        scored_group(["correct"] * 3, order=1, lengths=[7, 2, 5], score=KNOWN),
        scored_group(
            ["incorrect", "unknown", "incorrect"], order=2, lengths=[6, 3, 8], score=KNOWN
        ),
    ]
    first, *others = (_of_a_teacher(group, k, of_student=of_student) for group in made)
    return [_masked(first), *others]


def _of_a_teacher(group: ScoredGroup, k: int, *, of_student: bool) -> ScoredGroup:
    teacher, student = tiny_model(seed=1, spread=0.4), tiny_model()
    logprobs, tops, entropy = {}, {}, {}
    for index, trajectory in enumerate(group.rollout.trajectories):
        table = _table(teacher, group, index, 1.0).detach()
        chosen = torch.tensor(trajectory.token_ids)[:, None].long()
        logprobs[index] = table.gather(1, chosen)[:, 0].numpy()
        ids = (_table(student, group, index, 1.0).detach() if of_student else table).topk(k).indices
        tops[index] = TopTokens(ids.numpy().astype(np.int32), table.gather(1, ids).numpy())
        entropy[index] = -(table.exp() * table).sum(1).numpy()
    return replace(group, teacher_logprobs=logprobs, teacher_top=tops, teacher_entropy=entropy)


def _masked(group: ScoredGroup) -> ScoredGroup:
    """The world wrote the longest trajectory's every fourth token."""
    *others, last = group.rollout.trajectories
    mask = np.arange(len(last.token_ids)) % 4 != 1
    masked = replace(last, mask=mask, logprobs=np.where(mask, last.logprobs, 0).astype(np.float32))
    rollout = replace(group.rollout, trajectories=(*others, masked))
    return replace(group, verified=replace(group.verified, rollout=rollout))


def expected_gradients(kind: str, temperature: float) -> list[Tensor]:
    """Of −Σ min(ρ, 2) A over the groups, by the formula of `kind`."""
    _, formula = KINDS[kind]
    model, total = tiny_model(), torch.zeros(())
    data = groups(kind)
    for group in data:
        outcomes = [v.outcome for v in group.verified.verdicts]
        known = [o == "correct" for o in outcomes if o != "unknown"]
        for index, outcome in enumerate(outcomes):
            if outcome == "unknown":
                continue
            trajectory = group.rollout.trajectories[index]
            own = torch.tensor(trajectory.sampled)
            chosen = torch.tensor(trajectory.token_ids)[own][:, None].long()
            at_one, hot = (_table(model, group, index, t)[own] for t in (1.0, temperature))
            sampling = hot.gather(1, chosen)[:, 0]
            behaviour = torch.tensor(trajectory.logprobs)[own]
            top = group.teacher_top[index]
            mine = _with_tail(at_one.gather(1, torch.tensor(top.ids).long()[own]))
            theirs = _with_tail(torch.tensor(top.logprobs)[own])
            row = Row(
                student=at_one.gather(1, chosen)[:, 0].tolist(),
                teacher=group.teacher_logprobs[index][trajectory.sampled].tolist(),
                behaviour=behaviour.tolist(),
                correct=outcome == "correct",
                group=known,
                student_top=mine.tolist(),
                teacher_top=theirs.tolist(),
                entropy=group.teacher_entropy[index][trajectory.sampled].tolist(),
            )
            ratio = (sampling - behaviour).exp()
            capped = ratio * (2.0 / ratio.detach()).clamp(max=1.0)
            total = total - (capped * torch.tensor(formula(row))).sum()
            if kind in DIVERGENCES:
                pair = (theirs, mine) if kind.startswith("eopd") else (mine, theirs)
                gap = (pair[0].exp() * (pair[0] - pair[1])).sum(1)
                total = total + (torch.tensor(DIVERGENCES[kind](row)) * gap).sum()
    (total / len(data)).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _with_tail(logprobs: Tensor) -> Tensor:
    """[L, k + 1]: all other tokens as one, or of all of them [L, k]."""
    if logprobs.shape[1] == VOCAB:
        return logprobs
    return torch.cat([logprobs, torch.log1p(-logprobs.exp().sum(1, keepdim=True))], 1)


def _table(model: PreTrainedModel, group: ScoredGroup, index: int, temperature: float) -> Tensor:
    """[L, V] log-probs at each token of a trajectory."""
    trajectory = group.rollout.trajectories[index]
    ids = torch.tensor([*group.prompt.token_ids.tolist(), *trajectory.token_ids.tolist()])
    logits = model(ids[None]).logits[0, len(group.prompt.token_ids) - 1 : -1]
    return (logits / temperature).log_softmax(-1)
