"""The definitions of ray.io/v1 in KubeRay 1.6.2, as JSON Schema that refuses what they do not name.

KubeRay publishes them (Apache 2.0) as 1 MB of YAML a kind and in no package registry. Nearly all of
that is Kubernetes' own types written out, so those are references here, to the schemas that
Kubernetes publishes; KubeRay's own fields are all of its API reference of that release, and what is
required is what its types mark so. Statuses, which the operator writes, are left out.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

import jsonschema
from referencing import Registry
from referencing.jsonschema import DRAFT202012

KUBERNETES = "1.34"

_DEFINITIONS = "https://kubernetes.io/api/_definitions.json"


def _object(*required: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _core(kind: str) -> dict[str, Any]:
    return {"$ref": f"{_DEFINITIONS}#/$defs/io.k8s.api.core.v1.{kind}"}


def _enum(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


def _array(items: dict[str, Any], at_least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": at_least}


def _integer(minimum: int = -(2**31)) -> dict[str, Any]:
    return {"type": "integer", "minimum": minimum, "maximum": 2**31 - 1}


_STRING, _FLAG, _NUMBER = ({"type": name} for name in ("string", "boolean", "number"))
_STRINGS = {"type": "object", "additionalProperties": _STRING}
_MANAGER = _enum("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
_DELETION = _enum("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone")
_CREDENTIAL = _object(value=_STRING, valueFrom=_core("EnvVarSource"))
_GROUP = {
    "labels": _STRINGS,
    "rayStartParams": _STRINGS,
    "resources": _STRINGS,
    "template": _core("PodTemplateSpec"),
}

_CLUSTER = _object(
    "headGroupSpec",
    authOptions=_object(
        mode=_enum("disabled", "token"), secretName=_STRING, enableK8sTokenAuth=_FLAG
    ),
    autoscalerOptions=_object(
        env=_array(_core("EnvVar")),
        envFrom=_array(_core("EnvFromSource")),
        idleTimeoutSeconds=_integer(),
        image=_STRING,
        imagePullPolicy=_STRING,
        resources=_core("ResourceRequirements"),
        securityContext=_core("SecurityContext"),
        upscalingMode=_enum("Default", "Aggressive", "Conservative"),
        version=_enum("v1", "v2"),
        volumeMounts=_array(_core("VolumeMount")),
    ),
    enableInTreeAutoscaling=_FLAG,
    gcsFaultToleranceOptions=_object(
        "redisAddress",
        externalStorageNamespace=_STRING,
        redisAddress=_STRING,
        redisPassword=_CREDENTIAL,
        redisUsername=_CREDENTIAL,
    ),
    headGroupSpec=_object(
        "template",
        **_GROUP,
        enableIngress=_FLAG,
        headService=_core("Service"),
        serviceType=_STRING,
    ),
    headServiceAnnotations=_STRINGS,
    managedBy=_MANAGER,
    rayVersion=_STRING,
    suspend=_FLAG,
    upgradeStrategy=_object(type=_enum("Recreate", "None")),
    workerGroupSpecs=_array(
        _object(
            "groupName", "minReplicas", "maxReplicas", "template",
            **_GROUP,
            groupName=_STRING,
            idleTimeoutSeconds=_integer(),
            maxReplicas=_integer(),
            minReplicas=_integer(),
            numOfHosts=_integer(),
            replicas=_integer(),
            scaleStrategy=_object(workersToDelete=_array(_STRING)),
            suspend=_FLAG,
        )
    ),
)  # fmt: skip

_SPECS = {
    "RayCluster": _CLUSTER,
    "RayJob": _object(
        activeDeadlineSeconds=_integer(),
        backoffLimit=_integer(),
        clusterSelector=_STRINGS,
        deletionStrategy=_object(
            deletionRules=_array(
                _object(
                    "policy", "condition",
                    policy=_DELETION,
                    condition=_object(
                        jobDeploymentStatus=_STRING, jobStatus=_STRING, ttlSeconds=_integer(0)
                    ),
                ),
                at_least=1,
            ),
            onFailure=_object(policy=_DELETION),
            onSuccess=_object(policy=_DELETION),
        ),
        entrypoint=_STRING,
        entrypointNumCpus=_NUMBER,
        entrypointNumGpus=_NUMBER,
        entrypointResources=_STRING,
        jobId=_STRING,
        managedBy=_MANAGER,
        metadata=_STRINGS,
        preRunningDeadlineSeconds=_integer(1),
        rayClusterSpec=_CLUSTER,
        runtimeEnvYAML=_STRING,
        shutdownAfterJobFinishes=_FLAG,
        submissionMode=_enum("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        submitterConfig=_object(backoffLimit=_integer()),
        submitterPodTemplate=_core("PodTemplateSpec"),
        suspend=_FLAG,
        ttlSecondsAfterFinished=_integer(),
    ),
    "RayService": _object(
        deploymentUnhealthySecondThreshold=_integer(),
        excludeHeadPodFromServeSvc=_FLAG,
        managedBy=_MANAGER,
        rayClusterConfig=_CLUSTER,
        rayClusterDeletionDelaySeconds=_integer(0),
        serveConfigV2=_STRING,
        serveService=_core("Service"),
        serviceUnhealthySecondThreshold=_integer(),
        upgradeStrategy=_object(
            type=_enum("NewCluster", "NewClusterWithIncrementalUpgrade", "None"),
            clusterUpgradeOptions=_object(
                gatewayClassName=_STRING,
                intervalSeconds=_integer(),
                maxSurgePercent=_integer(),
                stepSizePercent=_integer(),
            ),
        ),
    ),
}  # fmt: skip


@functools.cache
def _registry() -> Any:
    file = f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict/_definitions.json"
    text = (resources.files("kubernetes_validate") / file).read_text()
    return Registry().with_resource(_DEFINITIONS, DRAFT202012.create_resource(json.loads(text)))


def validate(document: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError: a document of ray.io/v1 is not what KubeRay takes."""
    metadata = {"$ref": f"{_DEFINITIONS}#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
    schema = _object(
        "apiVersion", "kind", "metadata", "spec",
        apiVersion={"const": "ray.io/v1"},
        kind=_STRING,
        metadata=metadata,
        spec=_SPECS[document["kind"]],
    )  # fmt: skip
    jsonschema.Draft202012Validator(schema, registry=_registry()).validate(document)
