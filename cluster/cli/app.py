"""The console script: find the command, run it, and turn whatever goes wrong into one line."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from cluster.cli.command import PROGRAM, Command
from cluster.cli.failures import Terminated, explain
from cluster.cli.registry import find_command, is_only_a_group, overview

HELP = ("-h", "--help")
TRACEBACK = "--traceback"
BROKEN_PIPE = 141  # what a shell reports for a command that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run `pluglm` with these words, by default the process's own.

    Returns:
        0; 1 for a failure, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    running: list[Command] = []
    with _sigterm_interrupts():
        try:
            code = _dispatch(words, running)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            # The reader (head, less) has gone. Python would complain once more when it flushes.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE
        except (Exception, KeyboardInterrupt) as error:
            if TRACEBACK in words:
                traceback.print_exc()
            failure = explain(error)
            message = failure.message
            if isinstance(error, KeyboardInterrupt) and running and running[0].after_interrupt:
                message += f"; {running[0].after_interrupt}"
            print(f"{PROGRAM}: error: {message}", file=sys.stderr)
            return failure.code


def _dispatch(words: list[str], running: list[Command]) -> int:
    while words[:1] == [TRACEBACK]:
        words = words[1:]
    if not words or words[0] in HELP:
        print(overview())
        return 0
    if words[0] == "--version":
        print(f"{PROGRAM} {_version()}")
        return 0
    if is_only_a_group(words[0]) and words[1:2] and words[1] in HELP:
        print(overview(words[0]))
        return 0
    command, rest = find_command(words)
    try:
        # Intermixed, so that `pretrain CONFIG --resume key=value` means what it says.
        options = command.parser().parse_intermixed_args(rest)
    except SystemExit as end:  # --help
        return int(end.code or 0)
    running.append(command)
    return command.run(options)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(PROGRAM)
    except PackageNotFoundError:
        return "(not installed: run from a checkout)"


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM unwinds a command like Ctrl-C, so that it leaves no process and no lock behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
