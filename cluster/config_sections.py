"""From sections of plain values to a checked configuration, and back to TOML, for every command.

A configuration is a frozen dataclass whose fields are sections; a section is a frozen dataclass
that checks itself (`trainer.settings_fields`).
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from cluster.config_text import (
    KnownKeys,
    parse_override,
    to_field_type,
    toml_value,
    unknown_key,
    unknown_section,
)
from trainer.settings_fields import ConfigError, shown

Config = TypeVar("Config")


def build_config(
    kind: type[Config], tree: Mapping[str, Any], overrides: Sequence[str] = ()
) -> Config:
    """Build the checked configuration from sections of plain values.

    Args:
        kind: the configuration's class.
        tree: section name to key to value, as `tomllib` gives it; missing keys take defaults.
        overrides: ``section.key=value``; values as in TOML, bare words are strings, the last
            one of a key wins.

    Raises:
        ConfigError: unknown key, wrong type or impossible value.
    """
    sections = get_type_hints(kind)
    known = known_keys_of(kind)
    given: dict[str, dict[str, Any]] = {name: {} for name in known}
    for name, table in tree.items():
        if name not in known:
            raise ConfigError(unknown_section(name, known))
        if not isinstance(table, Mapping):
            raise ConfigError(
                f"{name} = {shown(table)}: {name} is a section; write [{name}] and its keys "
                "below it"
            )
        for key, value in table.items():
            if key not in known[name]:
                raise ConfigError(unknown_key(f"{name}.{key}", known))
            given[name][key] = to_field_type(value, known[name][key])
    for override in overrides:
        name, key, value = parse_override(override, known)
        given[name][key] = value
    return kind(**{name: _build_section(sections[name], given[name]) for name in known})


def known_keys_of(kind: type[Any]) -> KnownKeys:
    """Section name to key to declared type, in the order of declaration."""
    return {
        section.name: {item.name: hints[item.name] for item in fields(section_kind)}
        for section in fields(kind)
        for section_kind in [get_type_hints(kind)[section.name]]
        for hints in [get_type_hints(section_kind)]
    }


def sections_to_toml(config: Any) -> str:
    """A configuration as TOML, every key written out; loads back equal."""
    parts = []
    for section in fields(config):
        values = getattr(config, section.name)
        lines = [
            f"{item.name} = {toml_value(getattr(values, item.name))}" for item in fields(values)
        ]
        parts.append("\n".join([f"[{section.name}]", *lines]))
    return "\n\n".join(parts) + "\n"


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's sections.

    Raises:
        ConfigError: unreadable, or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        reason = "no such file; give a TOML file, such as one of those in configs/"
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text at byte {error.start}; save it as UTF-8"
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    except tomllib.TOMLDecodeError as error:
        reason = f"not valid TOML: {error}"
    raise ConfigError(f"{path}: {reason}")


def _build_section(section: Any, values: Mapping[str, Any]) -> Any:
    for item in fields(section):
        required = item.default is MISSING and item.default_factory is MISSING
        if required and item.name not in values:
            key = f"{section.SECTION}.{item.name}"
            raise ConfigError(f"{key} is missing: set it in the file or pass {key}=VALUE")
    return section(**values)
