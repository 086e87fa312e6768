"""How a section of settings is declared and checked: documented fields, types, choices, ranges.

A section is a frozen, keyword-only dataclass with a class attribute ``SECTION`` (its name in the
TOML file). Every field carries its help, and its allowed range, as metadata, so one check serves
all sections and a reference can be generated from the declarations. Values may be ``bool``,
``int``, ``float``, ``str``, a ``Literal`` of strings, a fixed-length ``tuple`` of floats, or a
``tuple[X, ...]`` of one or more numbers or strings (of none, too, if that is its default).
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import field as dataclass_field
from dataclasses import fields
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that cannot work; the message is one line: given, allowed, what to do."""


def described(
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    may_be_empty: bool = False,
) -> Mapping[str, Any]:
    """Metadata of a field: what it means (with its unit) and the range that is allowed.

    Args:
        help: one or two sentences, for people; names the unit where there is one.
        minimum: smallest allowed number.
        maximum: largest allowed number.
        above: exclusive lower bound.
        below: exclusive upper bound.
        may_be_empty: a tuple of any length may have none.

    Returns:
        A read-only mapping for ``dataclasses.field(metadata=...)``. Bounds of a tuple's field
        hold for each of its numbers.
    """
    bounds = {"minimum": minimum, "maximum": maximum, "above": above, "below": below}
    given: dict[str, Any] = {name: b for name, b in bounds.items() if b is not None}
    if may_be_empty:
        given["may_be_empty"] = True
    return MappingProxyType({"help": help, **given})


def documented(default: T, help: str, **bounds: Any) -> T:
    """A dataclass field with a default, its help and the rest as ``described`` takes it."""
    declared: T = dataclass_field(default=default, metadata=described(help, **bounds))
    return declared


def check_section(section: Any) -> None:
    """Check every field of a section against its declared type, choices and bounds.

    Raises:
        ConfigError: the first field that does not fit, named ``section.key``.
    """
    hints = get_type_hints(type(section))
    for item in fields(section):
        key = f"{section.SECTION}.{item.name}"
        check_value(key, getattr(section, item.name), hints[item.name], item.metadata)


def check_value(key: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> None:
    """Check one value; ``key`` is the dotted name that the error states.

    Raises:
        ConfigError: wrong type, not among the choices, or out of bounds.
    """
    if get_origin(hint) is Literal:
        _check_choice(key, value, get_args(hint))
    elif get_origin(hint) is tuple:
        kind, length = get_args(hint)[0], tuple_length(hint)
        fits = isinstance(value, tuple) and (
            len(value) == length if length else bool(value) or "may_be_empty" in metadata
        )
        if not fits:
            raise ConfigError(f"{key} = {shown(value)}: must be {describe_type(hint)}")
        for number in value:
            _check_scalar(key, number, kind, metadata, given=value)
    else:
        _check_scalar(key, value, hint, metadata, given=value)


def tuple_length(hint: Any) -> int | None:
    """How many numbers a tuple's field holds; None: as many as one likes."""
    return None if Ellipsis in get_args(hint) else len(get_args(hint))


def describe_type(hint: Any) -> str:
    """The type in words, as errors and references say it."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(f'"{choice}"' for choice in get_args(hint))
    if get_origin(hint) is tuple:
        count = tuple_length(hint)
        if count is None:
            return _LISTS[get_args(hint)[0]]
        return f"a list of {count} numbers, such as [{', '.join(['0.9'] * count)}]"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    return words[hint]


_LISTS = {
    int: "a list of one or more whole numbers, such as [0, 1, 2]",
    float: "a list of numbers, such as [0.7, 0.3]",
    str: 'a list of strings, such as ["a", "b"]',
}


def describe_bounds(metadata: Mapping[str, Any]) -> str:
    """The allowed range in words; empty when nothing bounds the field."""
    if "minimum" in metadata and "maximum" in metadata:
        return f"from {_in_full(metadata['minimum'])} to {_in_full(metadata['maximum'])}"
    words = {"minimum": "at least", "above": "above", "maximum": "at most", "below": "below"}
    return " and ".join(
        f"{word} {_in_full(metadata[bound])}" for bound, word in words.items() if bound in metadata
    )


def _in_full(bound: float) -> str:
    # A large whole number is an exact limit, such as that of a seed; 4.29497e+09 is not.
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def shown(value: Any) -> str:
    """A value as the configuration spells it, for messages."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"' if value.isprintable() and '"' not in value else repr(value)
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(shown(item) for item in value)}]"
    return repr(value)


def _check_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f'; did you mean "{near[0]}"?' if near else ""
    allowed = ", ".join(f'"{choice}"' for choice in choices)
    raise ConfigError(
        f"{key} = {shown(value)}: must be {'one of ' if choices[1:] else ''}{allowed}{hint}"
    )


def _check_scalar(key: str, value: Any, hint: Any, metadata: Mapping[str, Any], given: Any) -> None:
    accepted = (int, float) if hint is float else (hint,)
    # bool is an int to Python, but `top_k = true` is a mistake.
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{key} = {shown(given)}: must be {describe_type(hint)}")
    if isinstance(value, str):
        _check_text(key, value)
    elif not math.isfinite(value):
        raise ConfigError(f"{key} = {shown(given)}: must be a finite number")
    elif not _within(value, metadata):
        raise ConfigError(f"{key} = {shown(given)}: must be {describe_bounds(metadata)}")


def _check_text(key: str, value: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"{key} = {shown(value)}: must be valid Unicode text") from None


def _within(value: float, bounds: Mapping[str, float]) -> bool:
    return bounds.get("minimum", -math.inf) <= value <= bounds.get(
        "maximum", math.inf
    ) and bounds.get("above", -math.inf) < value < bounds.get("below", math.inf)
