"""The reference of commands, out of their own parsers."""

from __future__ import annotations

import argparse
from inspect import cleandoc

from cluster.cli.command import PROGRAM, Command
from cluster.cli.registry import COMMANDS
from cluster.reference.markdown import GENERATED, cell

_INTRODUCTION = f"""\
`{PROGRAM} COMMAND --help` tells the same. Exit codes: 0; 1 for a failure, 2 for bad input, 75 where
a run stopped at a signal and is to be started again, 130 after Ctrl-C, 143 after SIGTERM.
`--traceback` shows where in the program an error arose."""


def commands_reference() -> str:
    """Markdown: every command with its arguments."""
    listed = "\n".join(
        f"| [`{command.name}`](#{_anchor(command)}) | {cell(command.summary)} |"
        for command in COMMANDS
    )
    contents = f"| command | what it does |\n|---|---|\n{listed}"
    parts = [f"# Commands\n\n{GENERATED}\n\n{_INTRODUCTION}\n\n{contents}"]
    parts.extend(_described(command) for command in COMMANDS)
    return "\n\n".join(parts) + "\n"


def _anchor(command: Command) -> str:
    return f"{PROGRAM} {command.name}".replace(" ", "-")


def _described(command: Command) -> str:
    parser = command.parser()
    actions = [
        action
        for action in parser._actions  # argparse has no other way to ask for them
        if action.help != argparse.SUPPRESS and action.dest not in ("help", "traceback")
    ]
    rows = [f"| {_spelled(action)} | {_meaning(action)} |" for action in actions]
    parts = [f"## {PROGRAM} {command.name}", cleandoc(parser.description or command.summary)]
    if rows:
        parts.append("\n".join(["| argument | meaning |", "|---|---|", *rows]))
    if parser.epilog:
        parts.append(f"```\n{cleandoc(parser.epilog)}\n```")
    return "\n\n".join(parts)


def _spelled(action: argparse.Action) -> str:
    value = action.metavar or (
        "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    )
    shown = " ".join(value) if isinstance(value, tuple) else str(value)
    if not action.option_strings:
        spelled = shown
    elif action.nargs == 0:
        spelled = ", ".join(action.option_strings)
    else:
        spelled = f"{', '.join(action.option_strings)} {shown}"
    if action.nargs in ("+", "*"):
        spelled += " ..."
    return f"`{cell(spelled)}`"


def _meaning(action: argparse.Action) -> str:
    text = cell((action.help or "").replace("%%", "%"))
    return f"{text} (needed)" if action.option_strings and action.required else text
