"""What ended a run, in one sentence, and whether it can be continued as it is."""

from __future__ import annotations

from ray.exceptions import RayError, RayTaskError
from ray.train import TrainingFailedError
from redis.exceptions import RedisError

from services.errors import PatienceExceeded, ScopeError, Unavailable, WorkerDied

_PASSING = (Unavailable, PatienceExceeded, WorkerDied, RedisError, RayError, OSError)


def learner_cause(error: TrainingFailedError) -> BaseException:
    """What the code of a rank raised, which Ray Train wraps; else that one died."""
    failures = getattr(error, "worker_failures", {}).values()
    raised = [failure._base_exc for failure in failures if hasattr(failure, "_base_exc")]
    return raised[0] if raised else WorkerDied(_last_line(error))


def passes(error: BaseException) -> bool:
    """Whether the same run may fare better when it is continued: what was away or full may be
    back, and what died starts anew. A fault of code, settings or data is met again."""
    if isinstance(error, RayTaskError):
        return passes(error.cause)
    return isinstance(error, _PASSING)


def sentence(error: BaseException) -> str:
    """Its message; of what is none of ours its kind too, which often says more."""
    kind = "" if isinstance(error, ScopeError) else f"{type(error).__name__}: "
    return kind + _last_line(error)


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
