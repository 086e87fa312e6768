"""Where a run begins: at step 0, or at the newest checkpoint that is undamaged."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import PretrainConfig
from cluster.errors import LaunchError
from trainer.checkpoint import (
    CheckpointState,
    checkpoint_step,
    committed_checkpoints,
    latest_checkpoint,
    read_state,
    read_verified,
)
from trainer.checkpoint_state import OldCheckpointFormat
from trainer.data.cursor import Cursor
from trainer.errors import CheckpointError
from trainer.settings import ConfigError
from trainer.settings_fields import shown

# What a resumed run may set anew, by section: it changes neither what is learned nor the files.
# Sections that are not named (run names, logging, checkpoints, evaluation, cluster) may all change,
# but for the seed.
_MAY_CHANGE: dict[str, frozenset[str]] = {
    "run": frozenset({"dir", "name"}),
    # Directories may move; their contents are compared by fingerprint and content version.
    "data": frozenset({"corpus", "more_corpora", "cache_gib"}),
    "model": frozenset({"init_from"}),
    "memory": frozenset(
        {
            "store",
            "server",
            "shards",
            "replicas",
            "placement",
            "node_resource",
            "on_lost_shard",
            "deadline_s",
            "threads_per_shard",
            "gpus_per_shard",
            "audit_every_s",
        }
    ),
    "optim": frozenset({"fused", "max_skipped_steps"}),
    "runtime": frozenset(
        {
            "device",
            "threads_per_trainer",
            "node_resource",
            "trainers",
            "zero_stage",
            "micro_batch_size",
            "deepspeed_config",
            "activation_checkpointing",
            "retrieval_chunks",
            "offload_optimizer",
            "offload_parameters",
            "nvme_path",
        }
    ),
}


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins.

    Attributes:
        checkpoint: to resume from; None: start afresh.
        state: of it, or of step 0.
        notes: what a person must know about it, one line each.
    """

    checkpoint: Path | None
    state: CheckpointState
    notes: tuple[str, ...] = ()


def find_start(
    config: PretrainConfig,
    run_dir: Path,
    *,
    resume: bool,
    content: str,
    fingerprint: str = "",
    contents: bool = True,
) -> Start:
    """Where to begin.

    Args:
        config: the run's configuration.
        run_dir: its directory.
        resume: go on from the newest checkpoint, or from the one before where that is damaged.
        content: content version of the memory for a fresh start.
        fingerprint: of the corpus that is trained on; empty: not known.
        contents: read every file of the checkpoint and compare its checksum, not only its size.

    Raises:
        LaunchError: a run is there already, or none to resume.
        CheckpointError: every checkpoint is damaged, or of an earlier version.
        ConfigError: the checkpoint needs other settings, or another corpus.
    """
    checkpoint = latest_checkpoint(run_dir)
    if not resume:
        if checkpoint is not None:
            raise LaunchError(
                f"{run_dir} already holds a run; go on with it with --resume, or choose another "
                "directory with run.dir=DIR"
            )
        return Start(checkpoint=None, state=_first(config, content, fingerprint))
    if checkpoint is None:
        raise LaunchError(
            f"{run_dir} holds no committed checkpoint to resume from; start it without --resume"
        )
    checkpoint, state, notes = _newest_undamaged(run_dir, contents=contents)
    check_same_run(config, checkpoint, state)
    if state.step > config.optim.steps:
        raise ConfigError(
            f"optim.steps = {config.optim.steps}: {checkpoint.name} is already at step {state.step}"
        )
    if fingerprint and state.corpus_fingerprint not in ("", fingerprint):
        raise ConfigError(
            f"data.corpus = {' + '.join(config.data.corpora)}: is another corpus (fingerprint "
            f"{fingerprint}) "
            f"than {checkpoint} was trained on ({state.corpus_fingerprint}); give that one, or "
            "start another run with run.dir=DIR"
        )
    return Start(checkpoint=checkpoint, state=state, notes=(*notes, *_regrouped(config, state)))


def _first(config: PretrainConfig, content: str, fingerprint: str) -> CheckpointState:
    return CheckpointState(
        step=0,
        cursor=Cursor(),
        trainers=config.runtime.trainers,
        zero_stage=config.runtime.zero_stage,
        content_version=content,
        encoder_step=0,
        published_step=0,
        corpus_fingerprint=fingerprint,
    )


def _newest_undamaged(
    run_dir: Path, *, contents: bool
) -> tuple[Path, CheckpointState, tuple[str, ...]]:
    """(the checkpoint, its state, what was passed over and why)."""
    read = read_verified if contents else read_state
    damaged: list[tuple[Path, str]] = []
    for checkpoint in reversed(committed_checkpoints(run_dir)):
        try:
            state = read(checkpoint)
        except OldCheckpointFormat:
            raise
        except CheckpointError as error:
            damaged.append((checkpoint, str(error).split("; remove this checkpoint")[0]))
            continue
        notes = [f"{path.name} is damaged and passed over: {why}" for path, why in damaged]
        if damaged:
            lost = checkpoint_step(damaged[0][0]) - state.step
            notes.append(
                f"going on from the one before, {checkpoint.name}: {lost} steps are done again"
            )
        return checkpoint, state, tuple(notes)
    reasons = "; ".join(f"{path.name}: {why}" for path, why in damaged)
    raise CheckpointError(
        f"no checkpoint of {run_dir} can be used ({reasons}); bring one back from a copy, or start "
        "another run with run.dir=DIR"
    )


def check_same_run(config: PretrainConfig, checkpoint: Path, state: CheckpointState) -> None:
    """Refuse settings that would make the resumed run another one than the checkpoint's."""
    given = tomllib.loads(config.to_toml())
    for section, keys in _MAY_CHANGE.items():
        for key, was in state.settings.get(section, {}).items():
            now = given.get(section, {}).get(key, was)
            if now != was and key not in keys:
                name = f"{section}.{key}"
                raise ConfigError(
                    f"{name} = {shown(now)}: the run in {checkpoint.parent.parent} was started "
                    f"with {shown(was)}; resume with {name}={shown(was)}, or start another run"
                )


def _regrouped(config: PretrainConfig, state: CheckpointState) -> list[str]:
    """What to say when other trainers, or trainers of another kind, go on."""
    runtime = config.runtime
    before, now = (state.trainers, state.zero_stage), (runtime.trainers, runtime.zero_stage)
    notes = []
    if before != now:
        notes.append(
            f"saved by {before[0]} trainers (ZeRO-{before[1]}), going on with {now[0]} "
            f"(ZeRO-{now[1]}); dropout draws anew where their number changed"
        )
    was, is_now = _per_pass(state), config.micro_batch_size
    if was and was != is_now and state.step < config.optim.retrieval_warmup_steps:
        notes.append(
            f"the retrieval warm-up's negatives are now {is_now} sequences and were {was}: its "
            "loss is another from here on"
        )
    whole, whole_before = is_now * runtime.trainers, was * state.trainers
    if was and whole != whole_before and config.model.query_norm == "batch":
        notes.append(
            f"BatchNorm's statistics are now those of {whole} sequences and were of "
            f"{whole_before}: results differ a little from here on"
        )
    return notes


def _per_pass(state: CheckpointState) -> int:
    """Sequences per trainer and pass when the checkpoint was written; 0: not known."""
    settings: dict[str, Any] = state.settings
    try:
        micro = int(settings["runtime"]["micro_batch_size"])
        return micro or int(settings["optim"]["batch_size"]) // state.trainers
    except (KeyError, TypeError, ValueError):
        return 0
