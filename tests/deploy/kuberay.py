"""What KubeRay 1.6 accepts in the fields that our manifests may use, as JSON Schema.

The published definitions of ray.io/v1 are 1.2 MB each, nearly all of them Kubernetes' own pod
template written out. So this holds KubeRay's own fields, by its API reference, and the templates
are validated by Kubernetes' published schema.
"""

from __future__ import annotations

from typing import Any


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


_ANY: dict[str, Any] = {"type": "object"}
_STRING = {"type": "string"}
_STRINGS = {"type": "object", "additionalProperties": _STRING}
_COUNT = {"type": "integer", "minimum": 0}
_FLAG = {"type": "boolean"}

_CLUSTER = _object(
    ("headGroupSpec",),
    rayVersion=_STRING,
    suspend=_FLAG,
    authOptions=_object(mode={"enum": ["disabled", "token"]}, secretName=_STRING),
    enableInTreeAutoscaling=_FLAG,
    autoscalerOptions=_object(
        image=_STRING,
        imagePullPolicy=_STRING,
        env={"type": "array"},
        envFrom={"type": "array"},
        volumeMounts={"type": "array"},
        idleTimeoutSeconds=_COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        resources=_ANY,
        securityContext=_ANY,
        version={"enum": ["v1", "v2"]},
    ),
    headServiceAnnotations=_STRINGS,
    headGroupSpec=_object(
        ("rayStartParams", "template"),
        serviceType=_STRING,
        headService=_ANY,
        enableIngress=_FLAG,
        rayStartParams=_STRINGS,
        template=_ANY,
    ),
    workerGroupSpecs={
        "type": "array",
        "items": _object(
            ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
            groupName=_STRING,
            replicas=_COUNT,
            minReplicas=_COUNT,
            maxReplicas=_COUNT,
            numOfHosts=_COUNT,
            idleTimeoutSeconds=_COUNT,
            suspend=_FLAG,
            rayStartParams=_STRINGS,
            template=_ANY,
            scaleStrategy=_ANY,
        ),
    },
)

SPECS = {
    "RayJob": _object(
        entrypoint=_STRING,
        runtimeEnvYAML=_STRING,
        jobId=_STRING,
        metadata=_STRINGS,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        entrypointNumCpus={"type": "number"},
        entrypointNumGpus={"type": "number"},
        entrypointResources=_STRING,
        activeDeadlineSeconds=_COUNT,
        backoffLimit=_COUNT,
        shutdownAfterJobFinishes=_FLAG,
        ttlSecondsAfterFinished=_COUNT,
        suspend=_FLAG,
        clusterSelector=_STRINGS,
        submitterPodTemplate=_ANY,
        submitterConfig=_object(backoffLimit=_COUNT),
        deletionStrategy=_ANY,
        managedBy=_STRING,
        rayClusterSpec=_CLUSTER,
    ),
    "RayService": _object(
        serveConfigV2=_STRING,
        serveService=_ANY,
        upgradeStrategy=_ANY,
        excludeHeadPodFromServeSvc=_FLAG,
        rayClusterDeletionDelaySeconds=_COUNT,
        rayClusterConfig=_CLUSTER,
    ),
}
