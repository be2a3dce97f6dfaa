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
# For the scored tokens of one forward vLLM keeps all of the vocabulary's log-probs in float32:
# 2,048 tokens of a vocabulary of 150,000 are 1.2 GB.
_CHUNK_TOKENS = 2048


def engine_args(config: TeacherConfig, longest: int) -> AsyncEngineArgs:
    """What vLLM scores with, sequences of up to `longest` tokens.

    Raises:
        services.engines.EngineError: an argument is unknown, taken or refused by vLLM.
        services.models.ModelError: there is no such model.
    """
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
            "max_num_batched_tokens": min(config.batch_tokens, _CHUNK_TOKENS),
            "enable_chunked_prefill": True,
        },
    )


def check(config: TeacherConfig, longest: int) -> None:
    """See `teacher.scorer.check_scorer`."""

    def make(engine: EngineConfig) -> AsyncEngineArgs:
        return engine_args(config.model_copy(update={"engine": engine}), longest)

    vllm_core.check(make, config.engine, SECTION)


class VLLMScorer:
    """See `teacher.scorer.Scorer`. Prompts are prefilled in chunks of 2,048 tokens, unless
    `engine.args.max_num_batched_tokens` says otherwise.

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
