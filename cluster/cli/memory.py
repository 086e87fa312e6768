"""`pluglm memory`: all its commands, in the order in which one uses them."""

from __future__ import annotations

from cluster.cli import (
    memory_domains,
    memory_edit,
    memory_history,
    memory_look,
    memory_serve,
    memory_stats,
    memory_upkeep,
    memory_usage,
)
from cluster.cli.command import Command

COMMANDS: tuple[Command, ...] = (
    memory_look.INFO,
    memory_look.SEARCH,
    memory_usage.USAGE,
    memory_edit.ADD,
    memory_edit.REMOVE,
    memory_edit.UPDATE,
    memory_domains.PLUG,
    memory_domains.UNPLUG,
    memory_domains.SWAP,
    memory_history.LOG,
    memory_history.DIFF,
    memory_history.TAG,
    memory_history.ROLLBACK,
    memory_upkeep.COMPACT,
    memory_upkeep.VERIFY,
    memory_upkeep.GC,
    memory_serve.SERVE,
    memory_serve.SERVERS,
    memory_serve.SHOW,
    memory_stats.STATS,
    memory_serve.CANCEL,
    memory_serve.STOP,
)
