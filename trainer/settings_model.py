"""The settings of what is trained: the model's shape and the memory that it reads."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from trainer.settings_fields import ConfigError, check_section, documented

MemoryAttention = Literal["multi_head", "single_head", "sentence_level"]
ValuePooling = Literal["shared", "separate", "tokens"]
QueryNorm = Literal["batch", "layer", "none"]
MemoryInit = Literal["normal", "copy"]
EntryEncoder = Literal["word_embedding", "first_n"]
Pooler = Literal["attentive", "mean", "max", "cls"]
RefreshMode = Literal["async", "sync", "off"]
OnLostShard = Literal["wait", "degrade"]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model's shape; its vocabulary is that of the corpus's tokenizer."""

    SECTION: ClassVar[str] = "model"

    hidden_size: int = documented(256, "Width H of the encoder.", minimum=1)
    num_layers: int = documented(4, "Encoder layers, memory layers included.", minimum=1)
    num_heads: int = documented(4, "Attention heads; must divide hidden_size.", minimum=1)
    intermediate_size: int = documented(
        1024, "Width of the feed-forward part of plain layers.", minimum=1
    )
    max_positions: int = documented(
        128, "Longest sequence, in tokens; at least the corpus's sequence length.", minimum=1
    )
    dropout: float = documented(
        0.1, "Dropout of hidden states and attention probabilities.", minimum=0, below=1
    )
    memory_layers: int = documented(
        1, "How many layers, the last ones, read the memory.", minimum=1
    )
    memory_ffn_size: int = documented(
        256,
        "Width of the feed-forward part beside the memory; 0 leaves it out.",
        minimum=0,
    )
    key_size: int = documented(128, "Width Q of queries and keys.", minimum=1)
    memory_attention: MemoryAttention = documented(
        "multi_head",
        "How positions read the retrieved entries: attention per head, attention with one head, "
        "or one weighted sum for the whole sequence.",
    )
    value_pooling: ValuePooling = documented(
        "tokens",
        "What is read of an entry: the vector that also makes its key (shared, the paper's), "
        "the vector of a pooler of its own (separate), or every token's vector (tokens).",
    )
    query_norm: QueryNorm = documented(
        "layer",
        "Normalisation of the query: batch is the paper's; layer is the same in evaluation.",
    )
    entry_encoder: EntryEncoder = documented(
        "word_embedding",
        "What reads an entry before it is pooled: the embeddings alone, or also the encoder's own "
        "first layers (first_n), which makes refreshes and steps slower.",
    )
    entry_encoder_layers: int = documented(
        0, "Layers n of entry_encoder first_n, below the memory layers; else 0.", minimum=0
    )
    entry_pooler: Pooler = documented(
        "attentive", "How an entry's token vectors become the one that makes its key."
    )
    query_pooler: Pooler = documented(
        "attentive", "How a sequence's positions become the one vector that makes its query."
    )
    memory_init: MemoryInit = documented(
        "normal",
        "Start of the memory path: small random matrices (normal), or identities (copy), so that "
        "a passage finds itself and passes its tokens on before anything is learned.",
    )
    memory_beta_init: float = documented(
        1.0,
        "Start of the weight that the likeness of query and key has in the memory attention; "
        "larger: the best entry outweighs the others from the first step on.",
    )
    initializer_range: float = documented(
        0.02, "Standard deviation of random weights; small models learn faster with more.", above=0
    )
    init_from: str = documented(
        "", "Directory of a BERT-like checkpoint whose weights are the start; empty: random."
    )

    def __post_init__(self) -> None:
        check_section(self)
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"model.num_heads = {self.num_heads}: must divide model.hidden_size = "
                f"{self.hidden_size}; change one of them"
            )
        if self.memory_layers > self.num_layers:
            raise ConfigError(
                f"model.memory_layers = {self.memory_layers}: must be at most "
                f"model.num_layers = {self.num_layers}; lower it or add layers"
            )
        layers, plain = self.entry_encoder_layers, self.num_layers - self.memory_layers
        if self.entry_encoder == "word_embedding" and layers:
            raise ConfigError(
                f"model.entry_encoder_layers = {layers}: must be 0 with model.entry_encoder = "
                '"word_embedding"; choose "first_n" to encode entries with layers'
            )
        if self.entry_encoder == "first_n" and not 1 <= layers <= plain:
            raise ConfigError(
                f"model.entry_encoder_layers = {layers}: must be 1 to {plain} with "
                'model.entry_encoder = "first_n", the layers below the memory layers'
            )
        if self.value_pooling == "tokens" and self.memory_attention == "sentence_level":
            raise ConfigError(
                'model.value_pooling = "tokens": must be "shared" or "separate" with '
                'model.memory_attention = "sentence_level", which weighs whole entries'
            )


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """The differentiable plug-in memory: what it holds, how it is searched and refreshed."""

    SECTION: ClassVar[str] = "memory"

    store: str = documented("", "Directory of the memory's store; empty: the corpus's own memory.")
    shards: int = documented(2, "Actors that the entries are dealt to.", minimum=1)
    top_k: int = documented(
        5, "Entries K retrieved per sequence; at most the memory's entries.", minimum=1
    )
    server: str = documented(
        "",
        "Name of a running memory server to use (`pluglm memory serve`) instead of starting one; "
        "how it is sharded, held and searched is then the server's affair.",
    )
    replicas: int = documented(
        1, "Actors that hold each shard; a slow or dead one is hedged by another.", minimum=1
    )
    placement: Literal["spread", "pack"] = documented(
        "spread", "Shards on as many nodes as there are, or on as few as hold them."
    )
    node_resource: str = documented(
        "",
        "Custom resource of Ray that a node must have to hold shards, as those started with "
        '`ray start --resources=\'{"memory": 1}\'` have "memory"; empty: any node.',
    )
    index: str = documented(
        "flat",
        "Index of a shard: flat (exact), a preset (ivf, pq), or a FAISS factory string such as "
        '"IVF4096,Flat".',
    )
    key_dtype: Literal["float32", "float16", "bfloat16", "int8"] = documented(
        "float32",
        "How keys are held; whatever it is, what is found is scored by exact keys.",
    )
    search_params: str = documented(
        "", 'FAISS search parameters, such as "nprobe=8"; empty: what suits the index.'
    )
    min_recall: float = documented(
        0.95,
        "An approximate index answers only while its recall, measured on the training's own "
        "queries, is at least this; until then, and below, search is exact.",
        minimum=0,
        maximum=1,
    )
    audit_every_s: float = documented(
        60.0, "Seconds between two measurements of an approximate index's recall.", above=0
    )
    refresh: RefreshMode = documented(
        "async",
        "New keys while training goes on (async), while training waits (sync), or never (off).",
    )
    refresh_every_steps: int = documented(
        50, "Optimizer steps from one refresh's weights to the next one's.", minimum=1
    )
    max_staleness_steps: int = documented(
        0,
        "Steps that training may run ahead of the keys' weights before it waits; 0: no bound, "
        "else at least refresh_every_steps.",
        minimum=0,
    )
    exclude_own_document: bool = documented(
        False, "Keep the entries of a sequence's own document out of its retrieval."
    )
    exclude_own_document_share: float = documented(
        1.0,
        "Share of the training sequences for which exclude_own_document is done, drawn by chance; "
        "below 1 the model learns both to read the right entry and to do without it.",
        above=0,
        maximum=1,
    )
    on_lost_shard: OnLostShard = documented(
        "wait",
        "When a shard does not answer: wait for it up to deadline_s, or go on without it and "
        "say so in every reply.",
    )
    deadline_s: float = documented(
        60.0,
        "Seconds that a search waits for a shard; changing epochs waits as long, at least 60 s.",
        above=0,
    )
    threads_per_shard: int = documented(1, "CPU threads of each shard.", minimum=1)
    gpus_per_shard: float = documented(
        0.0, "GPUs of each shard; 0: on the CPU; a fraction shares a GPU.", minimum=0
    )

    def __post_init__(self) -> None:
        check_section(self)
        if self.exclude_own_document_share < 1 and not self.exclude_own_document:
            raise ConfigError(
                f"memory.exclude_own_document_share = {self.exclude_own_document_share}: needs "
                "memory.exclude_own_document = true, of which it is the share"
            )
        bound = self.max_staleness_steps
        if bound and self.refresh == "off":
            raise ConfigError(
                f'memory.max_staleness_steps = {bound}: must be 0 with memory.refresh = "off", '
                "because keys that are never refreshed only grow older"
            )
        if bound and bound < self.refresh_every_steps:
            raise ConfigError(
                f"memory.max_staleness_steps = {bound}: must be 0 (no bound) or at least "
                f"memory.refresh_every_steps = {self.refresh_every_steps}; raise it or refresh "
                "more often"
            )
        if self.gpus_per_shard > 1 and self.gpus_per_shard != int(self.gpus_per_shard):
            raise ConfigError(
                f"memory.gpus_per_shard = {self.gpus_per_shard}: must be a whole number when "
                "above 1; only a single GPU can be shared"
            )
