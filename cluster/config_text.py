"""The text side of the configuration: overrides, TOML literals, and messages about unknown keys."""

import difflib
import json
import re
import tomllib
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from trainer.settings_fields import ConfigError

KnownKeys = Mapping[str, Mapping[str, Any]]
"""Section name to key to declared type."""


def parse_override(override: str, known: KnownKeys) -> tuple[str, str, Any]:
    """Split ``section.key=value`` and give the value the type of its field.

    Values are TOML literals (``8``, ``1e-3``, ``true``, ``[0.9, 0.98]``, ``"text"``); anything
    else is a string as it stands. For a key that holds a string, so is a number or a date.

    Returns:
        (section, key, value)

    Raises:
        ConfigError: no ``=``, or an unknown key.
    """
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    if not equals:
        raise ConfigError(
            f"{override!r}: write overrides as section.key=value, such as memory.top_k=8"
        )
    section, _, key = dotted.partition(".")
    if key not in known.get(section, {}):
        raise ConfigError(unknown_key(dotted, known))
    hint = known[section][key]
    value = parse_literal(text.strip())
    if hint is str and not isinstance(value, str):
        value = text.strip()
    return section, key, to_field_type(value, hint)


def parse_literal(text: str) -> Any:
    """The TOML literal that ``text`` spells; text that spells none is returned as it is."""
    try:
        parsed = tomllib.loads(f"literal = {text}")
    except tomllib.TOMLDecodeError:
        return text
    # A line break in the text could have begun a second key.
    return parsed["literal"] if len(parsed) == 1 else text


def to_field_type(value: Any, hint: Any) -> Any:
    """What TOML lacks: whole numbers become floats, and lists tuples, where a field wants them.

    A value of another type is returned as it is, for the section's own check to name.
    """
    if hint is float and type(value) is int:
        return float(value)
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(to_field_type(number, get_args(hint)[0]) for number in value)
    return value


def toml_value(value: bool | int | float | str | tuple[int | float, ...]) -> str:
    """One value as a TOML literal, on one line; reads back equal."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped as well.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    return repr(value)


def unknown_section(name: str, known: KnownKeys) -> str:
    """The message for a section, or a key outside any section, that does not exist."""
    holders = [f"{section}.{name}" for section, keys in known.items() if name in keys]
    near = difflib.get_close_matches(name, list(known), n=1)
    if holders:
        hint = f"did you mean {' or '.join(holders)}?"
    elif near:
        hint = f"did you mean [{near[0]}]?"
    else:
        hint = f"the sections are {', '.join(known)}"
    return f"{name}: unknown section; {hint}"


def unknown_key(dotted: str, known: KnownKeys) -> str:
    """The message for ``section.key`` that does not exist: the nearest key that does, if any."""
    section, _, key = dotted.partition(".")
    near = _nearest_key(section, key or section, known)
    if near:
        hint = f"did you mean {near}?"
    elif section in known:
        hint = f"[{section}] has {', '.join(known[section])}"
    else:
        hint = f"the sections are {', '.join(known)}"
    return f"{dotted}: unknown key; {hint}"


def _nearest_key(section: str, key: str, known: KnownKeys) -> str | None:
    def likeness(candidate: tuple[str, str]) -> float:
        other, name = candidate
        # The section decides between equally similar keys; it never makes up for a different key.
        same_section = difflib.SequenceMatcher(None, section, other).ratio()
        return difflib.SequenceMatcher(None, key, name).ratio() + 0.05 * same_section

    best = max(((other, name) for other in known for name in known[other]), key=likeness)
    return ".".join(best) if likeness(best) >= 0.65 else None


def is_host_and_port(address: str) -> bool:
    """Whether the text is ``host:port`` with a port from 1 to 65535."""
    match = re.fullmatch(r"([A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})", address)
    return match is not None and 1 <= int(match[2]) <= 65535
