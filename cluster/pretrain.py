"""The main job's driver: check, start Ray, the memory and the trainers, watch, evaluate, report."""

from __future__ import annotations

import logging
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from cluster import checks, resources
from cluster.config import PretrainConfig
from cluster.errors import LaunchError
from cluster.ray_session import ray_session
from cluster.run_lock import run_lock
from cluster.run_memory import RunMemory, run_memory
from cluster.starting import Start, find_start
from cluster.stop import Stop, stop_on_signals
from cluster.trainer_actor import Gang, TrainerDied, first_failure, trainer_gang
from memory_server.actors.client import RayMemory
from memory_server.store.store import Store
from model import PlugLMConfig
from trainer.build import build_model
from trainer.checkpoint import latest_checkpoint, read_key_weights
from trainer.errors import TrainingError
from trainer.evaluate import describe_evaluation
from trainer.export import MODEL, write_json, write_text
from trainer.loop import TrainJob, TrainOutcome
from trainer.metrics import METRICS_FILE
from trainer.progress import Progress
from trainer.report import write_report
from trainer.task import CorpusTask, Task

log = logging.getLogger(__name__)
CONFIG_FILE = "config.toml"
_POLL_S = 0.5

Say = Callable[[str], None]
AfterTraining = Callable[[TrainJob], list[str]]


def pretrain(
    config: PretrainConfig,
    *,
    resume: bool = False,
    say: Say | None = None,
    notes: dict[str, str] | None = None,
    after: AfterTraining | None = None,
) -> int:
    """Pre-train on a corpus, from its first step or from the newest checkpoint; blocks.

    Args:
        config: the run's configuration.
        resume: go on with the run in `config.run.dir`.
        say: receives lines for a person; standard error when None.
        notes: what the report says of the text ({"source", "licence"}).
        after: called with the job when training is complete and the memory still serves; the lines
            that it returns are said at the end.

    Returns:
        0 when the run is complete; 130 or 143 when a signal asked it to end (a checkpoint of the
        last step is committed if training had begun).

    Raises:
        ConfigError, CorpusError, LaunchError, StoreError: refused before any work.
        TrainingError, CheckpointError: training could not go on; what was committed is kept.
    """
    config = _with_absolute_paths(config)
    source = checks.corpus_source(config)
    corpus = Path(config.data.corpus)
    return run_task(
        config,
        source,
        lambda version: CorpusTask(corpus, source.store, version=version),
        first_content=Store.open(source.store).head(),
        resume=resume,
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
            model.key_weights() if start.checkpoint is None else read_key_weights(start.checkpoint)
        )
        task = make_task(start.state.content_version)
        return _run(config, source, task, start, shape, weights, run_dir, tell, notes, after)


def _run(
    config: PretrainConfig,
    source: checks.Source,
    task: Task,
    start: Start,
    shape: PlugLMConfig,
    weights: dict[str, Tensor],
    run_dir: Path,
    tell: Say,
    notes: dict[str, str] | None,
    after: AfterTraining | None,
) -> int:
    if start.checkpoint is None:
        _set_aside_metrics(run_dir)
    write_text(run_dir / CONFIG_FILE, config.to_toml())
    if notes:
        write_json(run_dir / "notes.json", notes)
    with stop_on_signals() as stop:
        try:
            with _everything(config, source, shape, weights, start, stop) as up:
                serving, gang, device = up
                memory = serving.memory
                tell(_opening(config, memory, start, device))
                job = TrainJob(
                    settings=config,
                    run_dir=run_dir,
                    task=task,
                    memory=memory,
                    epoch=serving.epoch,
                    content_version=serving.content_version,
                    tokenizer=source.tokenizer.resolve(),
                    model_config=shape.to_dict(),
                    device=device,
                    init_method=gang.rendezvous,
                    checkpoint=start.checkpoint,
                    start=start.state,
                    notes=start.notes,
                    resolved_config=_plain(config),
                )
                outcome = _watch(config, gang, job, stop, tell)
                if outcome.stopped:
                    tell(
                        f"stopped at step {outcome.step}; {outcome.checkpoint} is committed: go on "
                        "with --resume"
                    )
                    return 128 + stop.number
                tell("evaluating on held-out text ...")
                evaluation = _wait(gang.evaluate(job), run_dir, stop)
                report = write_report(run_dir)
                for line in describe_evaluation(evaluation):
                    tell(line)
                if after is not None:
                    for line in after(job):
                        tell(line)
                    report = write_report(run_dir)
        except KeyboardInterrupt as interruption:
            last = latest_checkpoint(run_dir)
            kept = f"go on from {last.name} with --resume" if last else "no checkpoint was due yet"
            tell(f"interrupted; {kept}")
            return stop.exit_code(interruption)
    tell(f"model: {run_dir / MODEL}")
    tell(f"report: {report}")
    return 0


@contextmanager
def _everything(
    config: PretrainConfig,
    source: checks.Source,
    shape: PlugLMConfig,
    weights: dict[str, Tensor],
    start: Start,
    stop: Stop,
) -> Iterator[tuple[RunMemory, Gang, str]]:
    """Ray, the memory server and the trainers, ended in the opposite order whatever happens."""
    with ray_session(config.cluster, cpus=resources.cpus_needed(config)):
        # Ray has installed a handler of its own; this run's must be the one that counts.
        stop.listen()
        stop.check()
        there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        # A joined cluster may have GPUs where this machine has none, and the other way round.
        device = resources.choose_device(config, int(there.get("GPU", 0)))
        resources.check_cluster(config, device, there)
        with run_memory(config, source, shape, weights, start) as serving:
            stop.check()
            loopback = config.cluster.address == "local"
            on_gpu = device == "cuda"
            with trainer_gang(config.runtime, on_gpu=on_gpu, loopback=loopback) as gang:
                stop.check()
                yield serving, gang, device


def _watch(
    config: PretrainConfig, gang: Gang, job: TrainJob, stop: Stop, tell: Say
) -> TrainOutcome:
    """Show progress until every rank has ended."""
    stop.training = True
    references = gang.start(job)
    asked = False
    progress: Progress | None = None
    if config.logging.progress:
        progress = Progress(config.optim.steps, start_step=job.start.step)
    try:
        waiting = references
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_POLL_S)
            if stop.event.is_set() and not asked:
                asked = True
                tell("stopping after this step: writing a checkpoint (again to end at once) ...")
                gang.request_stop()
            line, messages = gang.poll()
            for message in messages:
                tell(message)
            if progress is not None and "step" in line:
                progress.update(line)
            if ready and _any_failed(ready):
                failure = first_failure(references)
                raise _explained(failure, job.run_dir)
        outcome: TrainOutcome = ray.get(references[0])
        return outcome
    finally:
        stop.training = False
        if progress is not None:
            progress.close()


def _any_failed(ready: list[Any]) -> bool:
    try:
        ray.get(ready)
    # Whatever a rank raised; `first_failure` finds out which rank knows the reason.
    except Exception:
        return True
    return False


def _explained(failure: Exception | None, run_dir: Path) -> Exception:
    if isinstance(failure, (TrainingError, LaunchError)):
        return failure
    last = latest_checkpoint(run_dir)
    advice = f"go on from {last.name} with --resume" if last else "no checkpoint was due yet"
    error = TrainingError(f"training failed: {_reason(failure)}; {advice}")
    error.__cause__ = failure
    return error


def _reason(failure: Exception | None) -> str:
    if isinstance(failure, TrainerDied):
        return str(failure)
    first = str(failure).strip().splitlines()[0] if failure else "no reason given"
    return f"{type(failure).__name__}: {first}"


def _wait(reference: Any, run_dir: Path, stop: Stop) -> Any:
    """The evaluation's result."""
    while True:
        ready, waiting = ray.wait([reference], timeout=_POLL_S)
        stop.check()
        if waiting:
            continue
        failure = first_failure(ready)
        if failure is not None:
            raise TrainingError(
                f"the evaluation failed: {_reason(failure)}; training is complete and its model is "
                f"{run_dir / MODEL}: evaluate it again with --resume"
            ) from failure
        return ray.get(reference)


def _opening(config: PretrainConfig, memory: RayMemory, start: Start, device: str) -> str:
    info = memory.info()
    runtime = config.runtime
    where = "" if start.checkpoint is None else f", resuming at step {start.state.step}"
    return (
        f"{info.entries:,} entries in {info.shards} shards; {runtime.trainers} trainers on "
        f"{device}, ZeRO-{runtime.zero_stage}, {config.memory.refresh} refresh every "
        f"{config.memory.refresh_every_steps} steps{where}"
    )


def _with_absolute_paths(config: PretrainConfig) -> PretrainConfig:
    """The run's config.toml must mean the same from whatever directory it is read."""
    corpus = str(Path(config.data.corpus).expanduser().resolve())
    store = config.memory.store and str(Path(config.memory.store).expanduser().resolve())
    return replace(
        config,
        data=replace(config.data, corpus=corpus),
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


def _plain(config: PretrainConfig) -> dict[str, Any]:
    return tomllib.loads(config.to_toml())


def to_stderr(line: str) -> None:
    """Say a line to the person who started the command."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - the driver talks to a person
