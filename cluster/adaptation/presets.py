"""From a TOML file to a comparison that can be checked and run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.adaptation.comparing import Comparison
from cluster.adaptation.conditions import adaptation_conditions, reference_names, size_note
from cluster.adaptation.settings import BASELINE, DAPT, AdaptationConfig
from cluster.config_sections import build_config, read_toml

CONFIG_FILE = "adaptation.toml"


def load_adaptation_config(path: Path | str, overrides: Sequence[str] = ()) -> AdaptationConfig:
    """Read a comparison's TOML file, apply overrides in order, and build the configuration.

    Raises:
        ConfigError: unreadable file, bad TOML, unknown key, wrong type or impossible value.
    """
    return build_config(AdaptationConfig, read_toml(Path(path)), overrides)


def adaptation_comparison(config: AdaptationConfig) -> Comparison:
    """The comparison that a configuration asks for. Raises as `adaptation_conditions`."""
    conditions = adaptation_conditions(config)
    names = [condition.name for condition in conditions]
    notes = {
        condition.name: size_note(config.model.path, condition.config.model.path)
        for condition in conditions
        if condition.name in (BASELINE, DAPT)
    }
    return Comparison(
        home=Path(config.run.dir),
        conditions=conditions,
        references=reference_names(names),
        settings={CONFIG_FILE: config.to_toml()},
        notes=notes,
    )
