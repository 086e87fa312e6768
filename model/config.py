"""The configuration of a PlugLM encoder."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

_CHOICES: dict[str, tuple[str, ...]] = {
    "memory_attention": ("multi_head", "single_head", "sentence_level"),
    "value_pooling": ("shared", "separate", "tokens"),
    "query_norm": ("batch", "layer", "none"),
    "memory_init": ("normal", "copy"),
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
        legacy: reproduce the published checkpoints' quirks (heads reshaped without a transpose,
            decoder not tied to the word embedding, ignored label -1).
    """

    model_type = "pluglm"

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
    legacy: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.legacy:
            self.tie_word_embeddings = False
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self._check()

    def _check(self) -> None:
        for name, allowed in _CHOICES.items():
            given = getattr(self, name)
            if given not in allowed:
                raise ValueError(f"{name} is {given!r}; allowed: {', '.join(allowed)}")
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                     "intermediate_size", "max_position_embeddings", "key_size"):  # fmt: skip
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

    @property
    def ignored_label(self) -> int:
        """The label of positions that carry no loss."""
        return -1 if self.legacy else -100
