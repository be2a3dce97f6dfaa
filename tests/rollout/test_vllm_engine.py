"""The real vLLM against plain forwards of the same model. One engine serves the whole module."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio
import torch
from transformers import Qwen3ForCausalLM

from rollout import vllm_transfer
from rollout.config import RolloutConfig
from rollout.engine import (
    Completion,
    Engine,
    SamplingError,
    build_engine,
    check_engine,
)
from services.engines import EngineError
from services.errors import BadItem, EngineDied, Unavailable
from services.models import probe_tokens
from services.trajectory import Sampling
from services.weights import Call, TransferFailed, Weights, WeightsMismatch
from tests.builders import CONTEXT, VLLM_HEAD, VOCAB, save_tiny, tiny_model
from tests.rollout.conftest import full_logprobs, published
from tests.rollout.test_episodes import episodes, question
from tests.waiting import DEADLINE_S

pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.usefixtures("vllm"),
]

END = 1
EXTENSION = "tests.rollout.vllm_faults.FaultyWorker"
ARGS = {"kv_cache_memory_bytes": 1 << 26, "max_num_seqs": 64}
RANDOM = np.random.default_rng(0)
PROMPTS = [RANDOM.integers(2, VOCAB, int(length)).tolist() for length in (1, 2, 3, 17, 64, 130)]


def vllm_model(seed: int) -> Qwen3ForCausalLM:
    return tiny_model(seed, head=VLLM_HEAD)


def config(**args: Any) -> RolloutConfig:
    return RolloutConfig.model_validate({"engine": {"kind": "vllm", "args": {**ARGS, **args}}})


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("vllm"), head=VLLM_HEAD)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def started(directory: Path) -> AsyncIterator[Engine]:
    """Its workers can be told to forget the re-packing of the vocabulary matrices."""
    made = await asyncio.to_thread(
        build_engine, config(worker_extension_cls=EXTENSION), str(directory)
    )
    yield made
    await made.close()


@pytest_asyncio.fixture(loop_scope="module")
async def engine(started: Engine) -> Engine:
    """With version 0: the weights of `vllm_model(0)`."""
    await started.load_weights(published(vllm_model(0), 0))
    return started


def tokens(group: Sequence[Completion]) -> list[list[int]]:
    return [c.token_ids.tolist() for c in group]


def assert_sampled_from(
    model: Any, prompt: Sequence[int], group: Sequence[Completion], temperature: float = 1.0
) -> None:
    for completion in group:
        ids = [*prompt, *completion.token_ids.tolist()]
        expected = full_logprobs(model, ids, temperature)[len(prompt) - 1 :]
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


# -------------------------------------------------------------------------- what is sampled


@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("seed", [0, 1], ids=["before an update", "after it"])
async def test_logprobs_are_those_of_a_full_forward(
    engine: Engine, temperature: float, seed: int
) -> None:
    await engine.load_weights(published(vllm_model(seed), seed))
    sampling = Sampling(n=3, max_tokens=20, temperature=temperature, seed=5)
    together = await asyncio.gather(*(engine.sample(p, sampling) for p in PROMPTS))
    alone = [await engine.sample(p, sampling) for p in PROMPTS]
    for prompt, first, second in zip(PROMPTS, together, alone, strict=True):
        for sampled in (first, second):
            assert sampled.weight_version == seed
            assert_sampled_from(vllm_model(seed), prompt, sampled.completions, temperature)


async def test_the_most_likely_tokens_are_those_of_a_full_forward(engine: Engine) -> None:
    """More of them than vLLM gives by itself (20)."""
    sampling = Sampling(n=2, max_tokens=9, temperature=0.6, seed=5, top=22)
    plain = await engine.sample(PROMPTS[2], replace(sampling, top=0))
    sampled = await engine.sample(PROMPTS[2], sampling)
    assert tokens(sampled.completions) == tokens(plain.completions)
    for completion in sampled.completions:
        ids = torch.tensor([[*PROMPTS[2], *completion.token_ids.tolist()]])
        with torch.no_grad():
            logits = vllm_model(0)(ids).logits[0, len(PROMPTS[2]) - 1 : -1]
        assert completion.top is not None
        assert completion.top.tolist() == logits.topk(22).indices.tolist()


async def test_samples_are_fixed_by_their_seed_and_differ_from_each_other(engine: Engine) -> None:
    sampling = Sampling(n=6, max_tokens=20, seed=2**62 - 1)
    first, again, larger, other = [
        tokens((await engine.sample(PROMPTS[3], s)).completions)
        for s in (sampling, sampling, replace(sampling, n=8), replace(sampling, seed=7))
    ]
    assert first == again
    assert larger[:6] == first
    assert len({tuple(ids) for ids in first}) > 1
    assert other != first


async def test_samples_of_a_prompt_share_its_prefill(engine: Any) -> None:
    """Counted where the model runs: whole blocks of the prompt are computed once, for all."""
    prompt, n, block = RANDOM.integers(2, VOCAB, 130).tolist(), 8, 32
    await engine._llm.collective_rpc("count_tokens")
    await engine.sample(prompt, Sampling(n=n, max_tokens=1))
    (computed,) = await engine._llm.collective_rpc("counted_tokens")
    assert computed == len(prompt) + (n - 1) * (len(prompt) % block)


async def test_first_tokens_are_distributed_as_the_model_says(engine: Engine) -> None:
    n = 2000
    sampled = await engine.sample(PROMPTS[2], Sampling(n=n, max_tokens=1, seed=3))
    with torch.no_grad():
        logits = vllm_model(0)(torch.tensor([PROMPTS[2]])).logits[0, -1].double()
    expected = torch.softmax(logits, 0).numpy()
    seen = np.bincount([int(c.token_ids[0]) for c in sampled.completions], minlength=VOCAB) / n
    # Five standard deviations of each token's share; of the rare ones, of one sample.
    assert (np.abs(seen - expected) < 5 * np.sqrt(expected / n) + 1 / n).all()


async def test_a_completion_ends_at_the_end_token_or_at_its_limit(engine: Engine) -> None:
    sampled = await engine.sample(PROMPTS[3], Sampling(n=32, max_tokens=12, seed=1))
    for completion in sampled.completions:
        ids = completion.token_ids.tolist()
        assert len(completion.logprobs) == len(ids)
        assert END not in ids[:-1]
        assert completion.finish == ("stop" if ids[-1] == END else "length")
        assert completion.finish == "stop" or len(ids) == 12
    assert {c.finish for c in sampled.completions} == {"stop", "length"}


# ------------------------------------------------------------------------------- weights


async def test_every_group_has_exactly_one_version(engine: Engine) -> None:
    """Groups are sampled while new versions come in: each was sampled by the one it names."""
    models = [vllm_model(seed) for seed in range(3)]

    async def sample(place: int) -> tuple[list[int], Any]:
        prompt = PROMPTS[place % len(PROMPTS)]
        return prompt, await engine.sample(prompt, Sampling(n=2, max_tokens=12, seed=place))

    groups: list[tuple[list[int], Any]] = []

    async def update() -> None:
        version = 0
        while len({sampled.weight_version for _, sampled in groups}) < 3:
            version += 1
            await engine.load_weights(published(models[version % 3], version))
            await sample(version)

    updating = asyncio.create_task(update())
    while not updating.done():
        groups += await asyncio.gather(*(sample(len(groups) + i) for i in range(6)))
    await updating
    for prompt, sampled in groups:
        assert_sampled_from(models[sampled.weight_version % 3], prompt, sampled.completions)


async def test_weights_are_written_before_anything_stops(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in flight goes on meanwhile; closed is the engine for the load alone."""
    seen: list[str] = []
    closed, written = engine._turnstile.closed, vllm_transfer._written

    def writing(path: Path, buffer: Any) -> int:
        seen.append("written")
        return written(path, buffer)

    def closing(*, drained: bool) -> Any:
        seen.append("closed")
        return closed(drained=drained)

    monkeypatch.setattr(vllm_transfer, "_written", writing)
    monkeypatch.setattr(engine._turnstile, "closed", closing)
    await engine.load_weights(published(vllm_model(1), 1))
    assert seen == ["written", "closed"]


async def test_weights_that_are_written_are_let_go(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the wait for what is in flight: the object store needs their room."""
    weights = published(vllm_model(1), 1)
    buffer, closed = weakref.ref(weights.buffer), engine._turnstile.closed
    held: list[bool] = []

    def closing(*, drained: bool) -> Any:
        held.append(buffer() is not None)
        return closed(drained=drained)

    monkeypatch.setattr(engine._turnstile, "closed", closing)
    loading = engine.load_weights(weights)
    del weights
    await loading
    assert held == [False]
    sampled = await engine.sample([2, 3], Sampling(n=1, max_tokens=4))
    assert sampled.weight_version == 1
    assert_sampled_from(vllm_model(1), [2, 3], sampled.completions)


@pytest.fixture
def keeping(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The engine, told to keep groups in flight; its completions know no end token."""
    monkeypatch.setattr(engine, "_in_flight", "keep")
    monkeypatch.setattr(engine, "_end_tokens", [])
    return engine


async def test_groups_in_flight_go_on_under_new_weights(keeping: Any) -> None:
    """Weights change several times in the middle of long completions. Every token then has the
    log-prob that its own version, and no other, gives it after all the tokens before it: what was
    computed under older weights is not kept."""
    models = [vllm_model(seed) for seed in range(3)]
    long = Sampling(n=3, max_tokens=CONTEXT - max(map(len, PROMPTS)), temperature=0.6, seed=4)
    version, seen = 0, set[int]()
    while len(seen) < 2:
        sampling = asyncio.gather(*(keeping.sample(p, long) for p in PROMPTS))
        while not sampling.done():
            version += 1
            await keeping.load_weights(published(models[version % 3], version))
            await keeping.sample([2], Sampling(n=1, max_tokens=25))  # the long ones go on beside it
        for prompt, sampled in zip(PROMPTS, await sampling, strict=True):
            oldest = set()
            for completion in sampled.completions:
                runs = completion.version_runs or ((0, sampled.weight_version),)
                starts, versions = zip(*runs, strict=True)
                assert starts[0] == 0 and list(versions) == sorted(set(versions))
                ends = [*starts[1:], len(completion.token_ids)]
                ids = [*prompt, *completion.token_ids.tolist()]
                for start, end, by in zip(starts, ends, versions, strict=True):
                    expected = full_logprobs(models[by % 3], ids, 0.6)[len(prompt) - 1 :]
                    np.testing.assert_allclose(
                        completion.logprobs[start:end], expected[start:end], atol=1e-4
                    )
                seen.update(versions)
                oldest.add(versions[0])
            assert sampled.weight_version == min(oldest)


async def test_turns_of_an_episode_tell_their_versions(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights change between turns and within them, and the world's tokens are context alone."""
    monkeypatch.setattr(engine, "_in_flight", "keep")
    models = [vllm_model(seed) for seed in range(3)]
    play, version = episodes(engine.sample), 0
    playing = asyncio.gather(*(play.group(question(order)) for order in range(8)))
    while not playing.done():
        version += 1
        await engine.load_weights(published(models[version % 3], version))
        await engine.sample([2], Sampling(n=1, max_tokens=5))
    seen = set()
    for group in await playing:
        start = len(group.prompt.token_ids)
        for place, t in enumerate(group.trajectories):
            ids = [*group.prompt.token_ids.tolist(), *t.token_ids.tolist()]
            versions = group.token_versions(place)
            for by in set(versions[t.sampled].tolist()):
                own = t.sampled & (versions == by)
                expected = full_logprobs(models[by % 3], ids)[start - 1 :].numpy()
                np.testing.assert_allclose(t.logprobs[own], expected[own], atol=1e-4)
                seen.add(by)
            assert group.weight_version <= versions[t.sampled].min()
    assert len(seen) > 1


async def test_a_turn_computes_what_is_new_alone(engine: Any) -> None:
    prompt, block = RANDOM.integers(2, VOCAB, 130).tolist(), 32
    first = await engine.sample(prompt, Sampling(n=1, max_tokens=1))
    whole = [*prompt, *first.completions[0].token_ids.tolist(), 5, 6]
    await engine._llm.collective_rpc("count_tokens")
    await engine.sample(whole, Sampling(n=1, max_tokens=1))
    (computed,) = await engine._llm.collective_rpc("counted_tokens")
    assert computed == len(whole) % block


async def test_what_goes_on_under_weights_that_fail_the_probe_is_not_handed_out(
    keeping: Any,
) -> None:
    sampling = asyncio.create_task(keeping.sample([2, 3], Sampling(n=2, max_tokens=CONTEXT - 2)))
    async with asyncio.timeout(DEADLINE_S):
        while not keeping._llm.get_num_unfinished_requests():
            await asyncio.sleep(0.001)
    with pytest.raises(WeightsMismatch, match=r"version 1: .* nats, more than"):
        await keeping.load_weights(published(vllm_model(1), 1, fault=0.1))
    with pytest.raises(Unavailable, match="no weights that passed the probe"):
        await sampling


async def test_a_stale_output_matrix_is_found_out_before_a_token_is_sampled(engine: Any) -> None:
    await engine._llm.collective_rpc("forget_repacking")
    try:
        with pytest.raises(WeightsMismatch, match=r"version 2: .* nats, more than probe_tolerance"):
            await engine.load_weights(published(vllm_model(1), 2))
        with pytest.raises(Unavailable, match="no weights that passed the probe"):
            await engine.sample([2, 3], Sampling(n=1, max_tokens=2))
    finally:
        await engine._llm.collective_rpc("remember_repacking")
    await engine.load_weights(published(vllm_model(1), 3))
    sampled = await engine.sample(PROMPTS[3], Sampling(n=2, max_tokens=12))
    assert sampled.weight_version == 3
    assert_sampled_from(vllm_model(1), PROMPTS[3], sampled.completions)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("drop", "model.norm.weight is missing"),
        ("add", "model.extra.weight is not in the model"),
        ("reshape", r"model.norm.weight is \[31\], not \[32\]"),
    ],
)
async def test_weights_of_another_model_are_named(
    engine: Engine, change: str, complaint: str
) -> None:
    parameters = dict(vllm_model(1).named_parameters())
    if change == "drop":
        del parameters["model.norm.weight"]
    elif change == "add":
        parameters["model.extra.weight"] = torch.nn.Parameter(torch.zeros(2))
    else:
        parameters["model.norm.weight"] = torch.nn.Parameter(torch.zeros(31))
    with pytest.raises(WeightsMismatch, match=f"version 3.*{complaint}"):
        await engine.load_weights(Weights.flatten(3, parameters.items(), [2, 3], [0.0]))


async def test_weights_are_cast_to_the_models_precision(engine: Engine) -> None:
    cast = vllm_model(1)
    with torch.no_grad():
        for parameter in cast.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    probe = probe_tokens(VOCAB)
    parameters = [(name, p.to(torch.bfloat16)) for name, p in cast.named_parameters()]
    weights = Weights.flatten(4, parameters, probe, full_logprobs(cast, probe).tolist())
    await engine.load_weights(weights)
    sampled = await engine.sample(PROMPTS[2], Sampling(n=2, max_tokens=9))
    assert_sampled_from(cast, PROMPTS[2], sampled.completions)


class LocalSender:
    """The learner's end of a transfer; it has a newer version than was asked for."""

    def __init__(self, weights: Weights, *, fails: bool = False) -> None:
        self._weights, self._fails = weights, fails

    async def calls(self, world_size: int) -> AsyncIterator[Call]:
        assert world_size == 1
        yield Call("init_weight_transfer_engine", {})
        if self._fails:
            raise TransferFailed("the learner died")
        from rollout import vllm_transfer  # vLLM, without which this file must still load

        with vllm_transfer.shared(self._weights) as update:
            yield Call("start_weight_update", None)
            yield Call("update_weights", update)
            yield Call("finish_weight_update", self._weights.announcement())


async def test_weights_may_be_sent_by_the_other_end_of_the_transfer(engine: Any) -> None:
    sender = LocalSender(published(vllm_model(2), 9))
    await engine.load_weights(replace(published(vllm_model(1), 8).announcement(), sender=sender))
    sampled = await engine.sample(PROMPTS[3], Sampling(n=2, max_tokens=12))
    assert sampled.weight_version == 9
    assert_sampled_from(vllm_model(2), PROMPTS[3], sampled.completions)


async def test_an_engine_that_is_left_without_weights_is_given_up(engine: Any) -> None:
    sender = LocalSender(published(vllm_model(2), 9), fails=True)
    with pytest.raises(EngineDied, match="left without weights: the learner died"):
        await engine.load_weights(replace(published(vllm_model(2), 9), sender=sender))
    with pytest.raises(Unavailable, match="no weights that passed the probe"):
        await engine.sample([2, 3], Sampling(n=1, max_tokens=2))


# ------------------------------------------------------------------------------- the calls


async def test_more_prompt_tokens_than_one_forward_takes(engine: Engine) -> None:
    """They are more than the 2,048 of vLLM's default; one prompt would be prefilled in parts."""
    prompts = RANDOM.integers(2, VOCAB, (30, 200)).tolist()
    sampling = Sampling(n=2, max_tokens=4, seed=8)
    groups = await asyncio.gather(*(engine.sample(p, sampling) for p in prompts))
    for prompt, sampled in zip(prompts, groups, strict=True):
        assert_sampled_from(vllm_model(0), prompt, sampled.completions)


async def test_a_cancelled_call_frees_its_place(engine: Any) -> None:
    """It would otherwise sample for minutes, and hold up the next update as long."""
    endless = Sampling(n=64, max_tokens=CONTEXT - 2, seed=1)
    calls = [asyncio.create_task(engine.sample([2], endless)) for _ in range(40)]
    async with asyncio.timeout(DEADLINE_S):
        while engine._llm.get_num_unfinished_requests() < 40 * 64:
            await asyncio.sleep(0.01)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    assert all(call.cancelled() for call in calls)
    assert engine._llm.get_num_unfinished_requests() == 0
    async with asyncio.timeout(DEADLINE_S):
        await engine.load_weights(published(vllm_model(2), 5))


async def test_a_request_that_vllm_aborts_is_an_error_and_no_short_answer(engine: Any) -> None:
    """So its item is not handed on but stays with the stage, which tries it again."""
    call = asyncio.create_task(engine.sample([2, 3], Sampling(n=1, max_tokens=CONTEXT - 2, seed=0)))
    waiting = engine._llm.output_processor.request_states
    async with asyncio.timeout(DEADLINE_S):
        while not waiting:
            await asyncio.sleep(0)
        await engine._llm.abort(list(waiting), internal=True)
        with pytest.raises(SamplingError, match="vLLM ended a completion with 'abort'"):
            await call
    sampled = await engine.sample([2, 3], Sampling(n=1, max_tokens=4))
    assert_sampled_from(vllm_model(0), [2, 3], sampled.completions)


@pytest.mark.parametrize(
    ("prompt", "change", "complaint"),
    [
        ([], {}, "empty prompt"),
        ([2, VOCAB], {}, "outside of the vocabulary"),
        ([2], {"n": 0}, "nothing to sample"),
        ([2], {"top_p": 0.9}, "top_p"),
        ([2], {"max_tokens": CONTEXT}, "more than vLLM's max_model_len"),
    ],
)
async def test_what_cannot_be_sampled_spoils_no_batch(
    engine: Engine, prompt: list[int], change: dict[str, Any], complaint: str
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


@pytest.mark.parametrize(
    ("engine_config", "complaint"),
    [
        ({"args": {"max_num_seq": 4}}, "no argument 'max_num_seq'; did you mean 'max_num_seqs'"),
        ({"args": {"logprobs_mode": "raw_logits"}}, "logprobs_mode is set by this engine itself"),
        (
            {"args": {"max_num_seqs": "many", "seed": 1}},
            r"rollout\.engine\.args\.max_num_seqs: vLLM refuses: '<' not supported",
        ),
        (
            {"args": {"compilation_config": {"beckend": "eager"}}},
            r"args\.compilation_config: .* no field 'beckend'; did you mean 'backend'",
        ),
        ({"args": {"tensor_parallel_size": 3}}, r"heads \(4\) must be divisible by .* size \(3\)"),
        ({"device": "cuda"}, "runs on 'cpu', not on 'cuda'"),
    ],
)
async def test_arguments_that_cannot_work_are_refused(
    directory: Path, engine_config: dict[str, Any], complaint: str
) -> None:
    wrong = RolloutConfig.model_validate({"engine": {"kind": "vllm", **engine_config}})
    with pytest.raises(EngineError, match=complaint):
        check_engine(wrong, str(directory))
    check_engine(config(), str(directory))


async def test_a_sequence_as_long_as_the_runs_longest_fits(directory: Path) -> None:
    """Its cache need not hold the model's whole context; but the probe, which may be longer."""
    engine: Any = await asyncio.to_thread(build_engine, config(), str(directory), 48)
    try:
        weights = published(vllm_model(0), 0)
        assert engine._llm.model_config.max_model_len == len(weights.probe_ids) + 1 == 65
        await engine.load_weights(weights)
        prompt, longest = PROMPTS[3][:16], Sampling(n=2, max_tokens=32, seed=5)
        sampled = await engine.sample(prompt, longest)
        assert_sampled_from(vllm_model(0), prompt, sampled.completions)
        with pytest.raises(BadItem, match=r"are 66 tokens, more than vLLM's max_model_len \(65\)"):
            await engine.sample(prompt, replace(longest, max_tokens=50))
    finally:
        await engine.close()


async def test_its_worker_is_in_the_process_of_its_core(engine: Any) -> None:
    """As on one GPU: each process imports vLLM anew, which takes as long as all else."""
    names = ["".join(p.cmdline()) for p in psutil.Process().children(recursive=True)]
    assert sum("VLLM::" in name for name in names) == 1, names


async def test_an_engine_whose_process_is_killed_says_so(keeping: Any) -> None:
    """The last test: nothing can be sampled after it. It dies with groups in flight and in the
    middle of an update; the worker ends, and its prompts are taken over by another."""
    (core,) = [p for p in psutil.Process().children() if "EngineCore" in "".join(p.cmdline())]
    core.suspend()  # so that no group and no update can be over before
    calls = [asyncio.create_task(keeping.sample(p, Sampling(4, 100))) for p in PROMPTS]
    async with asyncio.timeout(DEADLINE_S):
        while keeping._llm.get_num_unfinished_requests() < 4 * len(PROMPTS):
            await asyncio.sleep(0.001)
    calls.append(asyncio.create_task(keeping.load_weights(published(vllm_model(0), 9))))
    async with asyncio.timeout(DEADLINE_S):
        while not keeping._turnstile._closed:
            await asyncio.sleep(0.001)
    core.kill()
    async with asyncio.timeout(DEADLINE_S):
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(result) for result in results} == {EngineDied}
