"""Files that other programs read: Ray's cluster launcher, Docker, the shell."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from teacher.serve import ENVIRONMENT
from tests.deploy.conftest import ROOT

CLUSTERS = sorted((ROOT / "deploy/clusters").glob("*.yaml"))
BIN = Path(sys.executable).parent


@pytest.mark.parametrize("file", CLUSTERS, ids=lambda file: file.stem)
def test_ray_up_accepts_it(file: Path) -> None:
    config = prepare_config(yaml.safe_load(file.read_text()))
    validate_config(config)
    node = "~/scope/deploy/clusters/node.sh"
    assert config["file_mounts"].keys() == {"~/scope", "~/.ray/auth_token"}
    assert config["setup_commands"] == [f"{node} setup"]
    (start,) = config["head_start_ray_commands"]
    assert start.endswith(f"{node} head")
    assert config["worker_start_ray_commands"] == [f"{node} worker $RAY_HEAD_IP"]


@pytest.mark.parametrize("file", ["clusters/node.sh", "docker/Dockerfile"])
def test_whatever_starts_ray_tells_serve_the_same(file: str) -> None:
    words = (ROOT / "deploy" / file).read_text().split()
    for name, value in ENVIRONMENT.items():
        assert f"{name}={value}" in words


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_a_cloud_has_nodes_for_every_role(cloud: str) -> None:
    types = yaml.safe_load((ROOT / f"deploy/clusters/{cloud}.yaml").read_text())[
        "available_node_types"
    ]
    assert types["head"]["resources"]["CPU"] == 0
    for role in ("learner", "teacher", "rollout"):
        assert types[role]["resources"][role] == 1
        assert types[role]["min_workers"] == 0 < types[role]["max_workers"]


@pytest.mark.parametrize(
    ("linter", "file"),
    [
        ("hadolint", "deploy/docker/Dockerfile"),
        ("shellcheck", "deploy/clusters/node.sh"),
        ("shellcheck", "deploy/install.sh"),
        ("shellcheck", "deploy/install-vllm.sh"),
    ],
)
def test_linters_find_nothing(linter: str, file: str) -> None:
    program = shutil.which(linter, path=f"{BIN}:{os.environ['PATH']}")
    assert program, f"no {linter} found: make install"
    done = subprocess.run([program, ROOT / file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
