from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.config import ConfigError, RunConfig, dump, load, load_teacher

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
    assert load_teacher(path) == config.teacher


@pytest.mark.parametrize("name", ["deepseek-r1-distill-1.5b.yaml", "qwen3-1.7b.yaml"])
def test_the_papers_configurations_are_the_papers(name: str) -> None:
    config = load(RUNS[0].parent / name)
    assert (config.trainer.groups_per_step, config.sampling.n) == (256, 8)
    assert (config.sampling.temperature, config.sampling.max_tokens) == (0.6, 12_288)
    assert (config.data.epochs, config.data.max_prompt_tokens) == (10, 2048)
    assert config.trainer.optimizer.lr == 5e-5
    objective = config.trainer.objective
    assert (objective.kind, objective.tau, objective.normalization) == ("scope", 1.0, "paper")
    assert objective.student_path_ppl_positive
    assert not objective.teacher_path_ppl_positive


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.objective.taw=2", "unknown key 'trainer.objective.taw'; did you mean 'tau'?"),
        ("trainr.ranks=2", "unknown key 'trainr'; did you mean 'trainer'?"),
        ("sampling.zzzz=1", "known keys: n, "),
        ("trainer.objective.tau=-1", "trainer.objective.tau: Input should be greater than 0"),
        ("trainer.objective.kind=ppo", "trainer.objective.kind: must be one of scope, "),
        ("no-equals-sign", "an override is section.key=value, not 'no-equals-sign'"),
        ("ray.address=auto", "needs redis.url"),
        ("rollout.engine.weight_transfer=nccl", "weight_transfer 'nccl' goes from GPU to GPU"),
        (
            "teacher.others.code.modle=x",
            "unknown key 'teacher.others.code.modle'; did you mean 'model'",
        ),
        ("teacher.others.code={model: t}", "teacher: model 't' belongs to 2 teachers"),
        (
            "teacher.others.code={model: x, engine: {args: {tensor_parallel_size: 2}}, "
            "resources: {gpus: 1}}",
            "teacher.others.code.engine.args ask for 2 GPUs",
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
    assert load(path, ["teacher=null"]).teacher is None
    path.write_text(yaml.safe_dump({k: v for k, v in SMALL.items() if k != "teacher"}))
    with pytest.raises(ConfigError, match="is a run's config that has no teacher"):
        load_teacher(path)


def test_overrides_are_yaml_and_make_sections(tmp_path: Path) -> None:
    config = load(
        written(tmp_path),
        ["trainer.optimizer.betas=[0.9, 0.95]", "trainer.objective.use_seq_weights=false"],
    )
    assert config.trainer.optimizer.betas == (0.9, 0.95)
    assert not config.trainer.objective.use_seq_weights


@pytest.mark.parametrize(
    ("content", "message"), [("- a", "holds no settings"), ("a: [", "is not YAML")]
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
    assert shared.teacher.resources.gpus == shared.rollout.resources.gpus == 0.25
