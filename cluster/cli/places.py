"""What a path on the command line is: a memory's store, a corpus or a run's directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.config import ConfigError, PretrainConfig, load_config
from trainer.corpus.info import MANIFEST as CORPUS_FILE
from trainer.corpus.info import load_corpus_info
from trainer.corpus.remote import corpus_memory, is_url, location

CONFIG_FILE = "config.toml"
STORE_FILE = "store.json"
MODEL = "model"
WORLD_MEMORY = Path("world") / "memory"


def is_run(path: Path) -> bool:
    """Whether a run wrote its configuration there."""
    return (path / CONFIG_FILE).is_file()


def no_run(path: Path) -> FileNotFoundError:
    """The refusal of a path that is no run directory; names the runs that lie in it."""
    inside = sorted(child for child in path.glob("*") if is_run(child))
    if inside:
        hint = f"did you mean {' or '.join(str(run) for run in inside[:3])}?"
    else:
        hint = "give the directory that `pluglm pretrain` wrote to"
    return FileNotFoundError(f"{path} is no run directory (it has no {CONFIG_FILE}); {hint}")


def run_config(run_dir: Path, overrides: Sequence[str] = ()) -> PretrainConfig:
    """The configuration that a run wrote down, with overrides.

    Raises:
        FileNotFoundError: it is no run directory. ConfigError: a bad override.
    """
    if not is_run(run_dir):
        raise no_run(run_dir)
    return load_config(run_dir / CONFIG_FILE, overrides)


def run_model(run_dir: Path) -> Path:
    """The model that a run exported.

    Raises:
        ConfigError: the run has not finished.
    """
    path = run_dir / MODEL
    if not path.is_dir():
        raise ConfigError(
            f"the run {run_dir} has no {MODEL}/ yet: it is written when training is complete; "
            "finish it with `pluglm pretrain ... --resume`, or give --model DIR"
        )
    return path


def with_corpus(run_dir: Path) -> Path:
    """The run's directory, if its held-out text can be read.

    Raises:
        ConfigError: the run was trained on the synthetic world, which has none.
    """
    if (run_dir / WORLD_MEMORY / STORE_FILE).is_file():
        raise ConfigError(
            f"the run {run_dir} was trained on invented facts and has no held-out text; its "
            "figures are in exam.json and evaluation.json there, and `pluglm probe` and `pluglm "
            "explain` ask it more"
        )
    return run_dir


def memory_path(path: Path) -> Path | str:
    """The store that a path leads to: itself, a corpus's own memory, or the one a run read.

    Raises:
        FileNotFoundError: there is nothing, or only runs below it.
        CorpusError, ConfigError: it is damaged.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {path}; give a memory's store, a corpus or a run directory"
        )
    if (path / STORE_FILE).is_file():
        return path
    if (path / CORPUS_FILE).is_file():
        return load_corpus_info(path).memory_path
    if is_run(path):
        config = run_config(path)
        if (path / WORLD_MEMORY / STORE_FILE).is_file():
            return path / WORLD_MEMORY  # a synthetic run has drawn its own
        if config.memory.store:
            return location(config.memory.store)
        if is_url(config.data.corpus):
            return corpus_memory(config.data.corpus)
        return load_corpus_info(config.data.corpus).memory_path
    if any(is_run(child) for child in path.glob("*")):
        raise no_run(path)
    return path
