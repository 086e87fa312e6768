"""What a machine or cluster cannot place is refused before any work."""

from __future__ import annotations

import re

import pytest

from cluster.config import PretrainConfig, config_from_mapping, load_config
from cluster.errors import LaunchError
from cluster.presets import preset
from cluster.resources import (
    check_cluster,
    check_gpus,
    choose_device,
    cpus_needed,
    gpus_needed,
    on_nodes_with,
)
from trainer.settings import ConfigError


def config(*overrides: str) -> PretrainConfig:
    return config_from_mapping({"data": {"corpus": "c"}}, overrides)


@pytest.mark.parametrize(
    ("device", "gpus", "chosen"),
    [("auto", 0, "cpu"), ("auto", 2, "cuda"), ("cpu", 2, "cpu"), ("cuda", 1, "cuda")],
)
def test_auto_takes_gpus_where_there_are_some(device: str, gpus: int, chosen: str) -> None:
    assert choose_device(config(f"runtime.device={device}"), gpus) == chosen


def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"runtime\.device = .cuda.: no CUDA GPU"):
        choose_device(config("runtime.device=cuda"), 0)


def test_fp16_is_refused_where_auto_means_the_cpu() -> None:
    with pytest.raises(ConfigError, match="fp16"):
        choose_device(config("runtime.precision=fp16"), 0)


def test_trainers_take_whole_gpus_and_shards_their_fraction() -> None:
    wanted = config("runtime.trainers=2", "memory.shards=4", "memory.gpus_per_shard=0.25")
    assert gpus_needed(wanted, "cuda") == 3.0
    assert gpus_needed(wanted, "cpu") == 1.0
    with pytest.raises(ConfigError, match=r"need 3 GPUs, but there are 2; lower runtime.trainers"):
        check_gpus(wanted, "cuda", 2)
    check_gpus(wanted, "cuda", 3)


def test_a_trainer_and_a_shard_have_one_gpu_together() -> None:
    shares = "runtime.trainers=1", "memory.shards=1", "memory.gpus_per_shard=0.3"
    check_gpus(config(*shares, "runtime.gpus_per_trainer=0.7"), "cuda", 1)
    with pytest.raises(ConfigError, match=r"need 1\.3 GPUs, but there are 1; .* or the shares"):
        check_gpus(config(*shares), "cuda", 1)
    with pytest.raises(ConfigError, match=r"more than 0\.5 each"):
        config("runtime.trainers=2", "runtime.gpus_per_trainer=0.5")


def test_a_joined_cluster_with_too_few_cpus_is_refused() -> None:
    wanted = config("runtime.threads_per_trainer=3", "memory.threads_per_shard=2")
    assert cpus_needed(wanted) == 10
    check_cluster(wanted, "cpu", {"CPU": 10.0})
    with pytest.raises(LaunchError, match=re.escape("needs 10 CPUs (2 trainers of 3, 2 shards")):
        check_cluster(wanted, "cpu", {"CPU": 9.0})


@pytest.mark.parametrize("section", ["runtime", "memory"])
def test_nodes_that_are_named_must_be_there(section: str) -> None:
    wanted = config(f"{section}.node_resource=apart")
    check_cluster(wanted, "cpu", {"CPU": 99.0, "apart": 2.0})
    says = f"{section}.node_resource = .apart.: no node of the cluster has it; start some with"
    with pytest.raises(LaunchError, match=says):
        check_cluster(wanted, "cpu", {"CPU": 99.0})
    elsewhere = config("memory.node_resource=apart", "memory.server=wiki")
    check_cluster(elsewhere, "cpu", {"CPU": 99.0})  # a server's shards are placed already
    assert on_nodes_with("apart") == {"apart": 0.001}
    assert on_nodes_with("") == {}


def test_the_papers_recipe_fits_the_papers_machine() -> None:
    recipe = load_config(preset("pluglm-base"))
    assert choose_device(recipe, 8) == "cuda"
    check_gpus(recipe, "cuda", 8)


@pytest.mark.parametrize("name", ["quickstart", "synthetic"])
def test_the_quickstarts_fit_a_laptop_without_a_gpu(name: str) -> None:
    shipped = load_config(preset(name))
    check_gpus(shipped, choose_device(shipped, 0), 0)


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(ConfigError, match="named nonsense"):
        preset("nonsense")
