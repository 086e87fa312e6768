"""Bytes of every part of a memory and of a trainer, as the code stores them.

Each function mirrors the class that its comment names: whoever changes one changes the other.
`on_gpu`: whether the shard's keys are on a GPU; what stays on the host is told apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from memory_server.index.base import IndexSettings
from memory_server.index.factory import FLAT, expected_index_bytes, training_bytes
from memory_server.index.flat_index import QUERY_BLOCK
from memory_server.index.row_groups import (
    GROUP_ROWS,
    HELD_MAXIMA,
    PAIR_NUMBERS,
    PRODUCT_SCORES,
)
from memory_server.keys.key_codes import DECODED_NUMBERS, TORCH_DTYPES
from model.config import PlugLMConfig
from model.key_tables import has_tables, tables_bytes
from trainer.deepspeed_config import MOST_IN_A_BUCKET

GIB = 1 << 30
# A process that has imported torch and what a shard needs: its own, and the libraries' pages, which
# all processes of a node share. Measured by benchmarks/plan_check.py.
PROCESS_BYTES = 270 << 20
LIBRARIES_BYTES = 150 << 20
# CUDA's context and cuBLAS's workspace in each process on a GPU. Assumed, not measured here.
CUDA_PROCESS_BYTES = 700 << 20
# The peak of benchmarks/training_step.py less its weights, gradients and memory (H=256, float32,
# CPU), over the tensors that `activations` counts: what is made and freed on the way.
ACTIVATIONS_PEAK = 1.25
WEIGHTS_COPIES = 2  # that a shard has of the published key weights while it makes keys
TRAINER_PROCESS_BYTES = 2 * GIB  # of a trainer on its host: torch, DeepSpeed, data. Assumed.


@dataclass(frozen=True, kw_only=True)
class Where:
    """Bytes on the device of a shard or a trainer, and in its host's memory. On a CPU the former
    are in the host's memory, too."""

    device: int = 0
    host: int = 0

    def __add__(self, other: Where) -> Where:
        return Where(device=self.device + other.device, host=self.host + other.host)

    def times(self, count: int) -> Where:
        return Where(device=count * self.device, host=count * self.host)


def keys(rows: int, width: int, dtype: str) -> Where:
    """KeyCodes: the numbers; beside codes a float32 scale and a float16 error bound per row."""
    numbers = TORCH_DTYPES[dtype].itemsize * width
    return Where(device=rows * (numbers + (0 if dtype == "float32" else 6)))


def rows_on_host(rows: int) -> Where:
    """ShardContent: ids and documents, int64, and a mark whether a row lives."""
    return Where(host=rows * (8 + 8 + 1))


def rows_on_device(rows: int, *, on_gpu: bool, approximate: bool) -> Where:
    """EpochBuilder's copies of ids and documents (on a CPU they are ShardContent's own),
    BarredRows' marks (ApproximateIndex has marks of its own), RowGroups' starts.

    Documents lie in the order of rows, as segments are built; else DocumentRows sorts them.
    """
    copied = 16 if on_gpu else 0
    marks = 2 if approximate else 1
    return Where(device=rows * (copied + marks) + 8 * -(-rows // GROUP_ROWS))


def codes(rows: int, width: int, settings: IndexSettings, *, on_gpu: bool) -> Where:
    """FaissBlock: lists of codes and ids, the centroids twice (index and template), and the list
    of each row, which stays on the host."""
    if settings.kind == FLAT:
        return Where()
    from memory_server.index.faiss_presets import inverted_lists, recipe_for

    recipe = recipe_for(settings, rows=rows, width=width)
    lists = inverted_lists(recipe.factory)
    # `expected_index_bytes` is an upper bound: FAISS counts the list in a row's code, and the
    # list of each row is kept only where rows can be put into lists (not of 4-bit codes).
    beside = -(-max(0, lists - 1).bit_length() // 8) + (4 if recipe.short_codes else 0)
    whole = (
        -beside * rows
        + expected_index_bytes(settings, rows=rows, width=width)
        + 2 * 4 * lists * width
    )
    return Where(device=whole, host=0) if not on_gpu else Where(device=whole, host=4 * rows)


def codes_in_training(rows: int, width: int, settings: IndexSettings) -> Where:
    """faiss_training_bytes: a sample of keys, and FAISS's own copy, while an index is trained."""
    return Where(host=training_bytes(settings, rows=rows, width=width))


def tokens(rows: int, entry_tokens: int, vocabulary: int) -> int:
    """Segment: the tokens, uint16 if the vocabulary allows. Mapped, so they are the page cache's:
    the system may drop them and read them again."""
    return rows * entry_tokens * (2 if vocabulary <= 1 << 16 else 4)


def store(rows: int, entry_tokens: int, vocabulary: int, text_bytes: int) -> int:
    """segment_schema: id, document, tokens, and three large strings (text, title, source), each
    with an int64 offset; once on a file system that all nodes see, or on each node."""
    return tokens(rows, entry_tokens, vocabulary) + rows * (8 + 8 + 3 * 8 + text_bytes)


def tables(config: PlugLMConfig, entry_tokens: int) -> int:
    """KeyTables of one set of weights; 0 where the model has none. On CPUs a node's shards share
    them (table_files), on GPUs each shard has its own. Kept as long as an epoch of these weights
    is, and used to make exact keys where codes are held."""
    return tables_bytes(config, entry_tokens) if has_tables(config) else 0


def key_weights(config: PlugLMConfig) -> int:
    """Embeddings, the entry's pooler and key_proj in float32, as they are published."""
    hidden = config.hidden_size
    embeddings = (config.vocab_size + config.max_position_embeddings + 4) * hidden
    return 4 * (embeddings + hidden * (hidden + 2) + config.key_size * (hidden + 1))


def searching(rows: int, width: int, dtype: str, batch: int, *, on_gpu: bool) -> Where:
    """RowGroups and KeyCodes: scores of one product, groups' best scores, decoded codes, and the
    rows of chosen groups; at most, while a search is under way."""
    kind, batch = "cuda" if on_gpu else "cpu", min(batch, QUERY_BLOCK)
    scores = min(PRODUCT_SCORES[kind], rows * batch)
    maxima = min(HELD_MAXIMA[kind], -(-rows // GROUP_ROWS) * batch)
    decoded = 0 if dtype == "float32" else min(DECODED_NUMBERS[kind], rows * width)
    pairs = min(PAIR_NUMBERS[kind], batch * 64 * GROUP_ROWS * width)
    return Where(device=4 * (scores + maxima + decoded + pairs))


def trainer_state(
    parameters: int,
    *,
    zero_stage: int,
    precision: str,
    trainers: int,
    offload_optimizer: str = "none",
    offload_parameters: str = "none",
) -> Where:
    """TrainingEngine: weights and gradients in the number format, master weights in float32 and
    AdamW's or LAMB's two moments; what the ZeRO stage deals out is divided by the trainers. What is
    offloaded to "cpu" is on the host, to "nvme" on neither."""
    number = 4 if precision == "fp32" else 2
    # Stage 0 in float32 is not wrapped: it keeps no second copy of the weights.
    master = 0 if precision == "fp32" and zero_stage == 0 else 4
    optimizer = master + 8
    dealt = [0, optimizer, optimizer + number, optimizer + 2 * number][zero_stage]
    whole = 2 * number + optimizer - dealt
    moved, host = 0, 0
    for what, each in ((offload_optimizer, optimizer), (offload_parameters, number)):
        if what != "none":
            moved += each
            host += each if what == "cpu" else 0
    return Where(
        device=parameters * whole + -(-parameters * (dealt - moved) // trainers),
        host=-(-parameters * host // trainers),
    )


def gradient_buckets(parameters: int, *, zero_stage: int, precision: str, on_gpu: bool) -> Where:
    """deepspeed_config: where gradients are put together to be reduced; on a GPU one is filled
    while another is sent."""
    if not zero_stage:
        return Where()
    number = 4 if precision == "fp32" else 2
    both = 2 if on_gpu and zero_stage < 3 else 1
    return Where(device=both * number * min(MOST_IN_A_BUCKET, parameters))


def activations(
    config: PlugLMConfig,
    *,
    sequences: int,
    tokens_each: int,
    entry_tokens: int,
    masked_share: float,
    precision: str,
    recomputed: bool,
) -> Where:
    """About what a forward pass of PlugLMForMaskedLM keeps for its gradient. An estimate by
    counting tensors; attention is not materialised, as scaled_dot_product_attention's is not."""
    number = 4 if precision == "fp32" else 2
    hidden, layers = config.hidden_size, config.num_hidden_layers
    per_layer = 12 * hidden + 3 * config.intermediate_size
    per_token = layers * hidden + per_layer if recomputed else layers * per_layer
    count = sequences * tokens_each
    entries = sequences * config.top_k * entry_tokens * config.num_memory_layers
    of_entries = entries * hidden * (8 if config.value_pooling == "tokens" else 5)
    masked = count * masked_share
    logits = masked * config.vocab_size * (number + 4 + 4)
    counted = number * (count * per_token + of_entries) + logits
    return Where(device=int(ACTIVATIONS_PEAK * counted))
