"""Settings of the teachers: their models, their server and the workers that ask them. Imports
pydantic only."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from services.config import (
    DEFAULT_TEACHER,
    HEAD,
    Config,
    EngineConfig,
    RedisConfig,
    Resources,
    WorkersConfig,
)


class CacheConfig(RedisConfig):
    """A Redis that remembers scores and nothing else, shared by whoever is given its URL. Its own
    `maxmemory` and `maxmemory-policy allkeys-lru` keep it bounded."""

    url: str


class Autoscale(Config):
    """How many copies of the model there are, by how many requests each one holds."""

    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(ge=1)
    target_requests: float = Field(default=32.0, gt=0)
    """Requests that each replica shall hold, worked on or waiting."""
    upscale_delay_s: float = Field(default=30.0, ge=0)
    downscale_delay_s: float = Field(default=600.0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Autoscale:
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas is more than max_replicas")
        return self


def _endpoint(value: object) -> object:
    """A URL alone is an endpoint."""
    return {"url": value} if isinstance(value, str) else value


class Endpoint(Config):
    """A server that somebody else runs: this service, or any `vllm serve`."""

    url: str = Field(pattern=r"^https?://[^/]")
    """With its route prefix, without `/v1`."""
    model: str | None = None
    """The name that it serves the teacher under; None is its first."""
    key_env: str | None = None
    """The environment variable that holds its API key."""


class ContextMessage(Config):
    """A chat message whose text may name keys of the row: `{prompt}`, `{reference}`, or any of its
    `extra_info`."""

    role: str = "user"
    content: str


def _context(value: object) -> object:
    """Text that is no keyword is what the user says."""
    return [{"content": value}] if isinstance(value, str) and value != "row" else value


Context: TypeAlias = Annotated[
    Literal["row"] | Annotated[tuple[ContextMessage, ...], Field(min_length=1)],
    BeforeValidator(_context),
]
"""A prompt of the teacher's own: a template over each row, or its `extra_info.teacher_prompt`."""


class TeacherConfig(Config):
    """One teacher: a model, and who serves it."""

    model: str
    """A Hugging Face directory or hub name; also the name that requests call the model by."""
    data_sources: tuple[str, ...] = ()
    """Whose prompts go to it, besides those whose row names it (`extra_info.teacher`) and the data
    source of its own name. The teacher `default` has all others."""
    context: Context | None = None
    """What it reads before an answer instead of the student's prompt: text, or chat messages, with
    `{prompt}`, `{reference}` and keys of the row's `extra_info` in them; `row` takes the messages
    in `extra_info.teacher_prompt`. Its own chat template is applied; the student never sees it."""
    tokenizer: Literal["student", "own"] = "student"
    """`own`: the teacher's tokenizer is another than the student's. Prompts are made with its own
    chat template, answers are tokenised anew for it, and log-probs are compared over chunks of
    text, where both have a boundary."""
    weights: Literal["fixed", "student"] = "fixed"
    """`student`: the weights that the learner publishes, of which `model`, the run's student, only
    gives the architecture."""
    refresh_steps: int = Field(default=1, ge=1)
    """With `weights: student`: they are taken over once the learner is so many steps ahead."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """With `weights: student`: the share of its old weights that the teacher keeps at each refresh;
    0 is a copy."""
    probe_tolerance: float = Field(default=1e-3, gt=0)
    """With `weights: student`: as `rollout.probe_tolerance`."""
    endpoints: list[Annotated[Endpoint, BeforeValidator(_endpoint)]] = Field(default_factory=list)
    """Servers that hold this model already (each a URL, or more about it): the run then deploys
    none of its own."""
    reference: str = "majority"
    """Which model is right where endpoints differ and `model` is not on this machine: that of most
    endpoints, or of the one whose URL is given."""
    endpoint_tolerance: float = Field(default=0.1, gt=0)
    """Nats by which the log-probs of a fixed sequence may differ on average between endpoints that
    tell no fingerprint: bfloat16 and other kernels differ by some hundredths."""
    ca_file: Path | None = None
    """Certificates (PEM) of the private authority that vouches for the endpoints, on every node."""
    hedge_factor: float | None = Field(default=4.0, ge=1)
    """A request to an endpoint that takes so many times as long as a slow one is sent to a second
    endpoint too; None never does."""
    engine: EngineConfig = EngineConfig()
    """What computes the log-probs."""
    replicas: int = Field(default=1, ge=1)
    """Copies of the model; Ray Serve balances requests over them."""
    autoscale: Autoscale | None = None
    """As many replicas as the load needs, instead of a fixed number."""
    resources: Resources = Resources()
    """What each replica reserves."""
    max_sequence_tokens: int | None = Field(default=None, ge=2)
    """Longest prompt and completion together; None is the model's context length, and in a run the
    longest that the run sends, where that is known."""
    max_request_tokens: int = Field(default=1_048_576, ge=2)
    """Tokens of all sequences of one request together."""
    max_body_bytes: int = Field(default=64 << 20, ge=1024)
    """Longest body of a request."""
    max_top_logprobs: int = Field(default=64, ge=1, le=1024)
    """Most alternatives of one token that may be asked for."""
    batch_tokens: int = Field(default=16_384, ge=1)
    """Tokens in one forward of the transformers engine; a longer sequence goes alone. vLLM
    prefills in chunks of at most 8,192 of them, on a CPU of 2,048."""
    max_ongoing_requests: int = Field(default=256, ge=1)
    """Requests that one replica holds, worked on or waiting; past it callers are told at once
    (503) when to come again."""
    max_held_tokens: int = Field(default=4_194_304, ge=1)
    """Tokens of the sequences that one replica holds; the same past it."""
    key_tokens_per_s: float | None = Field(default=None, gt=0)
    """What each API key may have read by one replica on average; past it 429. None: no limit."""
    cache: CacheConfig | None = None
    """Remembers scores by model and token ids, so that replays and ablations pay once."""
    request_timeout_s: float = Field(default=300.0, gt=0)
    """One request from its first byte to the last of the answer. After it the group waits and
    is asked for again."""
    drain_s: float = Field(default=30.0, ge=0)
    """How long requests in flight may still take when a replica is told to stop."""

    @model_validator(mode="after")
    def _served_once(self) -> TeacherConfig:
        if self.autoscale and self.replicas != 1:
            raise ValueError("replicas is fixed by autoscale: leave it out")
        own = ("replicas", "autoscale", "engine", "resources", "key_tokens_per_s", "cache")
        fields = type(self).model_fields
        changed = [name for name in own if getattr(self, name) != fields[name].get_default()]
        if self.endpoints and changed:
            raise ValueError(
                f"endpoints are served by others, so this run serves no such teacher: leave out "
                f"{', '.join(changed)}"
            )
        known = ("majority", *(endpoint.url for endpoint in self.endpoints))
        if self.reference not in known:
            raise ValueError(
                f"reference is {self.reference!r}, and must be one of {', '.join(known)}"
            )
        return self

    @model_validator(mode="after")
    def _follows(self) -> TeacherConfig:
        if self.weights == "fixed":
            ours = {"refresh_steps", "ema", "probe_tolerance"} & self.model_fields_set
            changed = [n for n in ours if getattr(self, n) != type(self).model_fields[n].default]
            if changed:
                raise ValueError(f"{', '.join(sorted(changed))}: only with weights: student")
            return self
        if self.endpoints:
            raise ValueError("weights: student follow the run's learner: leave out endpoints")
        if self.tokenizer == "own":
            raise ValueError("weights: student have the student's tokenizer: leave out tokenizer")
        if self.cache is not None:
            raise ValueError("weights: student change, and a cache knows the model alone: leave it")
        if self.ema and (self.replicas > 1 or self.autoscale):
            raise ValueError("ema: each replica would have an average of its own; take one replica")
        return self

    @property
    def least_replicas(self) -> int:
        """Copies that there always are."""
        return self.autoscale.min_replicas if self.autoscale else self.replicas


class ScoringConfig(WorkersConfig):
    """What all teachers of a run share: the address at which they are served, and the stage workers
    that ask them."""

    host: str = "127.0.0.1"
    """Address to listen on. Any other than loopback needs at least one API key."""
    port: int = Field(default=8000, ge=0, le=65_535)
    """0 takes a free port."""
    resources: Resources = HEAD
    start_timeout_s: float = Field(default=600.0, gt=0)
    """How long the servers may take to load their models and answer."""


class TeachersConfig(Config):
    """The teachers of a run by name, and what they share. One teacher may be written `teacher: {…}`
    instead; it is called `default`."""

    teachers: dict[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")], TeacherConfig] = (
        Field(default_factory=dict)
    )
    scoring: ScoringConfig = ScoringConfig()

    @property
    def served(self) -> dict[str, TeacherConfig]:
        """Those that are not somebody else's."""
        return {name: one for name, one in self.teachers.items() if not one.endpoints}

    def router(self) -> Callable[[str | None, str], str]:
        """A function from the teacher that a row names, if any, and its data source to the name of
        the teacher that scores it. It raises ValueError where there is no such teacher."""
        known = [*self.teachers]
        by_source = {source: name for name in known for source in self._sources(name)}

        def route(named: str | None, data_source: str) -> str:
            name = named or by_source.get(data_source, DEFAULT_TEACHER)
            if name in known:
                return name
            if named is None:
                raise ValueError(
                    f"the data source {data_source!r} belongs to no teacher: call one of "
                    f"{', '.join(known)} {DEFAULT_TEACHER!r}, or give it this source"
                )
            near = difflib.get_close_matches(named, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"only {', '.join(known)}"
            raise ValueError(f"this run has no teacher {named!r}; {hint}")

        return route

    def _sources(self, name: str) -> tuple[str, ...]:
        return (name, *self.teachers[name].data_sources)

    @model_validator(mode="before")
    @classmethod
    def _one_teacher(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping) or "teacher" not in raw:
            return raw
        rest = {key: value for key, value in raw.items() if key != "teacher"}
        if raw["teacher"] is None:
            return rest
        named = rest.get("teachers") or {}
        if isinstance(named, Mapping) and DEFAULT_TEACHER in named:
            raise ValueError(
                f"teacher and teachers.{DEFAULT_TEACHER} are the same one: write it once"
            )
        return rest | {"teachers": {DEFAULT_TEACHER: raw["teacher"], **named}}

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if self.teachers and not self.served and self.scoring.host != ScoringConfig().host:
            raise ValueError("endpoints are served by others: leave out scoring.host")
        sources = Counter(s for name in self.teachers for s in {*self._sources(name)})
        models = Counter(one.model for one in self.served.values())
        for what, counted in (("data source", sources), ("model", models)):
            for value, times in counted.items():
                if times > 1:
                    raise ValueError(f"{what} {value!r} belongs to {times} teachers: choose one")
        return self
