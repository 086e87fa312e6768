"""Write the references into docs/reference, or with --check say which are not as written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.reference.api import api_reference
from cluster.reference.commands import commands_reference
from cluster.reference.configuration import configuration_reference

PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": configuration_reference,
    "commands.md": commands_reference,
    "api.md": api_reference,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if --check found a page that differs."""
    parser = argparse.ArgumentParser(prog="python -m cluster.reference", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--to", type=Path, default=Path("docs/reference"), metavar="DIR")
    options = parser.parse_args(argv)
    stale = []
    for name, write in PAGES.items():
        path, text = options.to / name, write()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(str(path))
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if stale:
        done = "not as the program has it (run `make docs`)" if options.check else "written"
        sys.stderr.write(f"{', '.join(stale)}: {done}\n")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
