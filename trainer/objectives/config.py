"""Settings of the objectives, one class a kind. Imports pydantic only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any, Literal, Self, TypeAlias

from pydantic import Field, ModelWrapValidatorHandler, field_validator, model_validator

from services.config import Config

Divergence: TypeAlias = Literal["forward_kl", "reverse_kl", "jsd"]


class ObjectiveConfig(Config):
    """What is learned from a scored group: the settings of every objective. `kind` chooses the
    class that reads them, which adds its own."""

    kind: str
    """One of `OBJECTIVES`, or "package.module:NAME" of your own (docs/objectives.md)."""
    normalization: Literal["paper", "released"] = "paper"
    """Weights of a path sum to 1 (paper) or have mean 1 (the authors' released code)."""
    is_ratio_cap: float = Field(default=2.0, gt=0)
    """Truncation of the importance ratio ρ to the policy that sampled."""
    aggregation: Literal["group", "token"] = "group"
    """The loss is a mean over prompts (paper) or over the tokens that are trained."""

    @property
    def pull(self) -> Literal["sampled"] | Divergence:
        """What pulls a trajectory towards the teacher: the sampled tokens' log-ratio, or a
        divergence over the most likely tokens."""
        return "sampled"

    @property
    def bound(self) -> float | None:
        """Bound in nats on |log π_T − log π_S| of one token; None: there is none."""
        return None

    @property
    def top_tokens(self) -> int:
        """At how many tokens of each place student and teacher are compared."""
        return 0

    @property
    def student_top(self) -> int:
        """How many of the student's most likely tokens are needed at each place, with what the
        teacher says of them."""
        return 0

    @property
    def teacher_top(self) -> int:
        """How many of the teacher's most likely tokens are needed at each place."""
        return self.top_tokens - self.student_top

    @property
    def teacher_entropy(self) -> bool:
        """Whether the teacher's entropy over the vocabulary is needed at each place."""
        return False

    @classmethod
    def class_for(cls, raw: object) -> type[ObjectiveConfig]:
        """The settings of the kind that `raw` names; this class where there is no such kind."""
        if cls is not ObjectiveConfig or not isinstance(raw, Mapping):
            return cls
        kind = raw.get("kind", "scope")
        settings = OBJECTIVES.get(kind)
        if settings is None and _is_own(kind):
            with suppress(ImportError, AttributeError, TypeError):
                settings = own_objective(kind).settings
        return settings or cls

    @model_validator(mode="wrap")
    @classmethod
    def _of_its_kind(cls, raw: Any, handler: ModelWrapValidatorHandler[Self]) -> Any:
        if isinstance(raw, Mapping):
            if cls is ObjectiveConfig:
                _Kind.model_validate({"kind": raw.get("kind", "scope")})
            chosen = cls.class_for(raw)
            chosen._refuse_others(raw)
            if chosen is not cls:
                return chosen.model_validate(raw)
        return handler(raw)

    @classmethod
    def _refuse_others(cls, raw: Mapping[str, Any]) -> None:
        """Names the kinds that have a setting which this one does not."""
        for key in raw:
            having = [kind for kind, one in OBJECTIVES.items() if key in one.model_fields]
            if having and key not in cls.model_fields:
                kind = raw.get("kind") or cls.model_fields["kind"].default
                raise ValueError(f"{key} is a setting of {' and '.join(having)}, not of {kind}")


class LogRatioConfig(ObjectiveConfig):
    """Of one that reads the log-ratio of sampled tokens to the teacher."""

    log_ratio_bound: float | None = Field(default=None, gt=0)
    """Bound in nats on |log π_T − log π_S| of one token; None follows the paper."""

    @property
    def bound(self) -> float | None:
        """The setting."""
        return self.log_ratio_bound


class TopTokensConfig(ObjectiveConfig):
    """Of one that compares student and teacher at the `top_k` most likely tokens and, as one more
    outcome, all others."""

    top_k: int = Field(default=32, ge=1)
    top_k_of: Literal["teacher", "student"] = "teacher"
    """Whose most likely tokens these are. The student's are those of the weights that sampled, and
    the teacher is asked to score them."""

    @property
    def top_tokens(self) -> int:
        """The setting."""
        return self.top_k

    @property
    def student_top(self) -> int:
        """All or none, by the setting."""
        return self.top_tokens if self.top_k_of == "student" else 0


class TaughtConfig(LogRatioConfig, TopTokensConfig):
    """Of one that pulls trajectories towards the teacher, in whichever way the settings say."""

    divergence: Literal["sampled"] | Divergence = "sampled"
    """What pulls a trajectory towards the teacher: the sampled tokens' log-ratio (paper), or a
    divergence over the `top_k` most likely tokens and all others together, which has less noise
    and asks more of the teacher. `log_ratio_bound` is of the sampled one only."""

    @property
    def pull(self) -> Literal["sampled"] | Divergence:
        """The setting."""
        return self.divergence

    @property
    def top_tokens(self) -> int:
        """None where the sampled tokens are all that is read."""
        return 0 if self.divergence == "sampled" else self.top_k


class ScopeConfig(TaughtConfig):
    """SCOPE. Names follow the authors' README; the defaults follow the paper."""

    kind: Literal["scope"] = "scope"
    tau: float = Field(default=1.0, gt=0)
    """Temperature of both paths' weights: small sharpens, large flattens."""
    use_dual_path_weighting: bool = True
    """False: no routing by correctness; every trajectory takes the teacher path."""
    use_seq_weights: bool = True
    """False: uniform weights in both paths."""
    use_student_path_weights: bool = True
    use_teacher_path_weights: bool = True
    student_path_ppl_positive: bool = True
    """True: a correct trajectory that surprises the student weighs more."""
    teacher_path_ppl_positive: bool = False
    """False: an incorrect trajectory that surprises the teacher weighs less."""
    first_error: float | None = Field(default=None, ge=0)
    """Nats by which the teacher must find a token less likely than the student for it to be wrong:
    the teacher path of a trajectory starts at its first such token. None: at its beginning."""


class OpdConfig(TaughtConfig):
    """On-policy distillation."""

    kind: Literal["opd"] = "opd"


class GrpoConfig(ObjectiveConfig):
    """GRPO, without a teacher."""

    kind: Literal["grpo"] = "grpo"


class RftConfig(ObjectiveConfig):
    """Rejection-sampling fine-tuning."""

    kind: Literal["rft"] = "rft"


class KdrlConfig(TaughtConfig):
    """GRPO and on-policy distillation together."""

    kind: Literal["kdrl"] = "kdrl"
    kl_coef: float = Field(default=1.0, gt=0)
    """The weight of the reverse KL beside the group-normalised reward."""


class KdConfig(ObjectiveConfig):
    """Sequence-level distillation on the teacher's own samples."""

    kind: Literal["kd"] = "kd"


class PowerOpdConfig(ObjectiveConfig):
    """PowerOPD: a bounded advantage."""

    kind: Literal["power_opd"] = "power_opd"
    alpha: float = Field(default=1.0, gt=0)
    """The power. A large one listens to likely tokens only; the paper tries 0.1 to 500."""


class IwOpdConfig(LogRatioConfig):
    """IW-OPD: early tokens weigh more."""

    kind: Literal["iw_opd"] = "iw_opd"
    gamma: float = Field(default=0.5, ge=0)
    """What the first token weighs more than the last."""


class SgOpdConfig(LogRatioConfig):
    """SG-OPD: the verdict says how far a token's log-ratio is trusted."""

    kind: Literal["sg_opd"] = "sg_opd"
    agree: float = Field(default=1.8, ge=1)
    """Factor of a log-ratio whose sign is that of the verdict."""
    disagree: float = Field(default=1.0, ge=0, le=1)
    """Factor of the others."""


class VopdConfig(LogRatioConfig, TopTokensConfig):
    """vOPD: the log-ratio without its expectation."""

    kind: Literal["vopd"] = "vopd"
    top_k_of: Literal["teacher", "student"] = "student"


class TaOpdConfig(LogRatioConfig):
    """TA-OPD: the most teachable tokens only."""

    kind: Literal["ta_opd"] = "ta_opd"
    top_k: int = Field(default=16, ge=1)
    """How many of the student's most likely tokens student and teacher are compared at."""
    fraction: float = Field(default=0.05, gt=0, le=1)
    """Of each trajectory's tokens."""

    @property
    def top_tokens(self) -> int:
        """The setting."""
        return self.top_k

    @property
    def student_top(self) -> int:
        """All of them."""
        return self.top_k


class OpsaConfig(ObjectiveConfig):
    """OPSA: unlikely tokens become less likely, and nobody teaches."""

    kind: Literal["opsa"] = "opsa"
    fraction: float = Field(default=0.2, gt=0, le=1)
    """Of each trajectory's tokens: the least likely."""
    strength: float = Field(default=0.5, gt=0)
    """Their advantage, negated."""


class TgopdConfig(LogRatioConfig):
    """TGOPD: a teacher for prompts on which it is reliable, GRPO for the others."""

    kind: Literal["tgopd"] = "tgopd"
    margin: float = 0.0
    """Nats a token by which the teacher must find correct answers likelier than incorrect ones."""


class EntropyConfig(TopTokensConfig):
    """Of one that asks how certain the teacher is."""

    entropy: Literal["vocabulary", "top_k"] = "vocabulary"
    """What the teacher's entropy is over. `top_k`: its most likely tokens and, as one, all others,
    which every server can tell; at most that over the vocabulary."""

    @property
    def teacher_entropy(self) -> bool:
        """Whether the teacher's entropy over the vocabulary is needed at each place."""
        return self.entropy == "vocabulary"


class EopdConfig(LogRatioConfig, EntropyConfig):
    """EOPD: what an uncertain teacher would say is learned as a whole."""

    kind: Literal["eopd"] = "eopd"
    entropy_threshold: float = Field(default=0.8, ge=0)
    """Nats of the teacher from which on the forward KL is added."""
    entropy_width: float | None = Field(default=None, gt=0)
    """Nats over which it sets in: its weight is sigmoid((H − threshold) / width). None: at once."""

    @property
    def pull(self) -> Divergence:
        """Beside the log-ratio."""
        return "forward_kl"


class SrpoConfig(EntropyConfig):
    """SRPO: GRPO on the correct, distillation by a certain teacher on the incorrect."""

    kind: Literal["srpo"] = "srpo"
    divergence: Divergence = "reverse_kl"
    beta: float = Field(default=1.0, ge=0)
    """How strongly the teacher's entropy lowers a token's weight; 0: not at all."""

    @property
    def pull(self) -> Divergence:
        """The setting."""
        return self.divergence


OBJECTIVES: Mapping[str, type[ObjectiveConfig]] = {
    one.model_fields["kind"].default: one
    for one in (
        ScopeConfig, OpdConfig, GrpoConfig, RftConfig, KdrlConfig, KdConfig,
        PowerOpdConfig, IwOpdConfig, SgOpdConfig, VopdConfig, TaOpdConfig, OpsaConfig, TgopdConfig,
        EopdConfig, SrpoConfig,
    )
}  # fmt: skip
"""The settings of each kind that comes with this package."""


class _Kind(Config):
    """What is said of a kind that does not exist stands under its key."""

    kind: str

    @field_validator("kind")
    @classmethod
    def _exists(cls, kind: str) -> str:
        if kind in OBJECTIVES:
            return kind
        if not _is_own(kind):
            raise ValueError(
                f"must be one of {', '.join(OBJECTIVES)}, or package.module:NAME of your own, "
                f"not {kind!r}"
            )
        try:
            own_objective(kind)
        except (ImportError, AttributeError, TypeError) as error:
            raise ValueError(f"{kind!r}: {error}") from error
        return kind


def _is_own(kind: object) -> bool:
    return isinstance(kind, str) and bool(re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", kind))


def own_objective(kind: str) -> Any:
    """The `trainer.objectives.base.Objective` that "package.module:NAME" names, imported.

    Raises:
        ImportError, AttributeError: there is none of that name.
        TypeError: it is something else.
    """
    module, _, name = kind.partition(":")
    objective = getattr(import_module(module), name)
    settings = getattr(objective, "settings", None)
    if not (isinstance(settings, type) and issubclass(settings, ObjectiveConfig)):
        raise TypeError("it is not an Objective with a class of settings")
    return objective
