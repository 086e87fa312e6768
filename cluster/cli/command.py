"""What a command is, and how its arguments are parsed and refused."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

PROGRAM = "pluglm"


class UsageError(ValueError):
    """The command line itself is wrong; the message says what would be right."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of `pluglm`.

    Attributes:
        name: its words, such as "corpus build".
        summary: one short line for the map of commands.
        description: what it does, for its own help.
        example: one or more whole command lines, for its own help.
        configure: adds its arguments to a parser.
        run: does the work and returns the exit code; imports what is heavy itself.
        after_interrupt: what a person should know after Ctrl-C.
    """

    name: str
    summary: str
    description: str
    example: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    after_interrupt: str = ""

    def parser(self) -> argparse.ArgumentParser:
        """The parser of the words behind the command's name."""
        example = "\n".join(f"  {line}" for line in self.example.strip().splitlines())
        parser = _Parser(
            prog=f"{PROGRAM} {self.name}",
            description=self.description,
            epilog=f"example:\n{example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.configure(parser)
        parser.add_argument(
            "--traceback", action="store_true", help="show where in the program an error arose"
        )
        return parser


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing the usage and ending the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


_MOST_ENTRIES = 1e14


def positive(text: str) -> int:
    """An argument that is a whole number from 1 upwards."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return number


def count_of_entries(text: str) -> int:
    """An argument that is a whole number from 1 upwards, also as 1e9 or 1_000_000."""
    try:
        number = float(text.replace("_", "").replace(",", ""))
    except ValueError:
        number = 0.0
    if not 1 <= number <= _MOST_ENTRIES or number != int(number):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number from 1 to {_MOST_ENTRIES:.0e}, such as 1e9"
        )
    return int(number)


def domain_names(text: str) -> tuple[str, ...]:
    """An argument that names domains, with commas between them."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(
            f"{text!r} names no domain somewhere; give names with commas between them, such as a,b"
        )
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} names a domain twice")
    return names
