"""Seconds of a search, a step and a refresh, from the rates of the machines."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.planning import sizes
from cluster.planning.gpu_presets import training_share
from cluster.planning.rates import WIDTH, ApproximateLine, Rates, build_units, direct_units
from cluster.planning.wanted import Wanted
from memory_server.index.flat_index import QUERY_BLOCK
from memory_server.keys.key_sources import tables_pay_from
from memory_server.wire.fan_out import default_fan_in, groups_of
from model import KeyEncoderFactory
from model.key_tables import has_tables
from trainer.build import count_parameters

JOINED_QUERIES = 4096  # of several searches that a shard answers as one (SearchServer's own)
# A call of two shards that compute nothing takes 1.6 ms at batch 32 (benchmarks/transport.py);
# each further group that is asked is assumed to take the client a tenth of a millisecond.
CALL_S, PER_GROUP_S = 1.5e-3, 1e-4
LOCAL_CALL_S = 3e-4  # of LocalMemory beside its index: checks, the winners' tokens
_NUMBERS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, kw_only=True)
class SearchTimes:
    """One search, in seconds.

    Attributes:
        batch: queries of one trainer's search. joined: that a shard answers at once.
        alone_s: of one search when nothing else is asked: shards, call and network.
        shard_s, call_s, network_s: its parts.
        pass_s: until every trainer has its answer, when all ask at once, for one memory layer.
        by: what a shard's time goes into most.
    """

    batch: int
    joined: int
    alone_s: float
    shard_s: float
    call_s: float
    network_s: float
    pass_s: float
    by: str


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """One optimizer step, in seconds. `waiting_s`: for the memory, as far as it is not hidden.

    `queries` are those of a step, over all trainers and memory layers.
    """

    compute_s: float
    reduce_s: float
    waiting_s: float
    sync_refresh_s: float
    queries: int
    flops: float
    given: bool

    @property
    def seconds(self) -> float:
        return self.compute_s + self.reduce_s + self.waiting_s + self.sync_refresh_s

    @property
    def overhead(self) -> float:
        """The share of the step that is waiting for the memory."""
        return (self.waiting_s + self.sync_refresh_s) / self.seconds


@dataclass(frozen=True, kw_only=True)
class RefreshTimes:
    """One refresh of all keys, in seconds, by parts; shards work side by side.

    Attributes:
        share: of the time during which one is under way; above 1 they cannot keep up.
        by_tables: whether keys are made by tables.
    """

    weights_s: float
    tables_s: float
    keys_s: float
    index_s: float
    disk_s: float
    every_s: float
    by_tables: bool

    @property
    def seconds(self) -> float:
        # Tokens are read while keys are made.
        return self.weights_s + self.tables_s + max(self.keys_s, self.disk_s) + self.index_s

    @property
    def share(self) -> float:
        return self.seconds / self.every_s if self.every_s else 0.0


def shard_rates(wanted: Wanted, gpu: Rates | None, host: Rates) -> Rates:
    """Of what one shard has to itself while all work."""
    if wanted.shards_on_gpu:
        assert gpu is not None
        return gpu
    return host.with_threads(wanted.threads_per_shard)


def search_times(wanted: Wanted, rates: Rates, *, batch: int | None = None) -> SearchTimes:
    """Of what a trainer asks at once, or of another batch."""
    config = wanted.config
    count = batch or queries_per_search(wanted)
    # Shards that share a GPU take turns.
    turns = wanted.shards_per_gpu if wanted.shards_on_gpu else 1
    shard_s = turns * _answer_s(wanted, rates, count)
    if wanted.local:
        return SearchTimes(
            batch=count,
            joined=count,
            alone_s=shard_s + LOCAL_CALL_S,
            shard_s=shard_s,
            call_s=LOCAL_CALL_S,
            network_s=0.0,
            pass_s=shard_s + LOCAL_CALL_S,
            by=_most(wanted, rates, count),
        )
    groups = len(groups_of(config.memory.shards, default_fan_in(config.memory.replicas)))
    call_s = CALL_S + PER_GROUP_S * groups
    trainers = config.runtime.trainers
    # Queries that the busiest replica answers: a search goes to one, whole.
    everybody = count * math.ceil(trainers / config.memory.replicas)
    joined = min(everybody, max(JOINED_QUERIES, count))
    busy_s = turns * math.ceil(everybody / joined) * _answer_s(wanted, rates, joined)
    network_s = _network_s(wanted, count, groups, trainers=1)
    crowded_s = _network_s(wanted, count, groups, trainers=wanted.trainers_per_node)
    return SearchTimes(
        batch=count,
        joined=joined,
        alone_s=shard_s + call_s + network_s,
        shard_s=shard_s,
        call_s=call_s,
        network_s=network_s,
        pass_s=busy_s + call_s + crowded_s,
        by=_most(wanted, rates, joined),
    )


def step_times(
    wanted: Wanted, search: SearchTimes, refresh_s: float, gpu: Rates | None, host: Rates
) -> StepTimes:
    """Of one optimizer step, with the search's and, if it is synchronous, the refresh's part."""
    config, model = wanted.config, wanted.model
    runtime, memory = config.runtime, config.memory
    passes, layers = config.accumulation_steps, model.num_memory_layers
    flops = step_flops(wanted)
    number = _NUMBERS[runtime.precision]
    if wanted.trains_on_gpu:
        assert gpu is not None
        rate = gpu.products.get(number, gpu.products["float32"]) * runtime.trainers
    else:
        threads = min(wanted.machines.cores, wanted.trainers_per_node * runtime.threads_per_trainer)
        on_node = host.with_threads(threads).products
        rate = on_node.get(number, on_node["float32"]) * wanted.machines.nodes
    share = training_share(model.hidden_size, on_gpu=wanted.trains_on_gpu)
    compute_s = wanted.step_s if wanted.step_s is not None else flops / (rate * share)
    reduce_s = 0.0
    if wanted.machines.nodes > 1:
        # A ring over the nodes sends and receives every gradient twice; from stage 2 on each pass.
        # Stage 3 gathers the weights forward and backward besides, where it reduces gradients once.
        often = passes if runtime.zero_stage >= 2 else 1
        rounds = 3 if runtime.zero_stage == 3 else 2
        size = count_parameters(model) * (4 if runtime.precision == "fp32" else 2)
        reduce_s = often * rounds * size / wanted.machines.network_bytes_per_s
    chunks = _chunks(wanted)
    waiting_s = passes * layers * chunks * search.pass_s
    if chunks > 1:
        # While one piece searches, others run the layers below: forward, a third of the whole.
        below = 1 - layers / model.num_hidden_layers
        waiting_s -= min(waiting_s, compute_s / 3 * below) * (chunks - 1) / chunks
    sync_s = refresh_s / memory.refresh_every_steps if memory.refresh == "sync" else 0.0
    return StepTimes(
        compute_s=compute_s,
        reduce_s=reduce_s,
        waiting_s=waiting_s,
        sync_refresh_s=sync_s,
        queries=config.optim.batch_size * layers,
        flops=flops,
        given=wanted.step_s is not None,
    )


def _chunks(wanted: Wanted) -> int:
    """Pieces of a pass, each with a search of its own, of which some hide others."""
    return 1 if wanted.model.query_norm == "batch" else wanted.config.runtime.retrieval_chunks


def queries_per_search(wanted: Wanted) -> int:
    """Of a trainer's search: of its micro-batch, or of one piece of it."""
    return -(-wanted.config.micro_batch_size // _chunks(wanted))


def step_flops(wanted: Wanted) -> float:
    """Multiplications of matrices in one step, twice each, forward and backward (three times)."""
    config, model = wanted.config, wanted.model
    hidden, batch = model.hidden_size, config.optim.batch_size
    length, layers = wanted.sequence_tokens, model.num_hidden_layers
    plain = layers - model.num_memory_layers
    count = batch * length
    per_token = layers * 4 * hidden**2 + plain * 2 * hidden * model.intermediate_size
    per_token += model.num_memory_layers * 2 * hidden * model.memory_ffn_size
    per_token += layers * 2 * length * hidden  # scores and their sums
    per_token += model.num_memory_layers * 2 * hidden**2  # q_proj and out_proj of the memory
    entries = batch * model.top_k * model.num_memory_layers
    read = wanted.entry_tokens if model.value_pooling == "tokens" else 1
    per_entry = hidden * (model.key_size + 3 * hidden * read)  # keys, values, k_proj and v_proj
    per_entry += wanted.entry_tokens * hidden**2  # the pooler
    masked = count * config.data.mask_probability * hidden * (hidden + model.vocab_size)
    return 3.0 * 2.0 * (count * per_token + entries * per_entry + masked)


def refresh_times(
    wanted: Wanted, rates: Rates, host: Rates, *, step_s: float, cached: bool
) -> RefreshTimes:
    """Of one refresh.

    Args:
        step_s: of an optimizer step; 0: nothing is trained.
        cached: whether the page cache holds the tokens.
    """
    model, memory = wanted.model, wanted.config.memory
    tokens, width = wanted.entry_tokens, model.key_size
    on_gpu = wanted.shards_on_gpu
    turns = wanted.shards_per_gpu if on_gpu else 1
    factory = KeyEncoderFactory(model.to_dict())
    pays_from = tables_pay_from(
        factory, entry_tokens=tokens, rescoring=memory.key_dtype != "float32"
    )
    by_tables = has_tables(model) and pays_from is not None and wanted.entries >= pays_from
    units = build_units(model.vocab_size, tokens, model.hidden_size, width)
    direct = rates.direct_s * direct_units(
        tokens, model.hidden_size, model.entry_encoder_layers, model.intermediate_size
    )
    # On a CPU one process of a node builds the tables, with its own threads.
    builder = rates if on_gpu else host.with_threads(wanted.threads_per_shard)
    one_key = rates.key_seconds(tokens, width) if by_tables else direct
    held = sizes.tokens(wanted.rows, tokens, wanted.vocabulary) * wanted.shards_per_node
    published = 0.0
    if not wanted.local:
        published = sizes.key_weights(model) / wanted.machines.network_bytes_per_s
    line = approximate_line(wanted, rates)
    return RefreshTimes(
        weights_s=published,
        tables_s=turns * builder.table_s * units if by_tables else 0.0,
        keys_s=turns * wanted.rows * one_key,
        index_s=0.0 if line is None else turns * line.refill_seconds(wanted.rows),
        disk_s=0.0 if cached else held / host.disk_bytes_per_s,
        every_s=step_s * memory.refresh_every_steps,
        by_tables=by_tables,
    )


def approximate_line(wanted: Wanted, rates: Rates) -> ApproximateLine | None:
    """What is known of the index; of a factory string, what is known of the preset most like it.

    Raises:
        ValueError: nothing is known of it on this device.
    """
    if not wanted.approximate:
        return None
    kind = wanted.config.memory.index
    like = kind if kind in ("ivf", "pq") else "pq" if "PQ" in kind else "ivf"
    if like not in rates.approximate:
        raise ValueError(
            f"memory.index = {kind!r}: how fast it is on {rates.name} is not known; give a "
            "--calibration of it that measured FAISS, or memory.gpus_per_shard=0"
        )
    return rates.approximate[like]


def _answer_s(wanted: Wanted, rates: Rates, batch: int) -> float:
    """Seconds of one shard for one search."""
    line = approximate_line(wanted, rates)
    if line is not None:
        return line.search_seconds(wanted.rows, batch)
    search = rates.search[wanted.config.memory.key_dtype]
    return search.seconds(wanted.rows, batch, wanted.config.model.key_size)


def _most(wanted: Wanted, rates: Rates, batch: int) -> str:
    """What a shard's exact search spends most of its time on."""
    if wanted.approximate:
        return "scanning lists"
    line, rows = rates.search[wanted.config.memory.key_dtype], wanted.rows
    wide = wanted.config.model.key_size / WIDTH
    by = {
        "reading the keys": rows * -(-batch // QUERY_BLOCK) * line.per_row_s * wide,
        "products of keys and queries": rows * batch * line.per_pair_s * wide,
        "what each query takes beside the scan": batch * line.per_query_s,
        "what a search takes whatever its size": line.fixed_s,
    }
    return max(by, key=lambda name: by[name])


def _network_s(wanted: Wanted, batch: int, groups: int, *, trainers: int) -> float:
    """Queries out (float16 and an exponent), hits in: ids, documents, scores, tokens. A group's
    relay has the same from its other members, on the nodes of shards.

    Args:
        trainers: of the node, that all ask; 1: nobody else asks.
    """
    config, machines = wanted.config, wanted.machines
    if machines.nodes == 1:
        return 0.0
    out = batch * (2 * config.model.key_size + 2)
    token = 2 if wanted.vocabulary <= 1 << 16 else 4
    back = batch * config.memory.top_k * (20 + token * wanted.entry_tokens)
    members = config.memory.shards - groups
    asked = trainers if trainers == 1 else config.runtime.trainers
    relayed = asked * members / (min(groups, machines.nodes) if asked == 1 else machines.nodes)
    return (trainers * groups + relayed) * max(out, back) / machines.network_bytes_per_s
