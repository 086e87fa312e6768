"""docs/planning.md shows what the command prints. `python -m
tests.cluster.planning.test_planning_docs` writes it anew."""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

from cluster.cli import main

ROOT = Path(__file__).parents[3]
DOCUMENT = ROOT / "docs" / "planning.md"
WAYS = {
    "exact int8": "--shards-on gpu",
    "IVF-PQ": "--shards-on host memory.index=pq",
    "mixed": "--shards-on host",
}
GPUS = (8, 64, 512)
GIB = 1 << 30


def rewritten(text: str) -> str:
    """The document with every plan in it as the command prints it now."""
    text = re.sub(
        r"<!-- table -->\n.*?<!-- end -->",
        lambda _: f"<!-- table -->\n\n{plans_table()}\n\n<!-- end -->",
        text,
        flags=re.S,
    )
    return re.sub(
        r"^```\n\$ pluglm (plan [^\n]*)\n.*?^```",
        lambda found: f"```\n$ pluglm {found[1]}\n{printed(found[1])}```",
        text,
        flags=re.S | re.M,
    )


def printed(words: str) -> str:
    """What `pluglm` prints."""
    out = io.StringIO()
    given = [str(ROOT / w) if w.startswith("configs/") else w for w in shlex.split(words)]
    with contextlib.redirect_stdout(out):
        assert main(given) in (0, 1)
    return out.getvalue()


def plans_table() -> str:
    """A row for each way and number of GPUs."""
    lines = [
        "| GPUs | how | trainers + shards | fullest place | step, s | waiting for the memory | "
        "refresh, s | cost of 1,000 steps | fits |",
        "|---:|---|---|---|---:|---:|---:|---:|---|",
    ]
    for gpus in GPUS:
        for name, words in WAYS.items():
            told = json.loads(
                printed(
                    f"plan --entries 1e9 --gpu H100-80 --gpus {gpus} --price-per-gpu-hour 2.5 "
                    f"{words} --json"
                )
            )
            lines.append(f"| {gpus} | {name} | {row(told)} |")
    return "\n".join(lines)


def row(told: dict[str, Any]) -> str:
    """The cells of one plan."""
    places = [place for place in told["places"] if place["usable_bytes"]]
    fullest = max(places, key=lambda p: p["needed_bytes"] / p["usable_bytes"])
    needed, usable = (fullest[f"{which}_bytes"] / GIB for which in ("needed", "usable"))
    step, placement = told["step"], told["placement"]
    return " | ".join(
        [
            f"{placement['trainers']} + {placement['shards']}",
            f"{fullest['name']}: {needed:,.0f} of {usable:,.0f} GiB",
            f"{step['seconds']:,.2f}",
            f"{100 * step['overhead']:.0f} %",
            f"{told['refresh']['seconds']:,.1f}",
            f"{told['cost']['per_1000_steps']:,.0f}",
            "yes" if told["fits"] else "**no**",
        ]
    )


def test_the_document_shows_what_the_command_prints() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.count("$ pluglm plan") == 3
    assert rewritten(text) == text


if __name__ == "__main__":
    DOCUMENT.write_text(rewritten(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
