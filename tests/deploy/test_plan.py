"""`scope plan`, against a simulated pipeline, brute force and figures put in by hand."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy import plan
from deploy.cli import main
from deploy.config import ConfigError, RunConfig, load, load_other
from deploy.rates import Rates, RolloutRate, Workload, learned_of, of_records, of_run, work_of
from services.metrics import read
from tests.deploy.conftest import ROOT
from trainer.objectives.base import SequenceStats, entering
from trainer.objectives.kinds import objective

DEMO, PAPER = ROOT / "deploy/runs/demo.yaml", ROOT / "deploy/runs/qwen3-1.7b.yaml"
RATES = Rates.model_validate(
    {
        "about": "put in by hand",
        "workload": {"prompt_tokens": 100, "completion_tokens": 900, "correct": 0.6,
                     "incorrect": 0.3, "incorrect_tokens": 1900, "longest_tokens": 4000},
        "rollout": {"tokens_per_s": 2000},
        "verifier": {"verdicts_per_s": 50},
        "teachers": {"default": {"tokens_per_s": 8000}},
        "learner": {"tokens_per_s": 6000, "step_s": 5},
    }
)  # fmt: skip


def simulated(seconds: list[float], under_way: int, steps: int = 2000) -> float:
    """Seconds a step of stages that each work on one step at a time, in order, where a step is let
    in when the one `under_way` before it has left."""
    free, left = [0.0] * len(seconds), [0.0] * under_way
    for step in range(steps):
        at = left[step]
        for stage, takes in enumerate(seconds):
            free[stage] = at = max(at, free[stage]) + takes
        left.append(at)
    return (left[-1] - left[-1 - steps // 2]) / (steps // 2)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(0.1, 10.0), min_size=4, max_size=4),
    st.integers(min_value=0, max_value=4),
)
def test_the_rate_is_that_of_a_pipeline_with_so_many_steps_under_way(
    seconds: list[float], staleness: int
) -> None:
    said = plan._period(dict(zip(plan.ROLES, seconds, strict=True)), staleness + 1)
    assert said == pytest.approx(simulated(seconds, staleness + 1), rel=0.01)


def test_what_a_step_asks_of_each_stage() -> None:
    config = load(PAPER, ["trainer.groups_per_step=10", "sampling.n=4"])
    work = work_of(config, RATES)
    assert work.sampled_tokens == 40 * 900
    assert work.verdicts == 40
    assert work.scored_tokens == pytest.approx(40 * 0.3 * 2000)  # incorrect ones only
    # Two ranks: the perplexities of correct answers, of (0.9 · 900 − 0.3 · 1900) / 0.6 = 400
    # tokens, are a forward of their own, a third of all.
    assert work.learned_tokens == pytest.approx(40 * (0.9 * 1000 + 0.6 / 3 * 500))
    assert work.trained_tokens == pytest.approx(40 * 0.9 * 900)
    opd = work_of(load(PAPER, ["trainer.objective.kind=opd"]), RATES)
    assert opd.scored_tokens == pytest.approx(256 * 8 * 0.9 * 1000)


def test_the_limiting_stage_and_the_rate() -> None:
    made = plan.make(load(PAPER, ["trainer.max_staleness=2"]), RATES)
    seconds = {role.name: role.seconds for role in made.roles}
    assert seconds["rollout"] == pytest.approx(256 * 8 * 900 / (4 * 2000))
    assert seconds["teacher"] == pytest.approx(256 * 8 * 0.3 * 2000 / (2 * 8000))
    assert seconds["learner"] == pytest.approx(256 * 8 * (900 + 100) / (2 * 6000) + 5)
    assert made.limit == "rollout"
    assert made.step_s == pytest.approx(seconds["rollout"])
    assert made.trained_tokens_per_s == pytest.approx(256 * 8 * 0.9 * 900 / made.step_s)
    # The default lets two steps be under way, which is too few for stages as even as these.
    made = plan.make(load(PAPER), RATES)
    assert made.step_s == pytest.approx(sum(seconds.values()) / 2)
    assert made.limit.startswith("admission")
    synchronous = plan.make(load(PAPER, ["trainer.max_staleness=0"]), RATES)
    assert synchronous.step_s == pytest.approx(sum(seconds.values()))
    assert synchronous.limit.startswith("admission")


@pytest.mark.parametrize("gpus", [3, 8, 13])
@pytest.mark.parametrize("staleness", [0, 1])
def test_no_other_split_is_faster(gpus: int, staleness: int) -> None:
    config = load(
        PAPER,
        [f"trainer.max_staleness={staleness}", "teacher.resources.gpus=0.5",
         "verifier.workers=100"],
    )  # fmt: skip
    rates = RATES.model_copy(
        update={"teachers": {"default": RATES.teachers["default"].model_copy(update={"gpus": 0.5})}}
    )
    made = plan.make(config, rates, gpus=gpus)
    assert made.gpus <= gpus
    for counts in itertools.product(range(1, gpus + 1), range(1, 2 * gpus + 1), range(1, gpus + 1)):
        rollout, teacher, ranks = counts
        if rollout + teacher / 2 + ranks <= gpus:
            other = plan.make(_with(config, rollout, teacher, ranks), rates)
            assert made.step_s <= other.step_s * 1.05  # which has a hundred judges


def _with(config: RunConfig, rollout: int, teacher: int, ranks: int) -> RunConfig:
    raw = config.model_dump()
    raw["rollout"]["workers"], raw["teachers"]["default"]["replicas"] = rollout, teacher
    raw["trainer"]["ranks"] = ranks
    return RunConfig.model_validate(raw)


def test_gpus_that_change_nothing_are_left_over() -> None:
    """One answer of 4,000 tokens takes its time, however many engines there are."""
    slow = RATES.model_copy(
        update={"rollout": RATES.rollout.model_copy(update={"token_s": 0.02})}  # type: ignore[union-attr]
    )
    made = plan.make(load(PAPER), slow, gpus=1024)
    assert made.limit == "rollout"
    assert made.step_s == pytest.approx(80, rel=0.01)
    assert made.gpus < 40


def test_engines_of_several_gpus_stay_whole() -> None:
    config = load(
        PAPER, ["teacher.resources.gpus=4", "teacher.engine.args={tensor_parallel_size: 4}"]
    )
    with pytest.raises(ConfigError, match="measured with 1 GPUs and the config gives each 4"):
        plan.make(config, RATES, gpus=16)
    rates = RATES.model_copy(
        update={"teachers": {"default": RATES.teachers["default"].model_copy(update={"gpus": 4.0})}}
    )
    made = plan.make(config, rates, gpus=16)
    teacher = next(role for role in made.roles if role.name == "teacher")
    assert teacher.gpus == 4 * teacher.units
    with pytest.raises(ConfigError, match="of each role asks for: rollout 1, learner 1, teacher 4"):
        plan.make(config, rates, gpus=5)


@pytest.mark.parametrize("role", plan.ROLES)
def test_a_missing_rate_is_named_with_what_measures_it(role: str) -> None:
    config = load(PAPER)
    missing: dict[str, Any] = {"teachers": {}} if role == "teacher" else {role: None}
    rates = RATES.model_copy(update=missing)
    with pytest.raises(ConfigError, match=f"rate of the {role}: .*benchmarks.* measures it"):
        plan.make(config, rates)


def test_a_teacher_that_is_not_asked_needs_no_rate() -> None:
    rates = RATES.model_copy(update={"teachers": {}})
    made = plan.make(load(PAPER, ["trainer.objective.kind=grpo"]), rates, gpus=8)
    assert made.roles[2].seconds == 0

    assert made.roles[2].gpus == 0  # it is not even loaded


@pytest.mark.parametrize(
    ("kind", "correct", "incorrect"),
    [("scope", 1, 1), ("opd", 1, 1), ("kdrl", 1, 1), ("rft", 1, 0), ("grpo", 0.25, 0.25)],
)
def test_what_enters_no_loss_is_not_learned(kind: str, correct: float, incorrect: float) -> None:
    load_ = RATES.workload.model_copy(update={"mixed": 0.25})
    rates = RATES.model_copy(update={"workload": load_})
    config = load(
        PAPER,
        [f"trainer.objective.kind={kind}", "trainer.groups_per_step=10", "sampling.n=4",
         *(["trainer.objective.use_student_path_weights=false"] if kind == "scope" else [])],
    )  # fmt: skip
    work = work_of(config, rates)
    assert work.trained_tokens == pytest.approx(40 * (0.6 * correct * 400 + 0.3 * incorrect * 1900))
    assert work.learned_tokens == pytest.approx(40 * (0.6 * correct * 500 + 0.3 * incorrect * 2000))
    unknown = plan.make(config, RATES)  # not how many groups have both verdicts
    assert any("workload.mixed" in note for note in unknown.notes) == (kind == "grpo")
    assert work_of(config, RATES).learned_tokens >= work.learned_tokens


@pytest.mark.parametrize("kind", ["scope", "rft", "grpo", "kdrl", "opd"])
def test_what_is_learned_is_what_a_learner_computes(kind: str) -> None:
    """Tokens of known groups, by the learner's own rule and by the plan's."""
    outcomes = ["cccc", "cccc", "iiii", "ciii", "ccii"]
    correct = torch.tensor([o == "c" for group in outcomes for o in group])
    config = load(PAPER, [f"trainer.objective.kind={kind}", "sampling.n=4"])
    chosen, zeros = config.trainer.objective, torch.zeros(20)
    stats = SequenceStats(torch.arange(5).repeat_interleave(4), correct, ~correct, zeros, zeros)
    computed = entering(objective(chosen), stats, chosen)
    load_ = Workload(prompt_tokens=1, completion_tokens=1, correct=11 / 20, incorrect=9 / 20,
                     mixed=8 / 20)  # fmt: skip
    learned = learned_of(config, load_).trained * 20
    # One fraction for correct and incorrect ones alike: exact where both enter or neither does.
    assert learned == pytest.approx(float(computed.sum()))


@pytest.mark.parametrize("kind", ["scope", "opd"])
def test_a_run_without_an_incorrect_answer_has_rates(kind: str) -> None:
    records = [
        record | {"reward/accuracy": 1.0, "scope/unknown_fraction": 0.0,
                  "response_length/incorrect_mean": math.nan, "teacher/tokens": 0.0,
                  "teacher/asking_s": 0.0}
        for record in _records(12)
    ]  # fmt: skip
    config = load(DEMO)
    rates = of_records(config, records, about="known")
    assert rates.workload.incorrect == 0 and rates.workload.incorrect_tokens is None
    asked = load(DEMO, [f"trainer.objective.kind={kind}"])
    if kind == "opd":
        with pytest.raises(ConfigError, match="no rate of the teacher"):
            plan.make(asked, rates, cores=2)
    else:
        made = plan.make(asked, rates, cores=2)
        assert made.roles[2].seconds == 0
        assert any("no answer was incorrect" in note for note in made.notes)


# ---------------------------------------------------------------------------- several teachers

OTHERS = (
    "teachers={code: {model: m, resources: {gpus: 2}}, chains: {model: c, resources: {gpus: 1}}}"
)
SEVERAL = Rates.model_validate(
    RATES.model_dump()
    | {
        "teachers": {
            "default": {"tokens_per_s": 8000, "share": 0.5},
            "code": {"tokens_per_s": 4000, "gpus": 2, "share": 0.3},
            "chains": {"tokens_per_s": 9000, "share": 0.2},
        },
    }
)


def test_every_teacher_has_its_share_and_the_slowest_limits() -> None:
    made = plan.make(load(PAPER, [OTHERS]), SEVERAL)
    scored = 256 * 8 * 0.3 * 2000
    lines = {role.name: (role.units, role.gpus, role.seconds) for role in made.roles}
    assert lines["teacher"] == pytest.approx((2, 2, scored * 0.5 / 16_000))
    assert lines["teacher code"] == pytest.approx((1, 2, scored * 0.3 / 4000))
    assert lines["teacher chains"] == pytest.approx((1, 1, scored * 0.2 / 9000))
    assert made.gpus == 4 + 2 + 2 + 1 + 2
    # Side by side: that of code alone counts.
    seconds = [lines[role][2] for role in ("rollout", "verifier", "teacher code", "learner")]
    assert made.step_s == pytest.approx(max(max(seconds), sum(seconds) / 2))


@pytest.mark.parametrize("gpus", [6, 10, 14])
def test_no_other_split_over_several_teachers_is_faster(gpus: int) -> None:
    config = load(PAPER, [OTHERS, "verifier.workers=100"])
    made = plan.make(config, SEVERAL, gpus=gpus)
    assert made.gpus <= gpus
    for counts in itertools.product(range(1, gpus), repeat=4):
        first, code, chains, ranks = counts
        rollout = gpus - ranks - first - 2 * code - chains
        if rollout < 1:
            continue
        raw = _with(config, rollout, first, ranks).model_dump()
        raw["teachers"]["code"]["replicas"] = code
        raw["teachers"]["chains"]["replicas"] = chains
        other = plan.make(RunConfig.model_validate(raw), SEVERAL)
        assert made.step_s <= other.step_s * 1.05  # which has a hundred judges


def test_rates_of_other_teachers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"also of teacher code, teacher chains, which"):
        plan.make(load(PAPER), SEVERAL)
    with pytest.raises(ConfigError, match=r"no rate of the teacher code: .*benchmarks"):
        plan.make(load(PAPER, [OTHERS]), RATES)
    with pytest.raises(
        ConfigError, match=r"5 GPUs .*, teacher 1, teacher code 2, teacher chains 1"
    ):
        plan.make(load(PAPER, [OTHERS]), SEVERAL, gpus=5)
    one, half = {"tokens_per_s": 1}, {"tokens_per_s": 1, "share": 0.5}
    with pytest.raises(ValueError, match=r"shares of the teachers add up to 1\.5"):
        Rates.model_validate(RATES.model_dump() | {"teachers": {"default": one, "code": half}})


def test_rates_of_several_teachers_are_read_apart() -> None:
    records = [
        record | {"teacher/tokens_default": 960.0 * n, "teacher/asking_s_default": 4.0 * n,
                  "teacher/tokens_code": 2880.0 * n, "teacher/asking_s_code": 8.0 * n}
        for n, record in enumerate(_records(12), 1)
    ]  # fmt: skip
    config = load(DEMO, ["teachers={code: {model: m, replicas: 2}}"])
    rates = of_records(config, records, about="known")
    assert rates.teachers.keys() == {"default", "code"}
    assert rates.teachers["default"].share == 0.25 and rates.teachers["code"].share == 0.75
    assert rates.teachers["default"].tokens_per_s == pytest.approx(960 / 2)  # two workers
    assert rates.teachers["code"].tokens_per_s == pytest.approx(2880 / 4 / 2)
    made = plan.make(config, rates, cores=100)
    teacher = next(role for role in made.roles if role.name == "teacher")
    assert (teacher.units, teacher.seconds) == (3, pytest.approx(3.84 / 3))


def test_samples_of_another_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="kd samples from the teacher"):
        plan.make(load(PAPER, ["trainer.objective.kind=kd"]), RATES)


def _records(steps: int) -> list[dict[str, Any]]:
    """A run of 10 s a step whose rates are known: 16 groups of 8, lengths 20 + 80."""
    return [
        {
            "step": n, "time": 10.0 * n, "batch/groups": 16, "prompt_length/mean": 20.0,
            "batch/mixed_token_fraction": 0.5,
            "response_length/mean": 80.0, "response_length/max": 200.0,
            "response_length/incorrect_mean": 100.0, "reward/accuracy": 0.5,
            "scope/unknown_fraction": 0.25, "timing_s/wait_groups": 3.0,
            "timing_s/forward_backward": 4.0, "timing_s/perplexity": 1.0,
            "timing_s/optimizer": 2.0,
            "rollout/sampled_tokens": 10_240.0 * n, "rollout/sampling_s": 5.0 * n,
            "verifier/verdicts": 128.0 * n, "verifier/judging_s": 2.0 * n,
            "teacher/tokens": 3_840.0 * n, "teacher/asking_s": 12.0 * n, "teacher/workers": 2.0,
            "cpu_s/rollout": 5.12 * n, "cpu_s/verifier": 1.28 * n, "cpu_s/teacher": 3.84 * n,
            "cpu_s/learner": 7.0 * n, "cpu_s/other": 1.0 * n, "cpu_s/redis": 1.0 * n,
        }
        for n in range(1, steps + 1)
    ]  # fmt: skip


def test_rates_of_known_records() -> None:
    config = load(DEMO, ["teacher.replicas=3"])
    rates = of_records(config, _records(12), about="known")
    assert rates.rollout and rates.verifier and rates.teachers and rates.learner and rates.cpu
    assert rates.workload.incorrect == pytest.approx(0.25)
    assert rates.rollout.tokens_per_s == pytest.approx(2048)
    assert rates.verifier.verdicts_per_s == pytest.approx(64)
    # Two workers wait 6 s each for what three replicas do.
    assert rates.teachers["default"].tokens_per_s == pytest.approx(3840 / 6 / 3)
    learned = 128 * 0.75 * 100
    assert rates.learner.tokens_per_s == pytest.approx(learned / 5)
    assert rates.learner.step_s == pytest.approx(2)
    assert rates.cpu.rollout_token_s == pytest.approx(5.12 / 10_240)
    assert rates.cpu.learner_token_s == pytest.approx(5 / learned)
    assert rates.cpu.learner_step_s == pytest.approx(2)
    assert rates.cpu.other_cores == pytest.approx(0.2)


def test_an_engine_with_other_answers_at_once() -> None:
    rate = RATES.rollout
    assert rate and rate.tokens_per_s_of(7.0) == 2000  # nothing is known of its forwards
    known = RolloutRate(tokens_per_s=1000, token_s=0.0055, sequences=10, answers=20)
    # A forward of ten takes 10 ms and each answer in it 0.5 ms.
    assert known.tokens_per_s_of(20) == pytest.approx(1000)
    assert known.tokens_per_s_of(np.array([10, 40])) == pytest.approx([5 / 0.0075, 20 / 0.015])
    assert known.tokens_per_s_of(1) == pytest.approx(1 / 0.0055)


def test_how_many_answers_an_engine_is_given() -> None:
    config = load(DEMO, ["trainer.groups_per_step=16", "rollout.capacity=8"])
    assert plan.answers_of(config, 1) == 8 * 8  # its capacity
    assert plan.answers_of(config, np.array([4, 100])).tolist() == [4 * 8, 8]
    config = load(DEMO, ["trainer.groups_per_step=64", "rollout.batch_sequences=100"])
    assert plan.answers_of(config, 1) == 100


def test_fewer_answers_to_a_prompt_cost_more_each() -> None:
    records = _records(12)
    for n, record in enumerate(records, start=1):
        # 20 in a forward of 5 s / 512; alone it takes half as long
        record |= {"rollout/workers": 1.0, "rollout/forwards": 512.0 * n,
                   "rollout/forward_us": 5e6 / 512 / 2}  # fmt: skip
    rates = of_records(load(DEMO), records, about="known")
    assert rates.rollout and rates.rollout.sequences == pytest.approx(20)
    assert rates.rollout.answers == 16 * 8
    half = plan.make(load(DEMO, ["sampling.n=4"]), rates, cores=2)
    # Half the answers in as many forwards: 10 more than one are 9/19 of the way to 20.
    sampling = next(role for role in half.roles if role.name == "rollout")
    assert sampling.seconds == pytest.approx(5.12 * (1 + 9 / 19) / 2)


def test_a_stage_of_one_s_own_uses_cores_and_is_said_to_keep_up() -> None:
    step = "{name: filter, after: verifier, worker: 'my.filters:Filter'}"
    config = load(DEMO, [f"steps=[{step}]"])
    records = [record | {"cpu_s/filter": 3.0 * record["step"]} for record in _records(12)]
    rates = of_records(config, records, about="known")
    assert rates.cpu is not None
    assert rates.cpu.other_cores == pytest.approx((1.0 + 1.0 + 3.0) / 10)
    made = plan.make(config, rates, cores=2)
    assert made.step_s == pytest.approx((5.12 + 1.28 + 3.84 + 7.0) / (2 - 0.5))
    assert any(note.startswith("no rate is known of filter (steps)") for note in made.notes)
    greedy = load(DEMO, [f"steps=[{step.replace('}', ', resources: {gpus: 1}}')}]"])
    with pytest.raises(ConfigError, match="steps: no rate is known of filter, which reserves GPUs"):
        plan.make(greedy, rates)


def test_a_replaced_worker_takes_no_work_back() -> None:
    records = _records(12)
    for record in records[6:]:
        record["rollout/sampled_tokens"] -= 10_240.0 * 7
        record["rollout/sampling_s"] -= 5.0 * 7
    rates = of_records(load(DEMO), records, about="known")
    assert rates.rollout and rates.rollout.tokens_per_s == pytest.approx(2048)


def test_roles_that_share_cores_add_up() -> None:
    config = load(DEMO)
    rates = of_records(config, _records(12), about="known")
    used = [5.12, 1.28, 3.84, 7.0]
    made = plan.make(config, rates, cores=2)
    assert [role.seconds for role in made.roles] == pytest.approx(used)
    assert made.step_s == pytest.approx(sum(used) / 1.8)
    assert made.limit.startswith("the cores")
    alone = plan.make(config, rates, cores=100)
    assert alone.step_s == pytest.approx(sum(used) / 2)  # two steps under way
    with pytest.raises(ConfigError, match="leave --gpus out"):
        plan.make(config, rates, gpus=8)
    with pytest.raises(ConfigError, match="no processor seconds: a run of some dozen steps"):
        plan.make(config, rates.model_copy(update={"cpu": None}))


def test_the_command_reads_a_file_of_rates_and_its_json_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*arguments: str) -> tuple[str, str]:
        with pytest.raises(SystemExit):
            main(["plan", str(PAPER), *arguments])
        shown = capsys.readouterr()
        return shown.out, shown.err

    file = tmp_path / "rates.yaml"
    file.write_text(yaml.safe_dump(RATES.model_dump()))
    shown, _ = command("--rates", str(file), "--gpus", "8")
    assert "limited by" in shown and "put in by hand" in shown
    found = json.loads(command("--rates", str(file), "--gpus", "8", "--json")[0])
    assert Rates.model_validate(found["rates"]) == RATES
    assert sum(role["gpus"] for role in found["roles"]) == found["gpus"] <= 8
    file.write_text("about: x\nworkloads: {}\n")
    assert "did you mean 'workload'" in command("--rates", str(file))[1]
    assert "either --from RUN_DIR or --rates FILE" in command()[1]


@pytest.mark.slow
def test_a_real_run_has_every_rate_and_a_short_one_is_refused(run_dir: Path) -> None:
    rates = of_records(load(run_dir / "config.yaml"), read(run_dir), about="a test")
    assert rates.rollout and rates.verifier and rates.teachers and rates.cpu
    assert rates.cpu.rollout_token_s > 0 and rates.cpu.learner_token_s > 0
    with pytest.raises(ConfigError, match="let it run longer"):
        of_run(run_dir)


def test_the_table_of_sizes_is_what_the_plan_says() -> None:
    rates = load_other(Rates, ROOT / "docs/assumed-h100.yaml")
    page = (ROOT / "docs/sizing.md").read_text()
    rows = re.findall(r"^\| `--gpus (\d+) ?([^`]*)` \| (.*) \|$", page, re.M)
    assert len(rows) == 5
    for gpus, override, cells in rows:
        made = plan.make(load(PAPER, override.split()), rates, gpus=int(gpus))
        units = {role.name: role.units for role in made.roles}
        assert cells.split(" | ") == [
            *(f"{units[role]}" for role in ("rollout", "teacher", "learner")),
            f"{made.gpus:g}", f"{made.step_s:.3g} s", made.limit.partition(":")[0],
        ]  # fmt: skip
