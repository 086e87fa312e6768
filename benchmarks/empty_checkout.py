"""Wall time and peak memory of `make quickstart` from an empty checkout.

Clones the committed state of this repository into a new directory and runs `make setup` there (it
downloads the packages; pip's cache is used if there is one), then `make quickstart`.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path

from harness import REPOSITORY, argument_parser, begin, finish, note, table
from watch import Watched, watch


def _row(name: str, watched: Watched) -> list[str]:
    pss = "not told" if watched.peak_pss_gib is None else f"{watched.peak_pss_gib:.2f}"
    return [name, f"{watched.seconds:.0f}", f"{watched.peak_rss_gib:.2f}", pss]


def _arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--make",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="for make, such as TORCH_INDEX=URL",
    )
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    facts = begin()
    figures: dict[str, Watched] = {}
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        checkout = home / "pluglm"
        subprocess.run(
            ["git", "clone", "--quiet", "--no-local", REPOSITORY, checkout], check=True, cwd=home
        )
        for target in ("setup", "quickstart"):
            note(f"make {target} ...")
            log = home / f"{target}.log"
            figures[target] = watch(["make", target, *args.make], cwd=checkout, log=log)
        note(log.read_text(encoding="utf-8", errors="replace")[-4000:])
    rows = [_row(f"make {target}", watched) for target, watched in figures.items()]
    print(table(["command", "wall seconds", "peak RSS, GiB", "peak PSS, GiB"], rows))
    print(f"\nin all {sum(watched.seconds for watched in figures.values()):.0f} s")
    finish(args.json, facts, args, {name: asdict(watched) for name, watched in figures.items()})


if __name__ == "__main__":
    main()
