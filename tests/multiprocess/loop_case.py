"""What whole runs of the trainer's loop need on disk, for the tests of the loop."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from memory_server.local import LocalMemory
from model import KeyEncoderFactory, PlugLMForMaskedLM
from trainer.build import build_model, model_config
from trainer.checkpoint import (
    CheckpointState,
    committed_checkpoints,
    read_key_weights,
    read_state,
)
from trainer.control import Control
from trainer.data.cursor import Cursor
from trainer.data.stream import TrainBatch
from trainer.job import TrainJob, TrainOutcome
from trainer.loop import run_rank
from trainer.settings import (
    CheckpointSettings,
    DataSettings,
    EvaluateSettings,
    LoggingSettings,
    MemorySettings,
    ModelSettings,
    OptimSettings,
    RunSettings,
    RuntimeSettings,
    TrainSettings,
)
from trainer.task import Stream
from trainer.world.store import build_world_store
from trainer.world.task import WorldStream, WorldTask, worlds_needed
from trainer.world.tokenizer import PAD, VOCABULARY, save_world_tokenizer

STEPS, EVERY, FACTS, KEY_SIZE = 10, 4, 24, 8
Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class OneWorldTask:
    """A world that does not change, so that each rank can hold a memory of its own."""

    worlds: WorldTask

    def open(
        self, settings: TrainSettings, *, rank: int, world_size: int, cursor: Cursor, step: int = 0
    ) -> Stream:
        return WorldStream(
            self.worlds,
            batch_size=settings.optim.batch_size,
            micro_batch_size=settings.micro_batch_size,
            rank=rank,
            world_size=world_size,
            cursor=cursor,
        )

    def heldout(
        self, settings: TrainSettings, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[TrainBatch]:
        return self.worlds.heldout(settings, rank=rank, world_size=world_size)

    def content_version(self, step: int) -> str | None:
        return None


@dataclass(frozen=True)
class Place:
    """What all runs share on disk."""

    home: Path
    changing: WorldTask
    constant: OneWorldTask

    @classmethod
    def make(cls, home: Path) -> Place:
        fingerprint = save_world_tokenizer(home / "tokenizer")
        tasks = []
        for every in (EVERY, STEPS):
            store = home / f"store-{every}"
            worlds = worlds_needed(STEPS, every) + 1
            versions = build_world_store(
                store, worlds=worlds, seed=1, size=FACTS, tokenizer_fingerprint=fingerprint
            )
            tasks.append(
                WorldTask(
                    store=store,
                    versions=tuple(versions),
                    seed=1,
                    size=FACTS,
                    refresh_every_steps=every,
                    steps=STEPS,
                )
            )
        return cls(home, tasks[0], OneWorldTask(tasks[1]))

    def settings(
        self,
        name: str,
        *,
        trainers: int = 1,
        passes: int = 1,
        zero_stage: int = 2,
        refresh: str = "sync",
        dropout: float = 0.1,
        lr: float = 3e-3,
        evaluate_every: int = 0,
        warmup: int | None = None,
    ) -> TrainSettings:
        if warmup is None:
            warmup = 100 if refresh == "sync" else 0
        return TrainSettings(
            run=RunSettings(dir=str(self.home / name)),
            data=DataSettings(corpus="none"),
            model=ModelSettings(
                hidden_size=32,
                num_layers=2,
                num_heads=2,
                intermediate_size=64,
                max_positions=8,
                dropout=dropout,
                memory_ffn_size=32,
                key_size=KEY_SIZE,
            ),
            memory=MemorySettings(
                top_k=3,
                refresh=refresh,  # type: ignore[arg-type]
                refresh_every_steps=EVERY,
            ),
            optim=OptimSettings(
                steps=STEPS,
                batch_size=8,
                lr=lr,
                retrieval_warmup_steps=warmup,
                max_skipped_steps=3,
            ),
            runtime=RuntimeSettings(
                trainers=trainers,
                zero_stage=zero_stage,
                micro_batch_size=8 // trainers // passes,
            ),
            checkpoint=CheckpointSettings(every_steps=5, keep=3),
            logging=LoggingSettings(log_every_steps=1, progress=False),
            evaluate=EvaluateSettings(every_steps=evaluate_every, sequences=16),
        )

    def job(self, settings: TrainSettings, *, resume: bool = False, memory: Any = None) -> TrainJob:
        """What the driver would hand out; without `memory` every call opens one of its own."""
        run_dir = Path(settings.run.dir)
        run_dir.mkdir(exist_ok=True)
        config = model_config(settings.model, vocab_size=len(VOCABULARY), pad_token_id=PAD)
        sync = settings.memory.refresh == "sync"
        worlds = self.changing if sync else self.constant.worlds
        start = CheckpointState(
            step=0,
            cursor=Cursor(),
            trainers=settings.runtime.trainers,
            zero_stage=settings.runtime.zero_stage,
            content_version=worlds.versions[0],
            encoder_step=0,
            published_step=0,
        )
        weights: Mapping[str, Tensor] = build_model(config, seed=settings.run.seed).key_weights()
        checkpoint = None
        if resume:
            checkpoint = committed_checkpoints(run_dir)[-1]
            start, weights = read_state(checkpoint), read_key_weights(checkpoint)
        if memory is None:
            memory = LocalMemory(
                worlds.store,
                encoder=KeyEncoderFactory(config.to_dict()),
                weights=weights,
                encoder_step=start.encoder_step,
                content_version=start.content_version,
            )
        return TrainJob(
            settings=settings,
            run_dir=run_dir,
            task=self.changing if sync else self.constant,
            memory=memory,
            epoch=memory.info().epoch,
            content_version=memory.info().content_version,
            tokenizer=self.home / "tokenizer",
            model_config=config.to_dict(),
            device="cpu",
            init_method=f"file://{run_dir}/.meeting-{start.step}",
            checkpoint=checkpoint,
            start=start,
            resolved_config={},
        )

    def run(self, settings: TrainSettings, rank: int = 0, **options: Any) -> TrainOutcome:
        stop_after = options.pop("stop_after", None)
        faults = options.pop("faults", ())
        job = self.job(settings, **options)
        with injected(faults, rank, job.start.step, settings.accumulation_steps):
            try:
                return run_rank(job, rank, StopAfter(stop_after) if stop_after else Control())
            finally:
                job.memory.close()

    def run_in_a_fork(self, settings: TrainSettings, rank: int = 0, **options: Any) -> TrainOutcome:
        """`run` in a process of its own, as DeepSpeed wants it, which need not import it again."""
        with multiprocessing.get_context("fork").Pool(1) as pool:
            return pool.apply(self.run, (settings, rank), options)


@dataclass(frozen=True)
class Fault:
    """What is not finite on one rank in one step: its "loss", "query" or "gradient"."""

    rank: int
    step: int
    what: str


@contextmanager
def injected(faults: Sequence[Fault], rank: int, steps_done: int, passes: int) -> Iterator[None]:
    """Spoil this rank's passes, as a bad batch or a flipped bit would."""
    calls = 0

    def due(what: str, step: int) -> bool:
        return Fault(rank, step, what) in faults

    def hook(module: nn.Module, _: Any, output: Any) -> Any:
        nonlocal calls
        if not module.training or not faults:
            return None
        step = steps_done + calls // passes + 1
        if isinstance(module, nn.LayerNorm) and module.normalized_shape == (KEY_SIZE,):
            return output * torch.nan if due("query", step) else None
        if not isinstance(module, PlugLMForMaskedLM):
            return None
        calls += 1
        if due("loss", step):
            output["loss"] = output.loss * torch.inf
        if due("gradient", step):
            output.loss.register_hook(lambda gradient: gradient * torch.inf)
        return output

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class StopAfter(Control):
    """Somebody asks the run to end during a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def report(self, line: Mapping[str, Any]) -> None:
        super().report(line)
        if line.get("step") == self._step:
            self.request_stop()


def lines(place: Place, name: str, kind: str = "train") -> Lines:
    text = (place.home / name / "metrics.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.splitlines()]
    return [line for line in found if line["kind"] == kind]


def numbers(place: Place, name: str, *keys: str, kind: str = "train") -> list[list[float]]:
    return [[line[key] for key in ("step", *keys)] for line in lines(place, name, kind)]


def exported(place: Place, name: str) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = load_file(place.home / name / "model" / "model.safetensors")
    return weights
