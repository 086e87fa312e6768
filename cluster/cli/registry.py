"""All commands, in the order in which one uses them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from cluster.cli import (
    adapt,
    adapt_baseline,
    calibrate,
    checkpoint,
    convert,
    corpus,
    doctor,
    evaluate,
    experiment,
    explain,
    explorer,
    export,
    finetune,
    in_task,
    launch,
    memory,
    plan,
    pretrain,
    probe,
    quickstart,
    report,
    simulate,
    update,
)
from cluster.cli.command import PROGRAM, Command, UsageError

COMMANDS: tuple[Command, ...] = (
    quickstart.QUICKSTART,
    corpus.BUILD,
    corpus.INFO,
    doctor.DOCTOR,
    calibrate.CALIBRATE,
    plan.PLAN,
    pretrain.PRETRAIN,
    *launch.COMMANDS,
    simulate.SIMULATE,
    checkpoint.LIST,
    checkpoint.VERIFY,
    *memory.COMMANDS,
    evaluate.EVALUATE,
    explain.EXPLAIN,
    explorer.EXPLORER,
    probe.PROBE,
    update.UPDATE,
    finetune.FINETUNE,
    experiment.EXPERIMENT,
    adapt.ADAPT,
    adapt.COMPARE,
    adapt_baseline.BASELINE,
    in_task.IN_TASK,
    report.REPORT,
    convert.BERT,
    convert.PUBLISHED,
    convert.TO_PUBLISHED,
    export.EXPORT,
)


def members(group: str) -> list[Command]:
    """The commands whose first word is this one, apart from the command of just this name."""
    return [command for command in COMMANDS if command.name.startswith(f"{group} ")]


def is_only_a_group(word: str) -> bool:
    """Whether commands begin with this word, and none is this word alone."""
    return bool(members(word)) and all(command.name != word for command in COMMANDS)


def find_command(words: Sequence[str]) -> tuple[Command, list[str]]:
    """The command that a command line names, and the words behind its name.

    Raises:
        UsageError: there is no such command; names the nearest.
    """
    # The longest name first: what `adapt` takes could be any word, but `adapt compare` is meant so.
    for command in sorted(COMMANDS, key=lambda command: -len(command.name.split())):
        name = command.name.split()
        if list(words[: len(name)]) == name:
            return command, list(words[len(name) :])
    first = words[0]
    inside = members(first)
    if inside:
        # What the person meant by the second word can only be one of this group.
        names = [command.name.split()[1] for command in inside]
        given = words[1] if len(words) > 1 else None
        wrong = (
            f"{first}: a command is missing"
            if given is None
            else f"{first} {given}: no such command"
        )
        raise UsageError(f"{wrong}; give one of {', '.join(names)}: see `{PROGRAM} {first} --help`")
    known = list(dict.fromkeys(command.name.split()[0] for command in COMMANDS))
    near = difflib.get_close_matches(first, known, n=1)
    hint = f"did you mean `{PROGRAM} {near[0]}`?" if near else f"give one of {', '.join(known)}"
    raise UsageError(f"{first}: no such command; {hint} (see `{PROGRAM} --help`)")


def overview(group: str | None = None) -> str:
    """The map of commands: all of them, or those of one group."""
    shown = COMMANDS if group is None else members(group)
    width = max(len(command.name) for command in shown) + 2
    lines = [f"  {command.name:<{width}}{command.summary}" for command in shown]
    if group is not None:
        return "\n".join(
            [
                f"usage: {PROGRAM} {group} COMMAND ...",
                "",
                "commands:",
                *lines,
                "",
                f"`{PROGRAM} {group} COMMAND --help` tells the arguments and shows an example.",
            ]
        )
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND ...",
            "",
            "Pre-train language models that read a differentiable plug-in memory (PlugLM).",
            "",
            "commands, in the order one uses them:",
            *lines,
            "",
            "options:",
            "  -h, --help    this map",
            "  --version     the installed version",
            "  --traceback   show where in the program an error arose",
            "",
            "example:",
            f"  {PROGRAM} quickstart",
            "",
            f"`{PROGRAM} COMMAND --help` tells the arguments and shows an example.",
        ]
    )
