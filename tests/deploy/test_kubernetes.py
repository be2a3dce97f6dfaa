"""The manifests, as Kustomize renders them, against the published schemas and our own rules."""

from __future__ import annotations

import functools
import importlib
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml

from deploy.config import RunConfig, load
from teacher.config import TeachersConfig
from tests.deploy import kuberay
from tests.deploy.conftest import ROOT
from tests.deploy.kuberay import KUBERNETES

RUNS = ("cpu", "gpu", "spot")
OVERLAYS = (*RUNS, "teacher")


@functools.cache
def rendered(overlay: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        ["kubectl", "kustomize", ROOT / "deploy/kubernetes" / overlay],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def one(overlay: str, kind: str) -> dict[str, Any]:
    (found,) = [document for document in rendered(overlay) if document["kind"] == kind]
    return found


def ray_cluster(overlay: str) -> dict[str, Any]:
    spec = one(overlay, "RayService" if overlay == "teacher" else "RayJob")["spec"]
    cluster: dict[str, Any] = spec.get("rayClusterSpec") or spec["rayClusterConfig"]
    return cluster


def groups(overlay: str) -> list[dict[str, Any]]:
    cluster = ray_cluster(overlay)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def templates(overlay: str) -> list[dict[str, Any]]:
    """The templates of all pods: Ray's and Redis'."""
    sets = [d for d in rendered(overlay) if d["kind"] == "StatefulSet"]
    return [group["template"] for group in groups(overlay)] + [s["spec"]["template"] for s in sets]


def validate(document: dict[str, Any]) -> None:
    if document["apiVersion"] == "ray.io/v1":
        kuberay.validate(document)
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid(overlay: str) -> None:
    for document in rendered(overlay):
        validate(document)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayJob", "spec.entryPoint", "scope run"),
        ("RayJob", "spec.rayClusterSpec.headGroupSpecs", {}),
        ("RayJob", "spec.rayClusterSpec.authOptions.secret", "scope"),
        ("RayJob", "spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("RayJob", "spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.livenesProbe", {}),
        ("RayJob", "spec.rayClusterSpec.workerGroupSpecs.0.replicas", "1"),
        ("RayJob", "spec.rayClusterSpec.autoscalerOptions.resources.request", {}),
        ("RayJob", "spec.submissionMode", "HttpMode"),
        ("StatefulSet", "spec.template.spec.containers.0.redinessProbe", {}),
    ],
)
def test_the_schemas_do_refuse(kind: str, path: str, value: Any) -> None:
    document = json.loads(json.dumps(one("cpu", kind)))
    *above, name = path.split(".")
    place: Any = document
    for key in above:
        place = place[int(key) if key.isdigit() else key]
    place[name] = value
    with pytest.raises(jsonschema.ValidationError) as refused:
        validate(document)
    assert name in [*refused.value.absolute_path, *re.findall(r"'([^']*)' was", str(refused.value))]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_pod_has_more_rights_than_it_needs(overlay: str) -> None:
    for template in templates(overlay):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            rights = container["securityContext"]
            assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]
            name, _, tag = container["image"].partition(":")
            assert name and tag and tag != "latest"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_are_references(overlay: str) -> None:
    assert not [d for d in rendered(overlay) if d["kind"] == "Secret"]
    for template in templates(overlay):
        for variable in template["spec"]["containers"][0].get("env", []):
            secret = any(w in variable["name"] for w in ("PASSWORD", "KEYS", "TOKEN", "AUTH"))
            assert secret == ("secretKeyRef" in variable.get("valueFrom", {})), variable["name"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_is_behind_a_network_policy(overlay: str) -> None:
    policies = [d["spec"] for d in rendered(overlay) if d["kind"] == "NetworkPolicy"]
    covered = [policy["podSelector"]["matchLabels"].items() for policy in policies]
    for template in templates(overlay):
        labels = template["metadata"]["labels"].items()
        assert any(selector <= labels for selector in covered), labels


@pytest.mark.parametrize("overlay", RUNS)
def test_the_config_is_one_and_its_roles_have_their_pods(overlay: str, tmp_path: Path) -> None:
    config = run_config(overlay, tmp_path)
    offered = [resources(group) for group in groups(overlay)]
    teacher = config.teachers["default"]
    for room in (config.rollout, config.verifier, teacher, config.trainer):
        (name,) = room.resources.custom
        node = next(found for found in offered if name in found)
        assert node["CPU"] >= room.resources.cpus
        assert node["GPU"] >= room.resources.gpus
    assert config.redis.url == "redis://scope-redis:6379"
    assert config.runs_dir == Path("/mnt/scope/runs")
    assert "/mnt/scope/runs/run" in one(overlay, "RayJob")["spec"]["entrypoint"]


@pytest.mark.parametrize("overlay", RUNS)
def test_all_roles_fit_together(overlay: str, tmp_path: Path) -> None:
    """GPUs of all roles against those of the largest cluster that the autoscaler may make."""
    config = run_config(overlay, tmp_path)
    most = sum(resources(g)["GPU"] * g.get("maxReplicas", 1) for g in groups(overlay))
    teacher = config.teachers["default"]
    asked = (
        config.rollout.workers * config.rollout.resources.gpus
        + teacher.replicas * teacher.resources.gpus
        + config.trainer.ranks * config.trainer.resources.gpus
    )
    assert asked <= most


def run_config(overlay: str, directory: Path) -> RunConfig:
    file = directory / "run.yaml"
    file.write_text(one(overlay, "ConfigMap")["data"]["run.yaml"])
    return load(file)


def resources(group: dict[str, Any]) -> dict[str, float]:
    """What a pod of a group offers to Ray, as KubeRay starts it."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    parameters = group["rayStartParams"]
    custom = json.loads(json.loads(parameters.get("resources", '"{}"')))
    return {
        "CPU": float(parameters.get("num-cpus", limits["cpu"])),
        "GPU": float(limits.get("nvidia.com/gpu", 0)),
        **custom,
    }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_is_the_version_that_the_image_has(overlay: str) -> None:
    assert ray_cluster(overlay)["rayVersion"] == ray.__version__


def test_the_served_teacher_is_one() -> None:
    served = yaml.safe_load(one("teacher", "RayService")["spec"]["serveConfigV2"])
    (application,) = served["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert TeachersConfig.model_validate(application["args"]).scoring.host == "0.0.0.0"
    assert [d["name"] for d in application["deployments"]] == ["teacher"]
