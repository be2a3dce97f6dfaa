"""A tiny real model on disk, and what is built around it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from services.models import load_model
from tests.builders import save_tiny
from tests.teacher.fakes import FakeScorer, FaultyTeacher, listening

VOCABULARY = 97
CONTEXT = 64

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Far from uniform, or every mistake would score alike; its output matrix is its own."""
    directory = tmp_path_factory.mktemp("models") / "teacher"
    return save_tiny(directory, vocab=VOCABULARY, context=CONTEXT, tied=False, spread=0.5)


class Reference:
    """Log-probs from transformers' own forward, one sequence at a time."""

    def __init__(self, directory: Path) -> None:
        self._model = load_model(str(directory))

    @torch.no_grad()
    def table(self, ids: list[int]) -> torch.Tensor:
        """[T, V] log-probs of what follows each token."""
        return self._model(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def score(self, prompt: list[int], completion: list[int]) -> list[float]:
        ids = torch.tensor([*prompt, *completion])
        chosen = self.table(ids.tolist())[:-1].gather(1, ids[1:, None]).squeeze(1)
        return [float(value) for value in chosen[len(prompt) - 1 :]]


@pytest.fixture(scope="session")
def reference(model_dir: Path) -> Reference:
    return Reference(model_dir)


@pytest.fixture(scope="session")
def sequences() -> list[tuple[list[int], list[int]]]:
    """Prompts and completions of random lengths, up to the whole context."""
    rng = np.random.default_rng(0)
    lengths = [(1, 1), (1, CONTEXT - 1), (CONTEXT - 1, 1)]
    lengths += [(int(p), int(t)) for p, t in rng.integers(1, CONTEXT // 2, (20, 2))]
    return [
        (rng.integers(0, VOCABULARY, p).tolist(), rng.integers(0, VOCABULARY, t).tolist())
        for p, t in lengths
    ]


@pytest.fixture
def scorer() -> FakeScorer:
    return FakeScorer()


@pytest.fixture(scope="session")
def _faulty_server() -> Iterator[tuple[FaultyTeacher, str]]:
    teacher = FaultyTeacher()
    with listening(teacher) as url:
        yield teacher, url


@pytest.fixture
def faulty(_faulty_server: tuple[FaultyTeacher, str]) -> FaultyTeacher:
    _faulty_server[0].heal()
    return _faulty_server[0]


@pytest.fixture
def faulty_url(_faulty_server: tuple[FaultyTeacher, str], faulty: FaultyTeacher) -> str:
    return _faulty_server[1]
