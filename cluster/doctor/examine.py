"""Looking a node or a cluster over, in the order in which things would fail."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cluster import checks, resources
from cluster.config import ClusterConfig, PretrainConfig
from cluster.doctor.across import all_reduce_across
from cluster.doctor.facts import NodeFacts, read_facts
from cluster.doctor.findings import (
    Finding,
    Places,
    of_clocks,
    of_machines,
    of_paths,
    of_versions,
)
from cluster.doctor.open_files import of_open_files, open_files_needed
from cluster.doctor.reduce import all_reduce
from cluster.errors import LaunchError
from cluster.ray_session import ray_session
from cluster.recovery import first_line
from memory_server.errors import MemoryServerError
from model import PlugLMConfig, PlugLMForMaskedLM, is_key_weight
from trainer.checkpoint import committed_checkpoints
from trainer.corpus.errors import CorpusError
from trainer.corpus.remote import absolute, is_url
from trainer.settings import ConfigError

_FACTS_TIMEOUT_S = 120.0
_LOOK_EVERY_S = 1.0


def examine(
    config: PretrainConfig | None, *, address: str, nodes: int, wait_s: float
) -> Iterator[Finding]:
    """Look at this node, or at every node of a cluster; findings come as they are made.

    Args:
        config: of a run that is to be started; None: of none.
        address: of a Ray cluster, "auto" or "host:port"; empty: this node alone.
        nodes: that the cluster is to have; waited for up to `wait_s` seconds.
    """
    needed: dict[str, int] = {}
    read_only: set[str] = set()
    if config is not None:
        yield from _of_run(config, needed, read_only)
    files = open_files_needed(config) if config is not None else 0
    with _tokens(list(needed)) as token:
        places = Places(needed=needed, read_only=frozenset(read_only), token=token)
        if not address:
            facts = read_facts(places.paths, token_name=token)
            yield from _of_nodes([facts], places, files)
        else:
            yield from _of_cluster(config, address, nodes, wait_s, places, files)
    yield all_reduce("gloo")
    if torch.cuda.is_available() and torch.cuda.device_count() > 1:
        yield all_reduce("nccl")


def _of_run(
    config: PretrainConfig, needed: dict[str, int], read_only: set[str]
) -> Iterator[Finding]:
    """Whether corpus, memory and model fit; notes what the run will write where, and read."""
    run_dir = Path(config.run.dir).expanduser().resolve()
    # What is there already is where it will be made.
    place = str(next(p for p in (run_dir, *run_dir.parents) if p.is_dir()))
    needed[place] = 0
    try:
        source = checks.corpus_source(config)
        shape = checks.check_model(config, source)
        checks.check_engine(config, on_gpu=config.runtime.device == "cuda")
    except (ConfigError, CorpusError, LaunchError, MemoryServerError, OSError) as error:
        yield Finding(grade="problem", what=str(error), fix="a run would be refused with this")
        return
    weights, checkpoint_bytes = _of_a_checkpoint(shape)
    # One more than are kept is on the disk while it is written; what a run left is there already.
    more = max(1, config.checkpoint.keep + 1 - len(committed_checkpoints(run_dir)))
    needed[place] = checkpoint_bytes * more
    sources = (*config.data.corpora, str(source.store))
    read_only.update(absolute(place) for place in sources if not is_url(place))
    yield Finding(
        grade="ok", what=f"the configuration fits its corpus: {weights / 1e6:,.1f} million weights"
    )


def _of_a_checkpoint(shape: PlugLMConfig) -> tuple[int, int]:
    """(weights of a model, bytes of its checkpoint): weights and two moments in float32, and those
    that made the memory's keys once more."""
    with torch.device("meta"):
        model = PlugLMForMaskedLM(shape)
    weights = sum(weight.numel() for weight in model.parameters())
    of_keys = sum(
        weight.numel()
        for name, weight in model.base_model.named_parameters()
        if is_key_weight(name, shape)
    )
    return weights, 12 * weights + 4 * of_keys


def _of_nodes(nodes: Sequence[NodeFacts], places: Places, files: int) -> Iterator[Finding]:
    yield from of_machines(nodes)
    yield from of_open_files(nodes, files)
    yield from of_versions(nodes)
    yield from of_paths(nodes, places)


def _of_cluster(
    config: PretrainConfig | None,
    address: str,
    nodes: int,
    wait_s: float,
    places: Places,
    files: int,
) -> Iterator[Finding]:
    import ray

    deadline = time.monotonic() + wait_s
    try:
        with _joined(address, deadline):
            alive = _wait_for_nodes(nodes, deadline)
            if len(alive) < nodes:
                yield Finding(
                    grade="problem",
                    what=f"{len(alive)} Ray nodes after {wait_s:g} s, {nodes} were to be there",
                    fix="look at the logs of the others (`ray status`, /tmp/ray/session_latest)",
                )
            facts, clocks, failed = _ask(alive, places.paths, places.token)
            for node_id, reason in failed.items():
                yield Finding(
                    grade="problem",
                    what=f"node {node_id[:12]} could not look at itself: {reason}",
                    fix="give it the same environment as the others, with this project in it",
                )
            silent = len(alive) - len(facts) - len(failed)
            if silent:
                yield Finding(
                    grade="problem",
                    what=f"{silent} nodes did not answer within {_FACTS_TIMEOUT_S:g} s",
                    fix="their raylets live, but cannot start a worker: see their Ray logs",
                )
            if facts:
                yield from of_clocks(facts, clocks)
                yield from _of_nodes(facts, places, files)
            answered = {fact.node_id for fact in facts}
            there = [n for n in ray.nodes() if n["NodeID"] in answered]  # type: ignore[no-untyped-call]
            yield from all_reduce_across(there, timeout_s=_FACTS_TIMEOUT_S)
            if config is not None:
                yield _of_resources(config, ray.cluster_resources())  # type: ignore[no-untyped-call]
    except LaunchError as error:
        yield Finding(grade="problem", what=str(error), fix="start Ray there, or correct --address")


def _of_resources(config: PretrainConfig, there: dict[str, float]) -> Finding:
    try:
        device = resources.choose_device(config, int(there.get("GPU", 0)))
        resources.check_cluster(config, device, there)
    except (ConfigError, LaunchError) as error:
        return Finding(grade="problem", what=str(error), fix="a run would be refused with this")
    cpus = resources.cpus_needed(config)
    return Finding(
        grade="ok",
        what=f"Ray has {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs; the run "
        f"takes {cpus} and {resources.gpus_needed(config, device):g}",
    )


@contextmanager
def _joined(address: str, deadline: float) -> Iterator[None]:
    """Join a Ray that may only be about to start. Raises LaunchError."""
    while True:
        try:
            session = ray_session(ClusterConfig(address=address), cpus=0, otherwise="wait for it")
            session.__enter__()
            break
        except LaunchError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_LOOK_EVERY_S)
    try:
        yield
    finally:
        session.__exit__(None, None, None)


def _wait_for_nodes(count: int, deadline: float) -> list[str]:
    import ray

    while True:
        alive = [n["NodeID"] for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
        if len(alive) >= count or time.monotonic() >= deadline:
            return alive
        time.sleep(_LOOK_EVERY_S)


def _ask(
    node_ids: Sequence[str], directories: list[str], token: str
) -> tuple[list[NodeFacts], list[float], dict[str, str]]:
    """What every node says, and when it said so; why a node failed. The silent are left out."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task: Any = ray.remote(num_cpus=0, max_retries=0)(read_facts)
    node_of = {
        task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote(directories, token_name=token, node_id=node_id): node_id
        for node_id in node_ids
    }
    asked = list(node_of)
    facts, clocks, failed = [], [], {}
    deadline = time.monotonic() + _FACTS_TIMEOUT_S
    while asked and (left := deadline - time.monotonic()) > 0:
        ready, asked = ray.wait(asked, timeout=left)
        at = time.time()
        for reference in ready:
            try:
                facts.append(ray.get(reference))
                clocks.append(at)
            except RayError as error:
                cause = getattr(error, "cause", None) or error
                failed[node_of[reference]] = f"{type(cause).__name__}: {first_line(cause)}"
    return facts, clocks, failed


@contextmanager
def _tokens(directories: Sequence[str]) -> Iterator[str]:
    """A file in each directory that exists, which other nodes must see; removed at the end.

    Yields its name, which is what it holds, too.
    """
    name = f".pluglm-doctor-{secrets.token_hex(8)}"
    written = []
    try:
        for directory in map(Path, directories):
            try:
                (directory / name).write_text(name, encoding="ascii")
            except OSError:  # it does not exist yet, or the findings tell that it is not writable
                continue
            written.append(directory / name)
        yield name if len(written) == len(directories) else ""
    finally:
        for path in written:
            path.unlink(missing_ok=True)
