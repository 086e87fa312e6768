"""Manifests for KubeRay: a RayCluster that stays, or a RayJob that brings its own.

Fields are those of the operator's custom resources, ray.io/v1 of KubeRay 1.6.
"""

from __future__ import annotations

import posixpath
import shlex
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import yaml

from cluster.errors import LaunchError
from cluster.launch.plan import LaunchPlan
from trainer.corpus.remote import is_url

_CONFIG_DIR = "/etc/pluglm"
_CONFIG_FILE = "config.toml"


def kuberay_manifests(
    plan: LaunchPlan,
    *,
    image: str,
    memory: str,
    claim: str,
    mount: str = "/data",
    namespace: str = "default",
    job: bool = True,
    retries: int = 3,
) -> str:
    """YAML of a ConfigMap with the run's configuration, and of a RayJob or RayCluster.

    Args:
        image: has this project and its dependencies installed.
        memory: of each pod, such as "64Gi".
        claim: a PersistentVolumeClaim that all pods can write to; holds corpus, store and runs.
        mount: where it is mounted.
        job: a RayJob; else a RayCluster alone, to which runs are submitted.
        retries: how often the job is started again after it ended without being complete.

    Raises:
        LaunchError: an image or claim that is empty, or run directories outside of the mount.
    """
    if not image.strip() or not claim.strip():
        raise LaunchError("give an image, and a claim that all pods can write to")
    data = plan.config.data
    needed = [("run.dir", plan.config.run.dir), ("data.corpus", data.corpus)]
    for key, path in (*needed, *(("data.more_corpora", more) for more in data.more_corpora)):
        below = posixpath.normpath(path).startswith(f"{posixpath.normpath(mount)}/")
        if not below and not (key != "run.dir" and is_url(path)):
            raise LaunchError(
                f"{key} = {path!r}: must lie below {mount}, where all pods see the claim {claim!r}"
            )
    meta = {"name": plan.name, "namespace": namespace}
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": meta,
        "data": {_CONFIG_FILE: plan.config.to_toml()},
    }
    cluster = _cluster(plan, image=image, memory=memory, claim=claim, mount=mount)
    if not job:
        ray: dict[str, Any] = {
            "apiVersion": "ray.io/v1",
            "kind": "RayCluster",
            "metadata": meta,
            "spec": cluster,
        }
    else:
        ray = {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": meta,
            "spec": {
                "entrypoint": entrypoint(),
                "submissionMode": "K8sJobMode",
                # The head has no CPU of its own for Ray; the driver only watches.
                "entrypointNumCpus": 0,
                "shutdownAfterJobFinishes": True,
                "ttlSecondsAfterFinished": 3600,
                "backoffLimit": retries,
                "rayClusterSpec": cluster,
            },
        }
    dumped: str = yaml.safe_dump_all([config_map, ray], sort_keys=False)
    return dumped


def entrypoint() -> str:
    """What the driver runs inside the cluster; it goes on with the run after a retry."""
    words = ["pluglm", "pretrain", f"{_CONFIG_DIR}/{_CONFIG_FILE}", "cluster.address=auto"]
    return shlex.join([*words, "--auto-resume"])


# The run's driver is a process of the head's pod, whose first process, `ray start`, keeps SIGTERM
# for itself and ends at once. So the run is told before, and waited for.
_TELL_RUN = (
    "pkill -TERM -f '[p]luglm pretrain' || exit 0; "
    "while pgrep -f '[p]luglm pretrain' >/dev/null; do sleep 1; done"
)


def _cluster(
    plan: LaunchPlan, *, image: str, memory: str, claim: str, mount: str
) -> dict[str, Any]:
    resources: dict[str, Any] = {"cpu": str(plan.cpus), "memory": memory}
    if plan.gpus:
        resources["nvidia.com/gpu"] = str(plan.gpus)
    small = {"cpu": "2", "memory": "8Gi"}
    return {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": _pod(plan, "ray-head", image, small, claim, mount, before_stop=_TELL_RUN),
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": plan.nodes,
                "minReplicas": plan.nodes,
                "maxReplicas": plan.nodes,
                "rayStartParams": {"num-cpus": str(plan.cpus)},
                "template": _pod(plan, "ray-worker", image, resources, claim, mount),
            }
        ],
    }


def _pod(
    plan: LaunchPlan,
    container: str,
    image: str,
    resources: Mapping[str, Any],
    claim: str,
    mount: str,
    *,
    before_stop: str = "",
) -> dict[str, Any]:
    hook = {"preStop": {"exec": {"command": ["bash", "-c", before_stop]}}}
    return {
        "spec": {
            "containers": [
                {
                    **({"lifecycle": hook} if before_stop else {}),
                    "name": container,
                    "image": image,
                    "workingDir": mount,
                    "env": [
                        {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
                        # A busy machine starves the memory's shards at Ray's own niceness.
                        {"name": "RAY_worker_niceness", "value": "0"},
                    ],
                    "resources": {"limits": dict(resources), "requests": dict(resources)},
                    "volumeMounts": [
                        {"name": "shared", "mountPath": mount},
                        {"name": "config", "mountPath": _CONFIG_DIR, "readOnly": True},
                        {"name": "shm", "mountPath": "/dev/shm"},
                    ],
                }
            ],
            # A run that is told to go writes a checkpoint first.
            "terminationGracePeriodSeconds": int(plan.config.recovery.grace_s) + 30,
            "volumes": [
                {"name": "shared", "persistentVolumeClaim": {"claimName": claim}},
                {"name": "config", "configMap": {"name": plan.name}},
                # Shared key tables and Ray's object store.
                {"name": "shm", "emptyDir": {"medium": "Memory"}},
            ],
        }
    }
