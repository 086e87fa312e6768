"""Numbers as people read them, and the ticks of an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def number(value: float | None) -> str:
    """Three significant figures, thousands apart; a dash for a missing number."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1000 or value == int(value):
        shown = f"{value:,.0f}"
    elif size >= 1e-3:
        shown = f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}"
    else:
        shown = f"{value:.1e}"
    return shown.replace("-", MINUS)


def fixed(value: float | None, digits: int) -> str:
    """A fixed number of decimals, for columns that are compared."""
    return DASH if value is None else f"{value:,.{digits}f}".replace("-", MINUS)


def signed(value: float | None, digits: int) -> str:
    """A difference, with its sign."""
    return DASH if value is None else f"{value:+,.{digits}f}".replace("-", MINUS)


def percent(share: float | None, digits: int = 0) -> str:
    """A share of 1 as a percentage."""
    return DASH if share is None else f"{100 * share:.{digits}f} %".replace("-", MINUS)


def seconds(value: float | None) -> str:
    """A duration in the unit that suits it."""
    if value is None:
        return DASH
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 90:
        return f"{value:.1f} s"
    minutes = round(value / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def byte_unit(largest: float) -> tuple[str, float]:
    """The unit to show sizes up to ``largest`` in, and its number of bytes."""
    power = 0
    while largest >= 1024 ** (power + 1) and power + 1 < len(BYTE_UNITS):
        power += 1
    return BYTE_UNITS[power], float(1024**power)


def plural(count: int, noun: str, many: str | None = None) -> str:
    """``1 refresh``, ``2 refreshes``."""
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round positions (1, 2 or 5 times a power of ten apart) that cover low..high."""
    span = high - low
    if span <= 0:
        span = abs(high) or 1.0
        low, high = low - span / 2, high + span / 2
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * m for m in (1, 2, 5, 10) if power * m * about >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_labels(positions: Sequence[float]) -> list[str]:
    """Labels with as many decimals as the distance between ticks needs."""
    apart = positions[1] - positions[0] if len(positions) > 1 else 1.0
    if apart >= 1e6:
        return [f"{p / 1e6:,g}M".replace("-", MINUS) for p in positions]
    if 0 < apart < 1e-4:
        return [f"{p:.0e}".replace("-", MINUS) for p in positions]
    digits = max(0, -math.floor(math.log10(apart) + 1e-9))
    return [f"{p:,.{digits}f}".replace("-", MINUS) for p in positions]
