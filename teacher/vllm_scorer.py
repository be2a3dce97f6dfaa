"""Scoring with vLLM, for teachers that need several GPUs: prompt log-probs, nothing generated
but the one token that vLLM insists on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.exceptions import EngineDeadError

from services import vllm_core
from services.config import EngineConfig
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


class VLLMScorer:
    """See `teacher.scorer.Scorer`. Prompts are prefilled in chunks of 8,192 tokens, on a CPU of
    2,048, unless `engine.args.max_num_batched_tokens` says otherwise.

    Args:
        config: the model and its engine.
        longest: tokens of the longest sequence that will be asked for.

    Raises:
        services.engines.EngineError: vLLM does not start with these arguments.
        services.models.ModelError: there is no such model.
    """

    def __init__(self, config: TeacherConfig, longest: int) -> None:
        self._running = vllm_core.start(engine_args(config, longest), SECTION)
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
        """
        check_starts(sequences, starts)
        return await asyncio.gather(
            *(
                self._score(index, ids, start, top, more.of([index]))
                for index, (ids, start) in enumerate(zip(sequences, starts, strict=True))
            )
        )

    async def check(self) -> None:
        """See `teacher.scorer.Scorer`."""
        try:
            await self._llm.check_health()
        except EngineDeadError as error:
            raise ScorerDied("vLLM's engine process is gone") from error

    async def close(self) -> None:
        """Ends vLLM's processes."""
        await self._running.close()

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
