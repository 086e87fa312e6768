"""Training on worlds that change: every few steps new facts, in the questions and in the memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.cursor import Cursor, rank_slice
from trainer.data.stream import TrainBatch
from trainer.settings import ConfigError, TrainSettings
from trainer.world.facts import Fact, World
from trainer.world.tokenizer import PAD, entry_tokens, question_tokens

_HELDOUT_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class WorldTask:
    """A `trainer.task.Task` whose questions and memory show the same world at every step.

    Step s (s steps are done) belongs to world s // `refresh_every_steps`. The trainer publishes
    weights at exactly the steps where the world changes, asks `content_version` what content goes
    along, and with ``memory.refresh = "sync"`` switches before it takes the step's batch. So keys,
    content and questions change together, also after a resume.

    The worlds of the training steps are followed by one more, whose facts no step asked for. It
    comes into the memory when training ends (`content_version` of the last step), so a trained run
    is left with a memory of new facts only, and `heldout` asks for those.

    Attributes:
        store: made by `build_world_store`; its versions are the worlds.
        versions: content version of each training world, and last that of the new facts.
        seed: of the worlds and the questions.
        size: facts per world.
        refresh_every_steps: steps from one world to the next.
        steps: of the whole training.
    """

    store: Path
    versions: tuple[str, ...]
    seed: int
    size: int
    refresh_every_steps: int
    steps: int

    def __post_init__(self) -> None:
        wanted = worlds_needed(self.steps, self.refresh_every_steps) + 1
        if len(self.versions) != wanted:
            raise ValueError(
                f"{len(self.versions)} content versions for {self.steps} steps with a new world "
                f"every {self.refresh_every_steps}: {wanted} are needed, one per world and one for "
                "the new facts"
            )

    def world(self, step: int) -> World:
        """The world of the step after `step` steps."""
        return World(self.seed, min(step // self.refresh_every_steps, self._last), self.size)

    @property
    def new_facts(self) -> tuple[Fact, ...]:
        """The facts that no training step asks for."""
        return World(self.seed, self._last, self.size).facts

    def content_version(self, step: int) -> str | None:
        """See `Task.content_version`: the step's world; from the last step on, the new facts."""
        if step >= self.steps:
            return self.versions[-1]
        return self.versions[step // self.refresh_every_steps]

    def open(
        self, settings: TrainSettings, *, rank: int, world_size: int, cursor: Cursor, step: int = 0
    ) -> WorldStream:
        """See `Task.open`.

        Raises:
            ConfigError: with these settings questions and memory would not show the same world.
        """
        self._check(settings)
        return WorldStream(
            self,
            batch_size=settings.optim.batch_size,
            micro_batch_size=settings.micro_batch_size,
            rank=rank,
            world_size=world_size,
            cursor=cursor,
        )

    def heldout(
        self, settings: TrainSettings, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[TrainBatch]:
        """See `Task.heldout`: new facts, which are in the memory only when training has ended."""
        entries_NS, ids_N = _entries(self.new_facts)
        share = min(settings.evaluate.sequences, self.size) // world_size
        rows = np.arange(share * world_size)
        mine = rank_slice(rows, rank, world_size)
        for start in range(0, share, _HELDOUT_BATCH):
            chosen = mine[start : start + _HELDOUT_BATCH]
            yield _batch(entries_NS[chosen], ids_N[chosen])

    @property
    def _last(self) -> int:
        return len(self.versions) - 1

    def _check(self, settings: TrainSettings) -> None:
        memory = settings.memory
        for key, given, wanted, why in (
            ("memory.refresh", memory.refresh, "sync", "the memory's facts change with the keys"),
            (
                "memory.refresh_every_steps",
                memory.refresh_every_steps,
                self.refresh_every_steps,
                "the store was made with a new world every so many steps",
            ),
            ("optim.steps", settings.optim.steps, self.steps, "the store holds their worlds"),
            (
                "memory.exclude_own_document",
                memory.exclude_own_document,
                False,
                "a fact's own entry is the only one that tells its thing",
            ),
            (
                "evaluate.every_steps",
                settings.evaluate.every_steps,
                0,
                "the new facts come into the memory when training ends",
            ),
        ):
            if given != wanted:
                raise ConfigError(
                    f"{key} = {given!r}: must be {wanted!r} for the synthetic world, because {why}"
                )


def worlds_needed(steps: int, refresh_every_steps: int) -> int:
    """How many worlds the training steps see."""
    return -(-steps // refresh_every_steps)


class WorldStream(Iterator[list[TrainBatch]]):
    """A rank's batches. The cursor's epoch counts steps, its position stays 0."""

    def __init__(
        self,
        task: WorldTask,
        *,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        cursor: Cursor,
    ) -> None:
        """Start at a cursor.

        Raises:
            ValueError: the cursor is not one of this task, or the batch does not divide.
        """
        if cursor.position:
            raise ValueError(
                f"the cursor {cursor} is not of the synthetic world, where position is always 0; "
                "resume with the task that wrote the checkpoint"
            )
        self._task, self._cursor = task, cursor
        self._batch_size, self._micro = batch_size, micro_batch_size
        self._rank, self._world_size = rank, world_size
        self._mine(np.arange(batch_size))
        self._shown: World | None = None
        self._entries_NS, self._ids_N = _entries(())

    @property
    def cursor(self) -> Cursor:
        """The place behind the steps handed out so far."""
        return self._cursor

    def __next__(self) -> list[TrainBatch]:
        step = self._cursor.epoch
        world = self._task.world(step)
        if world != self._shown:
            self._entries_NS, self._ids_N = _entries(world.facts)
            self._shown = world
        rows = self._mine(world.questions(step, self._batch_size))
        self._cursor = Cursor(epoch=step + 1, position=0)
        return [
            _batch(self._entries_NS[part], self._ids_N[part])
            for part in np.split(rows, len(rows) // self._micro)
        ]

    def close(self) -> None:
        """Nothing is held: batches are made when they are asked for."""

    def _mine(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return rank_slice(rows, self._rank, self._world_size)


def _entries(facts: tuple[Fact, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return entry_tokens(facts), np.array([fact.id for fact in facts], dtype=np.int64)


def _batch(entries_BS: NDArray[np.int64], ids_B: NDArray[np.int64]) -> TrainBatch:
    """Questions for facts; each one's right entry, and its document, is the fact's own."""
    input_ids, labels = question_tokens(entries_BS)
    return TrainBatch(
        input_ids=_tensor(input_ids),
        attention_mask=_tensor(input_ids != PAD),
        labels=_tensor(labels),
        doc_ids=_tensor(ids_B),
        positive_tokens=_tensor(entries_BS),
        positive_ids=_tensor(ids_B),
    )


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.int64))
