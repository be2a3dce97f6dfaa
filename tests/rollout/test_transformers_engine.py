"""The sampler against plain forwards of the same model, which know of no cache and no padding."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers import PreTrainedModel

from rollout import transformers_engine
from rollout.engine import Completion, SamplingError
from rollout.rows import Request, draw
from rollout.transformers_engine import (
    ATTENTION,
    TransformersEngine,
    prepare,
    sample_groups,
    sequence_logprobs,
)
from services.errors import BadItem, Unavailable
from services.trajectory import Sampling
from services.weights import Weights, WeightsMismatch, copy_weights
from tests.builders import VOCAB, tiny_model
from tests.rollout.conftest import full_logprobs, published
from tests.waiting import until

END = (1,)
PROMPTS = ([5], [2, 3, 4], [7, 8, 9, 10, 11, 12, 13], [(3 * i) % 22 + 2 for i in range(40)])


def engine_of(model: PreTrainedModel, *, batch_sequences: int = 64) -> TransformersEngine:
    return TransformersEngine(
        model,
        END,
        batch_sequences=batch_sequences,
        probe_tolerance=1e-3,
    )


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[TransformersEngine]:
    """With version 0: the weights of `tiny_model(0)`."""
    made = engine_of(tiny_model(5))
    await made.load_weights(published(tiny_model(0), 0))
    yield made
    await made.close()


def requests(**changes: Any) -> list[Request]:
    sampling = replace(Sampling(n=3, max_tokens=20), **changes)
    return [Request(p, replace(sampling, seed=i)) for i, p in enumerate(PROMPTS)]


def tokens(group: Sequence[Completion]) -> list[list[int]]:
    return [c.token_ids.tolist() for c in group]


def assert_sampled_from(
    model: PreTrainedModel, request: Request, group: Sequence[Completion], *, atol: float = 1e-4
) -> None:
    start = len(request.prompt_ids)
    for completion in group:
        ids = [*request.prompt_ids, *completion.token_ids.tolist()]
        expected = full_logprobs(model, ids, request.sampling.temperature)[start - 1 :]
        np.testing.assert_allclose(completion.logprobs, expected, atol=atol)


# -------------------------------------------------------------------------- what is sampled


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_logprobs_are_those_of_a_full_forward(temperature: float) -> None:
    model, batch = tiny_model(0), requests(temperature=temperature)
    together = sample_groups(model, batch, END)
    alone = [sample_groups(model, [request], END)[0] for request in batch]
    for request, first, second in zip(batch, together, alone, strict=True):
        assert_sampled_from(model, request, first)
        assert_sampled_from(model, request, second)


def test_the_most_likely_tokens_are_those_of_a_full_forward() -> None:
    """Prompts that ask for three, for one and for none share a batch; nothing else changes."""
    model = tiny_model(0)
    asked = [
        replace(r, sampling=replace(r.sampling, top=k))
        for r, k in zip(requests(), (3, 1, 0, 3), strict=True)
    ]
    plain = sample_groups(model, requests(), END)
    for request, group, expected in zip(
        asked, sample_groups(model, asked, END), plain, strict=True
    ):
        assert tokens(group) == tokens(expected)
        for completion in group:
            k, start = request.sampling.top, len(request.prompt_ids)
            ids = torch.tensor([[*request.prompt_ids, *completion.token_ids.tolist()]])
            with torch.no_grad():
                logits = tiny_model(0)(ids).logits[0, start - 1 : -1]
            if k == 0:
                assert completion.top is None
            else:
                assert completion.top is not None
                assert completion.top.tolist() == logits.topk(k).indices.tolist()


def test_decoding_by_groups_of_heads_is_transformers_own_attention() -> None:
    """Query heads that share a key head, several rows, prompts of several lengths."""
    model, batch = prepare(tiny_model(0)), requests(n=5)
    config = model.config
    assert config._attn_implementation == ATTENTION
    assert config.num_attention_heads > config.num_key_value_heads
    plain = sample_groups(tiny_model(0), batch, END)
    for request, group, expected in zip(
        batch, sample_groups(model, batch, END), plain, strict=True
    ):
        assert tokens(group) == tokens(expected)
        assert_sampled_from(tiny_model(0), request, group)


def test_a_group_does_not_depend_on_its_company() -> None:
    model, batch = tiny_model(0), requests()
    together = sample_groups(model, batch, END)
    for request, group in zip(batch, together, strict=True):
        assert tokens(sample_groups(model, [request], END)[0]) == tokens(group)
    reversed_ = sample_groups(model, batch[::-1], END)[::-1]
    assert list(map(tokens, reversed_)) == list(map(tokens, together))


def test_a_larger_group_begins_like_a_smaller_one() -> None:
    model, request = tiny_model(0), requests()[1]
    larger = replace(request, sampling=replace(request.sampling, n=6))
    (small,), (large,) = sample_groups(model, [request], END), sample_groups(model, [larger], END)
    assert len(large) == 6
    assert tokens(large)[:3] == tokens(small)
    assert len({tuple(t) for t in tokens(large)}) > 1


def test_another_seed_gives_other_samples() -> None:
    model, request = tiny_model(0), requests()[1]
    other = replace(request, sampling=replace(request.sampling, seed=99))
    both = sample_groups(model, [request, other], END)
    assert tokens(both[0]) != tokens(both[1])


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_first_tokens_are_distributed_as_the_model_says(temperature: float) -> None:
    model, prompt, n = tiny_model(0), [2, 3, 4], 4000
    request = Request(prompt, Sampling(n=n, max_tokens=1, temperature=temperature, seed=3))
    (group,) = sample_groups(model, [request], END)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double()
    expected = torch.softmax(logits / temperature, 0).numpy() * n
    seen = np.bincount([int(c.token_ids[0]) for c in group], minlength=VOCAB)
    # Rare tokens share a cell, as the test demands; 99.99 % quantile by Wilson and Hilferty.
    rare = expected < 5
    cells = [
        *zip(seen[~rare], expected[~rare], strict=True),
        (seen[rare].sum(), expected[rare].sum()),
    ]
    chi_square = sum((o - e) ** 2 / e for o, e in cells if e > 0)
    freedom = len(cells) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < bound


def test_a_completion_ends_at_the_end_token_or_at_its_limit() -> None:
    model = tiny_model(0)
    batch = requests(n=16)
    batch[1] = replace(batch[1], sampling=replace(batch[1].sampling, max_tokens=5))
    seen = set()
    for request, group in zip(batch, sample_groups(model, batch, END), strict=True):
        limit = request.sampling.max_tokens
        for completion in group:
            ids = completion.token_ids.tolist()
            assert 1 <= len(ids) <= limit
            assert len(completion.logprobs) == len(ids)
            assert not set(ids[:-1]) & set(END)
            assert completion.finish == ("stop" if ids[-1] in END else "length")
            assert completion.finish == "stop" or len(ids) == limit
            seen.add((completion.finish, limit))
    assert {("stop", 20), ("length", 5)} <= seen


def test_every_end_token_ends() -> None:
    (group,) = sample_groups(tiny_model(0), [Request([2], Sampling(n=8, max_tokens=9))], range(24))
    assert all(c.finish == "stop" and len(c.token_ids) == 1 for c in group)


def test_a_prompt_is_prefilled_once_and_finished_rows_are_dropped() -> None:
    model, batch = tiny_model(0), requests(n=16)
    shapes: list[tuple[int, ...]] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: shapes.append(tuple(args[0].shape))
    )
    groups = sample_groups(model, batch, END)
    hook.remove()
    assert shapes[0] == (4, 40)
    decoded = [rows for rows, width in shapes[1:] if width == 1]
    lengths = np.array([len(c.token_ids) for group in groups for c in group])
    growing = [int((lengths > step).sum()) for step in range(1, lengths.max())]
    assert decoded == growing


# ------------------------------------------------------------------------------- drawing


def test_the_cache_gets_no_more_room_than_the_longest_trajectory_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twice the prompts' places would double the cache where answers are short."""
    rooms: list[int] = []

    def spy(states: torch.Tensor, places: int) -> torch.Tensor:
        rooms.append(places)
        return roomier(states, places)

    roomier = transformers_engine._roomier
    monkeypatch.setattr(transformers_engine, "_roomier", spy)
    longest = max(map(len, PROMPTS))
    sample_groups(tiny_model(0), requests(max_tokens=5), [-1])
    assert max(rooms) <= longest + 5
    rooms.clear()
    sample_groups(tiny_model(0), requests(max_tokens=3 * longest), [-1])
    assert sorted(set(rooms)) == [2 * longest, 4 * longest]


@given(
    logits=hnp.arrays(np.float32, (3, 9), elements=st.floats(-80, 80, width=32)),
    impossible=hnp.arrays(np.bool_, (3, 9)),
    uniform=st.sampled_from([0.0, 0.3, 1 - 2**-53]) | st.floats(0, 1 - 2**-53),
)
@settings(max_examples=200)
def test_an_impossible_token_is_never_drawn(
    logits: np.ndarray, impossible: np.ndarray, uniform: float
) -> None:
    impossible[:, 4] = False  # something must be possible
    table = torch.from_numpy(np.where(impossible, -np.inf, logits).astype(np.float32))
    chosen, logprobs = draw(table, torch.ones(3), torch.full((3,), uniform, dtype=torch.float64))
    assert not impossible[np.arange(3), chosen.numpy()].any()
    assert torch.isfinite(logprobs).all()
    assert (logprobs <= 0).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_not_sampled_from(poison: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = poison
    with pytest.raises(SamplingError, match="not finite"):
        draw(logits, torch.ones(2), torch.zeros(2, dtype=torch.float64))


# ------------------------------------------------------------------------------- weights


def test_sequence_logprobs_are_those_of_transformers() -> None:
    model = tiny_model(0)
    ids = [2, 5, 9, 1, 4]
    np.testing.assert_allclose(sequence_logprobs(model, ids), full_logprobs(model, ids), atol=1e-5)


async def test_new_weights_are_sampled_from(engine: TransformersEngine) -> None:
    request = requests()[2]
    old = await engine.sample(request.prompt_ids, request.sampling)
    await engine.load_weights(published(tiny_model(1), 4))
    new = await engine.sample(request.prompt_ids, request.sampling)
    assert (old.weight_version, new.weight_version) == (0, 4)
    assert tokens(old.completions) != tokens(new.completions)
    assert_sampled_from(tiny_model(0), request, old.completions)
    assert_sampled_from(tiny_model(1), request, new.completions)


def test_weights_are_cast_to_the_models_precision() -> None:
    half = tiny_model(1).bfloat16()
    model = tiny_model(0)
    copy_weights(model, Weights.flatten(1, half.named_parameters(), [2, 3], [0.0]))
    expected = dict(half.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, expected[name].float())


async def test_every_group_has_exactly_one_version(engine: TransformersEngine) -> None:
    """Groups are sampled while new versions come in: each was sampled by the one it names."""
    models = [tiny_model(seed) for seed in range(3)]
    jobs = [Request(PROMPTS[i % 4], Sampling(n=2, max_tokens=12, seed=i)) for i in range(60)]

    few = asyncio.Semaphore(8)  # so that they are spread over the loads

    async def sample(index: int) -> tuple[Request, int, tuple[Completion, ...]]:
        async with few:
            made = await engine.sample(jobs[index].prompt_ids, jobs[index].sampling)
        return jobs[index], made.weight_version, made.completions

    running = [asyncio.create_task(sample(index)) for index in range(len(jobs))]
    for version in range(1, 9):
        await engine.load_weights(published(models[version % 3], version))
        await until(lambda: sum(job.done() for job in running) >= 5 * version, every_s=0.0)  # noqa: B023
    versions = set()
    for request, version, completions in await asyncio.gather(*running):
        assert_sampled_from(models[version % 3], request, completions)
        versions.add(version)
    assert len(versions) > 1


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("drop", "model.norm.weight is missing"),
        ("add", "model.extra.weight is not in the model"),
        ("reshape", r"model.norm.weight is \[31\], not \[32\]"),
    ],
)
async def test_weights_of_another_model_are_named(
    engine: TransformersEngine, change: str, complaint: str
) -> None:
    parameters = dict(tiny_model(1).named_parameters())
    if change == "drop":
        del parameters["model.norm.weight"]
    elif change == "add":
        parameters["model.extra.weight"] = torch.nn.Parameter(torch.zeros(2))
    else:
        parameters["model.norm.weight"] = torch.nn.Parameter(torch.zeros(31))
    with pytest.raises(WeightsMismatch, match=f"version 3.*{complaint}"):
        await engine.load_weights(Weights.flatten(3, parameters.items(), [2, 3], [0.0]))


async def test_not_a_token_is_sampled_from_weights_that_fail_the_probe(
    engine: TransformersEngine,
) -> None:
    request = requests()[1]
    with pytest.raises(WeightsMismatch, match=r"version 2: .*differ .* by 0\.0\d+ nats.*0\.001"):
        await engine.load_weights(published(tiny_model(1), 2, fault=0.01))
    with pytest.raises(Unavailable, match="no weights that passed"):
        await engine.sample(request.prompt_ids, request.sampling)
    await engine.load_weights(published(tiny_model(1), 3))
    assert (await engine.sample(request.prompt_ids, request.sampling)).weight_version == 3


async def test_a_corrupted_copy_fails_the_probe(engine: TransformersEngine) -> None:
    weights = published(tiny_model(1), 2)
    weights.buffer[:4096] = 63
    with pytest.raises(WeightsMismatch, match="version 2"):
        await engine.load_weights(weights)


async def test_a_probe_that_is_no_number_fails(engine: TransformersEngine) -> None:
    with pytest.raises(WeightsMismatch, match="not finite"):
        await engine.load_weights(published(tiny_model(1), 2, fault=math.nan))


async def test_nothing_is_sampled_before_the_first_weights() -> None:
    made = engine_of(tiny_model(0))
    with pytest.raises(Unavailable, match="no weights"):
        await made.sample([2], Sampling(n=1, max_tokens=1))
    await made.close()


# ------------------------------------------------------------------------------- the calls


async def test_concurrent_calls_share_batches(engine: TransformersEngine) -> None:
    batch = requests()
    made = await asyncio.gather(*(engine.sample(r.prompt_ids, r.sampling) for r in batch))
    together = sample_groups(tiny_model(0), batch, END)
    assert [tokens(m.completions) for m in made] == list(map(tokens, together))


async def test_a_group_over_the_budget_is_sampled_alone() -> None:
    made = engine_of(tiny_model(0), batch_sequences=4)
    await made.load_weights(published(tiny_model(0), 0))
    groups = await asyncio.gather(
        *(made.sample([2, 3], Sampling(n=n, max_tokens=3, seed=n)) for n in (1, 9, 2, 3))
    )
    assert [len(g.completions) for g in groups] == [1, 9, 2, 3]
    await made.close()


@pytest.mark.parametrize(
    ("prompt", "change", "complaint"),
    [
        ([], {}, "empty prompt"),
        ([2, VOCAB], {}, "outside of the vocabulary"),
        ([-1], {}, "outside of the vocabulary"),
        ([2], {"n": 0}, "nothing to sample"),
        ([2], {"max_tokens": 0}, "nothing to sample"),
        ([2], {"temperature": 0.0}, "temperature"),
        ([2], {"temperature": math.nan}, "temperature"),
        ([2], {"top_p": 0.9}, "top_p"),
    ],
)
async def test_what_cannot_be_sampled_spoils_no_batch(
    engine: TransformersEngine, prompt: list[int], change: dict[str, int], complaint: str
) -> None:
    good = Sampling(n=1, max_tokens=2)
    refused, sampled = await asyncio.gather(
        engine.sample(prompt, replace(good, **change)),
        engine.sample([2], good),
        return_exceptions=True,
    )
    assert isinstance(refused, BadItem)
    assert complaint in str(refused)
    assert not isinstance(sampled, BaseException)
