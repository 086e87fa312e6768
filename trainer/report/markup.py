"""HTML by construction: whatever is not `Html` already is escaped when it enters a tag."""

from __future__ import annotations

from html import escape

VOID = frozenset({"meta", "br", "hr", "input"})


class Html(str):
    """Text that is HTML already. Only this module and constants make it."""

    __slots__ = ()


def text(value: object) -> Html:
    """Any value as escaped text; `Html` stays as it is, None is empty."""
    if isinstance(value, Html):
        return value
    if value is None:
        return Html("")
    # A lone surrogate (a damaged file) cannot be written as UTF-8.
    return Html(escape(str(value).encode("utf-8", "replace").decode()))


def join(*parts: object) -> Html:
    """The parts one after the other, each escaped unless it is `Html`."""
    return Html("".join(text(part) for part in parts))


def tag(element: str, /, *children: object, **attributes: object) -> Html:
    """One element.

    Args:
        element: its name.
        *children: escaped unless they are `Html`; None is left out.
        **attributes: ``class_`` and ``for_`` lose their underscore, other underscores become
            hyphens (``aria_label``); None and False leave the attribute out, True sets it bare.
    """
    opening = element
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        opening += " " + key.rstrip("_").replace("_", "-")
        if value is not True:
            opening += f'="{text(str(value))}"'
    if element in VOID:
        return Html(f"<{opening}>")
    return Html(f"<{opening}>{join(*children)}</{element}>")
