"""`scope plan`: how fast a run would be, what limits it, and how many GPUs each role should get.

A step is G prompts. Stage s works T_s seconds on it with all of its units together. Admission lets
k + 1 steps be under way (k is `trainer.max_staleness`), so a step takes

    max(  slowest T_s,  Σ T_s / (k + 1)  )            on GPUs, each role on its own
    and not less than  Σ processor seconds / cores     where all roles share a machine

With k = 0 the stages add up. Pure arithmetic on measured rates (`deploy.rates`); docs/plan.md says
what it leaves out.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table

from deploy.config import ConfigError, RunConfig
from deploy.rates import Rates, learned_per_trajectory, teacher_of
from trainer.objectives import objective

IntArray: TypeAlias = NDArray[Any]
Count: TypeAlias = int | IntArray

ROLES = ("rollout", "verifier", "teacher", "learner")
_MEASURES = {
    "rollout": "`python -m benchmarks.engines`",
    "verifier": "`python -m benchmarks.verifier`",
    "teacher": "`python -m benchmarks.teacher`",
    "learner": "`python -m benchmarks.learner`",
    "cpu": "a run of some dozen steps on this machine, given as --from RUN_DIR,",
}
_VERIFIER_SHARE = 0.1  # of the slowest stage's time: judges are cheaper than GPUs that wait
_SPARE = 1.001  # a split that is so much slower on fewer GPUs is as good


@dataclass(frozen=True)
class Work:
    """What one step asks of each stage."""

    sampled_tokens: float
    verdicts: float
    scored_tokens: float
    """Prompts and completions that the teacher reads."""
    learned_tokens: float
    """Prompts and completions through forward and backward, or their worth."""
    trained_tokens: float
    """Completions alone, as `tokens/trained` counts."""


@dataclass(frozen=True)
class Units:
    """How many of each role there are."""

    rollout: int
    verifier: int
    teacher: int
    learner: int


@dataclass(frozen=True)
class Role:
    """One line of a plan: `seconds` of a step that the role works, `busy` of the time."""

    name: str
    units: int
    gpus: float
    seconds: float
    busy: float


@dataclass(frozen=True)
class Plan:
    """What would be."""

    step_s: float
    steps_per_hour: float
    trained_tokens_per_s: float
    limit: str
    gpus: float
    roles: tuple[Role, ...]
    notes: tuple[str, ...]


def work_of(config: RunConfig, rates: Rates) -> Work:
    """What a step of `config` asks, if its trajectories are like those that were measured.

    Raises:
        ConfigError: the rates are of other samples.
    """
    chosen, load = objective(config.trainer.objective), rates.workload
    if chosen.sampler != rates.sampler:
        raise ConfigError(
            f"{config.trainer.objective.kind} samples from the {chosen.sampler} and the rates are "
            f"of samples from the {rates.sampler}: measure with the same objective"
        )
    trajectories = config.trainer.groups_per_step * config.sampling.n
    known = load.correct + load.incorrect
    incorrect_tokens = load.incorrect_tokens or load.completion_tokens
    scored = {
        "none": 0.0,
        "incorrect": load.incorrect * (load.prompt_tokens + incorrect_tokens),
        "all": known * (load.prompt_tokens + load.completion_tokens),
    }[chosen.teacher]
    return Work(
        sampled_tokens=trajectories * load.completion_tokens,
        verdicts=trajectories,
        scored_tokens=trajectories * scored,
        learned_tokens=trajectories * learned_per_trajectory(config, load),
        trained_tokens=trajectories * known * load.completion_tokens,
    )


def as_configured(config: RunConfig) -> Units:
    """The units that the config asks for."""
    return Units(
        config.rollout.workers, config.verifier.workers, teacher_of(config).replicas,
        config.trainer.ranks,
    )  # fmt: skip


def make(config: RunConfig, rates: Rates, *, gpus: int | None = None, cores: float = 1) -> Plan:
    """The plan of `config` as it stands, or of its best split of `gpus`. `cores` are what the roles
    share where none reserves a GPU.

    Raises:
        ConfigError: a rate is missing or of other hardware, or the roles do not fit.
    """
    notes = _notes(config, rates)
    if not any(_gpus(config).values()):
        if gpus is not None:
            raise ConfigError("no role of this config reserves a GPU: leave --gpus out")
        return _shared(config, rates, cores, notes)
    _check_rates(config, rates)
    if rates.verifier is None:
        raise _missing("verifier")
    cluster = _Cluster(config, rates)
    units = as_configured(config) if gpus is None else _best(config, cluster, gpus)
    judging = cluster.work(units.learner).verdicts / rates.verifier.verdicts_per_s
    seconds = {
        **cluster.seconds(units.rollout, units.teacher, units.learner),
        "verifier": judging / units.verifier,
    }
    work = cluster.work(units.learner)
    return _plan(config, work, units, {role: float(seconds[role]) for role in ROLES}, notes, rates)


# ------------------------------------------------------------------------------------- on GPUs


class _Cluster:
    """Every role on devices of its own."""

    def __init__(self, config: RunConfig, rates: Rates) -> None:
        self.rates = rates
        self.steps = config.trainer.max_staleness + 1
        # A prompt goes to one engine: more engines than prompts under way have nothing to do.
        self._most = config.trainer.groups_per_step * self.steps
        # Several ranks need the perplexities in a forward of their own.
        self._works = [work_of(_with_ranks(config, ranks), rates) for ranks in (1, 2)]

    def work(self, ranks: int) -> Work:
        """What a step asks of so many ranks."""
        return self._works[ranks > 1]

    def seconds(self, rollout: Count, teacher: Count, learner: int) -> dict[str, Any]:
        """Of a step, for each role that needs GPUs; counts may be arrays."""
        rates, work = self.rates, self.work(learner)
        assert rates.rollout and rates.learner
        sampling = work.sampled_tokens / (
            rates.rollout.tokens_per_s * np.minimum(rollout, self._most)
        )
        if rates.rollout.token_s and rates.workload.longest_tokens:
            alone = rates.workload.longest_tokens * rates.rollout.token_s
            sampling = np.maximum(sampling, alone)
        scoring: Any = 0.0 * sampling
        if work.scored_tokens:
            assert rates.teacher
            scoring = work.scored_tokens / (rates.teacher.tokens_per_s * teacher)
        learning = work.learned_tokens / (rates.learner.tokens_per_s * learner)
        return {
            "rollout": sampling,
            "teacher": scoring,
            "learner": learning + rates.learner.step_s,
        }

    def step_s(self, rollout: Count, teacher: Count, learner: int) -> Any:
        """Seconds a step, with as many verifiers as keep judging well below the slowest."""
        sampling, scoring, learning = self.seconds(rollout, teacher, learner).values()
        slowest = np.maximum(np.maximum(sampling, scoring), learning)
        together = sampling + scoring + learning + _VERIFIER_SHARE * slowest
        return np.maximum(slowest, together / self.steps)

    def judges(self, rollout: int, teacher: int, learner: int) -> int:
        """How many verifiers that takes."""
        assert self.rates.verifier
        slowest = float(max(self.seconds(rollout, teacher, learner).values()))
        one = self.work(learner).verdicts / self.rates.verifier.verdicts_per_s
        return math.ceil(one / (_VERIFIER_SHARE * slowest))


def _best(config: RunConfig, cluster: _Cluster, gpus: int) -> Units:
    """The fastest split; of equally fast ones that with the fewest GPUs."""
    found = _fastest(config, cluster, gpus)
    if found is None:
        each = _gpus(config)
        parts = ", ".join(f"{name} {each[name]:g}" for name in ROLES if each[name])
        raise ConfigError(f"{gpus} GPUs are fewer than one of each role asks for: {parts}")
    enough = found[0] * _SPARE
    # The more GPUs the faster, or as fast: so the fewest that will do are found by bisection.
    fewest = bisect.bisect_left(
        range(1, gpus),
        True,
        key=lambda some: (_fastest(config, cluster, some) or (math.inf,))[0] <= enough,
    )
    found = _fastest(config, cluster, fewest + 1)
    assert found is not None
    _, engines, replicas, ranks = found
    return Units(engines, cluster.judges(engines, replicas, ranks), replicas, ranks)


def _fastest(config: RunConfig, cluster: _Cluster, gpus: int) -> tuple[float, int, int, int] | None:
    """Seconds a step, engines, replicas and ranks; None where not one of each has room."""
    return min(
        (
            (float(times[place]), int(engines[place]), int(replicas[place]), ranks)
            for engines, replicas, ranks in _splits(config, gpus)
            for times in [cluster.step_s(engines, replicas, ranks)]
            for place in [int(np.argmin(times))]
        ),
        default=None,
    )


def _splits(config: RunConfig, gpus: int) -> Iterator[tuple[IntArray, IntArray, int]]:
    """For every number of ranks, engines and replicas that fill the GPUs."""
    scores, each = objective(config.trainer.objective).teacher != "none", _gpus(config)
    teacher, learner, rollout = each["teacher"], each["learner"], each["rollout"]
    fixed = as_configured(config)
    for ranks in range(1, _fit(gpus, learner) + 1) if learner else (fixed.learner,):
        left = gpus - ranks * learner
        varies = teacher and scores
        replicas = np.arange(1, _fit(left, teacher) + 1) if varies else np.array([fixed.teacher])
        rest = left - replicas * teacher
        engines = np.floor(rest / rollout + 1e-9) if rollout else 0 * rest + fixed.rollout
        fits = (engines >= 1) & (rest >= -1e-9)
        if fits.any():
            yield engines[fits], replicas[fits], ranks


def _fit(gpus: float, each: float) -> int:
    return math.floor(gpus / each + 1e-9)


def _gpus(config: RunConfig) -> dict[str, float]:
    """Of one unit of each role."""
    return {
        "rollout": config.rollout.resources.gpus,
        "verifier": config.verifier.resources.gpus,
        "teacher": 0.0 if teacher_of(config).endpoints else teacher_of(config).resources.gpus,
        "learner": config.trainer.resources.gpus,
    }


def _with_ranks(config: RunConfig, ranks: int) -> RunConfig:
    trainer = config.trainer.model_copy(update={"ranks": ranks})
    return config.model_copy(update={"trainer": trainer})


# ---------------------------------------------------------------------------- on shared cores


def _shared(config: RunConfig, rates: Rates, cores: float, notes: list[str]) -> Plan:
    """All roles on the cores of one machine."""
    if (cpu := rates.cpu) is None:
        raise _missing("cpu")
    work, units = work_of(config, rates), as_configured(config)
    scoring = 0.0
    if work.scored_tokens:
        if cpu.teacher_token_s is None:
            raise _missing("teacher")
        scoring = work.scored_tokens * cpu.teacher_token_s
    used = {
        "rollout": work.sampled_tokens * cpu.rollout_token_s,
        "verifier": work.verdicts * cpu.verdict_s,
        "teacher": scoring,
        "learner": work.learned_tokens * cpu.learner_token_s + cpu.learner_step_s,
    }
    threads = {
        "rollout": units.rollout * (config.rollout.torch_threads or cores),
        "verifier": units.verifier * config.verifier.judges,
        "teacher": units.teacher * max(1, int(teacher_of(config).resources.cpus)),
        "learner": units.learner * (config.trainer.torch_threads or cores),
    }
    seconds = {role: used[role] / min(threads[role], cores) for role in ROLES}
    free = cores - cpu.other_cores
    if free <= 0:
        raise ConfigError(f"driver, Redis and Ray alone take {cpu.other_cores:.2g} of the cores")
    return _plan(config, work, units, seconds, notes, rates, least=sum(used.values()) / free)


# -------------------------------------------------------------------------------------- both


def _period(seconds: dict[str, float], steps: int) -> float:
    return max(max(seconds.values()), sum(seconds.values()) / steps)


def _plan(
    config: RunConfig, work: Work, units: Units, seconds: dict[str, float], notes: list[str],
    rates: Rates, least: float = 0.0,
) -> Plan:  # fmt: skip
    steps = config.trainer.max_staleness + 1
    slowest = max(seconds, key=lambda role: seconds[role])
    step_s = max(_period(seconds, steps), least)
    if step_s == least:
        limit = "the cores, which all roles share"
    elif step_s > seconds[slowest]:
        limit = (
            f"admission: a step takes {sum(seconds.values()):.3g} s from its feed to its end, and "
            f"trainer.max_staleness {config.trainer.max_staleness} lets {steps} be under way; the "
            f"longest part is {slowest}"
        )
    else:
        limit = slowest
    gpus = _gpus(config)
    roles = tuple(
        Role(role, (count := getattr(units, role)), count * gpus[role], seconds[role],
             seconds[role] / step_s)
        for role in ROLES
    )  # fmt: skip
    return Plan(
        step_s=step_s,
        steps_per_hour=3600 / step_s,
        trained_tokens_per_s=work.trained_tokens / step_s,
        limit=limit,
        gpus=sum(role.gpus for role in roles),
        roles=roles,
        notes=(*notes, f"rates: {rates.about}"),
    )


def _check_rates(config: RunConfig, rates: Rates) -> None:
    """Every role that works has a rate, of engines as large as the config's."""
    scores = objective(config.trainer.objective).teacher != "none"
    for role, gpus in _gpus(config).items():
        if role == "verifier" or (role == "teacher" and not scores):
            continue
        rate = getattr(rates, role)
        if rate is None:
            raise _missing(role)
        if rate.gpus != gpus and not (role == "teacher" and teacher_of(config).endpoints):
            raise ConfigError(
                f"the rate of {role} was measured with {rate.gpus:g} GPUs and the config gives "
                f"each {gpus:g}: measure that with {_MEASURES[role]}"
            )


def _missing(role: str) -> ConfigError:
    what = "processor seconds" if role == "cpu" else f"rate of the {role}"
    return ConfigError(f"there is no {what}: {_MEASURES[role]} measures it")


def _notes(config: RunConfig, rates: Rates) -> list[str]:
    """What the reader must know to believe it."""
    load, found = rates.workload, []
    if load.longest_tokens and load.longest_tokens > config.sampling.max_tokens:
        found.append(
            f"answers of up to {load.longest_tokens:,.0f} tokens were measured and "
            f"sampling.max_tokens is {config.sampling.max_tokens:,}: they would be shorter"
        )
    if any(_gpus(config).values()) and rates.rollout and rates.rollout.token_s is None:
        found.append(
            "rollout.token_s was not measured: with many engines the longest answer limits a step, "
            "and the plan does not know it (`python -m benchmarks.engines` with one prompt)"
        )
    return found


# ------------------------------------------------------------------------------------ shown


def render(plan: Plan) -> Group:
    """The plan as a table and some lines."""
    table = Table()
    for heading in ("role", "units", "GPUs", "seconds a step", "busy"):
        table.add_column(heading, justify="left" if heading == "role" else "right")
    for role in plan.roles:
        table.add_row(
            role.name,
            f"{role.units:,}",
            f"{role.gpus:g}",
            f"{role.seconds:.3g}",
            f"{role.busy:.0%}",
        )
    return Group(
        table,
        f"a step takes {plan.step_s:.3g} s: {plan.steps_per_hour:,.0f} steps an hour, "
        f"{plan.trained_tokens_per_s:,.0f} trained tokens/s on {plan.gpus:g} GPUs",
        f"limited by {plan.limit}",
        *(f"note: {note}" for note in plan.notes),
    )


def as_json(plan: Plan, rates: Rates) -> dict[str, Any]:
    """The plan; its `rates` are a rates file of their own."""
    return {**asdict(plan), "rates": rates.model_dump()}
