"""`pluglm finetune` behind its command: the configuration, one process per directory, the table."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from cluster.cli.text import table
from cluster.config_sections import build_config, read_toml, sections_to_toml
from cluster.run_lock import run_lock
from trainer.export import write_text
from trainer.finetune.run import check, claim, finetune
from trainer.finetune.settings import FinetuneSettings

CONFIG_FILE = "finetune.toml"
_HEADINGS = {
    "test": "test",
    "test_without_memory": "test, memory unplugged",
    "dev": "dev",
    "dev_without_memory": "dev, memory unplugged",
}
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(FinetuneSettings):
    """Everything that `pluglm finetune` needs to know."""

    def to_toml(self) -> str:
        """This configuration as TOML, every key written out; loads back equal."""
        return sections_to_toml(self)


def load_finetune_config(path: Path | str, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """Read a task's TOML file, apply overrides in order, and build the checked configuration.

    Args:
        path: a TOML file with the sections of `FinetuneConfig`; missing keys take defaults.
        overrides: ``section.key=value``; the last one of a key wins.

    Raises:
        ConfigError: unreadable file, bad TOML, unknown key, wrong type or impossible value.
    """
    return build_config(FinetuneConfig, read_toml(Path(path)), overrides)


def check_finetuning(config: FinetuneConfig, *, say: Say) -> None:
    """Read and check everything, and train nothing; raises as `trainer.finetune.run.check`."""
    quiet_transformers()
    check(config, say=say)


def run_finetuning(config: FinetuneConfig, *, resume: bool, say: Say) -> dict[str, Any] | None:
    """Fine-tune every seed that is not finished, alone in its directory; blocks.

    Returns:
        What results.json holds; None in the processes beside the first one.

    Raises:
        LaunchError: another process works there. Else as `check`, `claim` and `finetune` of
        `trainer.finetune.run`.
    """
    quiet_transformers()
    if config.run.wandb != "disabled":
        # The Trainer's wandb callback reads these.
        os.environ["WANDB_MODE"] = config.run.wandb
        os.environ["WANDB_PROJECT"] = config.run.wandb_project
    home = Path(config.run.dir)
    new = not home.exists()
    # Under torchrun the processes of one run share its directory; the first one holds it.
    first = int(os.environ.get("RANK", "0")) == 0
    try:
        with run_lock(home) if first else contextlib.nullcontext():
            heard = say if first else _silent
            checked = check(config, say=heard)
            if first:
                claim(config, resume=resume)
                write_text(home / CONFIG_FILE, config.to_toml())
            return finetune(config, checked, say=heard)
    finally:
        if first and new:
            _leave_nothing(home)


def results_table(results: dict[str, Any]) -> str:
    """Each metric's mean and deviation over the seeds, for a terminal."""
    measured = list(results["summary"])
    metrics = list(next(iter(results["summary"].values())))
    rows = [
        [metric, *(_mean_and_deviation(results["summary"][name][metric]) for name in measured)]
        for metric in metrics
    ]
    count = len(results["seeds"])
    over = f"{count} seeds, mean ± deviation" if count > 1 else "one seed"
    head = [over, *(_HEADINGS[name] for name in measured)]
    return table(head, rows, most=[30] * len(head), right=range(1, len(head)))


def _mean_and_deviation(found: dict[str, Any]) -> str:
    mean = f"{found['mean']:.4f}"
    return mean if found["std"] is None else f"{mean} ± {found['std']:.4f}"


def _leave_nothing(home: Path) -> None:
    """Remove a directory that a refused run made and wrote nothing to."""
    if home.is_dir() and {path.name for path in home.iterdir()} <= {".lock"}:
        (home / ".lock").unlink(missing_ok=True)
        home.rmdir()


def quiet_transformers() -> None:
    """Its bars and reports are for people who load models by hand."""
    # DeepSpeed, which accelerate imports where it is installed, would look for it and tell.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _silent(line: str) -> None:
    """What the other processes of a run say."""
