"""A whole run in one process, for comparing methods on equal terms.

Sampling, verdict, teacher scores, weights and gradient are the service's own functions, called one
after another without Ray and Redis between them: every step is exactly on policy, and for one seed
all methods get the same prompts in the same order and the same random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from rollout.config import DataConfig, SamplingConfig
from rollout.prompts import PromptSource, Row
from rollout.rows import Request
from rollout.transformers_engine import prepare, sample_groups
from services import packed
from services.models import end_tokens, load_model, load_tokenizer
from services.teacher_need import SCORED
from services.trajectory import (
    Prompt,
    RolloutGroup,
    ScoredGroup,
    TopTokens,
    Trajectory,
    Verdict,
    VerifiedGroup,
)
from services.weights import copy_weights
from trainer.batch import Batch
from trainer.config import TrainerConfig
from trainer.learner import Learner
from trainer.objectives.config import ObjectiveConfig
from trainer.objectives.kinds import objective


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run counted. Shares of correct answers are those of each step's own samples."""

    accuracy: list[float] = field(default_factory=list)
    sampled_tokens: int = 0
    scored_tokens: int = 0


class Stages:
    """The stages of a step, with the models that all runs share."""

    def __init__(
        self,
        student: Path,
        teacher: Path,
        judge: Callable[[str, str], Verdict],
        *,
        max_tokens: int,
        rows_at_once: int,
        device: str = "cpu",
    ) -> None:
        """Args:
        judge: of an answer's text that ended, and the reference.
        max_tokens: longest answer.
        rows_at_once: answers in one batch of the sampler.
        device: where all models compute.
        """
        self.student_path, self.teacher_path = str(student), str(teacher)
        self.judge, self.max_tokens, self.rows_at_once = judge, max_tokens, rows_at_once
        self.device = device
        self.tokenizer = load_tokenizer(self.student_path)
        self.ends = end_tokens(self.student_path)

    def _load(self, path: str) -> PreTrainedModel:
        return load_model(path, device=self.device)

    @cached_property
    def student(self) -> PreTrainedModel:
        """Samples; takes on every run's weights."""
        return prepare(self._load(self.student_path))

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """Scores."""
        return packed.prepare(self._load(self.teacher_path))

    @cached_property
    def teacher_sampler(self) -> PreTrainedModel:
        return prepare(self._load(self.teacher_path))

    def prompts(
        self, rows: Sequence[Row], n: int, *, seed: int, shuffle: bool, top: int = 0
    ) -> PromptSource:
        sampling = SamplingConfig(n=n, max_tokens=self.max_tokens)
        longest = max(len(row.token_ids) for row in rows)
        data = DataConfig(path=Path("in memory"), max_prompt_tokens=longest, shuffle=shuffle)
        return PromptSource(rows, sampling, seed=seed, data=data, top=top)

    def sample(
        self, model: PreTrainedModel, prompts: Sequence[Prompt], version: int = 0
    ) -> list[RolloutGroup]:
        """What the rollout worker does."""
        groups: list[RolloutGroup] = []
        for some in _chunks(prompts, max(1, self.rows_at_once // prompts[0].sampling.n)):
            requests = [Request(p.token_ids.tolist(), p.sampling) for p in some]
            for prompt, completions in zip(
                some, sample_groups(model, requests, self.ends), strict=True
            ):
                trajectories = tuple(
                    Trajectory(c.token_ids, c.logprobs, c.finish, self.text(c.token_ids), top=c.top)
                    for c in completions
                )
                groups.append(RolloutGroup(prompt, trajectories, version))
        return groups

    def text(self, token_ids: Any) -> str:
        return str(self.tokenizer.decode(token_ids.tolist(), skip_special_tokens=True))

    def verify(self, group: RolloutGroup) -> VerifiedGroup:
        """What the verifier's worker and its judge do."""
        verdicts = tuple(
            Verdict("incorrect", "truncated: no end token")
            if t.finish == "length"
            else self.judge(t.text, group.prompt.reference)
            for t in group.trajectories
        )
        return VerifiedGroup(group, verdicts)

    def score(
        self, group: VerifiedGroup, *outcomes: Any, asked: ObjectiveConfig | None = None
    ) -> ScoredGroup:
        """What the teacher's worker and its scorer do for what an objective asks."""
        asked = asked or ObjectiveConfig.model_validate({"kind": "scope"})
        indices = group.indices(*outcomes)
        prompt = group.rollout.prompt.teacher_ids.tolist()
        answers = [group.rollout.trajectories[i] for i in indices]
        named = [torch.tensor(a.top) for a in answers if a.top is not None]
        results = (
            []
            if not indices
            else packed.score_top(
                self.teacher,
                [prompt + answer.token_ids.tolist() for answer in answers],
                [len(prompt)] * len(indices),
                asked.teacher_top,
                torch.cat(named).long() if named else None,
                entropy=asked.teacher_entropy,
            )
        )
        scores = dict(zip(indices, results, strict=True))
        tops = {
            i: TopTokens(s.top_ids.numpy().astype(np.int32), s.top_logprobs.numpy())
            if answer.top is None
            else TopTokens(answer.top, s.candidates.numpy())
            for (i, s), answer in zip(scores.items(), answers, strict=True)
        }
        return ScoredGroup(
            group,
            {i: s.logprobs.numpy() for i, s in scores.items()},
            "teacher",
            tops if asked.top_tokens else {},
            teacher_entropy={i: s.entropy.numpy() for i, s in scores.items()}
            if asked.teacher_entropy
            else {},
        )

    def train(
        self,
        settings: TrainerConfig,
        rows: Sequence[Row],
        rollouts: int,
        *,
        seed: int,
        steps: int,
        tokens: float = float("inf"),
        each_step: Callable[[Trained], object] = lambda _: None,
    ) -> Trained:
        """One run of so many `steps` of `settings.groups_per_step` prompts with `rollouts` samples
        each, or until `tokens` have been sampled. Leaves its weights in `student`."""
        torch.manual_seed(seed)
        learner = Learner(self._load(self.student_path), settings, temperature=1.0)
        asked, need = settings.objective, objective(settings.objective)
        source = self.prompts(rows, rollouts, seed=seed, shuffle=True, top=asked.student_top)
        trained, prompts = Trained(), settings.groups_per_step
        for step in range(steps):
            if trained.sampled_tokens >= tokens:
                break
            copy_weights(self.student, learner.weights())
            sampler = self.student if need.sampler == "student" else self.teacher_sampler
            asking = [source.prompt(step * prompts + i) for i in range(prompts)]
            verified = [self.verify(group) for group in self.sample(sampler, asking, step)]
            groups = [self.score(group, *SCORED[need.teacher], asked=asked) for group in verified]
            learner.step(*learner.plans(Batch.of(groups)))
            trained = _counted(trained, groups)
            each_step(trained)
        copy_weights(self.student, learner.weights())
        return trained


def _counted(so_far: Trained, groups: Sequence[ScoredGroup]) -> Trained:
    answers = [t for g in groups for t in g.rollout.trajectories]
    correct = sum(len(g.verified.indices("correct")) for g in groups)
    return Trained(
        [*so_far.accuracy, correct / len(answers)],
        so_far.sampled_tokens + sum(len(t.token_ids) for t in answers),
        so_far.scored_tokens + sum(len(lp) for g in groups for lp in g.teacher_logprobs.values()),
    )


def _chunks(items: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
