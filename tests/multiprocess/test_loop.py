"""A whole run: the same numbers however it is cut over ranks, passes, stops and resumes."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from memory_server.local import LocalMemory
from model import KeyEncoderFactory, PlugLMForMaskedLM
from tests.multiprocess.ranks import run_ranks
from trainer.build import build_model, model_config
from trainer.checkpoint import (
    CheckpointState,
    checkpoint_path,
    committed_checkpoints,
    read_key_weights,
    read_state,
)
from trainer.control import Control
from trainer.corpus.tokenizer import load_tokenizer
from trainer.data.cursor import Cursor
from trainer.data.stream import TrainBatch
from trainer.errors import CheckpointError, TrainingError
from trainer.loop import TrainJob, TrainOutcome, run_rank
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

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

STEPS, EVERY, FACTS = 10, 4, 24
Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class OneWorldTask:
    """A world that does not change, so that each rank can hold a memory of its own."""

    worlds: WorldTask

    def open(
        self, settings: TrainSettings, *, rank: int, world_size: int, cursor: Cursor
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
    ) -> TrainSettings:
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
                key_size=8,
            ),
            memory=MemorySettings(
                top_k=3,
                refresh=refresh,  # type: ignore[arg-type]
                refresh_every_steps=EVERY,
            ),
            optim=OptimSettings(steps=STEPS, batch_size=8, lr=lr, retrieval_warmup_steps=warmup),
            runtime=RuntimeSettings(
                trainers=trainers,
                zero_stage=zero_stage,
                micro_batch_size=8 // trainers // passes,
            ),
            checkpoint=CheckpointSettings(every_steps=5, keep=3),
            logging=LoggingSettings(log_every_steps=1, progress=False),
            evaluate=EvaluateSettings(every_steps=evaluate_every, sequences=16),
        )

    def job(self, settings: TrainSettings, *, resume: bool = False) -> TrainJob:
        """What the driver would hand out; every call opens a memory of its own."""
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
        job = self.job(settings, **options)
        try:
            return run_rank(job, rank, Control() if stop_after is None else StopAfter(stop_after))
        finally:
            job.memory.close()

    def run_in_a_fork(self, settings: TrainSettings, **options: Any) -> TrainOutcome:
        """`run` in a process of its own, as DeepSpeed wants it, which need not import it again."""
        with multiprocessing.get_context("fork").Pool(1) as pool:
            return pool.apply(self.run, (settings,), options)


class StopAfter(Control):
    """Somebody asks the run to end during a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def report(self, line: Mapping[str, Any]) -> None:
        super().report(line)
        if line.get("step") == self._step:
            self.request_stop()


def run_alone(rank: int, place: Place) -> dict[str, Any]:
    """The runs of one rank, each in a fork of this process."""
    import deepspeed  # noqa: F401

    told: dict[str, Any] = {"whole": place.run_in_a_fork(place.settings("whole"))}
    # The same run, whose process dies after the checkpoint of step 5.
    whole, cut = place.home / "whole", place.home / "cut"
    cut.mkdir()
    shutil.copy(whole / "metrics.jsonl", cut / "metrics.jsonl")
    shutil.copytree(checkpoint_path(whole, 5), checkpoint_path(cut, 5))
    told["cut"] = place.run_in_a_fork(place.settings("cut"), resume=True)
    stopping = place.settings("stopped")
    told["stopped"] = place.run_in_a_fork(stopping, stop_after=4)
    told["exported when stopped"] = (place.home / "stopped" / "model").exists()
    told["resumed"] = place.run_in_a_fork(stopping, resume=True)
    told["constant"] = place.run_in_a_fork(constant(place, "constant"))
    told["two passes"] = place.run_in_a_fork(constant(place, "two-passes", passes=2))
    for name, settings in (
        ("diverged", place.settings("diverged", lr=1e30)),
        ("no room", place.settings("no-room")),
    ):
        Path(settings.run.dir).mkdir()
        if name == "no room":
            # Whoever runs the tests: nothing can be written below a file.
            (Path(settings.run.dir) / "checkpoints").write_text("")
        try:
            place.run_in_a_fork(settings)
        except (TrainingError, CheckpointError) as error:
            told[name] = error
    return told


def run_on_two(rank: int, place: Place) -> TrainOutcome:
    return place.run(constant(place, "two-ranks", trainers=2, zero_stage=3), rank)


def constant(place: Place, name: str, **options: Any) -> TrainSettings:
    return place.settings(name, refresh="off", dropout=0.0, evaluate_every=5, **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place.make(tmp_path_factory.mktemp("loop"))


@pytest.fixture(scope="module")
def told(place: Place) -> dict[str, Any]:
    """How the runs of one rank ended; one process for all tests, which only look."""
    result: dict[str, Any] = run_ranks(run_alone, 1, place, timeout_s=240, process_group=False)[0]
    return result


def lines(place: Place, name: str, kind: str = "train") -> Lines:
    text = (place.home / name / "metrics.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.splitlines()]
    return [line for line in found if line["kind"] == kind]


def numbers(place: Place, name: str, *keys: str, kind: str = "train") -> list[list[float]]:
    return [[line[key] for key in ("step", *keys)] for line in lines(place, name, kind)]


def exported(place: Place, name: str) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = load_file(place.home / name / "model" / "model.safetensors")
    return weights


def test_a_run_ends_with_a_checkpoint_and_a_model(place: Place, told: dict[str, Any]) -> None:
    outcome = told["whole"]
    assert (outcome.step, outcome.stopped) == (STEPS, False)
    assert outcome.checkpoint == checkpoint_path(place.home / "whole", STEPS)
    assert read_state(outcome.checkpoint).step == STEPS
    model = PlugLMForMaskedLM.from_pretrained(place.home / "whole" / "model")
    assert model.config.vocab_size == len(VOCABULARY)
    assert len(load_tokenizer(place.home / "whole" / "model")) == len(VOCABULARY)


@pytest.mark.usefixtures("told")
def test_every_step_is_on_record(place: Place) -> None:
    recorded = lines(place, "whole")
    assert [line["step"] for line in recorded] == list(range(1, STEPS + 1))
    for line in recorded:
        for key in ("loss", "mlm_loss", "retrieval_loss", "grad_norm", "sequences_per_s"):
            assert line[key] > 0, key
        assert 0 <= line["right_entry_rate"] <= 1
    assert [line["staleness_steps"] for line in recorded] == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
    assert [line["encoder_step"] for line in lines(place, "whole", "refresh")] == [4, 8, STEPS]
    assert [line["step"] for line in lines(place, "whole", "checkpoint")] == [5, STEPS]


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("name", ["cut", "stopped"])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(place: Place, name: str) -> None:
    """With dropout, and with new keys and new facts on the way."""
    keys = ("loss", "mlm_loss", "retrieval_loss", "grad_norm", "lr", "staleness_steps")
    assert numbers(place, name, *keys) == numbers(place, "whole", *keys)
    wanted = exported(place, "whole")
    for key, value in exported(place, name).items():
        assert torch.equal(value, wanted[key]), key


def test_a_wish_to_stop_writes_a_checkpoint_and_no_model(
    place: Place, told: dict[str, Any]
) -> None:
    outcome = told["stopped"]
    assert (outcome.step, outcome.stopped) == (4, True)
    assert outcome.checkpoint == checkpoint_path(place.home / "stopped", 4)
    assert told["exported when stopped"] is False
    assert (told["resumed"].step, told["resumed"].stopped) == (STEPS, False)


def test_training_that_diverges_ends_with_what_to_do(told: dict[str, Any]) -> None:
    assert isinstance(told["diverged"], TrainingError)
    assert "training has diverged" in str(told["diverged"])
    assert "lower optim.lr" in str(told["diverged"])


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_what_to_do(
    place: Place, told: dict[str, Any]
) -> None:
    error = told["no room"]
    assert isinstance(error, CheckpointError)
    for part in ("step 5", str(place.home / "no-room"), "MiB free", "resume with --resume"):
        assert part in str(error)


@pytest.mark.usefixtures("told")
def test_numbers_do_not_hang_on_passes_or_ranks(place: Place) -> None:
    (place.home / "two-ranks").mkdir()
    outcomes = run_ranks(run_on_two, 2, place, timeout_s=180, process_group=False)
    assert [outcome.step for outcome in outcomes] == [STEPS, STEPS]
    keys = ("loss", "mlm_accuracy", "grad_norm", "lr", "right_entry_rate")
    wanted = numbers(place, "constant", *keys)
    held = numbers(place, "constant", "loss", "loss_without_memory", kind="eval")
    assert [step for step, *_ in held] == [5, 10]
    for name in ("two-passes", "two-ranks"):
        for given, expected in zip(numbers(place, name, *keys), wanted, strict=True):
            assert given == pytest.approx(expected, abs=2e-5, rel=1e-4)
        given_held = numbers(place, name, "loss", "loss_without_memory", kind="eval")
        for given, expected in zip(given_held, held, strict=True):
            assert given == pytest.approx(expected, abs=2e-5)
        weights = exported(place, name)
        for key, value in exported(place, "constant").items():
            torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-4)
