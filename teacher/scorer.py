"""The seam between the teacher's server and what computes log-probs, and how one is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from services import engines
from services.engines import EngineError
from services.errors import EngineDied
from services.models import fingerprint, steady_tokens, text_config
from teacher.api import Limits, ModelCard, Tokens
from teacher.config import TeacherConfig
from teacher.scores import NO_MORE, InvalidLogProbs, More, TokenScores

if TYPE_CHECKING:  # a server must start without torch
    from services.weights import WeightFeed


class Scorer(Protocol):
    """Log-probs of given tokens under one model."""

    async def score(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        top: int = 0,
        more: More = NO_MORE,
    ) -> list[TokenScores]:
        """For each sequence the scores of its tokens from its start on.

        Args:
            sequences: token ids, prompt and completion together.
            starts: where each completion starts; at least 1, at most the sequence's length.
            top: how many of the most likely tokens come with each; at most the vocabulary.
            more: what else does.

        Raises:
            ScoringError: the model gave no valid log-probs.
        """
        ...

    async def check(self) -> None:
        """Returns if the model can score.

        Raises:
            ScorerDied: it never will again.
        """
        ...

    async def close(self) -> None:
        """Ends whatever the scorer started."""
        ...


class ScoringError(RuntimeError):
    """The model computed something that is no log-prob, and would again. `sequence` is the place
    of the first sequence that it happened to."""

    def __init__(self, sequence: int, error: InvalidLogProbs) -> None:
        super().__init__(f"the teacher's model computed no log-probs: {error}")
        self.sequence = sequence


class ScorerDied(EngineDied):
    """What computes is gone; a new scorer is needed."""


def check_starts(sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> None:
    """
    Raises:
        ValueError: a start is 0 (the first token has nothing before it) or past the end.
    """
    for ids, start in zip(sequences, starts, strict=True):
        if not 1 <= start <= len(ids):
            raise ValueError(f"cannot score from token {start} of a sequence of {len(ids)}")


def build_scorer(config: TeacherConfig, weights: WeightFeed | None = None) -> Scorer:
    """Loads the teacher with the configured engine. Takes as long as reading its weights.

    Raises:
        services.engines.EngineError: the engine is not available.
        services.models.ModelError: the model is not.
    """
    engines.require_gpu(config.engine, "teacher.engine", config.resources)
    kind = engines.choose(config.engine, "teacher.engine", config.resources)
    _check_following(config, kind)
    if kind == "vllm":
        from teacher.vllm_scorer import VLLMScorer

        return VLLMScorer(config, model_card(config).limits.max_sequence_tokens)
    from teacher.packed_scorer import PackedScorer

    model = engines.load(config.engine, config.model, config.resources)
    scorer = PackedScorer(model, batch_tokens=config.batch_tokens)
    if config.weights == "fixed":
        return scorer
    from teacher.following_scorer import FollowingScorer

    if weights is None:
        raise EngineError("a teacher with the student's weights can be served by a run only")
    return FollowingScorer(scorer, weights, config)


def _check_following(config: TeacherConfig, kind: str) -> None:
    if config.weights == "student" and kind == "vllm":
        raise EngineError(
            "a teacher with the student's weights is scored by transformers so far: set its "
            "engine.kind to transformers"
        )


def check_scorer(config: TeacherConfig) -> None:
    """Refuses what `build_scorer` would, as far as that can be told without loading anything:
    vLLM's arguments are checked by vLLM, where it is installed.

    Raises:
        services.engines.EngineError: see `build_scorer`.
        services.models.ModelError: there is no such model.
    """
    longest = model_card(config).limits.max_sequence_tokens
    _check_following(config, config.engine.kind)
    if engines.vllm_can_check(config.engine):
        from teacher.vllm_scorer import check

        check(config, longest)
    elif config.engine.kind == "transformers":
        engines.choose(config.engine, "teacher.engine", config.resources)


def _steady(config: TeacherConfig, limit: int) -> int:
    """The limit, or where transformers changes its mind about shorter sequences; vLLM never does.

    Raises:
        services.engines.EngineError: the config asks for more.
    """
    steady = None if config.engine.kind == "vllm" else steady_tokens(text_config(config.model))
    if steady is None or limit <= steady:
        return limit
    if config.max_sequence_tokens:
        raise EngineError(
            f"teacher.max_sequence_tokens is {limit}: past {steady} tokens the rotary embedding of "
            f"{config.model} changes for the whole sequence (rope_parameters in its config.json)"
        )
    return steady


def model_card(config: TeacherConfig) -> ModelCard:
    """What the server tells about its model, read from the model's directory.

    Raises:
        services.engines.EngineError: the limits do not fit the model.
        services.models.ModelError: the directory is no model.
    """
    identity = fingerprint(config.model)
    limit = config.max_sequence_tokens or identity.context_length
    if not limit:
        raise EngineError(
            f"{config.model} names no context length: set teacher.max_sequence_tokens"
        )
    if identity.context_length and limit > identity.context_length:
        raise EngineError(
            f"teacher.max_sequence_tokens is {limit}, past the context of {config.model} "
            f"({identity.context_length} tokens)"
        )
    limit = _steady(config, limit)
    return ModelCard(
        id=config.model,
        fingerprint=identity.model,
        context_length=identity.context_length or limit,
        tokens=Tokens(
            tokenizer=identity.tokenizer,
            tokenizer_size=identity.tokenizer_size,
            end_tokens=list(identity.end_tokens),
            chat_template=identity.chat_template,
        ),
        limits=Limits(
            max_sequence_tokens=limit,
            max_request_tokens=config.max_request_tokens,
            max_top_logprobs=min(config.max_top_logprobs, identity.vocab_size),
            vocab_size=identity.vocab_size,
            gives=_gives(config),
        ),
    )


def _gives(config: TeacherConfig) -> list[Literal["candidates", "entropy"]]:
    kind = config.engine.kind
    if kind == "auto":
        kind = engines.choose(config.engine, "teacher.engine", config.resources)
    if kind == "transformers":
        return ["candidates", "entropy"]
    # vLLM 0.32 scores given ids on GPUs alone, and tells no entropy.
    on_gpu = config.engine.on(config.resources).startswith("cuda")
    return ["candidates"] if on_gpu else []
