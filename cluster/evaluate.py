"""Evaluate a trained model on held-out text, in this process and without Ray."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster import checks
from cluster.config import ConfigError, PretrainConfig
from cluster.editing.lookup import entries_by_id
from cluster.resources import choose_device, local_gpus
from cluster.trained_model import TrainedModel, load_trained_model
from memory_server.local import LocalMemory
from memory_server.store.store import Store
from trainer.evaluate import evaluation_report
from trainer.reads.summary import counted_in, training_usage
from trainer.task import CorpusTask
from trainer.usage import usage_report


def evaluate_model(
    config: PretrainConfig,
    model: Path,
    *,
    domains: Collection[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure masked-LM loss and accuracy with the right memory, a shuffled one and none; blocks.

    Args:
        config: names the corpus and the memory, and says how to mask; its model section is not
            used.
        model: directory of a trained model with its tokenizer.
        domains: only their entries are read; none named: those of all that are plugged.
        say: told what is going on.

    Returns:
        What `evaluation.json` holds (see `trainer.evaluate.evaluation_report`).

    Raises:
        ConfigError, CorpusError, StoreError, TokenizerMismatch, UnknownDomain, FileNotFoundError:
        something is missing, damaged or does not fit; nothing was computed.
    """
    with _opened(config, model, say, domains) as (trained, memory, task, _):
        say("evaluating on held-out text ...")
        return evaluation_report(
            trained.model,
            memory,
            lambda: task.heldout(config),
            k=config.memory.top_k,
            device=trained.device,
        )


def memory_usage(
    config: PretrainConfig,
    model: Path,
    *,
    run: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """How a trained model uses its memory on held-out text; blocks.

    Args and errors as of `evaluate_model`.

    Args:
        run: the run's directory, whose newest checkpoint tells how training used the memory.

    Returns:
        See `trainer.usage.usage_report`; `training`, where the run counted reads, see
        `trainer.reads.summary.training_usage`.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    with _opened(config, model, say, ()) as (trained, memory, task, store):

        def domains_of(ids: Sequence[int]) -> dict[int, str]:
            manifest = store.manifest(memory.info().content_version)
            return {i: found.domain for i, found in entries_by_id(store, manifest, ids).items()}

        say("reading held-out text ...")
        told = usage_report(
            trained.model,
            memory,
            task.heldout(config),
            k=config.memory.top_k,
            device=trained.device,
            domains_of=domains_of,
        )
        if run is not None and (counted := counted_in(run)) is not None:
            told["training"] = training_usage(*counted, memory, domains_of=domains_of)
        return told


@contextmanager
def _opened(
    config: PretrainConfig,
    model: Path,
    say: Callable[[str], None],
    domains: Collection[str],
) -> Iterator[tuple[TrainedModel, LocalMemory, CorpusTask, Store]]:
    """The model, its memory, the text, and the memory's store."""
    device = choose_device(config, local_gpus())
    source = checks.corpus_source(config)
    trained = load_trained_model(model, device=device)
    trained.check_fingerprint(source.tokenizer_fingerprint, f"the corpus {config.data.corpus}")
    fitting = replace(
        config,
        # What counts is the model itself, and that it reads one shard, here.
        model=replace(config.model, max_positions=trained.max_positions),
        memory=replace(config.memory, shards=1),
    )
    store = Store.open(source.store)
    checks.check_memory(fitting, source, store.head())
    entries = sum(ref.live for ref in store.manifest().of_domains(domains))
    if config.memory.top_k > entries:
        raise ConfigError(
            f"memory.top_k = {config.memory.top_k}: must be at most {entries}, the entries of "
            f"{', '.join(domains)}; ask for fewer (-k)"
        )
    task = CorpusTask(config.data.corpus, source.store, domains=tuple(domains))
    say("computing the keys of the memory's entries ...")
    with trained.memory(source.store, domains=domains) as memory:
        yield trained, memory, task, store
