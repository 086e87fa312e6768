"""`python -m cluster.reference`: write docs/reference anew; `--check` only looks whether it is."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cluster.reference.pages import outdated, write_pages

# Of a checkout: an installed package has no docs.
_ROOT = Path(__file__).resolve().parents[2]


def main(argv: list[str] | None = None) -> int:
    """Write the pages, or check them.

    Returns:
        0; with `--check` 1 if a page is not what the code says; 2 outside of a checkout.
    """
    parser = argparse.ArgumentParser(prog="python -m cluster.reference", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if a page is out of date"
    )
    parser.add_argument(
        "--root", type=Path, default=_ROOT, metavar="DIR", help="the checkout (default: this one)"
    )
    options = parser.parse_args(argv)
    root: Path = options.root
    if not (root / "docs").is_dir():
        sys.stderr.write(f"{root} has no docs/: run this in a checkout, or name one with --root\n")
        return 2
    if not options.check:
        for path in write_pages(root):
            sys.stdout.write(f"written: {path}\n")
        return 0
    old = list(outdated(root))
    for path, difference in old:
        sys.stderr.write(f"{path} is not what the code says; run `make docs`\n{difference}\n")
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
