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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table

from deploy.config import ConfigError, RunConfig, called
from deploy.rates import Rates, Work, answers_of, needs_mixed, teachers_of, work_of
from services.pipeline import PIPELINE
from teacher.config import TeacherConfig
from trainer.objectives.kinds import objective

IntArray: TypeAlias = NDArray[Any]
Count: TypeAlias = int | IntArray

ROLES = (*PIPELINE.names, "learner")
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
class Team:
    """The replicas of each teacher that is asked."""

    replicas: tuple[int, ...]
    gpus: float
    token_s: float
    """Seconds a scored token, wherever it goes: the teachers work side by side, each on its share,
    so that of the one that takes longest. 0 where there is nothing to score."""


@dataclass(frozen=True)
class Units:
    """How many of each role there are."""

    rollout: int
    verifier: int
    teachers: tuple[int, ...]
    learner: int


@dataclass(frozen=True)
class RolePlan:
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
    roles: tuple[RolePlan, ...]
    notes: tuple[str, ...]


def as_configured(config: RunConfig) -> Units:
    """The units that the config asks for."""
    return Units(
        config.rollout.workers, config.verifier.workers,
        tuple(one.least_replicas for one in teachers_of(config).values()), config.trainer.ranks,
    )  # fmt: skip


def make(config: RunConfig, rates: Rates, *, gpus: int | None = None, cores: float = 1) -> Plan:
    """The plan of `config` as it stands, or of its best split of `gpus`. `cores` are what the roles
    share where none reserves a GPU.

    Raises:
        ConfigError: a rate is missing or of other hardware, or the roles do not fit.
    """
    notes = _notes(config, rates)
    own = [step.name for step in config.steps if step.resources.gpus]
    if own:
        raise ConfigError(f"steps: no rate is known of {', '.join(own)}, which reserves GPUs")
    if not any([*_gpus(config).values(), *_teacher_gpus(teachers_of(config))]):
        if gpus is not None:
            raise ConfigError("no role of this config reserves a GPU: leave --gpus out")
        return _shared(config, rates, cores, notes)
    _check_rates(config, rates)
    if rates.verifier is None:
        raise _missing("verifier")
    cluster = _Cluster(config, rates)
    units = as_configured(config) if gpus is None else _best(config, cluster, gpus)
    work = cluster.work(units.learner)
    token_s = cluster.team(units.teachers).token_s
    seconds = {
        **cluster.seconds(units.rollout, token_s, units.learner),
        "verifier": work.verdicts / rates.verifier.verdicts_per_s / units.verifier,
    }
    each = [work.scored_tokens * own for own in cluster.token_seconds(units.teachers)]
    times = {role: float(seconds[role]) for role in ROLES}
    return _plan(config, work, _lines(config, units, times, each), times, notes, rates)


# ------------------------------------------------------------------------------------- on GPUs


class _Cluster:
    """Every role on devices of its own."""

    def __init__(self, config: RunConfig, rates: Rates) -> None:
        self.rates = rates
        self._config = config
        self._teachers = teachers_of(config)
        self.steps = config.trainer.max_staleness + 1
        # A prompt goes to one engine: more engines than prompts under way have nothing to do.
        self._most = config.trainer.groups_per_step * self.steps
        # Several ranks need the perplexities in a forward of their own.
        self._works = [work_of(_with_ranks(config, ranks), rates) for ranks in (1, 2)]

    def work(self, ranks: int) -> Work:
        """What a step asks of so many ranks."""
        return self._works[ranks > 1]

    def token_seconds(self, replicas: Sequence[int]) -> list[float]:
        """Of each teacher for a scored token: for the share of it that goes there."""
        if not self.work(1).scored_tokens:
            return [0.0] * len(replicas)
        rates = [self.rates.teachers[name] for name in self._teachers]
        return [
            rate.share / (rate.tokens_per_s * count)
            for rate, count in zip(rates, replicas, strict=True)
        ]

    def team(self, replicas: tuple[int, ...]) -> Team:
        """That of so many replicas of each teacher."""
        each = _teacher_gpus(self._teachers)
        gpus = sum(own * count for own, count in zip(each, replicas, strict=True))
        return Team(replicas, gpus, max(self.token_seconds(replicas), default=0.0))

    def teams(self, fixed: tuple[int, ...], gpus: float) -> list[Team]:
        """All that are worth it on so many GPUs: with one replica more of the teacher that takes
        longest, again and again. `fixed` where no other is of use."""
        each = _teacher_gpus(self._teachers)
        if not self.work(1).scored_tokens or not any(each):
            return [self.team(fixed)]
        # Of what others serve there are as many as there are.
        replicas = [1 if own else count for own, count in zip(each, fixed, strict=True)]
        teams = [self.team(tuple(replicas))]
        while True:
            times = self.token_seconds(replicas)
            slowest = times.index(max(times))
            if not each[slowest] or teams[-1].gpus + each[slowest] > gpus + 1e-9:
                return teams
            replicas[slowest] += 1
            teams.append(self.team(tuple(replicas)))

    def seconds(self, rollout: Count, token_s: Any, learner: int) -> dict[str, Any]:
        """Of a step, for each role that needs GPUs, with a team of `token_s`; it and the count
        may be arrays."""
        rates, work = self.rates, self.work(learner)
        assert rates.rollout and rates.learner
        engines = np.minimum(rollout, self._most)
        each = rates.rollout.tokens_per_s_of(answers_of(self._config, engines))
        sampling = work.sampled_tokens / (each * engines)
        if rates.rollout.token_s and rates.workload.longest_tokens:
            alone = rates.workload.longest_tokens * rates.rollout.token_s
            sampling = np.maximum(sampling, alone)
        learning = work.learned_tokens / (rates.learner.tokens_per_s * learner)
        return {
            "rollout": sampling,
            "teacher": work.scored_tokens * token_s + 0.0 * sampling,
            "learner": learning + rates.learner.step_s,
        }

    def step_s(self, rollout: Count, token_s: Any, learner: int) -> Any:
        """Seconds a step, with as many verifiers as keep judging well below the slowest."""
        sampling, scoring, learning = self.seconds(rollout, token_s, learner).values()
        slowest = np.maximum(np.maximum(sampling, scoring), learning)
        together = sampling + scoring + learning + _VERIFIER_SHARE * slowest
        return np.maximum(slowest, together / self.steps)

    def judges(self, rollout: int, token_s: float, learner: int) -> int:
        """How many verifiers that takes."""
        assert self.rates.verifier
        slowest = float(max(self.seconds(rollout, token_s, learner).values()))
        one = self.work(learner).verdicts / self.rates.verifier.verdicts_per_s
        return math.ceil(one / (_VERIFIER_SHARE * slowest))


def _best(config: RunConfig, cluster: _Cluster, gpus: int) -> Units:
    """The fastest split; of equally fast ones that with the fewest GPUs."""
    best = _fastest(config, cluster, gpus)
    if best is None:
        each = _gpus(config)
        teachers = teachers_of(config)
        each |= {
            called(name): own for name, own in zip(teachers, _teacher_gpus(teachers), strict=True)
        }
        parts = ", ".join(f"{name} {own:g}" for name, own in each.items() if own)
        raise ConfigError(f"{gpus} GPUs are fewer than one of each role asks for: {parts}")
    enough = best[0] * _SPARE
    # The more GPUs the faster, or as fast: so the fewest that will do are found by bisection.
    fewest = bisect.bisect_left(
        range(1, gpus),
        True,
        key=lambda some: (_fastest(config, cluster, some) or (math.inf,))[0] <= enough,
    )
    best = _fastest(config, cluster, fewest + 1)
    assert best is not None
    _, engines, ranks, team = best
    return Units(engines, cluster.judges(engines, team.token_s, ranks), team.replicas, ranks)


def _fastest(
    config: RunConfig, cluster: _Cluster, gpus: int
) -> tuple[float, int, int, Team] | None:
    """Seconds a step, engines, ranks and teachers; None where not one of each has room."""
    teams = cluster.teams(as_configured(config).teachers, gpus)
    taken, token_s = (np.array([getattr(t, name) for t in teams]) for name in ("gpus", "token_s"))
    return min(
        (
            (float(times[index]), int(engines[index]), ranks, teams[which[index]])
            for engines, which, ranks in _splits(config, gpus, taken)
            for times in [cluster.step_s(engines, token_s[which], ranks)]
            for index in [int(np.argmin(times))]
        ),
        default=None,
        key=lambda split: split[:3],
    )


def _splits(
    config: RunConfig, gpus: int, teams: IntArray
) -> Iterator[tuple[IntArray, IntArray, int]]:
    """For every number of ranks, engines and the places of `teams` (by their GPUs) that fill the
    GPUs."""
    each, fixed = _gpus(config), as_configured(config)
    learner, rollout = each["learner"], each["rollout"]
    for ranks in range(1, _fit(gpus, learner) + 1) if learner else (fixed.learner,):
        rest = gpus - ranks * learner - teams
        engines = np.floor(rest / rollout + 1e-9) if rollout else 0 * rest + fixed.rollout
        fits = (engines >= 1) & (rest >= -1e-9)
        if fits.any():
            yield engines[fits], np.flatnonzero(fits), ranks


def _fit(gpus: float, each: float) -> int:
    return math.floor(gpus / each + 1e-9)


def _gpus(config: RunConfig) -> dict[str, float]:
    """Of one unit of each role but the teachers."""
    return {
        "rollout": config.rollout.resources.gpus,
        "verifier": config.verifier.resources.gpus,
        "learner": config.trainer.resources.gpus,
    }


def _teacher_gpus(teachers: Mapping[str, TeacherConfig]) -> list[float]:
    """Of one replica of each; none of what others serve."""
    return [0.0 if one.endpoints else one.resources.gpus for one in teachers.values()]


def _with_ranks(config: RunConfig, ranks: int) -> RunConfig:
    trainer = config.trainer.model_copy(update={"ranks": ranks})
    return config.model_copy(update={"trainer": trainer})


# ---------------------------------------------------------------------------- on shared cores


def _shared(config: RunConfig, rates: Rates, cores: float, notes: list[str]) -> Plan:
    """All roles on the cores of one machine."""
    if (cpu := rates.cpu) is None:
        raise _missing("cpu")
    work, units, teachers = work_of(config, rates), as_configured(config), teachers_of(config)
    scoring = 0.0
    if work.scored_tokens:
        if cpu.teacher_token_s is None:
            raise _missing("teacher")
        _check_names(teachers, rates)
        scoring = work.scored_tokens * cpu.teacher_token_s
    sampling = work.sampled_tokens * cpu.rollout_token_s
    if engine := rates.rollout:
        answers = answers_of(config, units.rollout)
        sampling *= float(engine.tokens_per_s / engine.tokens_per_s_of(answers))
    used = {
        "rollout": sampling,
        "verifier": work.verdicts * cpu.verdict_s,
        "teacher": scoring,
        "learner": work.learned_tokens * cpu.learner_token_s + cpu.learner_step_s,
    }
    threads = {
        "rollout": units.rollout * (config.rollout.torch_threads or cores),
        "verifier": units.verifier * config.verifier.judges,
        "teacher": sum(
            count * max(1, int(one.resources.cpus))
            for count, one in zip(units.teachers, teachers.values(), strict=True)
        ),
        "learner": units.learner * (config.trainer.torch_threads or cores),
    }
    seconds = {role: used[role] / (min(threads[role], cores) or 1) for role in ROLES}
    free = cores - cpu.other_cores
    if free <= 0:
        raise ConfigError(f"what is no role's takes {cpu.other_cores:.2g} of the cores alone")
    # Whose process is which teacher's is not known: all of them are one line.
    lines = _lines(config, units, seconds, [])
    return _plan(config, work, lines, seconds, notes, rates, least=sum(used.values()) / free)


# -------------------------------------------------------------------------------------- both


Line: TypeAlias = tuple[str, int, float, float]
"""RolePlan, units, GPUs of one and seconds of a step."""


def _lines(
    config: RunConfig, units: Units, seconds: dict[str, float], teachers: list[float]
) -> list[Line]:
    """A line for each role. Where there are several teachers and the time of each is known, one
    for each of them."""
    named, gpus = teachers_of(config), _gpus(config)
    each = _teacher_gpus(named)
    if len(teachers) > 1:
        scoring = [*zip(map(called, named), units.teachers, each, teachers, strict=True)]
    else:
        scoring = [("teacher", sum(units.teachers), max(each, default=0.0), seconds["teacher"])]
    lines = {role: (role, getattr(units, role), gpus[role], seconds[role]) for role in gpus}
    return [lines["rollout"], lines["verifier"], *scoring, lines["learner"]]


def _period(seconds: dict[str, float], steps: int) -> float:
    return max(max(seconds.values()), sum(seconds.values()) / steps)


def _plan(
    config: RunConfig, work: Work, lines: list[Line], seconds: dict[str, float],
    notes: list[str], rates: Rates, least: float = 0.0,
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
    roles = tuple(
        RolePlan(name, count, count * each, own_s, own_s / step_s)
        for name, count, each, own_s in lines
    )
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
    for role in ("rollout", "learner"):
        if (rate := getattr(rates, role)) is None:
            raise _missing(role)
        _check_size(role, role, rate.gpus, _gpus(config)[role])
    if not work_of(config, rates).scored_tokens:
        return
    teachers = teachers_of(config)
    _check_names(teachers, rates)
    for name, one in teachers.items():
        if name not in rates.teachers:
            raise _missing("teacher", called(name))
        if not one.endpoints:
            measured = rates.teachers[name].gpus
            _check_size("teacher", called(name), measured, one.resources.gpus)


def _check_size(role: str, name: str, measured: float, gpus: float) -> None:
    if measured != gpus:
        raise ConfigError(
            f"the rate of {name} was measured with {measured:g} GPUs and the config gives "
            f"each {gpus:g}: measure that with {_MEASURES[role]}"
        )


def _check_names(teachers: Mapping[str, TeacherConfig], rates: Rates) -> None:
    """Shares are of all teachers that were measured: of others they would be wrong."""
    gone = [called(name) for name in rates.teachers if name not in teachers]
    if gone:
        raise ConfigError(
            f"the rates are also of {', '.join(gone)}, which this config does not have: measure "
            f"with the teachers that it has"
        )


def _missing(role: str, name: str | None = None) -> ConfigError:
    what = "processor seconds" if role == "cpu" else f"rate of the {name or role}"
    return ConfigError(f"there is no {what}: {_MEASURES[role]} measures it")


def _notes(config: RunConfig, rates: Rates) -> list[str]:
    """What the reader must know to believe it."""
    load, notes = rates.workload, list[str]()
    if needs_mixed(config) and load.mixed is None:
        notes.append(
            f"{config.trainer.objective.kind} learns only from groups with correct and incorrect "
            f"answers, and workload.mixed, their fraction, was not measured: the learner's time "
            f"is as though all were such"
        )
    if objective(config.trainer.objective).teacher == "incorrect" and not load.incorrect:
        notes.append(
            "no answer was incorrect when the rates were measured: the teacher is taken to have "
            "nothing to do"
        )
    if config.steps:
        own = ", ".join(step.name for step in config.steps)
        notes.append(
            f"no rate is known of {own} (steps): taken to keep up, and what it uses of shared "
            f"cores is counted as it was measured"
        )
    if any(one.autoscale for one in teachers_of(config).values()):
        notes.append("a teacher that scales itself (autoscale) counts with its fewest replicas")
    if load.longest_tokens and load.longest_tokens > config.sampling.max_tokens:
        notes.append(
            f"answers of up to {load.longest_tokens:,.0f} tokens were measured and "
            f"sampling.max_tokens is {config.sampling.max_tokens:,}: they would be shorter"
        )
    if any(_gpus(config).values()) and rates.rollout and rates.rollout.token_s is None:
        notes.append(
            "rollout.token_s was not measured: with many engines the longest answer limits a step, "
            "and the plan does not know it (`python -m benchmarks.engines` with one prompt)"
        )
    return notes


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
