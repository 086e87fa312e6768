"""The configuration of a PlugLM encoder."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from transformers import PreTrainedConfig

_CHOICES: dict[str, tuple[str, ...]] = {
    "memory_attention": ("multi_head", "single_head", "sentence_level"),
    "value_pooling": ("shared", "separate", "tokens"),
    "query_norm": ("batch", "layer", "none"),
    "memory_init": ("normal", "copy"),
    "entry_encoder": ("word_embedding", "first_n"),
    "entry_pooler": ("attentive", "mean", "max", "cls"),
    "query_pooler": ("attentive", "mean", "max", "cls"),
}


class PlugLMConfig(PreTrainedConfig):
    """Sizes and variants of a PlugLM encoder (arXiv 2305.11564).

    The defaults are BERT-base with one memory layer. `value_pooling="shared"`, `query_norm="batch"`
    and `memory_init="normal"` are the paper's; the project's own recipes use the variants that were
    measured to make the memory *read* (docs/concepts.md).

    Args:
        vocab_size: V, tokens of the vocabulary.
        hidden_size: H; divisible by `num_attention_heads`.
        num_hidden_layers: L, all layers, memory layers included.
        num_memory_layers: M, the last M of the L layers read the memory; 0 makes a plain encoder.
        key_size: Q, width of the keys and of the queries.
        memory_ffn_size: width of the small FFN beside the memory; 0 leaves it out.
        memory_attention: `multi_head`, `single_head` or `sentence_level`.
        value_pooling: an entry's value is its key's pooled vector (`shared`), a vector from a
            pooler of its own (`separate`), or one vector per token of the entry (`tokens`).
        query_norm: what normalises the query: `batch`, `layer` or `none`.
        memory_init: `normal` draws every matrix from N(0, initializer_range). `copy` starts the
            memory path at the identity: queries and keys as the same pooled embeddings, so that a
            passage is like itself before anything is learned; values, knowledge attention and the
            head's first map as they are, so that the token most like the asking position is passed
            on.
        memory_beta_init: start of β, the weight of the query-key cosine in the knowledge attention.
            Larger values let the best entry outweigh the others before the attention has learned
            anything.
        entry_encoder: what reads an entry's tokens before they are pooled: the embeddings alone
            (`word_embedding`), or also the encoder's own first layers (`first_n`).
        entry_encoder_layers: n of `first_n`, from 1 to the number of plain layers; else 0.
        entry_pooler: how an entry's token vectors become the one that makes its key: `attentive`,
            `mean`, `max` or `cls` (the first token's vector).
        query_pooler: likewise for the positions of a sequence, in each memory layer.
        fixed_keys: the cosine uses the keys that come with the memory's reply, without gradient,
            instead of keys encoded again with the current weights.
        fixed_values: likewise for the values that are read.
        top_k: K, the entries that `attach` asks the memory for.
        tokenizer_fingerprint: of the tokenizer that it was trained with; `attach` refuses a memory
            of another one. Empty: not known.
        unpad_inputs: padding is not computed; hidden states at padded positions are zeros.
        sparse_prediction: with labels, the masked-LM head computes the labelled positions only.
        output_retrievals: outputs of the models with heads report what was retrieved. Turn it off
            for pipelines with a batch_size, which take every output apart by sequence.
        legacy: reproduce the published checkpoints' quirks (heads reshaped without a transpose,
            decoder not tied to the word embedding, ignored label -1).
    """

    model_type = "pluglm"
    # Reports, not predictions: transformers.Trainer must not collect them.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "retrievals",
        "mlm_loss",
        "retrieval_loss",
        "hidden_states",
    ]

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    num_memory_layers: int = 1
    key_size: int = 128
    memory_ffn_size: int = 768
    memory_attention: str = "multi_head"
    value_pooling: str = "shared"
    query_norm: str = "batch"
    memory_init: str = "normal"
    memory_beta_init: float = 1.0
    entry_encoder: str = "word_embedding"
    entry_encoder_layers: int = 0
    entry_pooler: str = "attentive"
    query_pooler: str = "attentive"
    fixed_keys: bool = False
    fixed_values: bool = False
    top_k: int = 5
    tokenizer_fingerprint: str = ""
    unpad_inputs: bool = True
    sparse_prediction: bool = True
    output_retrievals: bool = True
    classifier_dropout: float | int | None = None
    legacy: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.legacy:
            self.tie_word_embeddings = False
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self._check()

    def _check(self) -> None:
        self._check_types()
        for name, allowed in _CHOICES.items():
            given = getattr(self, name)
            if given not in allowed:
                raise ValueError(f"{name} is {given!r}; allowed: {', '.join(allowed)}")
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                     "intermediate_size", "max_position_embeddings", "key_size",
                     "type_vocab_size", "top_k"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}; choose sizes that divide"
            )
        if not 0 <= self.num_memory_layers <= self.num_hidden_layers:
            raise ValueError(
                f"num_memory_layers is {self.num_memory_layers}; allowed: 0 to num_hidden_layers "
                f"({self.num_hidden_layers})"
            )
        if self.memory_ffn_size < 0:
            raise ValueError(f"memory_ffn_size is {self.memory_ffn_size}; 0 leaves the FFN out")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            given = getattr(self, name)
            if given is not None and not 0 <= given < 1:
                raise ValueError(f"{name} is {given}; allowed: 0 up to, but not, 1")
        if not self.layer_norm_eps > 0:
            raise ValueError(f"layer_norm_eps is {self.layer_norm_eps}; it must be more than 0")
        if not self.initializer_range >= 0:
            raise ValueError(f"initializer_range is {self.initializer_range}; allowed: 0 or more")
        if not math.isfinite(self.memory_beta_init):
            raise ValueError(
                f"memory_beta_init is {self.memory_beta_init}; it must be a finite number"
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id is {self.pad_token_id}; allowed: 0 to {self.vocab_size - 1}, the "
                "ids of the vocabulary"
            )
        self._check_entry_encoder()
        if self.value_pooling == "tokens" and self.memory_attention == "sentence_level":
            raise ValueError(
                "value_pooling 'tokens' gives one value per token, but sentence_level attention "
                "weighs whole entries; use multi_head or single_head, or value_pooling 'shared' or "
                "'separate'"
            )
        if self.legacy and self.value_pooling != "shared":
            raise ValueError(
                "legacy checkpoints have value_pooling 'shared'; set legacy=False for others"
            )

    def _check_types(self) -> None:
        """Numbers and switches come from JSON, where a quoted one looks much like a real one."""
        for name, default in _DEFAULTS.items():
            given = getattr(self, name)
            if isinstance(default, bool):
                if not isinstance(given, bool):
                    raise ValueError(f"{name} is {given!r}; allowed: true or false")
            elif isinstance(default, int) and given is not None:
                if isinstance(given, bool) or not isinstance(given, int):
                    raise ValueError(f"{name} is {given!r}; it must be a whole number")
            elif isinstance(default, float) and (
                isinstance(given, bool) or not isinstance(given, int | float)
            ):
                raise ValueError(f"{name} is {given!r}; it must be a number")

    def _check_entry_encoder(self) -> None:
        layers, plain = self.entry_encoder_layers, self.num_hidden_layers - self.num_memory_layers
        if self.entry_encoder == "word_embedding" and layers:
            raise ValueError(
                f"entry_encoder_layers is {layers}, but entry_encoder 'word_embedding' uses no "
                "layer; leave it at 0, or choose entry_encoder 'first_n'"
            )
        if self.entry_encoder == "first_n" and not 1 <= layers <= plain:
            raise ValueError(
                f"entry_encoder_layers is {layers}; with entry_encoder 'first_n' allowed: 1 to "
                f"{plain}, the layers below the memory layers"
            )

    @property
    def ignored_label(self) -> int:
        """The label of positions that carry no loss."""
        return -1 if self.legacy else -100


# By name, of the settings that are this class's own.
_DEFAULTS: dict[str, Any] = {
    name: getattr(PlugLMConfig, name)
    for name in PlugLMConfig.__annotations__
    if isinstance(getattr(PlugLMConfig, name), bool | int | float)
}
