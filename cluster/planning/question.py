"""From a configuration, a store, options and calibrations to what is to be planned."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster import checks
from cluster.config import PretrainConfig, config_from_mapping, load_config
from cluster.planning.constants import Constants
from cluster.planning.gpu_presets import efficiency, gpu_sheet, host_sheet
from cluster.planning.rates import Rates, calibrated, of_gpu_sheet, of_host_sheet
from cluster.planning.wanted import TEXT_BYTES_PER_TOKEN, Machines, Wanted, placed
from cluster.presets import preset
from memory_server.errors import MemoryServerError
from memory_server.store.store import Store
from trainer.corpus.errors import CorpusError
from trainer.settings import ConfigError

GIB = 1 << 30
BASE = "pluglm-base-1b"  # the shape of a plan without a configuration of its own


@dataclass(frozen=True, kw_only=True)
class Options:
    """As they were given; None: not given."""

    config: Path | None
    overrides: tuple[str, ...] = ()
    entries: int | None = None
    entry_tokens: int | None = None
    text_bytes: int | None = None
    vocabulary: int | None = None
    sequence_tokens: int | None = None
    gpu: str | None = None
    gpus: int | None = None
    gpus_per_node: int = 8
    nodes: int | None = None
    host_gib: float | None = None
    cores: int | None = None
    network_gbps: float = 100.0
    shards_on: str | None = None
    trainers: int | None = None
    step_s: float | None = None
    local: bool = False
    calibrations: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be planned, and with which rates."""

    wanted: Wanted
    gpu: Rates | None
    host: Rates


@dataclass(frozen=True, kw_only=True)
class _Content:
    entries: int
    entry_tokens: int
    vocabulary: int
    sequence_tokens: int


def ask(options: Options) -> Question:
    """Put the question together.

    Raises:
        ValueError: something is missing or does not fit; says what to give.
        OSError: a file cannot be read.
    """
    known = [Constants.read(path) for path in options.calibrations]
    gpu, host = _rates(options, known)
    machines = _machines(options, known, gpu)
    config = _config(options, machines)
    if config.memory.server and not options.local:
        raise ValueError(
            f"memory.server = {config.memory.server!r}: the shards are that server's, and others "
            "may ask it, too; plan them with the configuration that it was started with, and leave "
            "memory.server out (memory.server=)"
        )
    content = _content(options, config)
    wanted = Wanted(
        config=config,
        machines=machines,
        entries=content.entries,
        entry_tokens=content.entry_tokens,
        vocabulary=content.vocabulary,
        sequence_tokens=content.sequence_tokens,
        text_bytes=options.text_bytes
        if options.text_bytes is not None
        else TEXT_BYTES_PER_TOKEN * content.entry_tokens,
        step_s=options.step_s,
        local=options.local,
    )
    if not options.local and (options.config is None or options.shards_on or options.trainers):
        on_host = machines.gpus < 2 or config.memory.index != "flat"
        where = options.shards_on or ("host" if on_host else "gpu")
        wanted = placed(wanted, shards_on=where, trainers=options.trainers)
        # What was said outright is not placed otherwise.
        said = config_from_mapping(tomllib.loads(wanted.config.to_toml()), options.overrides)
        wanted = replace(wanted, config=said)
    return Question(wanted=wanted, gpu=gpu, host=host)


def _rates(options: Options, known: Sequence[Constants]) -> tuple[Rates | None, Rates]:
    """Of a GPU and of a node's processors: calibrations first, then data sheets."""
    by_device = {constants.device: calibrated(constants) for constants in known}
    if len(by_device) < len(known):
        raise ValueError(
            "--calibration: give at most one of a GPU and one of a CPU, as `pluglm calibrate "
            "--device` made them"
        )
    gpu = by_device.get("cuda")
    if options.gpu is not None:
        if gpu is not None:
            raise ValueError(
                f"--gpu {options.gpu} and the --calibration of a GPU ({gpu.name}) both say how "
                "fast GPUs are; leave one out"
            )
        gpu = of_gpu_sheet(gpu_sheet(options.gpu), efficiency())
    if options.gpus and gpu is None:
        raise ValueError(f"--gpus {options.gpus}: say of which kind, with --gpu or --calibration")
    host = by_device.get("cpu")
    if host is None:
        bytes_ = int(options.host_gib * GIB) if options.host_gib else None
        host = of_host_sheet(host_sheet(cores=options.cores, memory_bytes=bytes_))
    elif options.cores is not None:
        host = host.with_threads(options.cores)
    return gpu, host


def _machines(options: Options, known: Sequence[Constants], gpu: Rates | None) -> Machines:
    gpus = options.gpus if options.gpus is not None else (options.gpus_per_node if gpu else 0)
    per_node = max(1, min(options.gpus_per_node, gpus or options.gpus_per_node))
    nodes = options.nodes or max(1, -(-gpus // per_node))
    measured = next((constants for constants in known), None)
    assumed = host_sheet()
    host_bytes = int(options.host_gib * GIB) if options.host_gib else None
    if host_bytes is None:
        host_bytes = measured.host_bytes if measured else assumed.memory_bytes
    of_cpu = next((constants for constants in known if constants.device == "cpu"), None)
    return Machines(
        gpus=gpus,
        gpus_per_node=per_node,
        nodes=nodes,
        host_bytes=host_bytes,
        cores=options.cores or (of_cpu.threads if of_cpu else assumed.cores),
        network_bytes_per_s=options.network_gbps * 1e9 / 8,
    )


def _config(options: Options, machines: Machines) -> PretrainConfig:
    if options.config is not None:
        return load_config(options.config, options.overrides)
    # Without a configuration of one's own: where nothing else is said, on what there is.
    assumed = [] if machines.gpus else ["runtime.device=cpu", "memory.gpus_per_shard=0"]
    if options.local:
        assumed += ["memory.shards=1", "memory.gpus_per_shard=0"]
    return load_config(preset(BASE), [*assumed, *options.overrides])


def _content(options: Options, config: PretrainConfig) -> _Content:
    """Sizes of the corpus and its store, where they are there, and of the options."""
    found: dict[str, int] = {}
    if options.config is not None and options.entries is None:
        try:
            source = checks.corpus_source(config)
            store = Store.open(source.store)
            found = {
                "entries": store.manifest(store.head()).entries,
                "entry_tokens": store.meta.entry_tokens,
                "vocabulary": source.vocab_size,
                "sequence_tokens": source.sequence_length,
            }
        except (CorpusError, ConfigError, MemoryServerError, OSError) as error:
            raise ValueError(
                f"how many entries the memory will hold is not known: {error}; or give --entries"
            ) from error
    entries = options.entries if options.entries is not None else found.get("entries")
    if entries is None:
        raise ValueError("--entries is missing: give how many entries the memory will hold")
    longest = config.model.max_positions
    return _Content(
        entries=entries,
        entry_tokens=options.entry_tokens or found.get("entry_tokens") or min(64, longest),
        vocabulary=options.vocabulary or found.get("vocabulary") or 30_522,
        sequence_tokens=options.sequence_tokens or found.get("sequence_tokens") or longest,
    )
