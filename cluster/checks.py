"""Everything that can be refused before any work is done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.config import PretrainConfig
from memory_server.index.base import IndexSettings
from memory_server.index.factory import check_index
from memory_server.requests import MAX_TOP_K
from memory_server.store.store import Store
from model import PlugLMConfig
from trainer.build import model_config
from trainer.corpus.info import COUNTS, CorpusInfo, load_corpus_info
from trainer.corpus.remote import corpus_memory, local_corpus, location
from trainer.data.order import MixedOrder, WholeShuffle
from trainer.data.part_cache import PartCache
from trainer.data.sequences import SequenceDataset
from trainer.deepspeed_config import deepspeed_config
from trainer.deepspeed_values import check_values
from trainer.settings import ConfigError


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a run trains on, as its task names it.

    Attributes:
        store: the memory's store.
        tokenizer: directory of the tokenizer; its fingerprint and vocabulary beside it.
        sequence_length: longest sequence T, in tokens.
        fingerprint: of what is trained on; empty: not known.
    """

    store: Path | str
    tokenizer: Path
    tokenizer_fingerprint: str
    vocab_size: int
    pad_token_id: int
    sequence_length: int
    fingerprint: str = ""


def corpus_source(config: PretrainConfig) -> Source:
    """Read the corpora that the config names.

    Raises:
        CorpusError, SequencesDamaged: one is missing, half-built, empty or damaged.
        ConfigError: they do not fit each other, or the step.
    """
    cache = PartCache.of_this_machine(config.data.cache_gib)
    infos = [load_corpus_info(local_corpus(corpus, cache)) for corpus in config.data.corpora]
    for info in infos:
        SequenceDataset(info.sequences_path)
        if info.heldout_sequences:
            SequenceDataset(info.heldout_path)
        if info.tokenizer_fingerprint != infos[0].tokenizer_fingerprint:
            raise ConfigError(
                f"data.more_corpora: {info.path} was tokenised by another tokenizer (fingerprint "
                f"{info.tokenizer_fingerprint}) than {infos[0].path} "
                f"({infos[0].tokenizer_fingerprint}); build it with --tokenizer "
                f"{infos[0].tokenizer_path}"
            )
    if not any(info.heldout_sequences for info in infos):
        raise ConfigError(
            f"data.corpus = {config.data.corpus}: holds no held-out sequences to evaluate on; "
            "build it with a larger --heldout-fraction"
        )
    if len(infos) > 1:
        try:
            MixedOrder([WholeShuffle(i.sequences, 0) for i in infos], config.data.weights, 0)
        except ValueError as error:
            raise ConfigError(f"data.weights: {error}") from error
    first = infos[0]
    longest = max(info.sequence_length for info in infos)
    _check_batch_tokens(config, longest)
    return Source(
        store=location(config.memory.store or str(corpus_memory(config.data.corpus))),
        tokenizer=first.tokenizer_path,
        tokenizer_fingerprint=first.tokenizer_fingerprint,
        vocab_size=first.vocab_size,
        pad_token_id=first.pad_token_id,
        sequence_length=longest,
        fingerprint=corpora_fingerprint(infos),
    )


def _check_batch_tokens(config: PretrainConfig, longest: int) -> None:
    """Every micro-batch must get a sequence, in the warm-up two, however long they are."""
    budget = config.optim.batch_tokens
    passes = config.runtime.trainers * config.accumulation_steps
    least = passes * longest * (2 if config.optim.retrieval_warmup_steps else 1)
    if budget and budget < least:
        raise ConfigError(
            f"optim.batch_tokens = {budget}: must be at least {least}, so that each of the "
            f"{passes} micro-batches of a step holds a sequence of {longest} tokens (two in the "
            "retrieval warm-up); raise it, or use fewer and larger micro-batches"
        )


def corpora_fingerprint(infos: Sequence[CorpusInfo]) -> str:
    """What tells these corpora from others; of one it is that corpus's own."""
    prints = [corpus_fingerprint(info) for info in infos]
    if len(prints) == 1:
        return prints[0]
    return hashlib.sha256(json.dumps(prints).encode()).hexdigest()[:32]


def corpus_fingerprint(info: CorpusInfo) -> str:
    """What tells a corpus from another, wherever it lies: its tokenizer, sources and counts."""
    facts = {name: getattr(info, name) for name in COUNTS}
    facts["sources"] = [asdict(source) for source in info.sources]
    text = json.dumps([info.tokenizer_fingerprint, facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def check_memory(config: PretrainConfig, source: Source, content: str) -> None:
    """Refuse a memory that does not fit the corpus or the model.

    Args:
        content: the content version that the run begins with.

    Raises:
        ConfigError: K above the entries, another tokenizer, entries or sequences too long, an
            index that is not known.
        StoreNotFound, StoreDamaged: no usable store.
    """
    index_settings(config)
    store = Store.open(source.store)
    if store.meta.tokenizer_fingerprint != source.tokenizer_fingerprint:
        raise ConfigError(
            f"memory.store = {source.store}: its entries were tokenised by another tokenizer "
            f"(fingerprint {store.meta.tokenizer_fingerprint}) than the corpus "
            f"({source.tokenizer_fingerprint}); build the memory with the corpus's tokenizer"
        )
    entries = store.manifest(content).entries
    most = min(entries, MAX_TOP_K)
    if config.memory.top_k > most:
        raise ConfigError(
            f"memory.top_k = {config.memory.top_k}: must be at most {most} (the memory at "
            f"{source.store} holds {entries} entries)"
        )
    if config.memory.shards > entries:
        raise ConfigError(
            f"memory.shards = {config.memory.shards}: must be at most the memory's {entries} "
            "entries"
        )
    longest = max(source.sequence_length, store.meta.entry_tokens)
    if longest > config.model.max_positions:
        raise ConfigError(
            f"model.max_positions = {config.model.max_positions}: must be at least {longest} "
            f"(sequences have {source.sequence_length} tokens, entries {store.meta.entry_tokens})"
        )


def index_settings(config: PretrainConfig) -> IndexSettings:
    """How each shard of the run's memory holds and searches its keys.

    Raises:
        ConfigError: an index or search parameters that FAISS does not know.
    """
    memory = config.memory
    settings = IndexSettings(
        kind=memory.index,
        key_dtype=memory.key_dtype,
        search=memory.search_params,
        min_recall=memory.min_recall,
        audit_every_s=memory.audit_every_s,
    )
    try:
        check_index(settings, key_width=config.model.key_size)
    except ValueError as error:
        raise ConfigError(f'memory.index = "{memory.index}": {error}') from error
    return settings


def check_engine(config: PretrainConfig, *, on_gpu: bool) -> None:
    """Build what the engine will be given, so that nonsense is refused here.

    Args:
        on_gpu: whether trainers may run on GPUs.

    Raises:
        ConfigError: the user's DeepSpeed JSON, or settings that need a GPU where there is none.
    """
    made = deepspeed_config(config, on_gpu=on_gpu)
    if config.runtime.deepspeed_config:
        check_values(made, f"runtime.deepspeed_config = {config.runtime.deepspeed_config}")


def check_model(config: PretrainConfig, source: Source) -> PlugLMConfig:
    """Build the model's configuration.

    Raises:
        ConfigError: sizes that do not fit together.
    """
    try:
        return model_config(
            config.model,
            vocab_size=source.vocab_size,
            pad_token_id=source.pad_token_id,
            top_k=config.memory.top_k,
            tokenizer_fingerprint=source.tokenizer_fingerprint,
        )
    except ValueError as error:
        raise ConfigError(f"[model]: {error}") from error
