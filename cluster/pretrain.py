"""The main job: check, start Ray and the memory, have the driver train, and report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import ray
from transformers.utils.logging import disable_progress_bar

from cluster import checks, resources
from cluster.config import PretrainConfig
from cluster.driver import Driver, RunPlan
from cluster.errors import GraceOver
from cluster.ray_session import ray_session
from cluster.run_lock import run_lock
from cluster.run_memory import RunMemory, run_memory
from cluster.starting import Start, find_start
from cluster.stop import Stop, stop_on_signals
from cluster.watch import Say
from memory_server.actors.client import RayMemory
from memory_server.store.store import Store
from trainer.build import build_model
from trainer.checkpoint import latest_checkpoint, read_key_weights
from trainer.corpus.remote import absolute, refuse_secrets
from trainer.evaluate import describe_evaluation
from trainer.export import MODEL, write_json, write_text
from trainer.job import TrainJob
from trainer.metrics import METRICS_FILE
from trainer.report import write_report
from trainer.task import CorpusTask, Task

CONFIG_FILE = "config.toml"

AfterTraining = Callable[[TrainJob], list[str]]


def pretrain(
    config: PretrainConfig,
    *,
    resume: bool = False,
    auto_resume: bool = False,
    say: Say | None = None,
    notes: dict[str, str] | None = None,
    after: AfterTraining | None = None,
) -> int:
    """Pre-train on a corpus, from its first step or from the newest checkpoint; blocks.

    Args:
        config: the run's configuration.
        resume: go on with the run in `config.run.dir`.
        auto_resume: go on with it if there is a checkpoint, else begin.
        say: receives lines for a person; standard error when None.
        notes: what the report says of the text ({"source", "licence"}).
        after: called with the job when training is complete and the memory still serves; the lines
            that it returns are said at the end.

    Returns:
        0 when the run is complete; when a signal asked it to end 130 (Ctrl-C), or 75 (SIGTERM,
        SIGUSR1): the same command with `auto_resume` goes on. A checkpoint of the last step is
        committed if training had begun and `recovery.grace_s` was enough.

    Raises:
        ConfigError, CorpusError, LaunchError, StoreError: refused before any work.
        TrainingError, CheckpointError: training could not go on; what was committed is kept.
    """
    config = with_absolute_paths(config)
    source = checks.corpus_source(config)
    return run_task(
        config,
        source,
        lambda version: CorpusTask(config.data.corpus, source.store, version=version),
        first_content=Store.open(source.store).head(),
        resume=resume or (auto_resume and _has_checkpoint(config)),
        say=say,
        notes=notes,
        after=after,
    )


def run_task(
    config: PretrainConfig,
    source: checks.Source,
    make_task: Callable[[str], Task],
    *,
    first_content: str,
    resume: bool = False,
    say: Say | None = None,
    notes: dict[str, str] | None = None,
    after: AfterTraining | None = None,
) -> int:
    """Train on any task; see `pretrain`.

    Args:
        make_task: the task on the memory content that the run begins with.
        first_content: that content version for a run that begins afresh.
    """
    tell = say or to_stderr
    # The run has a progress line of its own.
    disable_progress_bar()
    with stop_on_signals(requeue=True) as stop:
        # Of a cluster that is joined later nothing is known yet.
        on_gpu = config.runtime.device != "cpu"
        if config.cluster.address == "local":
            gpus = resources.local_gpus()
            device = resources.choose_device(config, gpus)
            resources.check_gpus(config, device, gpus)
            on_gpu = device == "cuda"
        shape = checks.check_model(config, source)
        checks.check_engine(config, on_gpu=on_gpu)
        run_dir = Path(config.run.dir).resolve()
        start = find_start(
            config,
            run_dir,
            resume=resume,
            content=first_content,
            fingerprint=source.fingerprint,
            contents=False,
        )
        checks.check_memory(config, source, start.state.content_version)
        # Built before the run directory is touched: model.init_from may be refused.
        model = build_model(shape, seed=config.run.seed, init_from=config.model.init_from)
        with run_lock(run_dir):
            # Found again: another driver may have ended meanwhile.
            start = find_start(
                config,
                run_dir,
                resume=resume,
                content=first_content,
                fingerprint=source.fingerprint,
            )
            for note in start.notes:
                tell(note)
            weights = (
                model.key_weights()
                if start.checkpoint is None
                else read_key_weights(start.checkpoint)
            )
            task = make_task(start.state.content_version)
            plan = RunPlan(
                config=config,
                source=source,
                task=task,
                shape=shape,
                first=start,
                weights=weights,
                run_dir=run_dir,
            )
            return _run(plan, stop, tell, notes, after)


def _run(
    plan: RunPlan,
    stop: Stop,
    tell: Say,
    notes: dict[str, str] | None,
    after: AfterTraining | None,
) -> int:
    config, run_dir = plan.config, plan.run_dir
    if plan.first.checkpoint is None:
        _set_aside_metrics(run_dir)
    write_text(run_dir / CONFIG_FILE, config.to_toml())
    if notes:
        write_json(run_dir / "notes.json", notes)
    try:
        with _ray_and_memory(plan, stop) as (serving, device):
            tell(_opening(config, serving.memory, plan.first, device))
            ended = Driver(plan, serving, device, stop=stop, tell=tell).run(after)
        outcome = ended.outcome
        if ended.evaluation is None:
            tell(
                f"stopped at step {outcome.step}; {outcome.checkpoint} is committed: go on "
                "with --resume"
            )
            return stop.exit_code()
        for line in (*describe_evaluation(ended.evaluation), *ended.lines):
            tell(line)
    except KeyboardInterrupt:
        tell(f"interrupted; {_kept(run_dir)}")
        return stop.exit_code()
    except GraceOver as error:
        tell(f"{error}; {_kept(run_dir)}")
        return stop.exit_code()
    tell(f"model: {run_dir / MODEL}")
    tell(f"report: {write_report(run_dir)}")
    return 0


def _has_checkpoint(config: PretrainConfig) -> bool:
    return latest_checkpoint(Path(config.run.dir).resolve()) is not None


@contextmanager
def _ray_and_memory(plan: RunPlan, stop: Stop) -> Iterator[tuple[RunMemory, str]]:
    """Ray and the memory server, ended in the opposite order whatever happens."""
    config = plan.config
    with ray_session(config.cluster, cpus=resources.cpus_needed(config)):
        # Ray has installed a handler of its own; this run's must be the one that counts.
        stop.listen()
        stop.check()
        there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        # A joined cluster may have GPUs where this machine has none, and the other way round.
        device = resources.choose_device(config, int(there.get("GPU", 0)))
        resources.check_cluster(config, device, there)
        with run_memory(config, plan.source, plan.shape, plan.weights, plan.first) as serving:
            stop.check()
            yield serving, device


def _kept(run_dir: Path) -> str:
    last = latest_checkpoint(run_dir)
    return f"go on from {last.name} with --resume" if last else "no checkpoint was due yet"


def _opening(config: PretrainConfig, memory: RayMemory, start: Start, device: str) -> str:
    info = memory.info()
    runtime = config.runtime
    where = "" if start.checkpoint is None else f", resuming at step {start.state.step}"
    return (
        f"{info.entries:,} entries in {info.shards} shards; {runtime.trainers} trainers on "
        f"{device}, ZeRO-{runtime.zero_stage}, {config.memory.refresh} refresh every "
        f"{config.memory.refresh_every_steps} steps{where}"
    )


def with_absolute_paths(config: PretrainConfig) -> PretrainConfig:
    """The run's config.toml must mean the same from whatever directory it is read."""
    for corpus in config.data.corpora:
        refuse_secrets(corpus, "data.corpus")
    refuse_secrets(config.memory.store, "memory.store")
    corpora = [absolute(corpus) for corpus in config.data.corpora]
    store = config.memory.store and absolute(config.memory.store)
    runtime, model = config.runtime, config.model
    json_file, start = runtime.deepspeed_config, model.init_from
    return replace(
        config,
        # Every rank opens these again, wherever its process was started.
        runtime=replace(runtime, deepspeed_config=json_file and absolute(json_file)),
        model=replace(model, init_from=start and absolute(start)),
        data=replace(config.data, corpus=corpora[0], more_corpora=tuple(corpora[1:])),
        memory=replace(config.memory, store=store),
    )


def _set_aside_metrics(run_dir: Path) -> None:
    """A run that ended before its first checkpoint starts anew; its metrics are kept aside."""
    metrics = run_dir / METRICS_FILE
    if not metrics.exists():
        return
    number = 1
    while (aside := run_dir / f"metrics.abandoned-{number}.jsonl").exists():
        number += 1
    metrics.rename(aside)


def to_stderr(line: str) -> None:
    """Say a line to the person who started the command."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - the driver talks to a person
