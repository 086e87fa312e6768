"""A run's checkpoints, looked at from outside: what they are of, and whether one can be resumed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.checks import corpora_fingerprint
from cluster.config import PretrainConfig
from cluster.errors import LaunchError
from cluster.starting import check_same_run
from memory_server.errors import StoreError
from memory_server.store.store import Store
from trainer.checkpoint import CheckpointState, committed_checkpoints, read_state
from trainer.checkpoint_state import checkpoint_bytes, damages
from trainer.corpus.errors import CorpusError
from trainer.corpus.info import load_corpus_info
from trainer.corpus.remote import corpus_memory, local_corpus, location
from trainer.errors import CheckpointError
from trainer.settings import ConfigError
from trainer.world.prepare import WORLD


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One checkpoint of a run.

    Attributes:
        size: in bytes; 0 where it cannot be read.
        state: what it is of; None where it cannot be read, and then `problem` says why.
    """

    path: Path
    size: int
    state: CheckpointState | None
    problem: str = ""


def list_checkpoints(run_dir: Path) -> list[Listed]:
    """All committed checkpoints, oldest first; files are not read, only their sizes are compared.

    Raises:
        LaunchError: there is none.
    """
    listed = []
    for path in committed_checkpoints(run_dir):
        try:
            state, size = read_state(path), checkpoint_bytes(path)
        except CheckpointError as error:
            listed.append(Listed(path=path, size=0, state=None, problem=str(error)))
            continue
        listed.append(Listed(path=path, size=size, state=state))
    if not listed:
        raise LaunchError(f"{run_dir} holds no committed checkpoint")
    return listed


def find_checkpoint(run_dir: Path, name: str | None) -> Path:
    """A run's checkpoint by its name (None: the newest); LaunchError names those that are there."""
    there = {path.name: path for path in committed_checkpoints(run_dir)}
    if not there:
        raise LaunchError(f"{run_dir} holds no committed checkpoint")
    if name is None:
        return list(there.values())[-1]
    if name not in there:
        raise LaunchError(f"{run_dir} has no checkpoint {name}; it has {', '.join(there)}")
    return there[name]


def problems(run_dir: Path, checkpoint: Path, config: PretrainConfig) -> list[str]:
    """Why a run could not be resumed from a checkpoint; reads all of it. Empty: it can.

    Every file is compared with its size and checksum; the run's settings, the corpus and the
    memory's content version must be those that the checkpoint was written with.

    Args:
        run_dir: the run's directory.
        checkpoint: one of its checkpoints.
        config: the run's configuration.
    """
    try:
        found = damages(checkpoint)
        state = read_state(checkpoint) if not found else None
    except CheckpointError as error:
        return [str(error)]
    if state is None:
        return found
    try:
        check_same_run(config, checkpoint, state)
    except ConfigError as error:
        found.append(str(error))
    store: Path | str | None = None
    if config.memory.store:
        store = location(config.memory.store)
    elif (run_dir / WORLD).is_dir():
        store = run_dir / WORLD / "memory"
    if state.corpus_fingerprint or store is None:
        corpora = " + ".join(config.data.corpora)
        try:
            infos = [load_corpus_info(local_corpus(corpus)) for corpus in config.data.corpora]
        except CorpusError as error:
            return [*found, str(error)]
        given = corpora_fingerprint(infos)
        if state.corpus_fingerprint not in ("", given):
            found.append(
                f"data.corpus = {corpora} is another corpus (fingerprint {given}) than the "
                f"checkpoint was trained on ({state.corpus_fingerprint})"
            )
        store = store or corpus_memory(config.data.corpus)
    return [*found, *_store_problems(store, state)]


def _store_problems(store: Path | str, state: CheckpointState) -> list[str]:
    try:
        Store.open(store).manifest(state.content_version)
    except StoreError as error:
        return [f"the memory's content {state.content_version} is not to be had: {error}"]
    return []
