"""SmolLM2-135M-Instruct on the stories of `examples/smollm`: a real model for the benchmarks."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.frozen import Models, as_groups
from examples.smollm import fetch
from examples.smollm.measure import MAX_TOKENS, ids
from examples.smollm.task import TRAIN, TRAIN_SEED, Problem, distinct
from rollout.rows import Request
from rollout.transformers_engine import prepare, sample_groups
from services.models import end_tokens, load_model, load_tokenizer
from services.trajectory import Sampling, ScoredGroup

PROMPTS, N = 4, 8  # of a step
NOISE = 0.02  # of the teacher, by each matrix's own standard deviation


@cache
def path() -> str:
    """The model's directory, fetched where it is not there."""
    fetch.main()
    return str(fetch.MODEL)


def student() -> PreTrainedModel:
    return load_model(path())


def teacher() -> PreTrainedModel:
    """The student with a little noise: as large, and not of the same opinion, since gradients of
    nothing but rounding would not take the time of real ones."""
    model, noise = student(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1:
                drawn = torch.randn(weights.shape, generator=noise)
                weights.add_(drawn * (NOISE * weights.std()))
    return model


SMOLLM = Models(student, teacher, lambda: load_tokenizer(path()))


def stories(count: int) -> list[Problem]:
    return distinct(TRAIN, TRAIN_SEED, count)


def sampled_groups() -> list[ScoredGroup]:
    """Real answers to the first stories, of the lengths that they have."""
    tokenizer, ends = SMOLLM.tokenizer(), end_tokens(path())
    requests = [
        Request(ids(story, tokenizer, hints=False), Sampling(N, MAX_TOKENS, seed=number))
        for number, story in enumerate(stories(PROMPTS))
    ]
    drawn = [
        (np.array(request.prompt_ids, np.int32), [answer.token_ids for answer in answers])
        for request, answers in zip(
            requests, sample_groups(prepare(student()), requests, ends), strict=True
        )
    ]
    return as_groups(SMOLLM, drawn, longest=MAX_TOKENS)
