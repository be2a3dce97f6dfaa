"""Scoring with vLLM, for teachers that need several GPUs: prompt log-probs, nothing generated
but the one token that vLLM insists on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.exceptions import EngineDeadError

from services import vllm_core
from services.config import EngineConfig
from services.engines import EngineError
from services.layouts import FAILURES
from services.models import load_model, load_tokenizer, memory_for, probe_tokens, weight_bytes
from teacher.config import TeacherConfig
from teacher.scorer import ScorerDied, ScoringError, check_starts
from teacher.scores import NO_MORE, InvalidLogProbs, More, TokenScores, valid_scores, with_more

SECTION = "teacher.engine"  # of a run's config, for messages
# Tokens of one forward. On GPUs (vLLM's V2 runner) log-probs are made of 1,024 rows at a time, and
# this is vLLM's own choice for an H100: more cost memory, and the matrices are busy with fewer.
_CHUNK_TOKENS = 8192
# On a CPU (V1) the vocabulary's log-probs of a whole forward are there at once, in float32: of
# 150,000 words 1.2 GB.
_CPU_CHUNK_TOKENS = 2048
# Larger models are not loaded a second time beside a GPU only to be compared: it takes minutes.
_QUICK_BYTES = 16 << 30
# Nats that log-probs may differ on average: in float32 kernels differ by 1e-4.
_SAME_IN_FLOAT32 = 0.01
_log = logging.getLogger(__name__)


def engine_args(config: TeacherConfig, longest: int) -> AsyncEngineArgs:
    """What vLLM scores with, sequences of up to `longest` tokens.

    Raises:
        services.engines.EngineError: an argument is unknown, taken or refused by vLLM.
        services.models.ModelError: there is no such model.
    """
    most = _CPU_CHUNK_TOKENS if vllm_core.on_cpu() else _CHUNK_TOKENS
    return vllm_core.engine_args(
        config.model,
        config.engine,
        SECTION,
        resources=config.resources,
        fixed={
            "max_model_len": longest + 1,  # and the token that is generated
            # Cached blocks have no logits any more, so they could never be used.
            "enable_prefix_caching": False,
            "max_logprobs": config.max_top_logprobs,
        },
        defaults={
            "max_num_batched_tokens": min(config.batch_tokens, most),
            "enable_chunked_prefill": True,
        },
    )


def check(config: TeacherConfig, longest: int) -> None:
    """See `teacher.scorer.check_scorer`."""

    def make(engine: EngineConfig) -> AsyncEngineArgs:
        return engine_args(config.model_copy(update={"engine": engine}), longest)

    vllm_core.check(make, config.engine, SECTION)


@dataclass(frozen=True, slots=True)
class _Proof:
    """A sequence, and what the model itself says of all its tokens but the first (nats)."""

    ids: list[int]
    logprobs: npt.NDArray[np.float32]  # [T - 1]

    def apart(self, theirs: Sequence[float]) -> float:
        """Nats by which others differ on average."""
        return float(np.abs(self.logprobs - theirs).mean())


def _proof(model: str, longest: int) -> _Proof | None:
    """By a plain forward in float32; None where that is not quick, or transformers cannot."""
    quick = vllm_core.on_cpu() or weight_bytes(model) <= _QUICK_BYTES
    if not quick or not memory_for(model):
        _log.info("%s is not compared with a plain forward: it is large", model)
        return None
    try:
        plain = load_model(model)
        vocabulary = plain.config.get_text_config().vocab_size
        ids = probe_tokens(vocabulary, load_tokenizer(model))[:longest]
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
        logprobs = logits.float().log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
    except (*FAILURES, ImportError, OSError) as error:
        _log.warning("%s is not compared with a plain forward: %s", model, error)
        return None
    if not bool(torch.isfinite(logprobs).all()):
        return None  # broken weights: what they score is refused
    return _Proof(ids, logprobs[:, 0].numpy())


class VLLMScorer:
    """See `teacher.scorer.Scorer`. Prompts are prefilled in chunks of 8,192 tokens, on a CPU of
    2,048, unless `engine.args.max_num_batched_tokens` says otherwise. Before it scores anything,
    vLLM must say of a fixed sequence what a plain forward says, where that is quick.

    Args:
        config: the model and its engine.
        longest: tokens of the longest sequence that will be asked for.

    Raises:
        services.engines.EngineError: vLLM does not start with these arguments.
        services.models.ModelError: there is no such model.
    """

    def __init__(self, config: TeacherConfig, longest: int) -> None:
        args = engine_args(config, longest)
        self._model = config.model
        self._tolerance = _SAME_IN_FLOAT32 if args.dtype == "float32" else config.endpoint_tolerance
        self._unproven = _proof(config.model, longest)  # before vLLM takes its memory
        self._proving = asyncio.Lock()
        self._running = vllm_core.start(args, SECTION)
        self._llm = self._running.llm

    async def score(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        top: int = 0,
        more: More = NO_MORE,
    ) -> list[TokenScores]:
        """See `teacher.scorer.Scorer`.

        Raises:
            ValueError: a start is 0 or past the end of its sequence.
            ScoringError: a log-prob is not finite or is positive.
            services.engines.EngineError: vLLM computes another model than the given one.
        """
        check_starts(sequences, starts)
        await self._prove()
        return await asyncio.gather(
            *(
                self._score(index, ids, start, top, more.of([index]))
                for index, (ids, start) in enumerate(zip(sequences, starts, strict=True))
            )
        )

    async def check(self) -> None:
        """See `teacher.scorer.Scorer`.

        Raises:
            services.engines.EngineError: vLLM computes another model than the given one.
        """
        try:
            await self._llm.check_health()
            await self._prove()
        except EngineDeadError as error:
            raise ScorerDied("vLLM's engine process is gone") from error

    async def close(self) -> None:
        """Ends vLLM's processes."""
        await self._running.close()

    async def _prove(self) -> None:
        """Once, on the loop that the engine is used on."""
        async with self._proving:
            if self._unproven is None:
                return
            scored = await vllm_core.sequence_logprobs(self._llm, self._unproven.ids)
            nats = self._unproven.apart(scored)
            if not nats <= self._tolerance:
                raise EngineError(
                    f"{SECTION}: vLLM computes another model than {self._model}: on a fixed "
                    f"sequence it is {nats:.2g} nats off a plain forward, more than "
                    f"{self._tolerance:g}; score it with engine.kind: transformers"
                )
            self._unproven = None

    async def _score(
        self, index: int, token_ids: Sequence[int], start: int, top: int, more: More
    ) -> TokenScores:
        if start == len(token_ids):
            return TokenScores.empty(top, more)
        scored = await vllm_core.prompt_logprobs(
            self._llm, token_ids, top, candidates=next(iter(more.candidates), None), start=start
        )
        ids, logprobs = scored.ids[start - 1 :], scored.logprobs[start - 1 :]
        try:
            made = valid_scores(logprobs[:, 0], len(logprobs), ids[:, 1:], logprobs[:, 1:], top)
            return with_more(made, scored.candidates, (), more)
        except InvalidLogProbs as error:
            raise ScoringError(index, error) from error
