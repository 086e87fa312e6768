"""Where fine-tuning starts: a model's directory, opened, checked and given a head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

import model as pluglm
from memory_server.errors import TokenizerMismatch
from memory_server.requests import MAX_TOP_K
from memory_server.store.store import Store
from trainer.corpus.tokenizer import load_tokenizer, tokenizer_fingerprint
from trainer.finetune.heads import Head
from trainer.finetune.settings import FinetuneSettings, MemorySettings
from trainer.settings_fields import ConfigError


@dataclass(frozen=True, kw_only=True)
class Start:
    """A model's directory, a PlugLM's or plain BERT's, and what belongs to it.

    Attributes:
        config: the model's configuration.
        memory: the settings of the memory that the model will read; None: it reads none.
        note: why the memory that the settings name is not read; empty otherwise.
    """

    path: Path
    config: Any
    tokenizer: Any
    fingerprint: str
    memory: MemorySettings | None
    note: str

    @property
    def is_pluglm(self) -> bool:
        """Whether it is a PlugLM, with or without memory layers."""
        return isinstance(self.config, pluglm.PlugLMConfig)

    @property
    def needs_two_sequences(self) -> bool:
        """Whether a training pass over one sequence has no batch statistics."""
        reads = self.is_pluglm and self.config.num_memory_layers > 0
        return reads and self.config.query_norm == "batch"


def open_start(settings: FinetuneSettings) -> Start:
    """Open the directory without loading weights, and check that model, task and memory fit.

    Raises:
        FileNotFoundError: no model there. ConfigError: model, sizes or memory do not fit.
        CorpusError: no usable tokenizer. StoreError, TokenizerMismatch, UnknownDomain: no memory
        that fits.
    """
    path = Path(settings.model.path).expanduser()
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"model.path = {str(path)!r}: holds no config.json; give the directory of a PlugLM or "
            "a BERT in transformers' format"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model.path = {str(path)!r}: cannot be read: {_first(error)}") from error
    tokenizer: Any = load_tokenizer(path)
    longest = int(getattr(config, "max_position_embeddings", settings.task.max_length))
    if settings.task.max_length > longest:
        raise ConfigError(
            f"task.max_length = {settings.task.max_length}: must be at most {longest}, the "
            f"positions of the model {path}"
        )
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"the model {path} has {config.vocab_size} tokens, but the tokenizer beside it "
            f"{len(tokenizer)}; put the tokenizer there that it was trained with"
        )
    start = Start(
        path=path,
        config=config,
        tokenizer=tokenizer,
        fingerprint=tokenizer_fingerprint(tokenizer),
        memory=None,
        note="",
    )
    return _with_memory(start, settings.memory)


def build_model(start: Start, head: Head, *, seed: int) -> Any:
    """Load the weights under a new head; the same seed gives the same head.

    The head of the directory is kept only if it is of the same kind and for the same labels, so
    that training can go on with it.

    Raises:
        ConfigError: the directory lacks weights of the encoder, or cannot be loaded.
    """
    options = head.model_options()
    config = type(start.config).from_dict(start.config.to_dict() | options)
    if start.is_pluglm:
        _say_memory(config, start)
    auto: Any = getattr(transformers, head.auto_class)
    # The caller's random state is left as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model, info = auto.from_pretrained(
                start.path,
                config=config,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                local_files_only=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ConfigError(
                f"the model {start.path} cannot be loaded ({_first(error)}); restore it from a copy"
            ) from error
        _check_encoder(start, model, info)
        if not _same_head(start, type(model).__name__, options):
            torch.manual_seed(seed)
            _renew_head(model, type(model)(config))
    return model


def _with_memory(start: Start, settings: MemorySettings) -> Start:
    if not settings.store.strip():
        return start
    if not start.is_pluglm or not start.config.num_memory_layers:
        kind = "a PlugLM without memory layers" if start.is_pluglm else start.config.model_type
        note = f"the model {start.path} is {kind}, which reads no memory: [memory] is not used"
        return replace(start, memory=None, note=note)
    store = Store.open(Path(settings.store).expanduser())
    meta = store.meta
    refs = store.manifest().of_domains(settings.domains)
    entries = sum(ref.live for ref in refs)
    if meta.tokenizer_fingerprint != start.fingerprint:
        raise TokenizerMismatch(
            f"the memory {store.path} was made with another tokenizer (fingerprint "
            f"{meta.tokenizer_fingerprint}) than the model {start.path} ({start.fingerprint}); "
            f"build it again with --tokenizer {start.path}"
        )
    if meta.entry_tokens > start.config.max_position_embeddings:
        raise ConfigError(
            f"the memory {store.path} has entries of {meta.entry_tokens} tokens, but the model "
            f"{start.path} reads at most {start.config.max_position_embeddings}; build one with "
            "shorter entries"
        )
    if not 1 <= settings.top_k <= min(entries, MAX_TOP_K):
        raise ConfigError(
            f"memory.top_k = {settings.top_k}: must be at most {min(entries, MAX_TOP_K)}; the "
            f"memory {store.path} holds {entries:,} entries"
            f"{' in ' + ', '.join(settings.domains) if settings.domains else ''}"
        )
    return replace(start, memory=settings, note="")


def _say_memory(config: Any, start: Start) -> None:
    """What a PlugLM that is opened again must know of the memory that it was fine-tuned with."""
    config.tokenizer_fingerprint = start.fingerprint
    if start.memory is not None:
        config.top_k = start.memory.top_k
        config.fixed_keys = config.fixed_values = start.memory.mode == "frozen"


def _check_encoder(start: Start, model: Any, info: dict[str, Any]) -> None:
    prefix = model.base_model_prefix
    # BERT's pooler belongs to next-sentence prediction: masked-LM checkpoints come without.
    lost = sorted(
        name
        for name in info["missing_keys"]
        if name.startswith(f"{prefix}.") and not name.startswith(f"{prefix}.pooler.")
    )
    lost += sorted(str(entry[0]) for entry in info["mismatched_keys"] if prefix in str(entry[0]))
    if lost:
        raise ConfigError(
            f"the model {start.path} lacks {len(lost)} weights of the encoder, such as {lost[0]}; "
            "restore it from a copy, or convert it again"
        )


def _same_head(start: Start, name: str, options: dict[str, Any]) -> bool:
    return name in (start.config.architectures or ()) and all(
        getattr(start.config, key, None) == value for key, value in options.items()
    )


def _renew_head(model: Any, fresh: Any) -> None:
    """Give the model the weights of `fresh` wherever they are no part of the encoder.

    A masked-LM head may have weights of the same name, which mean something else.
    """
    prefix = f"{model.base_model_prefix}."
    # BERT's pooler lies within the encoder, but is the first layer of a classifier's head, as
    # PlugLM's `head.in_proj`, which is new: the baseline must begin like it.
    new = {
        name: value
        for name, value in fresh.state_dict().items()
        if not name.startswith(prefix) or name.startswith(f"{prefix}pooler.")
    }
    model.load_state_dict(new, strict=False)


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
