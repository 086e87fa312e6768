"""From a comparison's settings to one fine-tuning per condition."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.adaptation.settings import (
    BASELINE,
    BOTH,
    CONDITIONS,
    DAPT,
    DOMAIN,
    GENERAL,
    NO_MEMORY,
    AdaptationConfig,
)
from cluster.finetune import FinetuneConfig
from memory_server.store.store import Store
from model import PlugLMConfig
from trainer.finetune.settings import FinetuneSettings, MemorySettings
from trainer.settings_fields import ConfigError

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One row of a comparison.

    Attributes:
        what: what is different in it, in a few words.
        config: its fine-tuning, in a directory of its own.
    """

    name: str
    what: str
    config: FinetuneConfig


def condition_of(
    settings: FinetuneSettings,
    name: str,
    what: str,
    *,
    memory: MemorySettings,
    model: str | None = None,
) -> Condition:
    """The fine-tuning of `settings` with another memory, or another model, in `run.dir/NAME`."""
    config = FinetuneConfig(
        task=settings.task,
        model=settings.model if model is None else replace(settings.model, path=model),
        memory=memory,
        train=settings.train,
        evaluate=settings.evaluate,
        run=replace(settings.run, dir=str(Path(settings.run.dir) / name)),
    )
    return Condition(name=name, what=what, config=config)


def without_memory(memory: MemorySettings) -> MemorySettings:
    """The settings of a model that reads nothing."""
    return replace(
        memory,
        store="",
        domains=(),
        exclude_own_samples=False,
        retrieval_loss_weight=0.0,
        right_entry="",
        find_own_label=False,
    )


def adaptation_conditions(config: AdaptationConfig) -> list[Condition]:
    """The conditions that the settings name, in their order.

    Raises:
        UnknownDomain: a domain is not plugged; names those that are. StoreError: no usable store.
        ConfigError: a baseline that is no plain BERT. Else as `check_reads_memory`.
    """
    compare = config.compare
    if any(name not in (BASELINE, DAPT) for name in compare.conditions):
        check_reads_memory(config.model.path)
    domains = {GENERAL: compare.general, BOTH: (*compare.general, *compare.domain)}
    domains[DOMAIN] = compare.domain
    models = {BASELINE: compare.baseline, DAPT: compare.dapt}
    if any(name in domains for name in compare.conditions):
        store = Store.open(Path(config.memory.store).expanduser())
        store.manifest().of_domains((*compare.general, *compare.domain))
    found = []
    for name in compare.conditions:
        if name in domains:
            memory = replace(config.memory, domains=domains[name])
        else:
            memory = without_memory(config.memory)
        if name in models:
            _check_plain(f"compare.{name}", models[name])
        found.append(
            condition_of(config, name, CONDITIONS[name], memory=memory, model=models.get(name))
        )
    return found


def check_reads_memory(path: str) -> None:
    """Refuse a `model.path` that would be the same model under every condition.

    Raises:
        FileNotFoundError: no model there. ConfigError: it has no memory layer.
    """
    if not (Path(path).expanduser() / "config.json").is_file():
        raise FileNotFoundError(
            f"model.path = {path!r}: holds no config.json; give the directory of a PlugLM, such "
            "as RUN_DIR/model"
        )
    if not _memory_layers(_raw_config(path)):
        raise ConfigError(
            f"model.path = {path!r}: reads no memory, so there is nothing to compare; give a "
            "PlugLM with memory layers, such as RUN_DIR/model"
        )


def reference_names(compared: list[str]) -> list[str]:
    """The conditions that the others are measured against, of those that there are."""
    return [name for name in (NO_MEMORY, GENERAL) if name in compared]


def size_note(first: str, other: str) -> str:
    """What is not of the same size in two models; empty: nothing that their files tell."""
    mine, theirs = _raw_config(first), _raw_config(other)
    parts = [
        f"{name} {theirs[name]} instead of {mine[name]}"
        for name in _SIZES
        if name in mine and name in theirs and mine[name] != theirs[name]
    ]
    return f"not of the same size as {first}: {', '.join(parts)}" if parts else ""


def _check_plain(key: str, path: str) -> None:
    if _memory_layers(_raw_config(path)):
        raise ConfigError(
            f"{key} = {path!r}: is a PlugLM with memory layers, which is what it is compared with; "
            "give plain BERT of the same size"
        )


def _memory_layers(raw: dict[str, Any]) -> int:
    """How many memory layers a model has, by its config.json; other models than PlugLM: none."""
    if raw.get("model_type") != PlugLMConfig.model_type:
        return 0
    return int(raw.get("num_memory_layers", PlugLMConfig.num_memory_layers))


def _raw_config(path: str) -> dict[str, Any]:
    """A model's config.json; empty where it is missing, which fine-tuning's own check names."""
    file = Path(path).expanduser() / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}
