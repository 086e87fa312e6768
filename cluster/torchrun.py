"""Trainers that torchrun starts, beside a memory server: `torchrun -m cluster.torchrun CONFIG ...`.

Every rank is a client of the Ray in which the server runs, and starts nothing there. Rank 0 makes
the run's keys live and tells the others which epoch that is, through torchrun's own store.

Started again, the same command goes on from the newest checkpoint. `--max-restarts` is left at 0:
ranks that torchrun starts again by itself do not always find each other over gloo.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from cluster import checks, resources
from cluster.cli.failures import explain
from cluster.config import PretrainConfig, load_config
from cluster.errors import LaunchError
from cluster.pretrain import CONFIG_FILE, with_absolute_paths
from cluster.ray_session import ray_session
from cluster.run_lock import run_lock
from cluster.run_memory import RunMemory, attached_memory
from cluster.starting import Start, find_start
from cluster.stop import PREEMPTION, REQUEUE
from memory_server.store.store import Store
from trainer.build import build_model
from trainer.checkpoint import latest_checkpoint, read_key_weights
from trainer.control import Control
from trainer.evaluate import describe_evaluation
from trainer.export import write_text
from trainer.final import evaluate_run
from trainer.job import TrainJob, TrainOutcome
from trainer.loop import run_rank
from trainer.report import write_report
from trainer.settings import ConfigError
from trainer.task import CorpusTask

_TELL_TIMEOUT = timedelta(hours=24)


def train_rank(config: PretrainConfig, *, rank: int, world: int, attempt: int) -> TrainOutcome:
    """Train as one of the ranks; blocks.

    Args:
        rank, world, attempt: as torchrun tells them.

    Raises:
        ConfigError, LaunchError, CorpusError: refused before any work. What training raises.
    """
    config = with_absolute_paths(config)
    _check(config, world)
    source = checks.corpus_source(config)
    shape = checks.check_model(config, source)
    run_dir = Path(config.run.dir)
    device = resources.choose_device(config, resources.local_gpus())
    with ExitStack() as stack:
        stack.enter_context(ray_session(config.cluster, cpus=0))
        memory = stack.enter_context(attached_memory(config, source))
        resume = latest_checkpoint(run_dir) is not None
        told: dict[str, Any]
        store = _store(attempt)
        if rank == 0:
            stack.enter_context(run_lock(run_dir))
            start = _start(config, source, run_dir, resume=resume, leads=True)
            serving = RunMemory(memory, own=False)
            model = build_model(shape, seed=config.run.seed, init_from=config.model.init_from)
            weights = (
                model.key_weights()
                if start.checkpoint is None
                else read_key_weights(start.checkpoint)
            )
            serving.renew(start, weights)
            stack.callback(serving.unpin)
            write_text(run_dir / CONFIG_FILE, config.to_toml())
            told = {
                "epoch": serving.epoch,
                "content": serving.content_version,
                "checkpoint": None if start.checkpoint is None else start.checkpoint.name,
            }
            store.set("start", json.dumps(told))
        else:
            told = json.loads(store.get("start"))
            resumes = told["checkpoint"] is not None
            start = _start(config, source, run_dir, resume=resumes, leads=False)
        mine = None if start.checkpoint is None else start.checkpoint.name
        if mine != told["checkpoint"]:
            raise LaunchError(
                f"rank {rank} sees the checkpoint {mine} in {run_dir}, rank 0 {told['checkpoint']}:"
                " put run.dir on a filesystem that all nodes mount at this path"
            )
        job = TrainJob(
            settings=config,
            run_dir=run_dir,
            task=CorpusTask(config.data.corpus, source.store, version=start.state.content_version),
            memory=memory,
            epoch=told["epoch"],
            content_version=told["content"],
            tokenizer=source.tokenizer.resolve(),
            model_config=shape.to_dict(),
            device=device,
            init_method="env://",
            checkpoint=start.checkpoint,
            start=start.state,
            notes=start.notes,
            resolved_config=_plain(config),
        )
        with _stop_on_signals() as control:
            outcome = run_rank(job, rank, control)
        if rank == 0 and not outcome.stopped:
            for line in describe_evaluation(evaluate_run(job)):
                _say(line)
            _say(f"report: {write_report(run_dir)}")
        return outcome


def _check(config: PretrainConfig, world: int) -> None:
    if not config.memory.server:
        raise ConfigError(
            'memory.server = "": torchrun starts trainers only; name a server that runs '
            "(`pluglm memory serve`)"
        )
    if config.cluster.address == "local":
        raise ConfigError(
            'cluster.address = "local": give the address of the Ray in which the server runs'
        )
    if config.runtime.trainers != world:
        raise ConfigError(
            f"runtime.trainers = {config.runtime.trainers}: torchrun started {world} processes; "
            f"set runtime.trainers={world}"
        )


def _start(
    config: PretrainConfig, source: checks.Source, run_dir: Path, *, resume: bool, leads: bool
) -> Start:
    return find_start(
        config,
        run_dir,
        resume=resume,
        content=Store.open(source.store).head(),
        fingerprint=source.fingerprint,
        contents=leads,  # one rank reads every byte and compares, not all of them
    )


def take_own_device(environment: MutableMapping[str, str]) -> None:
    """Show this process only the GPU that is its own, as Ray does; before CUDA is begun.

    torchrun shows every rank of a node all of them, and tells it its number there.
    """
    local = environment.get("LOCAL_RANK")
    if local is None:
        return
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    devices = None if shown is None else [name for name in shown.split(",") if name.strip()]
    if devices is None:
        environment["CUDA_VISIBLE_DEVICES"] = local
    elif devices:
        number = int(local)
        # More ranks than GPUs: this one sees none, and says so where it needs one.
        environment["CUDA_VISIBLE_DEVICES"] = devices[number] if number < len(devices) else ""


def _store(attempt: int) -> Any:
    """torchrun's own store, under a name of this attempt's."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise LaunchError("start this with torchrun: see `pluglm launch torchrun --help`")
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=_TELL_TIMEOUT,
    )
    return dist.PrefixStore(f"pluglm-{attempt}", store)  # type: ignore[attr-defined]


@contextmanager
def _stop_on_signals() -> Iterator[Control]:
    """torchrun hands SIGTERM on to every rank; rank 0's wish counts for all."""
    control = Control()

    def stop(number: int, frame: FrameType | None) -> None:
        control.request_stop()

    before = {number: signal.signal(number, stop) for number in (*PREEMPTION, signal.SIGINT)}
    try:
        yield control
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _plain(config: PretrainConfig) -> dict[str, Any]:
    import tomllib

    return tomllib.loads(config.to_toml())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - rank 0 talks to a person


def main(words: Sequence[str]) -> int:
    """0 when the run is complete, REQUEUE when a signal ended it, 1 or 2 with one line else."""
    rank = int(os.environ.get("RANK", "0"))
    take_own_device(os.environ)
    try:
        if not words:
            raise LaunchError("give a configuration: torchrun -m cluster.torchrun CONFIG.toml")
        outcome = train_rank(
            load_config(words[0], words[1:]),
            rank=rank,
            world=int(os.environ.get("WORLD_SIZE", "1")),
            attempt=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        )
    except Exception as error:
        failure = explain(error)
        if rank == 0 or not isinstance(error, ConfigError):
            _say(f"pluglm: error: {failure.message}")
        return failure.code
    if outcome.stopped and rank == 0:
        _say(f"stopped at step {outcome.step}; {outcome.checkpoint} is committed")
    return REQUEUE if outcome.stopped else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
