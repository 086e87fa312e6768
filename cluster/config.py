"""The whole configuration of a run: read from TOML with dotted overrides, written back as TOML.

`PretrainConfig` is the trainer's settings plus the `cluster` section. It is checked when built
and never changes afterwards; the resolved one goes into the run's directory and loads back equal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from cluster.config_sections import build_config, known_keys_of, read_toml, sections_to_toml
from cluster.config_text import KnownKeys, is_host_and_port
from trainer.settings import TrainSettings
from trainer.settings_fields import ConfigError, check_section, documented, shown

__all__ = ["ClusterConfig", "ConfigError", "PretrainConfig", "config_from_mapping", "load_config"]


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where Ray comes from and what this run asks of it."""

    SECTION: ClassVar[str] = "cluster"

    address: str = documented(
        "local",
        'Ray: "local" starts one for this run, "auto" joins the one of this machine, '
        '"host:port" joins that one.',
    )
    object_store_mib: int = documented(
        128, "MiB of Ray's object store, where this run starts Ray.", minimum=75
    )
    dashboard: bool = documented(False, "Start Ray's dashboard, where this run starts Ray.")
    ray_temp_dir: str = documented(
        "", "Absolute directory of Ray's own files, where this run starts Ray; empty: Ray's choice."
    )
    num_cpus: int = documented(
        0, "CPUs that Ray may plan with, where this run starts Ray; 0: as needed.", minimum=0
    )

    def __post_init__(self) -> None:
        check_section(self)
        if self.address not in ("local", "auto") and not is_host_and_port(self.address):
            raise ConfigError(
                f'cluster.address = {shown(self.address)}: must be one of "local", "auto" or '
                "host:port, such as head-node:6379"
            )
        if self.ray_temp_dir and not Path(self.ray_temp_dir).is_absolute():
            raise ConfigError(
                f"cluster.ray_temp_dir = {shown(self.ray_temp_dir)}: must be an absolute path, "
                "or empty"
            )


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """What a run does when trainers, nodes or the network fail, and when it is asked to go."""

    SECTION: ClassVar[str] = "recovery"

    max_restarts: int = documented(
        3,
        "Times in a row that trainers are started again from the last checkpoint without reaching "
        "a new one, after a trainer died, a node was lost, or nothing moved; 0: never.",
        minimum=0,
    )
    placement_timeout_s: float = documented(
        120.0, "Seconds to wait for the CPUs and GPUs of all trainers, at the start.", above=0
    )
    wait_for_nodes_s: float = documented(
        600.0, "The same after a fault, when a lost node may come back.", above=0
    )
    min_trainers: int = documented(
        0,
        "After waiting in vain, go on with fewer trainers, but at least so many; their number must "
        "divide optim.batch_size. 0: never fewer.",
        minimum=0,
    )
    stall_timeout_s: float = documented(
        1800.0,
        "Seconds without a step, a refresh or a checkpoint under way after which trainers are "
        "started again.",
        above=0,
    )
    grace_s: float = documented(
        60.0,
        "Seconds that SIGTERM or SIGUSR1 leaves for a checkpoint; after them the run ends without.",
        above=0,
    )

    def __post_init__(self) -> None:
        check_section(self)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainSettings):
    """Everything that `pluglm pretrain` needs to know."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recovery.min_trainers > self.runtime.trainers:
            raise ConfigError(
                f"recovery.min_trainers = {self.recovery.min_trainers}: must be at most "
                f"runtime.trainers = {self.runtime.trainers}"
            )

    def to_toml(self) -> str:
        """This configuration as TOML, every key written out; loads back equal."""
        return sections_to_toml(self)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Read a TOML file, apply overrides in order, and build the checked configuration.

    Args:
        path: a TOML file with the sections of `PretrainConfig`; missing keys take defaults.
        overrides: ``section.key=value``; values as in TOML, bare words are strings, the last
            one of a key wins.

    Raises:
        ConfigError: unreadable file, bad TOML, unknown key, wrong type or impossible value.
    """
    return config_from_mapping(read_toml(Path(path)), overrides)


def config_from_mapping(tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> PretrainConfig:
    """Build the checked configuration from sections of plain values.

    Args:
        tree: section name to key to value, as `tomllib` gives it.
        overrides: as in `load_config`.

    Raises:
        ConfigError: unknown key, wrong type or impossible value.
    """
    return build_config(PretrainConfig, tree, overrides)


def known_keys() -> KnownKeys:
    """Section name to key to declared type, in the order of declaration."""
    return known_keys_of(PretrainConfig)
