"""What every launcher is told: the run, and the nodes it is to have."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.config import PretrainConfig
from cluster.errors import LaunchError
from cluster.resources import cpus_needed, gpus_needed

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,46}[a-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """One run on so many equal nodes.

    Attributes:
        config: of the run. config_path: its file; overrides: key=value words for the command.
        name: lower-case letters, digits and hyphens; of the job.
        nodes: how many. cpus, gpus: of each.
        directory: absolute, on every node; where the command runs, and relative paths begin.
        setup: shell lines that make `pluglm` and `ray` available, such as activating a venv.
    """

    config: PretrainConfig
    config_path: Path
    overrides: Sequence[str] = ()
    name: str = "pluglm"
    nodes: int = 1
    cpus: int = 8
    gpus: int = 0
    directory: Path = field(default_factory=Path.cwd)
    setup: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Refuse what could never start.

        Raises:
            LaunchError: a name that no scheduler takes, or fewer CPUs or GPUs than the run needs.
        """
        if not _NAME.fullmatch(self.name):
            raise LaunchError(
                f"name {self.name!r}: give lower-case letters, digits and hyphens, at most 48"
            )
        if self.gpus < 0:
            raise LaunchError(f"gpus {self.gpus}: give 0 or more for each node")
        for line in self.setup:
            if "\n" in line:
                raise LaunchError(f"setup {line!r}: give one line at a time")
        device = "cuda" if self.gpus and self.config.runtime.device != "cpu" else "cpu"
        needed = {
            "CPU": float(cpus_needed(self.config)),
            "GPU": gpus_needed(self.config, device),
        }
        there = {"CPU": self.nodes * self.cpus, "GPU": self.nodes * self.gpus}
        for kind, count in needed.items():
            if count > there[kind]:
                raise LaunchError(
                    f"the run needs {count:g} {kind}s ({self.config.runtime.trainers} trainers, "
                    f"{self.config.memory.shards} shards), but {self.nodes} nodes of "
                    f"{there[kind] // self.nodes} have {there[kind]}; ask for more nodes, or lower "
                    "runtime.trainers or memory.shards"
                )
        if self.config.runtime.device == "cuda" and not self.gpus:
            raise LaunchError('runtime.device = "cuda": the nodes are to have no GPU; ask for some')

    def command(self, *more: str) -> list[str]:
        """The words of `pluglm pretrain`; it goes on with the run if it is queued again."""
        words = ["pluglm", "pretrain", str(self.config_path), *self.overrides, *more]
        return [*words, "--auto-resume"]

    def shell_command(self, *more: str) -> str:
        """The same for a shell; words of `more` are taken as they are, to be expanded there."""
        fixed = shlex.join(self.command()[:-1])
        return " ".join([fixed, *more, "--auto-resume"])
