"""`pluglm in-task` behind its command: checked, the samples added, the comparison run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.adaptation.comparing import Comparison, check_comparison, run_comparison
from cluster.adaptation.conditions import (
    Condition,
    check_reads_memory,
    condition_of,
    without_memory,
)
from cluster.adaptation.in_task import (
    COPY,
    Samples,
    base_domains,
    memory_with_samples,
    read_samples,
)
from cluster.adaptation.in_task_settings import (
    CONDITIONS,
    MEMORY,
    SAMPLES,
    WITH_SAMPLES,
    InTaskConfig,
)
from cluster.adaptation.settings import NO_MEMORY
from cluster.config_sections import build_config, read_toml
from memory_server.store.store import Store
from trainer.finetune.settings import MemorySettings
from trainer.settings_fields import ConfigError

CONFIG_FILE = "in-task.toml"
Say = Callable[[str], None]


def load_in_task_config(path: Path | str, overrides: Sequence[str] = ()) -> InTaskConfig:
    """Read the TOML file, apply overrides in order, and build the configuration.

    Raises:
        ConfigError: unreadable file, bad TOML, unknown key, wrong type or impossible value.
    """
    return build_config(InTaskConfig, read_toml(Path(path)), overrides)


def check_in_task(config: InTaskConfig, *, say: Say) -> Samples:
    """Read and check everything, and write nothing.

    Returns:
        The samples as they will be added.

    Raises:
        As `check_reads_memory`, `read_samples` and `trainer.finetune.run.check`.
    """
    check_reads_memory(config.model.path)
    samples = read_samples(config, say=say)
    plain = condition_of(config, MEMORY, CONDITIONS[MEMORY], memory=config.memory)
    check_comparison(_comparison(config, [plain]), say=say)
    if SAMPLES in config.in_task.conditions and config.memory.top_k > len(samples.rows):
        raise ConfigError(
            f"memory.top_k = {config.memory.top_k}: must be at most {len(samples.rows)}, the "
            f'training samples, with "{SAMPLES}" in in_task.conditions'
        )
    return samples


def run_in_task(
    config: InTaskConfig, samples: Samples, *, resume: bool, say: Say
) -> tuple[dict[str, Any], Sequence[str]]:
    """Add the samples to a copy of the memory, and fine-tune every condition; blocks.

    Args:
        samples: what `check_in_task` returned for the configuration.
        resume: go on in a directory that holds finished seeds, which are not trained again.

    Returns:
        What comparison.json holds, and the conditions that the others are measured against.

    Raises:
        As `run_comparison` and `memory_with_samples`.
    """
    comparison = _comparison(config, in_task_conditions(config))
    found = run_comparison(
        comparison,
        resume=resume,
        prepare=lambda: memory_with_samples(config, samples, say=say),
        say=say,
    )
    return found, comparison.references


def in_task_conditions(config: InTaskConfig) -> list[Condition]:
    """The conditions that the settings name, which all read the copy in the run's directory."""
    store = Store.open(Path(config.memory.store).expanduser())
    base, samples = base_domains(config, store), (config.in_task.domain,)

    def reading(domains: tuple[str, ...], *, samples: bool) -> MemorySettings:
        place = Path(config.run.dir) / COPY
        return replace(
            config.memory,
            store=str(place),
            domains=domains,
            exclude_own_samples=samples,
            find_own_label=samples and config.in_task.find_own_label,
        )

    memories = {
        NO_MEMORY: without_memory(config.memory),
        MEMORY: reading(base, samples=False),
        WITH_SAMPLES: reading((*base, *samples), samples=True),
        SAMPLES: reading(samples, samples=True),
    }
    return [
        condition_of(config, name, CONDITIONS[name], memory=memories[name])
        for name in config.in_task.conditions
    ]


def _comparison(config: InTaskConfig, conditions: list[Condition]) -> Comparison:
    names = [condition.name for condition in conditions]
    return Comparison(
        home=Path(config.run.dir),
        conditions=conditions,
        references=[name for name in (NO_MEMORY, MEMORY) if name in names],
        settings={CONFIG_FILE: config.to_toml()},
        notes={},
    )
