"""Who works in a run, and what the workers are told: derived from the table, for any row in it."""

from __future__ import annotations

import pytest

from deploy.config import ConfigError, OwnStep, RunConfig, load
from deploy.crew import Crew
from deploy.roles import own_settings, roles, settings, worker_class
from rollout.own_weights import OwnWeights
from rollout.worker import RolloutSettings
from services.config import StageConfig, WorkersConfig
from services.pipeline import EVAL, PIPELINE, TRAIN, Pipeline, Step
from services.stage import Connection
from tests.deploy.conftest import ROOT
from tests.deploy.filters import Filter, FilterSettings
from verifier.config import VerifierConfig

DEMO = ROOT / "deploy/runs/demo.yaml"
FILTER = Step("filter", "", "filter_out", "tests.deploy.filters:Filter")
WEIGHTS = OwnWeights("nowhere")


class FilterSection(WorkersConfig):
    """As a room's own config: its settings and how many workers there are."""

    every: int = 3


class WithFilter(RunConfig):
    """A run of a house with one row more in its table, and a section for it."""

    filter: FilterSection = FilterSection(workers=2)

    @property
    def pipeline(self) -> Pipeline:
        return PIPELINE.with_steps([("verifier", FILTER)])


def test_a_new_row_is_told_its_section() -> None:
    config = WithFilter.model_validate(load(DEMO).model_dump())
    (role,) = [role for role in roles(config) if role.name == "filter"]
    assert (role.workers, role.lanes) == (2, (TRAIN,))
    assert settings(config, role, WEIGHTS, {}) == FilterSection(workers=2)


def test_each_worker_is_told_what_it_takes() -> None:
    config = load(
        DEMO, ["steps=[{name: filter, after: rollout, worker: 'tests.deploy.filters:Filter'}]"]
    )
    told = {role.name: settings(config, role, WEIGHTS, {}) for role in roles(config)}
    assert [*told] == ["rollout", "filter", "verifier", "teacher"]
    for role in roles(config):
        assert isinstance(told[role.name], worker_class(role.step).settings_class)
    assert told["filter"] == FilterSettings(every=3)
    assert told["verifier"] == config.verifier


def test_settings_of_other_workers_are_refused_before_any_starts() -> None:
    crew = Crew(Connection("redis://nowhere", "wrong", StageConfig()), print)
    (rollout, *_) = roles(load(DEMO))
    with pytest.raises(TypeError, match="rollout take RolloutSettings and were given VerifierConf"):
        crew.staff(rollout, VerifierConfig(kinds={}))


def test_settings_of_one_s_own_are_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Filter, "settings_class", dict)
    own = OwnStep(name="filter", after="verifier", worker=FILTER.worker)
    with pytest.raises(ConfigError, match="settings_class of filter is dict, which is no"):
        own_settings(own, FILTER)


def test_where_the_teacher_samples_the_student_is_evaluated_by_a_role_of_its_own() -> None:
    config = load(DEMO, ["trainer.objective={kind: kd}", "trainer.max_staleness=0"])
    made = {role.name: role for role in roles(config)}
    assert [*made] == ["rollout", "verifier", "teacher", "evaluation"]
    assert (made["rollout"].lanes, made["evaluation"].lanes) == ((TRAIN,), (EVAL,))
    (teacher,) = config.teachers.values()
    models = {
        name: told.model_path
        for name in ("rollout", "evaluation")
        if isinstance(told := settings(config, made[name], WEIGHTS, {}), RolloutSettings)
    }
    assert models == {"rollout": teacher.model, "evaluation": config.student}
