from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services import packed
from services.models import load_model
from teacher.packed_scorer import PackedScorer
from teacher.scorer import ScoringError
from teacher.scores import More
from tests.teacher.conftest import VOCABULARY, Reference

Sequences = list[tuple[list[int], list[int]]]


@pytest.fixture
def packed_scorer(model_dir: Path) -> PackedScorer:
    return PackedScorer(load_model(str(model_dir)), batch_tokens=100)


def _split(sequences: Sequences) -> tuple[list[list[int]], list[int]]:
    return [[*p, *c] for p, c in sequences], [len(p) for p, _ in sequences]


async def test_scores_equal_transformers_batched_and_alone(
    packed_scorer: PackedScorer, reference: Reference, sequences: Sequences
) -> None:
    ids, starts = _split(sequences)
    batched = await packed_scorer.score(ids, starts)
    alone = [(await packed_scorer.score([i], [s]))[0] for i, s in zip(ids, starts, strict=True)]
    for (prompt, completion), together, single in zip(sequences, batched, alone, strict=True):
        expected = reference.score(prompt, completion)
        np.testing.assert_allclose(together.logprobs, expected, atol=1e-4)
        np.testing.assert_allclose(single.logprobs, expected, atol=1e-4)


async def test_no_forward_exceeds_the_budget_but_for_one_long_sequence(
    model_dir: Path, sequences: Sequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards: list[list[int]] = []
    real = packed.score_top

    def recording(model: Any, ids: list[list[int]], *asked: Any, **more: Any) -> Any:
        forwards.append([len(i) for i in ids])
        return real(model, ids, *asked, **more)

    monkeypatch.setattr(packed, "score_top", recording)
    scorer = PackedScorer(load_model(str(model_dir)), batch_tokens=50)
    await scorer.score(*_split(sequences))
    lengths = [length for forward in forwards for length in forward]
    assert lengths == sorted(lengths, reverse=True)
    assert len(lengths) == len(sequences)
    assert all(sum(forward) <= 50 or len(forward) == 1 for forward in forwards)
    assert any(len(forward) > 1 for forward in forwards)


async def test_samples_of_a_prompt_share_it_as_far_as_the_budget_goes(
    model_dir: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of 30 and 20 tokens, five samples each of 1 to 9 tokens, in any order."""
    forwards: list[int] = []
    real = packed.hidden_states

    def recording(model: Any, pack: packed.Pack) -> Any:
        forwards.append(len(pack.token_ids))
        return real(model, pack)

    monkeypatch.setattr(packed, "hidden_states", recording)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, VOCABULARY, n).tolist() for n in (30, 20)]
    asked = [
        (prompts[place], rng.integers(0, VOCABULARY, length).tolist())
        for place, length in (
            (0, 9),
            (1, 7),
            (0, 1),
            (1, 5),
            (0, 8),
            (1, 2),
            (0, 3),
            (1, 1),
            (0, 0),
        )
    ]
    for budget, expected in ((1000, [30 + 17 + 20 + 11]), (40, [39, 38, 30 + 2, 20 + 11])):
        forwards.clear()
        scorer = PackedScorer(load_model(str(model_dir)), batch_tokens=budget)
        for (prompt, completion), score in zip(
            asked, await scorer.score(*_split(asked)), strict=True
        ):
            wanted = reference.score(prompt, completion)
            np.testing.assert_allclose(score.logprobs, wanted, atol=1e-4)
        assert forwards == expected


async def test_calls_at_the_same_time_each_get_their_own_scores(
    packed_scorer: PackedScorer, sequences: Sequences
) -> None:
    ids, starts = _split(sequences)
    whole = await packed_scorer.score(ids, starts)
    parts = await asyncio.gather(
        *(packed_scorer.score([i], [s]) for i, s in zip(ids, starts, strict=True))
    )
    for one, part in zip(whole, parts, strict=True):
        np.testing.assert_allclose(part[0].logprobs, one.logprobs, atol=1e-5)


async def test_each_caller_gets_what_it_asked_for_and_no_more(
    packed_scorer: PackedScorer, reference: Reference
) -> None:
    """In one batch: three candidates and the entropy, one candidate, neither."""
    ids = [[5, 17, 3, 60, 2], [5, 17, 9], [8, 7, 6]]
    wide, narrow = (
        np.array([[1, 2, 3], [90, 4, 60], [2, 5, 0]], np.int32),
        np.array([[7]], np.int32),
    )
    first, second, third = await asyncio.gather(
        packed_scorer.score([ids[0]], [2], 1, More(True, [wide])),
        packed_scorer.score([ids[1]], [2], 0, More(candidates=[narrow])),
        packed_scorer.score([ids[2]], [1]),
    )
    table = reference.table(ids[0])[1:-1]
    expected = table.gather(1, torch.tensor(wide).long())
    np.testing.assert_allclose(first[0].candidates, expected, atol=1e-4)
    np.testing.assert_allclose(first[0].entropy, -(table.exp() * table).sum(1), atol=1e-4)
    assert first[0].top_ids.shape == (3, 1)
    expected = reference.table(ids[1])[1:-1, [7]]
    np.testing.assert_allclose(second[0].candidates, expected, atol=1e-4)
    assert second[0].entropy is None and second[0].top_ids.shape == (1, 0)
    assert third[0].candidates is None and third[0].entropy is None
    (nothing,) = await packed_scorer.score([[4]], [1], 0, More(True, [wide[:0]]))
    assert nothing.candidates is not None and nothing.candidates.shape == (0, 3)
    assert nothing.entropy is not None and len(nothing.entropy) == 0


async def test_an_empty_completion_scores_as_nothing(packed_scorer: PackedScorer) -> None:
    scores = await packed_scorer.score([[1, 2], [3], [4, 5, 6]], [2, 1, 1])
    assert [len(score.logprobs) for score in scores] == [0, 0, 2]
    assert await packed_scorer.score([], []) == []


@pytest.mark.parametrize("start", [0, 3])
async def test_a_start_that_scores_nothing_real_is_refused(
    packed_scorer: PackedScorer, start: int
) -> None:
    with pytest.raises(ValueError, match="cannot score from token"):
        await packed_scorer.score([[1, 2], [1, 2]], [1, start])


async def test_a_model_with_broken_weights_raises_instead_of_answering(model_dir: Path) -> None:
    model = load_model(str(model_dir))
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[5] = float("nan")
    scorer = PackedScorer(model, batch_tokens=1)  # a forward each: the other call is unharmed
    good, bad = await asyncio.gather(
        scorer.score([[1, 2, 3]], [1]), scorer.score([[1, 5, 3]], [1]), return_exceptions=True
    )
    assert isinstance(good, list)
    assert isinstance(bad, ScoringError)
    assert "log-prob" in str(bad)
