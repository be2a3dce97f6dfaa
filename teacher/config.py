"""Settings of the teacher: its model, its server and the workers that ask it. Imports pydantic
only."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from services.config import DEFAULT_TEACHER, Config, EngineConfig, RedisConfig, Resources


class CacheConfig(RedisConfig):
    """A Redis that remembers scores, shared by whoever is given its URL."""

    url: str
    max_bytes: int = Field(default=1 << 30, ge=1)
    """Of all scores in it; those that were used longest ago go first."""


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


class TeacherModel(Config):
    """One teacher: a model, and who serves it."""

    model: str
    """A Hugging Face directory or hub name; also the name that requests call the model by."""
    endpoints: list[Annotated[Endpoint, BeforeValidator(_endpoint)]] = Field(default_factory=list)
    """Servers that hold this model already (each a URL, or more about it): the run then deploys
    none of its own."""
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
    """Longest prompt and completion together; None is the model's context length."""
    max_request_tokens: int = Field(default=1_048_576, ge=2)
    """Tokens of all sequences of one request together."""
    max_body_bytes: int = Field(default=64 << 20, ge=1024)
    """Longest body of a request."""
    max_top_logprobs: int = Field(default=64, ge=1, le=1024)
    """Most alternatives of one token that may be asked for."""
    batch_tokens: int = Field(default=16_384, ge=1)
    """Tokens in one forward of the transformers engine; a longer sequence goes alone. vLLM
    prefills in chunks of at most 2,048 of them."""
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
    def _served_once(self) -> TeacherModel:
        if self.autoscale and self.replicas != 1:
            raise ValueError("replicas is fixed by autoscale: leave it out")
        own = ("replicas", "autoscale", "engine", "resources", "key_tokens_per_s", "cache")
        if self.endpoints and (changed := self._changed(own)):
            raise ValueError(
                f"endpoints are served by others, so this run serves no such teacher: leave out "
                f"{', '.join(changed)}"
            )
        return self

    def _changed(self, names: tuple[str, ...]) -> list[str]:
        fields = type(self).model_fields
        return [name for name in names if getattr(self, name) != fields[name].get_default()]

    @property
    def least_replicas(self) -> int:
        """Copies that there always are."""
        return self.autoscale.min_replicas if self.autoscale else self.replicas


class OtherTeacher(TeacherModel):
    """A teacher of some of the prompts: of those whose row names it (`extra_info.teacher`), and of
    data sources."""

    data_sources: tuple[str, ...] = ()
    """Whose prompts go to it, besides the data source of its own name."""


class TeacherConfig(TeacherModel):
    """The teachers of a run: the one that scores whatever names no other, the others, the address
    at which all are served, and the stage workers in front of them."""

    others: dict[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")], OtherTeacher] = Field(
        default_factory=dict
    )
    """More teachers by name, each with all the settings of one."""
    host: str = "127.0.0.1"
    """Address to listen on. Any other than loopback needs at least one API key."""
    port: int = Field(default=8000, ge=0, le=65_535)
    """0 takes a free port."""
    workers: int = Field(default=1, ge=1)
    """Stage workers that carry groups from the verified to the scored stream."""
    capacity: int = Field(default=16, ge=1)
    """Groups in flight in one worker; each is one request."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """How long the servers may take to load their models and answer."""

    @property
    def named(self) -> dict[str, TeacherModel]:
        """All teachers by name, the default first."""
        return {DEFAULT_TEACHER: self, **self.others}

    @property
    def served(self) -> dict[str, TeacherModel]:
        """Those that are not somebody else's."""
        return {name: one for name, one in self.named.items() if not one.endpoints}

    def router(self) -> Callable[[str | None, str], str]:
        """A function from the teacher that a row names, if any, and its data source to the name of
        the teacher that scores it. It raises ValueError where there is no such teacher."""
        by_source = {source: name for name in self.others for source in self._sources(name)}
        known = [*self.named]

        def route(named: str | None, data_source: str) -> str:
            if named is None:
                return by_source.get(data_source, DEFAULT_TEACHER)
            if named not in known:
                near = difflib.get_close_matches(named, known, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]!r}?" if near else f"only {', '.join(known)}"
                raise ValueError(f"this run has no teacher {named!r}; {hint}")
            return named

        return route

    def _sources(self, name: str) -> tuple[str, ...]:
        return (name, *self.others[name].data_sources)

    @model_validator(mode="after")
    def _told_apart(self) -> TeacherConfig:
        if DEFAULT_TEACHER in self.others:
            raise ValueError(f"others may not be called {DEFAULT_TEACHER!r}: that is this teacher")
        if not self.served and self._changed(("host",)):
            raise ValueError("endpoints are served by others: leave out host")
        sources = Counter(s for name in self.others for s in {*self._sources(name)})
        models = Counter(one.model for one in self.served.values())
        for what, counted in (("data source", sources), ("model", models)):
            for value, times in counted.items():
                if times > 1:
                    raise ValueError(f"{what} {value!r} belongs to {times} teachers: choose one")
        return self
