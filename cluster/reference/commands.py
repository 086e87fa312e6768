"""docs/reference/commands.md: every command of `pluglm`, its arguments, its help and exit codes."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator, Sequence

from cluster.cli.app import BROKEN_PIPE
from cluster.cli.command import PROGRAM, Command
from cluster.cli.failures import BAD_INPUT, CTRL_C, FAILED, TERMINATED
from cluster.cli.registry import COMMANDS
from cluster.reference.markdown import block, code, link, page, paragraphs, prose, table
from cluster.stop import REQUEUE

_INTRODUCTION = f"""\
# Commands

What `{PROGRAM}` understands. `{PROGRAM} --help` is the map of commands, `{PROGRAM} memory --help`
that of a group, and `{PROGRAM} COMMAND --help` tells what is below. Options and arguments may stand
in any order; an option is written in full. `{PROGRAM} --version` tells the version; every command
takes `--traceback`, which shows where in the program an error arose."""

_CODES: tuple[tuple[int, str], ...] = (
    (0, "done"),
    (
        FAILED,
        "it failed, and the message says how; or what was examined is not in order (`doctor`, "
        "`checkpoint verify`, `memory verify`)",
    ),
    (BAD_INPUT, "refused: a command line, configuration, path, name or file that cannot work"),
    (
        REQUEUE,
        "`pretrain` (or `quickstart`) was asked to go by SIGTERM or SIGUSR1: queue the same "
        "command again, `pretrain` with `--auto-resume` (sysexits.h calls it EX_TEMPFAIL)",
    ),
    (CTRL_C, "ended by Ctrl-C; `pretrain` has written a checkpoint if there was a step to save"),
    (BROKEN_PIPE, "who read the output has gone (`head`, `less`)"),
    (TERMINATED, "ended by SIGTERM"),
)


def commands_page() -> str:
    """The page as Markdown."""
    lines = [_INTRODUCTION, ""]
    lines += table(
        ["command", "what it does"],
        [(link(code(_full(each)), _full(each)), prose(each.summary)) for each in COMMANDS],
    )
    lines += ["", "## Exit codes", ""]
    lines += table(["code", "meaning"], [(code(str(number)), text) for number, text in _CODES])
    lines += [
        "",
        "Errors are one line on standard error; figures that other programs read (`--json`) are on "
        "standard output.",
    ]
    for command in COMMANDS:
        lines += ["", f"## {_full(command)}", "", *_command(command)]
    return page(lines)


def _full(command: Command) -> str:
    return f"{PROGRAM} {command.name}"


def _command(command: Command) -> Iterator[str]:
    parser = command.parser()
    taken = [action for action in parser._actions if action.dest not in ("help", "traceback")]
    places = [action for action in taken if not action.option_strings]
    options = [action for action in taken if action.option_strings]
    yield from block(f"{_full(command)} {_usage(options, places)}".rstrip())
    yield ""
    yield from paragraphs(inspect.cleandoc(command.description))
    for title, actions in (("argument", places), ("option", options)):
        if actions:
            yield ""
            yield from table(
                [title, "meaning"],
                [(_spelled(action), _meaning(action, parser)) for action in actions],
            )
    if command.after_interrupt:
        yield from ["", f"After Ctrl-C: {prose(command.after_interrupt)}."]
    yield ""
    yield from block(command.example)


def _usage(options: Sequence[argparse.Action], places: Sequence[argparse.Action]) -> str:
    """One line: required options in full, places in their order, other options as one word."""
    required = [_with_value(action, action.option_strings[-1]) for action in options
                if action.required]  # fmt: skip
    rest = ["[options]"] if len(required) < len(options) else []
    return " ".join([*(_place(action) for action in places), *required, *rest])


def _place(action: argparse.Action) -> str:
    name = _value(action)
    return {"?": f"[{name}]", "*": f"[{name} ...]", "+": f"{name} [{name} ...]"}.get(
        str(action.nargs), name
    )


def _spelled(action: argparse.Action) -> str:
    if not action.option_strings:
        return code(_place(action))
    return ", ".join(code(_with_value(action, flag)) for flag in action.option_strings)


def _with_value(action: argparse.Action, flag: str) -> str:
    if action.nargs == 0:
        return flag
    name = _value(action)
    return f"{flag} {name} ..." if action.nargs in ("+", "*") else f"{flag} {name}"


def _value(action: argparse.Action) -> str:
    if isinstance(action.metavar, str):
        return action.metavar
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return action.dest if not action.option_strings else action.dest.upper()


def _meaning(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    told = prose((action.help or "") % {**vars(action), "prog": parser.prog})
    if action.choices is not None and isinstance(action.metavar, str):
        told += f"; one of {', '.join(code(str(choice)) for choice in action.choices)}"
    if action.option_strings and action.required:
        told += " (required)"
    elif _is_told(action.default) and "default" not in told:
        told += f" (default: {action.default})"
    others = [
        code(other.option_strings[-1])
        for group in parser._mutually_exclusive_groups
        if action in group._group_actions
        for other in group._group_actions
        if other is not action and other.option_strings
    ]
    return f"{told}; not with {' or '.join(others)}" if others else told


def _is_told(default: object) -> bool:
    """Whether an option that is left out stands for something that a person would ask about."""
    return default != "" and type(default) in (int, float, str)
