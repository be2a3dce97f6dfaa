"""Every kind of objective that comes with this package, by the name that settings give it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.objectives.base import Objective
from trainer.objectives.config import ObjectiveConfig, own_objective
from trainer.objectives.log_ratio import IW_OPD, OPD, POWER_OPD, SG_OPD, VOPD
from trainer.objectives.paths import SCOPE
from trainer.objectives.rewards import GRPO, KD, KDRL, RFT, TGOPD
from trainer.objectives.selection import OPSA, TA_OPD
from trainer.objectives.uncertainty import EOPD, SRPO

_KINDS: Mapping[str, Objective[Any]] = {
    one.settings.model_fields["kind"].default: one
    for one in (
        SCOPE, OPD, GRPO, RFT, KDRL, KD,
        POWER_OPD, IW_OPD, SG_OPD, VOPD, TA_OPD, OPSA, TGOPD, EOPD, SRPO,
    )
}  # fmt: skip


def objective(config: ObjectiveConfig) -> Objective[Any]:
    """The objective whose settings these are."""
    chosen: Objective[Any] = _KINDS.get(config.kind) or own_objective(config.kind)
    return chosen.under(config) if chosen.under else chosen
