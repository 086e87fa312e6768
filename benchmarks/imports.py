"""How long a package takes to import, what `pluglm --help` takes, and how many lines there are.

Every import is in a fresh process, which pays for the interpreter and for whatever the package
imports; `torch` alone, and with `transformers`, are the peers. Lines are those of files that git
knows, with comments and blank ones.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

from harness import (
    REPOSITORY,
    Spread,
    argument_parser,
    begin,
    finish,
    positive,
    seconds,
    spread_of_ratios,
    table,
    turn_by_turn,
)

PEER = "import torch"
STATEMENTS = (
    PEER,
    "import torch, transformers",
    "import model",
    "import memory_server",
    "import trainer",
    "import cluster",
)
HELP = "pluglm --help"
FOLDERS = ("model", "memory_server", "trainer", "cluster", "benchmarks", "tests", "docs")


def run(*words: str | Path) -> None:
    subprocess.run([*map(str, words)], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)


def lines_by_folder() -> dict[str, int]:
    """Lines of Python, and of Markdown in docs."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    found = dict.fromkeys(FOLDERS, 0)
    for name in listed:
        folder, _, rest = name.partition("/")
        if rest and folder in found and name.endswith((".py", ".md")):
            text = (REPOSITORY / name).read_text(encoding="utf-8")
            found[folder] += len(text.splitlines())
    return found


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--repeats", type=positive, default=5)
    args = parser.parse_args()
    facts = begin()
    calls = {
        statement: partial(seconds, partial(run, sys.executable, "-c", statement))
        for statement in STATEMENTS
    }
    program = Path(sys.executable).with_name("pluglm")
    calls[HELP] = partial(seconds, partial(run, program, "--help"))
    times = turn_by_turn(calls, repeats=args.repeats)
    figures = [
        {
            "what": what,
            "seconds": Spread.of(times[what]),
            "ratio": spread_of_ratios(times[what], times[PEER]),
        }
        for what in calls
    ]
    lines = lines_by_folder()
    rows = [[one["what"], one["seconds"].shown(), one["ratio"].shown()] for one in figures]
    print(f"Medians (range) of {args.repeats} fresh processes\n")
    print(table(["", "seconds", f"over {PEER}"], rows) + "\n")
    print(table(["folder", "lines"], [[folder, f"{count:,}"] for folder, count in lines.items()]))
    finish(args.json, facts, args, {"imports": figures, "lines": lines})


if __name__ == "__main__":
    main()
