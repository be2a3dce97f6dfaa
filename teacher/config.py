"""Settings of the teacher: its model, its server and the workers that ask it. Imports pydantic
only."""

from __future__ import annotations

from pydantic import Field

from services.config import Config, EngineConfig, Resources


class TeacherConfig(Config):
    """The teacher: one Ray Serve application, and the stage workers in front of it."""

    model: str
    """A Hugging Face directory or hub name; also the name that requests call the model by."""
    engine: EngineConfig = EngineConfig()
    """What computes the log-probs."""
    replicas: int = Field(default=1, ge=1)
    """Copies of the model; Ray Serve balances requests over them."""
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
    workers: int = Field(default=1, ge=1)
    """Stage workers that carry groups from the verified to the scored stream."""
    capacity: int = Field(default=16, ge=1)
    """Groups in flight in one worker; each is one request."""
    request_timeout_s: float = Field(default=300.0, gt=0)
    """One request from its first byte to the last of the answer. After it the group waits and
    is asked for again."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """How long the server may take to load its model and answer."""
