"""Settings of the verifier. Imports pydantic only, so that the CLI starts at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from services.config import Config, SandboxLevel, WorkersConfig

# "package.module:function" is a domain of its own, see docs/verifier.md.
Kind: TypeAlias = Annotated[str, Field(pattern=r"^(exact|math|code|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$")]
AnswerFrom: TypeAlias = Literal["boxed", "hashes", "final_line"]
Overlong: TypeAlias = Literal["incorrect", "mask"]


class CodeConfig(Config):
    """How untrusted programs are run. A reference may ask for less time or memory, not for more."""

    sandbox: SandboxLevel = "bubblewrap"
    """What confines them. It is never exchanged for something weaker: see docs/verifier.md."""
    python: Path | None = None
    """The interpreter that runs them, with the packages that it has; None takes the verifier's
    own without its packages."""
    programs: int = Field(default=1, ge=1)
    """How many of one worker's programs run at once."""
    time_s: float = Field(default=10.0, gt=0)
    """Processor seconds of one test case. docs/verifier.md says how long that may take."""
    memory_mb: int = Field(default=1024, ge=64)
    """Address space of a program, in MiB."""
    disk_mb: int = Field(default=16, ge=1)
    """Size of a program's private /tmp, in MiB."""
    output_mb: int = Field(default=8, ge=1)
    """A program that prints more, in MiB, is killed."""


class VerifierConfig(WorkersConfig):
    """Who judges the trajectories, and within which limits."""

    capacity: int = Field(default=4, ge=1)
    """Groups that one worker holds at once."""
    kind: Kind = "math"
    """`exact` compares text, `math` mathematical expressions; `code` runs programs on tests.
    "package.module:function" is a function (completion, reference) -> Verdict of your own."""
    kinds: dict[str, Kind] = Field(default_factory=dict)
    """Another kind for some data sources: `data_source: kind`."""
    answer_from: AnswerFrom = "boxed"
    r"""For `math`: the last `\boxed{}`, what follows the last `####`, or the last line."""
    answer_in_thinking: bool = False
    """For `math` and `code`: whether what stands before `</think>`, or in thinking that has not
    ended, is read as well. A completion without these tags is read as a whole."""
    require_evaluated: bool = True
    """For `math`: an integral, a sum, a limit or the like where the reference has none is the task
    handed back, and incorrect."""
    answer_marker: str | None = Field(default=None, min_length=1)
    """For `exact`: what follows the last marker is the answer; None takes the whole text."""
    overlong: Overlong = "incorrect"
    """What a truncated trajectory (no end token) is: `incorrect`, or `mask` to leave it out."""
    judges: int = Field(default=1, ge=1)
    """Sandboxed child processes of one worker."""
    deadline_s: float = Field(default=5.0, gt=0)
    """A judge that takes longer for one trajectory is killed. Whatever takes longer than a second
    goes on in a judge that is kept for the slow."""
    cached_verdicts: int = Field(default=65_536, ge=0)
    """How many verdicts one worker remembers, by completion and reference."""
    memory_mb: int = Field(default=1024, ge=256)
    """Address space of one judge, in MiB."""

    code: CodeConfig = CodeConfig()

    @property
    def used_kinds(self) -> frozenset[Kind]:
        """Every kind that a trajectory may need."""
        return frozenset({self.kind, *self.kinds.values()})

    def kind_of(self, data_source: str) -> Kind:
        """Who judges the prompts of `data_source`."""
        return self.kinds.get(data_source, self.kind)

    @model_validator(mode="after")
    def _marker_has_a_use(self) -> Self:
        if self.answer_marker is not None and "exact" not in self.used_kinds:
            raise ValueError("answer_marker is read by kind `exact` only, which nothing here uses")
        return self
