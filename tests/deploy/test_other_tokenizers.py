"""A teacher that is the same function under another tokenizer teaches the same."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, Qwen3ForCausalLM

from services.trajectory import (
    Finish,
    LogProbs,
    RolloutGroup,
    ScoredGroup,
    TokenIds,
    Trajectory,
    Verdict,
    VerifiedGroup,
)
from teacher.ends import Ends
from teacher.retokenizer import Retokenizer
from teacher.scores import Question, TokenScores
from tests.builders import prompt as prompt_of
from tests.builders import scored_group, tiny_model
from tests.deploy.test_two_teachers import logprobs
from trainer.batch import Batch, check
from trainer.config import OptimizerConfig, TrainerConfig
from trainer.learner import Clock, Learner
from trainer.objectives.config import ObjectiveConfig

LETTERS = "abcd"
PAIRS = ["".join(pair) for pair in itertools.product(LETTERS, repeat=2)]
END = 0.2  # the probability of ending at any letter
LIKELY = dict(zip(LETTERS, (0.1, 0.2, 0.3, 0.4), strict=True))


def tokenizer(tokens: list[str], longest: int) -> Tokenizer:
    """`longest` characters a token."""
    made = Tokenizer(models.WordLevel({t: i for i, t in enumerate(["<pad>", "<eos>", *tokens])}))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("." * longest), "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens(["<pad>", "<eos>"])
    return made


def constant(probabilities: list[float]) -> Qwen3ForCausalLM:
    """A model that says the same of every next token: its embeddings are all alike."""
    model = tiny_model(vocab=len(probabilities), tied=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(1.0)
        hidden = model.model(torch.tensor([[0, 1]])).last_hidden_state[0, 0]
        wanted = torch.tensor(probabilities).log()
        model.get_output_embeddings().weight.copy_(wanted[:, None] * hidden / hidden.dot(hidden))
    return model


def teachers() -> tuple[Qwen3ForCausalLM, Qwen3ForCausalLM]:
    """One function twice: over the student's pairs of letters, and over letters. What is left of
    the first's mass is a letter alone before the end, which has no token: it lies on `<pad>`."""
    pairs = [(1 - END) ** 2 * LIKELY[a] * LIKELY[b] for a, b in PAIRS]
    letters = [(1 - END) * LIKELY[letter] for letter in LETTERS]
    return constant([END * (1 - END), END, *pairs]), constant([1e-9, END, *letters])


def answers(dice: np.random.Generator) -> list[list[int]]:
    """Each some pairs and the end."""
    return [[*dice.integers(2, 2 + len(PAIRS), n), 1] for n in (3, 1, 6, 4)]


@pytest.mark.parametrize("kind", ["scope", "opd", "kdrl", "sg_opd", "tgopd"])
def test_the_gradient_is_that_of_the_teacher_with_the_student_s_tokenizer(kind: str) -> None:
    own, other = tokenizer(PAIRS, 2), tokenizer([*LETTERS], 1)
    translator = Retokenizer(own.to_str(), other.to_str(), [1], 1)
    by_pair, by_letter = teachers()
    before = np.array([2, 3], np.int32)
    group = scored_group(["correct", "incorrect", "incorrect", "correct"])
    scores: list[dict[int, LogProbs]] = [{}, {}]
    chunks: dict[int, TokenIds] = {}
    trajectories = []
    for index, ids in enumerate(answers(np.random.default_rng(0))):
        one = Trajectory(np.array(ids, np.int32), np.full(len(ids), -2, np.float32), "stop", "")
        trajectories.append(one)
        scores[0][index] = np.asarray(logprobs(by_pair, before, one.token_ids))[
            np.arange(len(ids)), ids
        ]
        question = translator.asked(one, len(before))
        assert len(question.ids) == 2 * len(ids) - 1
        found = np.asarray(logprobs(by_letter, before, question.ids))[
            np.arange(len(question.ids)), question.ids
        ]
        empty = np.empty((len(found), 0))
        answered = question.answered(
            TokenScores(found, empty.astype(np.int32), empty.astype(np.float32))
        )
        assert answered.chunks is not None
        scores[1][index], chunks[index] = answered.logprobs, answered.chunks
    rollout = replace(group.rollout, trajectories=tuple(trajectories))
    verified = replace(group.verified, rollout=rollout)
    same = ScoredGroup(verified, scores[0], "teacher")
    retokenized = ScoredGroup(verified, scores[1], "teacher", chunks=chunks)
    for one in (same, retokenized):
        check(one, "all", vocabulary=18)
    for got, expected in zip(gradients(retokenized, kind), gradients(same, kind), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
    assert math.isclose(sum(scores[0][2]), sum(scores[1][2]), rel_tol=1e-5)


@pytest.mark.parametrize("translated", [True, False])
def test_truncation_does_not_climb_where_the_teacher_ends_with_another_token(
    translated: bool,
) -> None:
    """A base student ends with token 1, a chat teacher with 2, which means nothing to the student.
    It is the translation that keeps the student ending: without one it unlearns to."""
    torch.manual_seed(0)
    chat = [1e-6, 1e-6, 0.3, *[0.7 / 5] * 5]
    config = TrainerConfig(
        objective=ObjectiveConfig.model_validate({"kind": "opd"}),
        optimizer=OptimizerConfig(lr=3e-3),
    )
    start = [1e-6, 0.2, 1e-6, *[0.8 / 5] * 5]
    learner, student = Learner(constant(start), config, temperature=1.0), constant(start)
    ends = Ends.between([1], [2])
    assert ends is not None
    truncated = []
    for order in range(12):
        student.load_state_dict(learner.model.state_dict())
        group = sampled(student, order)
        trajectories, scores = group.rollout.trajectories, {}
        truncated.append(np.mean([one.finish == "length" for one in trajectories]))
        for index, one in enumerate(trajectories):
            question = ends.asked(one) if translated else Question(one.token_ids)
            scores[index] = np.log(chat)[question.ids].astype(np.float32)
        learner.step(*learner.plans(Batch.of([replace(group, teacher_logprobs=scores)])))
    before, after = np.mean(truncated[:3]), np.mean(truncated[-3:])
    assert (after <= before) if translated else (after > before + 0.1), truncated


@torch.no_grad()
def sampled(model: PreTrainedModel, order: int, most: int = 8) -> ScoredGroup:
    """A group of 32 answers that end with token 1 or are cut off."""
    prompt = prompt_of(order, n=32)
    ids = torch.tensor(prompt.token_ids).long().repeat(32, 1)
    for _ in range(most):
        ids = torch.cat([ids, model(ids).logits[:, -1].softmax(-1).multinomial(1)], 1)
    trajectories = []
    table = model(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    start = len(prompt.token_ids)
    for row, said in zip(ids[:, start:].tolist(), table[:, start - 1 :].numpy(), strict=True):
        own = row[: row.index(1) + 1] if 1 in row else row
        scores = said[: len(own)]
        finish: Finish = "stop" if 1 in row else "length"
        trajectories.append(Trajectory(np.array(own, np.int32), scores, finish, ""))
    verdicts = tuple(Verdict("incorrect", "") for _ in trajectories)
    rollout = RolloutGroup(prompt, tuple(trajectories), weight_version=0)
    return ScoredGroup(VerifiedGroup(rollout, verdicts), {}, "teacher")


def gradients(group: ScoredGroup, kind: str) -> list[Tensor]:
    config = TrainerConfig(objective=ObjectiveConfig.model_validate({"kind": kind}))
    learner = Learner(tiny_model(vocab=18), config, temperature=1.0)
    learner.backward(*learner.plans(Batch.of([group])), Clock())
    return [p.grad for p in learner.model.parameters() if p.grad is not None]
