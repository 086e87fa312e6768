"""The reference of commands, out of their own parsers.

It asks the parsers for their arguments instead of printing their help, whose lines are broken at
the width of the terminal and which is worded differently by each version of Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from cluster.cli.command import PROGRAM, Command
from cluster.cli.registry import COMMANDS
from cluster.reference.markdown import GENERATED, block, cell, code_cell, prose

_INTRODUCTION = f"""\
`{PROGRAM} COMMAND --help` tells the same. Exit codes: 0; 1 for a failure, 2 for bad input, 75 where
a run stopped at a signal and is to be started again, 130 after Ctrl-C, 143 after SIGTERM.
`--traceback`, which every command takes, shows where in the program an error arose."""

_OF_ALL = ("help", "traceback")


def commands_reference(commands: Sequence[Command] = COMMANDS) -> str:
    """Markdown: every command with its arguments."""
    listed = "\n".join(
        f"| [`{command.name}`](#{_anchor(command)}) | {cell(command.summary)} |"
        for command in commands
    )
    contents = f"| command | what it does |\n|---|---|\n{listed}"
    parts = [f"# Commands\n\n{GENERATED}\n\n{_INTRODUCTION}\n\n{contents}"]
    parts.extend(_described(command) for command in commands)
    return "\n\n".join(parts) + "\n"


def _anchor(command: Command) -> str:
    return f"{PROGRAM} {command.name}".replace(" ", "-")


def _described(command: Command) -> str:
    parser = command.parser()
    parts = [f"## {PROGRAM} {command.name}", block(usage(parser)), prose(command.description)]
    parts.extend(_arguments(parser))
    if command.after_interrupt:
        parts.append(f"After Ctrl-C: {cell(command.after_interrupt)}.")
    parts.append(f"For example:\n\n{block(command.example.strip())}")
    return "\n\n".join(parts)


def usage(parser: argparse.ArgumentParser) -> str:
    """The arguments that must be given, on one line; what may be given is only hinted at."""
    # argparse has no public way to ask for a parser's arguments and groups.
    needed_one = [group for group in parser._mutually_exclusive_groups if group.required]
    one_of_several = {id(action) for group in needed_one for action in group._group_actions}
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    words = [parser.prog]
    words += [_with_value(action) for action in shown if not action.option_strings]
    words += [
        _with_value(action)
        for action in shown
        if action.option_strings and action.required and id(action) not in one_of_several
    ]
    for group in needed_one:
        words.append(f"({' | '.join(_with_value(action) for action in group._group_actions)})")
    if any(a.option_strings and not a.required and a.dest not in _OF_ALL for a in shown):
        words.append("[options]")
    return " ".join(words)


def _arguments(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A table for each group of arguments, the parser's own groups under their titles."""
    own = [parser._positionals, parser._optionals]
    others = [group for group in parser._action_groups if group not in own]
    tables = [("", [action for group in own for action in group._group_actions])]
    tables += [(group.title or "", group._group_actions) for group in others]
    for title, actions in tables:
        rows = [
            f"| {code_cell(_spelled(action))} | {_meaning(action, parser)} |"
            for action in actions
            if action.help != argparse.SUPPRESS and action.dest not in _OF_ALL
        ]
        if rows:
            head = f"{title[0].upper()}{title[1:]}:\n\n" if title else ""
            yield head + "\n".join(["| argument | meaning |", "|---|---|", *rows])


def _spelled(action: argparse.Action) -> str:
    """All spellings of an argument, and its value."""
    return ", ".join([*action.option_strings[:-1], _with_value(action)])


def _with_value(action: argparse.Action) -> str:
    name = action.option_strings[-1] if action.option_strings else ""
    return " ".join(word for word in (name, _value(action)) if word)


def _value(action: argparse.Action) -> str:
    """How the value is written: SOURCE, {a,b}, [KEY=VALUE ...]; empty where there is none."""
    if action.nargs == 0:
        return ""
    if action.metavar is not None:
        name = " ".join(action.metavar) if isinstance(action.metavar, tuple) else action.metavar
    elif action.choices is not None:
        name = "{" + ",".join(map(str, action.choices)) + "}"
    else:
        name = action.dest.upper() if action.option_strings else action.dest
    if action.nargs == "+":
        return f"{name} ..."
    if action.nargs == "*":
        return f"[{name} ...]"
    if action.nargs == "?":
        return f"[{name}]"
    return " ".join([name] * action.nargs) if isinstance(action.nargs, int) else name


def _meaning(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    """The help with its defaults filled in, as argparse fills them, and what it leaves unsaid."""
    given = {name: value for name, value in vars(action).items() if value is not argparse.SUPPRESS}
    text = cell((action.help or "") % (given | {"prog": parser.prog}))
    notes = []
    if action.option_strings and action.required:
        notes.append("needed")
    if action.metavar is not None and action.choices is not None:
        notes.append(f"one of {', '.join(map(str, action.choices))}")
    return " ".join([text, *(f"({note})" for note in notes)]).strip()
