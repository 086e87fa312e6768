"""Laws of what a memory costs, from measured sizes: a fit, its error, a table and a plot.

    python benchmarks/memory_at_size.py --json flat.json
    python benchmarks/cost_curves.py flat.json --draw docs/images --document docs/benchmarks.md

The law of seconds, milliseconds and bytes over N entries is a + b N^p with a, b >= 0 and p one of 0
(nothing but a), 1/2 and 1, whichever errs least; errors are relative, so that small sizes count as
much as large ones. Two errors stand beside each law: the largest at a measured size, and that of
the largest size as foretold by the others alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import (
    argument_parser,
    between_markers,
    describe_machine,
    finish,
    note,
    table,
)

BEGIN, END = "<!-- cost curves -->", "<!-- end of cost curves -->"
POWERS = (0.0, 0.5, 1.0)
SECONDS = {
    "build_s": "build",
    "load_s": "load",
    "refresh_s": "refresh",
    "add_s": "add 1,000",
    "remove_s": "remove one",
    "swap_s": "swap 1,000",
    "resume_s": "resume",
}
_SIZES_FOR_A_LAW = 3


@dataclass(frozen=True, kw_only=True)
class Law:
    """fixed + slope * N ** power. `worst`: largest relative error at a size it was fitted to."""

    fixed: float
    slope: float
    power: float
    worst: float

    def at(self, entries: float) -> float:
        return float(self.fixed + self.slope * entries**self.power)

    def shown(self) -> str:
        """Per million entries, or their root's thousand: numbers that a person can compare."""
        if self.power == 0 or self.slope == 0:
            return f"{self.fixed:.3g}"
        unit = "N/10^6" if self.power == 1 else "sqrt(N)/10^3"
        scale = 1e6 if self.power == 1 else 1e3
        rising = f"{self.slope * scale:.3g} {unit}"
        return rising if self.fixed == 0 else f"{self.fixed:.3g} + {rising}"


def fit(entries: Sequence[float], values: Sequence[float]) -> Law:
    """The law that errs least.

    Args:
        entries: sizes, at least two that differ.
        values: greater than 0, one for each.

    Raises:
        ValueError: too few sizes, or a value that is not greater than 0.
    """
    sizes, found = np.asarray(entries, dtype=float), np.asarray(values, dtype=float)
    if len(set(entries)) < 2 or (found <= 0).any():
        raise ValueError(f"needs two sizes and values above 0, got {entries} and {values}")
    return min((_fitted(sizes, found, power) for power in POWERS), key=lambda law: law.worst)


def _fitted(sizes: Any, found: Any, power: float) -> Law:
    """Least squares of relative errors; a part that would be negative is left out."""
    columns = np.stack([np.ones_like(sizes), sizes**power], axis=1) / found[:, None]
    laws = []
    for used in ([0, 1], [0], [1]) if power else ([0],):
        numbers = np.zeros(2)
        solved = np.linalg.lstsq(columns[:, used], np.ones_like(found), rcond=None)[0]
        if (solved < 0).any():
            continue
        numbers[used] = solved
        fixed, slope = map(float, numbers)
        worst = float(np.abs(columns @ numbers - 1).max())
        laws.append(Law(fixed=fixed, slope=slope, power=power, worst=worst))
    # One column of positive numbers has a positive solution, so there is one.
    return min(laws, key=lambda law: law.worst)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One cost by size. `foretold`: relative error of the law of the smaller sizes at the largest;
    None where these are too few."""

    name: str
    unit: str
    entries: tuple[int, ...]
    values: tuple[float, ...]
    law: Law
    foretold: float | None


def curves(costs: Sequence[Mapping[str, Any]]) -> Iterator[Curve]:
    """Every cost that was measured at three sizes at least."""
    costs = sorted(costs, key=lambda cost: cost["entries"])
    named: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for cost in costs:
        size = int(cost["entries"])
        for key, name in SECONDS.items():
            if cost[key] is not None:
                named.setdefault((name, "s"), []).append((size, float(cost[key])))
        for batch, value in cost["search_ms"].items():
            named.setdefault((f"search, batch {batch}", "ms"), []).append((size, float(value)))
        named.setdefault(("process, one epoch", "GiB"), []).append(
            (size, cost["own_bytes"] / 2**30)
        )
        named.setdefault(("process, at most", "GiB"), []).append((size, cost["peak_bytes"] / 2**30))
        named.setdefault(("store on disk", "GiB"), []).append((size, cost["store_bytes"] / 2**30))
    for (name, unit), points in named.items():
        if len({size for size, _ in points}) < _SIZES_FOR_A_LAW:
            continue
        sizes, values = zip(*points, strict=True)
        foretold = None
        if len(set(sizes)) > _SIZES_FOR_A_LAW:
            foretold = fit(sizes[:-1], values[:-1]).at(sizes[-1]) / values[-1] - 1
        yield Curve(
            name=name,
            unit=unit,
            entries=sizes,
            values=values,
            law=fit(sizes, values),
            foretold=foretold,
        )


def read_costs(path: Path) -> dict[str, Any]:
    """What `memory_at_size.py --json` wrote, at enough sizes for a law.

    Raises:
        ValueError: it is something else, or holds too few sizes. OSError.
    """
    try:
        whole: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        sizes = {int(cost["entries"]) for cost in whole["figures"]}
        described(whole)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not what `memory_at_size.py --json` writes ({type(error).__name__}: "
            f"{error}); give such a file"
        ) from error
    if len(sizes) < _SIZES_FOR_A_LAW:
        raise ValueError(
            f"{path} has {len(sizes)} sizes, and a law needs {_SIZES_FOR_A_LAW}; run "
            "memory_at_size.py with more --entries"
        )
    return whole


def described(whole: Mapping[str, Any]) -> str:
    """Markdown: what was measured, and each cost's law."""
    given, found = whole["arguments"], list(curves(whole["figures"]))
    parts = whole["figures"][-1]["bytes_per_entry"]
    told = ", ".join(f"{size:.0f} of {part}" for part, size in parts.items())
    rows = [
        [
            f"{curve.name}, {curve.unit}",
            f"{curve.values[0]:.3g}",
            f"{curve.values[-1]:.3g}",
            curve.law.shown(),
            f"{100 * curve.law.worst:.0f} %",
            "-" if curve.foretold is None else f"{100 * curve.foretold:+.0f} %",
        ]
        for curve in found
    ]
    sizes = sorted(cost["entries"] for cost in whole["figures"])
    head = ["cost", f"at {sizes[0]:,}", f"at {sizes[-1]:,}", "law", "largest error",
            "largest size foretold"]  # fmt: skip
    return (
        f"`--index {given['index']} --key-dtype {given['key_dtype']}`, {len(sizes)} sizes, H="
        f"{given['hidden']}, 64 tokens, K=5, on {describe_machine(whole['machine'])}. Bytes per "
        f"entry: {told}.\n\n{table(head, rows)}"
    )


def draw(directory: Path, wholes: Sequence[Mapping[str, Any]]) -> None:
    """`cost_curves.png` and `.svg`: seconds, milliseconds and GiB by size; points and laws."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "pluglm"  # the same file from the same figures
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    panels = {"s": "seconds", "ms": "milliseconds of a search", "GiB": "GiB"}
    for axis, (unit, label) in zip(axes, panels.items(), strict=True):
        for whole in wholes:
            kind = whole["arguments"]["index"]
            for curve in curves(whole["figures"]):
                if curve.unit != unit:
                    continue
                name = curve.name if len(wholes) == 1 else f"{kind}: {curve.name}"
                (points,) = axis.plot(
                    curve.entries, curve.values, marker="o", linestyle="", label=name
                )
                between = np.geomspace(curve.entries[0], curve.entries[-1], 50)
                axis.plot(between, [curve.law.at(n) for n in between], color=points.get_color())
        axis.set(xscale="log", yscale="log", xlabel="entries", ylabel=label)
        axis.grid(visible=True, alpha=0.3)
        axis.legend(fontsize="x-small")
    directory.mkdir(parents=True, exist_ok=True)
    figure.savefig(directory / "cost_curves.png", dpi=120)
    figure.savefig(directory / "cost_curves.svg", metadata={"Date": None})


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="what memory_at_size.py --json wrote")
    parser.add_argument("--draw", type=Path, metavar="DIR", help="write the plot there")
    parser.add_argument(
        "--document", type=Path, metavar="FILE", help=f"tables go there, between {BEGIN} and {END}"
    )
    args = parser.parse_args()
    page = ""
    try:
        wholes = [read_costs(path) for path in args.files]
        if args.document is not None:
            page = args.document.read_text(encoding="utf-8")
            between_markers(page, "", BEGIN, END)  # before anything is drawn
    except OSError as error:
        parser.error(f"{error.filename} cannot be read: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))
    text = "\n\n".join(described(whole) for whole in wholes)
    print(text)
    if args.draw is not None:
        draw(args.draw, wholes)
        note(f"written: {args.draw / 'cost_curves.png'} and .svg")
    if args.document is not None:
        args.document.write_text(
            between_markers(page, text, BEGIN, END), encoding="utf-8", newline="\n"
        )
        note(f"written: {args.document}")
    laws = {
        str(path): list(curves(whole["figures"]))
        for path, whole in zip(args.files, wholes, strict=True)
    }
    finish(args.json, wholes[0]["machine"], args, laws)


if __name__ == "__main__":
    main()
