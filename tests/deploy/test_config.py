from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.config import ConfigError, RunConfig, dump, load, load_teachers
from trainer.objectives.config import OBJECTIVES, ScopeConfig

RUNS = sorted((Path(__file__).parents[2] / "deploy" / "runs").glob("*.yaml"))

SMALL: dict[str, Any] = {
    "name": "small",
    "student": "s",
    "data": {"path": "d.parquet", "max_prompt_tokens": 16},
    "sampling": {"n": 2, "max_tokens": 8},
    "verifier": {"kind": "exact"},
    "teacher": {"model": "t"},
}


def written(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SMALL | changes))
    return path


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.name)
def test_every_shipped_config_loads_and_prints_back(path: Path, tmp_path: Path) -> None:
    config = load(path)
    again = tmp_path / "again.yaml"
    again.write_text(dump(config))
    assert load(again) == config
    alone = load_teachers(path)
    assert (alone.teachers, alone.scoring) == (config.teachers, config.scoring)


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        ([], "float32"),
        (["rollout.resources.gpus=1"], "bfloat16"),
        (["rollout.resources.gpus=1", "rollout.engine.dtype=float16"], "float16"),
        (["rollout.engine.dtype=bfloat16"], "bfloat16"),
        (["rollout.resources.gpus=1", "teacher.model=s", "teacher.weights=student"], "float32"),
        (
            ["rollout.engine.dtype=bfloat16", "teacher.engine.dtype=bfloat16", "teacher.model=s",
             "teacher.weights=student"],
            "bfloat16",
        ),
    ],
)  # fmt: skip
def test_weights_travel_in_the_precision_of_all_who_follow_them(
    overrides: list[str], dtype: str, tmp_path: Path
) -> None:
    assert load(written(tmp_path), overrides).followers_dtype == dtype


@pytest.mark.parametrize(
    "name", ["deepseek-r1-distill-1.5b.yaml", "qwen3-1.7b.yaml", "eight-24gb.yaml"]
)
def test_the_papers_configurations_are_the_papers(name: str) -> None:
    config = load(RUNS[0].parent / name)
    assert (config.trainer.groups_per_step, config.sampling.n) == (256, 8)
    assert (config.sampling.temperature, config.sampling.max_tokens) == (0.6, 12_288)
    assert (config.data.epochs, config.data.max_prompt_tokens) == (10, 2048)
    assert config.trainer.optimizer.lr == 5e-5
    objective = config.trainer.objective
    assert isinstance(objective, ScopeConfig)
    assert (objective.kind, objective.tau, objective.normalization) == ("scope", 1.0, "paper")
    assert objective.student_path_ppl_positive
    assert not objective.teacher_path_ppl_positive


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "trainer.objective.taw=2",
            "unknown key 'trainer.objective.taw'; did you mean 'trainer.objective.tau'?",
        ),
        ("trainr.ranks=2", "unknown key 'trainr'; did you mean 'trainer'?"),
        ("max_steps=3", "unknown key 'max_steps'; did you mean 'trainer.max_steps'?"),
        ("trainer.lr=1", "unknown key 'trainer.lr'; did you mean 'trainer.optimizer.lr'?"),
        ("data.epoch=1", "unknown key 'data.epoch'; did you mean 'data.epochs'?"),
        ("workers=2", "did you mean 'scoring.workers' or 'rollout.workers' or 'verifier.workers'"),
        ("seed={a: 1, a: 2}", "the key 'a' stands twice in one table"),
        ("sampling.zzzz=1", "known keys: n, "),
        ("trainer.objective.tau=-1", "trainer.objective.tau: Input should be greater than 0"),
        ("trainer.objective.kind=ppo", "trainer.objective.kind: must be one of scope, "),
        ("no-equals-sign", "an override is section.key=value, not 'no-equals-sign'"),
        ("ray.address=auto", "needs redis.url"),
        ("rollout.engine.weight_transfer=nccl", "weight_transfer 'nccl' goes from GPU to GPU"),
        ("teacher.weights=student", "teacher.weights: student: its model must be the run's stud"),
        (
            "trainer.objective.kl_coef=2",
            "trainer.objective: kl_coef is a setting of kdrl, not of scope",
        ),
        (
            "trainer.objective={kind: opd, tau: 2}",
            "trainer.objective: tau is a setting of scope, not of opd",
        ),
        (
            "trainer.objective={kind: kdrl, kl_cof: 2}",
            "unknown key 'trainer.objective.kl_cof'; did you mean 'trainer.objective.kl_coef'?",
        ),
        ("trainer.objective={kind: opd, zzzz: 2}", "known keys: kind, normalization, "),
        ("trainer.objective.kind=3", "trainer.objective.kind: Input should be a valid string"),
        ("trainer.objective.kind=no.such:x", "trainer.objective.kind: 'no.such:x': No module"),
        ("evaluation.data.epochs=1", "unknown key 'evaluation.data.epochs'"),
        ("teacher.modle=x", "unknown key 'teacher.modle'; did you mean 'teacher.model'?"),
        ("teacher.port=1", "unknown key 'teacher.port'; did you mean 'scoring.port'?"),
        ("teachers.default={model: t}", "teacher and teachers.default are the same one"),
        (
            "teachers.code.modle=x",
            "unknown key 'teachers.code.modle'; did you mean 'teachers.code.model'?",
        ),
        ("teachers.code={model: t}", "model 't' belongs to 2 teachers"),
        (
            "teachers.code={model: x, engine: {args: {tensor_parallel_size: 2}}, "
            "resources: {gpus: 1}}",
            "teachers.code.engine.args ask for 2 GPUs",
        ),
        ("name=../x", "name: String should match pattern"),
    ],
)
def test_a_mistake_is_one_clear_sentence(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path), [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.ranks: .*'sede'.*'seed'"):
        load(written(tmp_path), ["sede=1", "trainer.ranks=0"])


def test_a_run_s_config_without_a_teacher_serves_none(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert load(path, ["teacher=null"]).teachers == {}
    path.write_text(yaml.safe_dump({k: v for k, v in SMALL.items() if k != "teacher"}))
    with pytest.raises(ConfigError, match="is a run's config that has no teacher"):
        load_teachers(path)


def test_ipc_is_refused_with_several_ranks(tmp_path: Path) -> None:
    """vLLM's sender gathers handles from all ranks, and would wait in rank 0 for ever."""
    gpus = ["rollout.resources.gpus=1", "trainer.resources.gpus=1", "trainer.ranks=2"]
    with pytest.raises(ConfigError, match="'ipc' works with trainer"):
        load(written(tmp_path), ["rollout.engine.weight_transfer=ipc", *gpus])


def test_overrides_are_yaml_and_make_sections(tmp_path: Path) -> None:
    config = load(
        written(tmp_path),
        ["trainer.optimizer.betas=[0.9, 0.95]", "trainer.objective.use_seq_weights=false"],
    )
    assert config.trainer.optimizer.betas == (0.9, 0.95)
    assert config.trainer.objective == ScopeConfig(use_seq_weights=False)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_kind_prints_back_with_its_own_settings_and_no_others(
    kind: str, tmp_path: Path
) -> None:
    config = load(written(tmp_path), [f"trainer.objective.kind={kind}"])
    assert type(config.trainer.objective) is OBJECTIVES[kind]
    again = tmp_path / "again.yaml"
    again.write_text(dump(config))
    assert load(again) == config
    section = yaml.safe_load(again.read_text())["trainer"]["objective"]
    assert section.keys() == OBJECTIVES[kind].model_fields.keys()
    assert ("tau" in section) == (kind == "scope") and ("kl_coef" in section) == (kind == "kdrl")


def test_one_teacher_is_the_default_of_several(tmp_path: Path) -> None:
    short = load(written(tmp_path), ["teachers.code={model: c}"])
    long = load(written(tmp_path, teacher=None, teachers={"default": {"model": "t"}}),
                ["teachers.code={model: c}"])  # fmt: skip
    assert short == long and [*short.teachers] == ["default", "code"]
    again = tmp_path / "again.yaml"
    again.write_text(dump(short))
    assert load(again) == short


@pytest.mark.parametrize(
    ("changes", "longest"),
    [
        ({}, 16 + 8),
        ({"max_sequence_tokens": 100}, 100),
        ({"context": "Solve {prompt}"}, None),
        ({"tokenizer": "own"}, None),
    ],
    ids=["what the run sends", "what it says", "a prompt of its own", "tokens of its own"],
)
def test_a_teacher_takes_what_the_run_sends(
    changes: dict[str, Any], longest: int | None, tmp_path: Path
) -> None:
    """What is evaluated is not scored; a step of one's own may make answers longer."""
    heldout = {"data": {"path": "x", "max_prompt_tokens": 10}, "sampling": {"max_tokens": 90}}
    teacher = {"model": "t", **changes}
    config = load(written(tmp_path, teacher=teacher, evaluation=heldout))
    assert config.served["default"].max_sequence_tokens == longest
    assert config.longest_sampled == 100
    rewriter = {"name": "rewriter", "after": "verifier", "worker": "a:B"}
    config = load(written(tmp_path, teacher=teacher, steps=[rewriter]))
    assert config.served["default"].max_sequence_tokens == changes.get("max_sequence_tokens")
    assert config.longest_sampled == 16 + 8


def test_a_teacher_alone_needs_no_run(tmp_path: Path) -> None:
    file = tmp_path / "teacher.yaml"
    file.write_text("teacher: {model: t}")
    served = load_teachers(file, ["scoring.port=8123", "teacher.replicas=2"])
    assert (served.scoring.port, served.teachers["default"].replicas) == (8123, 2)
    with pytest.raises(ConfigError, match=r"unknown key 'port'; did you mean 'scoring\.port'\?"):
        load_teachers(file, ["port=8123"])


@pytest.mark.parametrize(
    ("content", "message"),
    [("- a", "holds no settings"), ("a: [", "is not YAML"), ("a: {}\na: {}", "'a' stands twice")],
)
def test_a_file_that_is_no_config(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path / "missing.yaml")


def test_a_config_is_frozen(tmp_path: Path) -> None:
    config: Any = load(written(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        config.name = "other"
    assert isinstance(config, RunConfig)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "/nowhere.yaml"]])
def test_help_and_typing_errors_load_no_heavy_package(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from deploy.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as end:\n    code = end.code\n"
        "heavy = {'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True
    )
    assert "AssertionError" not in done.stderr
    assert done.returncode == (0 if "--help" in arguments else 1)
    if "run" in arguments:
        assert done.stderr == "scope: cannot read /nowhere.yaml: No such file or directory\n"


def test_small_models_share_a_gpu() -> None:
    shared = load(
        RUNS[0].parent / "demo.yaml", ["teacher.resources.gpus=0.25", "rollout.resources.gpus=0.25"]
    )
    assert shared.teachers["default"].resources.gpus == shared.rollout.resources.gpus == 0.25
