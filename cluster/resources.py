"""What a run needs of the machine or cluster, compared with what there is, before any work."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cluster.config import PretrainConfig
from cluster.errors import LaunchError
from trainer.settings import ConfigError

NODE_SHARE = 0.001  # of a node's custom resource: it marks the node, and is not used up


def on_nodes_with(name: str) -> dict[str, float]:
    """What an actor reserves beside CPUs and GPUs to run only where this resource is."""
    return {name: NODE_SHARE} if name else {}


def local_gpus() -> int:
    """CUDA GPUs that torch sees on this machine."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def choose_device(config: PretrainConfig, gpus: int) -> str:
    """ "cpu" or "cuda", for trainers.

    Args:
        config: `runtime.device` and `runtime.precision`.
        gpus: GPUs of the machine, or of the cluster that is joined.

    Raises:
        ConfigError: GPUs are asked for and there is none, or a format that the CPU lacks.
    """
    device = config.runtime.device
    if device == "cuda" and gpus < 1:
        raise ConfigError(
            'runtime.device = "cuda": no CUDA GPU is seen; use "cpu" or "auto", or install the gpu '
            "extra on a machine with a GPU"
        )
    chosen = "cpu" if device == "cpu" or gpus < 1 else "cuda"
    if chosen == "cpu" and config.runtime.precision == "fp16":
        raise ConfigError('runtime.precision = "fp16": the CPU trains in "fp32" or "bf16"')
    return chosen


def cpus_needed(config: PretrainConfig) -> int:
    """CPUs that trainers and shards reserve."""
    runtime, memory = config.runtime, config.memory
    trainers = runtime.trainers * runtime.threads_per_trainer
    return trainers + shard_actors(config) * memory.threads_per_shard


def shard_actors(config: PretrainConfig) -> int:
    """Actors that hold shards of the run's own memory; a server's are not the run's."""
    memory = config.memory
    return 0 if memory.server else memory.shards * memory.replicas


def gpus_needed(config: PretrainConfig, device: str) -> float:
    """GPUs that trainers and shards reserve."""
    runtime, memory = config.runtime, config.memory
    trainers = runtime.trainers * runtime.gpus_per_trainer if device == "cuda" else 0.0
    return trainers + shard_actors(config) * memory.gpus_per_shard


def check_gpus(config: PretrainConfig, device: str, gpus: int) -> None:
    """Refuse what cannot be placed.

    Raises:
        ConfigError: trainers and shards need more GPUs than there are.
    """
    needed = round(gpus_needed(config, device), 4)  # as finely as Ray counts
    if needed > gpus:
        raise ConfigError(
            f"{config.runtime.trainers} trainers on {device} (runtime.gpus_per_trainer = "
            f"{config.runtime.gpus_per_trainer:g}) and {shard_actors(config)} actors of shards "
            f"(memory.gpus_per_shard = {config.memory.gpus_per_shard:g}) need {needed:g} GPUs, but "
            f"there are {gpus}; lower runtime.trainers or the shares, or set runtime.device = "
            '"cpu" or memory.gpus_per_shard = 0'
        )


def check_cluster(config: PretrainConfig, device: str, resources: Mapping[str, float]) -> None:
    """Refuse a joined cluster that can never place the run.

    Args:
        resources: all resources of the cluster, as `ray.cluster_resources()` gives them.

    Raises:
        ConfigError: too few GPUs. LaunchError: too few CPUs.
    """
    check_gpus(config, device, int(resources.get("GPU", 0)))
    places = {
        "runtime.node_resource": config.runtime.node_resource,
        "memory.node_resource": "" if config.memory.server else config.memory.node_resource,
    }
    for key, name in places.items():
        if name and resources.get(name, 0.0) <= 0:
            raise LaunchError(
                f'{key} = "{name}": no node of the cluster has it; start some with '
                f"`ray start --resources='{{\"{name}\": 1}}'`, or leave {key} empty"
            )
    cpus = int(resources.get("CPU", 0))
    if cpus_needed(config) > cpus:
        raise LaunchError(
            f"the run needs {cpus_needed(config)} CPUs ({config.runtime.trainers} trainers of "
            f"{config.runtime.threads_per_trainer}, {config.memory.shards} shards of "
            f"{config.memory.threads_per_shard}), but the cluster has {cpus}; add nodes, or lower "
            "runtime.trainers, memory.shards or their threads"
        )
