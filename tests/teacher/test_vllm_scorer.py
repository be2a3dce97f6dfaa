"""The real vLLM against transformers' forward. One engine serves the whole module."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig

from benchmarks.families import plain
from services.config import EngineConfig
from services.engines import EngineError
from teacher.config import TeacherConfig
from teacher.scorer import Scorer, ScoringError, build_scorer
from tests.builders import CONTEXT, VLLM_HEAD, VOCAB, save_tiny, tiny_model, tiny_tokenizer
from tests.teacher.conftest import Reference
from tests.waiting import DEADLINE_S

pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.usefixtures("vllm"),
]

CHUNK = 48  # tokens of one forward: most sequences are prefilled in several
BROKEN_TOKEN = 23
LIMIT = 20  # of the most likely tokens that come with each
RANDOM = np.random.default_rng(1)
LENGTHS = [(1, 1), (1, CONTEXT - 1), (CONTEXT - 1, 1), (CHUNK, CHUNK), (CHUNK - 1, 2)]
LENGTHS += [(int(p), int(t)) for p, t in RANDOM.integers(1, CONTEXT // 2, (12, 2))]
PAIRS = [
    (RANDOM.integers(0, BROKEN_TOKEN, p).tolist(), RANDOM.integers(0, BROKEN_TOKEN, t).tolist())
    for p, t in LENGTHS
]
IDS = [[*prompt, *completion] for prompt, completion in PAIRS]
STARTS = [len(prompt) for prompt, _ in PAIRS]


ARGS = {"kv_cache_memory_bytes": 1 << 26, "max_num_batched_tokens": CHUNK, "max_num_seqs": 16}


def config(directory: Path, **engine: object) -> TeacherConfig:
    return TeacherConfig.model_validate(
        {
            "model": str(directory),
            "engine": {"kind": "vllm", "args": ARGS, **engine},
            "max_top_logprobs": LIMIT,
        }
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with a separate output matrix, and one token that it knows no embedding of."""
    path = save_tiny(tmp_path_factory.mktemp("vllm"), head=VLLM_HEAD, tied=False)
    model = tiny_model(head=VLLM_HEAD, tied=False)
    model.get_input_embeddings().weight.data[BROKEN_TOKEN] = float("nan")
    model.save_pretrained(path)
    return path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scorer(directory: Path) -> AsyncIterator[Scorer]:
    """With its worker in a process of its own, as several GPUs have them."""
    from services.vllm_core import shared_memory  # imports vLLM

    apart = {"distributed_executor_backend": "mp"}
    made = await asyncio.to_thread(build_scorer, config(directory, args=ARGS | apart))
    processes = multiprocessing.active_children()
    segments = shared_memory([child.pid for child in processes if child.pid])
    yield made
    await made.close()
    assert not multiprocessing.active_children()
    assert segments and not [name for name in segments if Path(name).exists()]


async def test_scores_equal_transformers_batched_and_alone(scorer: Scorer, directory: Path) -> None:
    reference = Reference(directory)
    batched = await scorer.score(IDS, STARTS)
    alone = [(await scorer.score([i], [s]))[0] for i, s in zip(IDS, STARTS, strict=True)]
    for (prompt, completion), together, single in zip(PAIRS, batched, alone, strict=True):
        expected = reference.score(prompt, completion)
        np.testing.assert_allclose(together.logprobs, expected, atol=1e-4)
        np.testing.assert_allclose(single.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("top", [4, LIMIT])
async def test_the_most_likely_tokens_are_those_of_transformers(
    scorer: Scorer, directory: Path, top: int
) -> None:
    reference = Reference(directory)
    for ids, start, scores in zip(IDS, STARTS, await scorer.score(IDS, STARTS, top), strict=True):
        table = reference.table(ids)[start - 1 : -1]
        np.testing.assert_allclose(scores.top_logprobs, table.topk(top).values, atol=1e-4)
        # Two that are as good as equally likely may change places.
        theirs = np.take_along_axis(table.numpy(), scores.top_ids, 1)
        np.testing.assert_allclose(scores.top_logprobs, theirs, atol=1e-4)
        assert all(len(set(row)) == top for row in scores.top_ids.tolist())


async def test_an_empty_completion_scores_as_nothing(scorer: Scorer) -> None:
    scores = await scorer.score([[1, 2], [3], [4, 5, 6]], [2, 1, 1])
    assert [len(score.logprobs) for score in scores] == [0, 0, 2]
    assert await scorer.score([], []) == []


@pytest.mark.parametrize("start", [0, 3])
async def test_a_start_that_scores_nothing_real_is_refused(scorer: Scorer, start: int) -> None:
    with pytest.raises(ValueError, match="cannot score from token"):
        await scorer.score([[1, 2], [1, 2]], [1, start])


async def test_log_probs_that_are_no_numbers_raise_and_harm_nobody_else(scorer: Scorer) -> None:
    good, bad = await asyncio.gather(
        scorer.score([[1, 2, 3]], [1]),
        scorer.score([[1, BROKEN_TOKEN, 3]], [1]),
        return_exceptions=True,
    )
    assert isinstance(good, list)
    assert isinstance(bad, ScoringError)
    assert "log-prob" in str(bad)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_model_len", CONTEXT), ("enable_prefix_caching", True), ("max_logprobs", LIMIT)],
)
async def test_an_argument_that_scoring_rests_on_is_refused(
    directory: Path, name: str, value: object
) -> None:
    with pytest.raises(EngineError, match=f"{name} is set by this engine itself"):
        build_scorer(config(directory, args={name: value}))


@pytest.mark.parametrize(
    ("on_cpu", "batch_tokens", "chunk"),
    [(True, 16_384, 2_048), (False, 16_384, 8_192), (False, 4_000, 4_000)],
)
async def test_memory_is_bounded_by_chunks_and_no_prefix_is_kept(
    directory: Path, monkeypatch: pytest.MonkeyPatch, on_cpu: bool, batch_tokens: int, chunk: int
) -> None:
    from teacher.vllm_scorer import engine_args  # imports vLLM

    monkeypatch.setattr("services.vllm_core.on_cpu", lambda: on_cpu)
    given = config(directory).model_copy(
        update={"engine": EngineConfig(kind="vllm"), "batch_tokens": batch_tokens}
    )
    made = engine_args(given, CONTEXT)
    assert (made.enable_prefix_caching, made.enable_chunked_prefill) == (False, True)
    assert (made.max_num_batched_tokens, made.max_logprobs) == (chunk, LIMIT)


async def test_on_a_gpu_prompts_are_scored_in_parts() -> None:
    """What `_CHUNK_TOKENS` rests on: the runner that vLLM takes where there is Triton."""
    from vllm.v1.worker.gpu.sample.prompt_logprob import CHUNK_SIZE

    assert CHUNK_SIZE == 1024


async def test_a_model_that_vllm_computes_otherwise_scores_nothing(
    scorer: Any, directory: Path
) -> None:
    from teacher.vllm_scorer import _Proof  # imports vLLM

    told = np.array(Reference(directory).score(IDS[2][:1], IDS[2][1:]), np.float32)
    scorer._unproven = _Proof(IDS[2], told - np.float32(0.02))
    with pytest.raises(EngineError, match=r"another model .* it is 0\.02 nats off a plain forward"):
        await scorer.check()
    with pytest.raises(EngineError, match=r"score it with engine\.kind: transformers"):
        await scorer.score([[1, 2]], [1])
    scorer._unproven = _Proof(IDS[2], told)
    await scorer.check()
    assert scorer._unproven is None


async def test_what_vllm_must_say_is_what_the_model_says(directory: Path, tmp_path: Path) -> None:
    from teacher.vllm_scorer import _proof  # imports vLLM

    reference, proof = Reference(save_tiny(tmp_path)), _proof(str(tmp_path), CONTEXT)
    assert proof is not None and len(proof.ids) == 64
    expected = reference.score(proof.ids[:1], proof.ids[1:])
    np.testing.assert_allclose(proof.logprobs, expected, atol=1e-5)
    assert _proof(str(directory), CONTEXT) is None  # whose weights are broken


async def test_cancelled_requests_leave_the_engine_free(scorer: Scorer) -> None:
    calls = [asyncio.create_task(scorer.score(IDS, STARTS)) for _ in range(20)]
    await asyncio.wait(calls, timeout=0.2)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    async with asyncio.timeout(DEADLINE_S):
        assert await scorer.score([[1, 2]], [1])


async def test_of_a_multimodal_checkpoint_the_text_model_scores(tmp_path: Path) -> None:
    """vLLM would start the other parts with a tokenizer, which it is not given."""
    text = tiny_llama().to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes = {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    model = Idefics3ForConditionalGeneration(
        Idefics3Config(text_config=text, vision_config={**vision, **sizes}, image_token_id=0)
    ).eval()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    scorer = await asyncio.to_thread(build_scorer, config(tmp_path))
    (scores,) = await scorer.score([IDS[2]], [1])
    await scorer.close()
    np.testing.assert_allclose(scores.logprobs, plain(model, IDS[2]).numpy(), atol=1e-4)


def tiny_llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        pad_token_id=0,
    )
