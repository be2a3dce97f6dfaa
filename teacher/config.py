"""Settings of the teacher: its model, its server and the workers that ask it. Imports pydantic
only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from services.config import Config, EngineConfig, RedisConfig, Resources


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


class TeacherConfig(Config):
    """The teacher: one Ray Serve application, and the stage workers in front of it."""

    model: str
    """A Hugging Face directory or hub name; also the name that requests call the model by."""
    endpoints: list[Annotated[Endpoint, BeforeValidator(_endpoint)]] = Field(default_factory=list)
    """Servers that hold this model already (each a URL, or more about it): the run then deploys no
    teacher of its own."""
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
    host: str = "127.0.0.1"
    """Address to listen on. Any other than loopback needs at least one API key."""
    port: int = Field(default=8000, ge=0, le=65_535)
    """0 takes a free port."""
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
    workers: int = Field(default=1, ge=1)
    """Stage workers that carry groups from the verified to the scored stream."""
    capacity: int = Field(default=16, ge=1)
    """Groups in flight in one worker; each is one request."""
    request_timeout_s: float = Field(default=300.0, gt=0)
    """One request from its first byte to the last of the answer. After it the group waits and
    is asked for again."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """How long the server may take to load its model and answer."""
    drain_s: float = Field(default=30.0, ge=0)
    """How long requests in flight may still take when a replica is told to stop."""

    @model_validator(mode="after")
    def _consistent(self) -> TeacherConfig:
        if self.autoscale and self.replicas != 1:
            raise ValueError("replicas is fixed by autoscale: leave it out")
        own = ("replicas", "autoscale", "host", "engine", "resources", "key_tokens_per_s", "cache")
        fields = type(self).model_fields
        changed = [name for name in own if getattr(self, name) != fields[name].get_default()]
        if self.endpoints and changed:
            raise ValueError(
                f"endpoints are served by others, so this run serves no teacher: leave out "
                f"{', '.join(changed)}"
            )
        return self
