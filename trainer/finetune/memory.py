"""The memory that a model reads while it is fine-tuned: opened once, renewed between steps."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor
from transformers import TrainerCallback

from memory_server.keys.stored_vectors import ABOUT
from memory_server.local import INITIAL_TIMEOUT_S, LocalMemory
from model import KeyEncoderFactory
from model.retrieval import Lookup
from trainer.convert.freeze import freeze_vectors
from trainer.finetune.settings import MemorySettings

VECTORS = "vectors"
Say = Callable[[str], None]


class ReadMemory:
    """A memory and the weights of the start, which every seed begins with."""

    def __init__(
        self, memory: LocalMemory, settings: MemorySettings, model: Any, vectors: Path | None
    ) -> None:
        """Take an opened memory; `vectors` is where its frozen keys and values lie."""
        self.memory = memory
        self.settings = settings
        self.vectors = vectors
        self._at_start = model.key_weights() if settings.mode == "live" else None
        self._renewed = False

    @property
    def entry_tokens(self) -> int:
        """The longest that an entry is."""
        return self.memory.info().entry_tokens

    def plug_into(self, model: Any) -> None:
        """Let the model read this memory.

        Raises:
            ValueError: they do not fit.
        """
        model.attach(self.memory, self.settings.top_k)

    def lookup(self, own_doc_ids_B: Tensor) -> Lookup:
        """What a training pass reads, each sequence without entries of its own document.

        Args:
            own_doc_ids_B: int64, one for each sequence of the pass; -1: none.
        """
        k = self.settings.top_k
        return lambda queries_BQ: self.memory.search(queries_BQ, k, exclude_doc_ids=own_doc_ids_B)

    def reset(self) -> None:
        """Search the keys of the start again, if they were renewed since."""
        if self._renewed and self._at_start is not None:
            self._switch(self._at_start, step=0)
            self._renewed = False

    def renew(self, model: Any, step: int) -> None:
        """Search keys that are made with the model's current weights; blocks while they are."""
        self._switch(model.key_weights(), step=step)
        self._renewed = True

    def _switch(self, weights: dict[str, Any], *, step: int) -> None:
        before = self.memory.info().epoch
        epoch = self.memory.stage(encoder_step=step, weights=weights)
        self.memory.wait_sealed(epoch, INITIAL_TIMEOUT_S)
        self.memory.activate(epoch)
        self.memory.release(before)


class RenewKeys(TrainerCallback):
    """Renews the keys every so many optimizer steps."""

    def __init__(self, memory: ReadMemory, every_steps: int) -> None:
        self._memory = memory
        self._every = every_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Between two optimizer steps; training waits."""
        if state.global_step % self._every == 0:
            self._memory.renew(given["model"], state.global_step)


@contextmanager
def open_memory(
    settings: MemorySettings, model: Any, home: Path, *, device: str, say: Say
) -> Iterator[ReadMemory]:
    """Open the store with this model's keys; blocks while they are made.

    Args:
        settings: names the store, its domains and the mode.
        model: a PlugLM with the weights of the start.
        home: where frozen vectors are kept; those that are there are taken.
        device: where keys are made and searched.
        say: told what takes time.

    Raises:
        StoreError: no usable store. RefreshFailed: the keys cannot be made.
    """
    store = Path(settings.store).expanduser()
    vectors = None
    if settings.mode == "frozen":
        vectors = home / VECTORS
        # Under torchrun the first process makes them, and the others find them.
        with PartialState(cpu=device == "cpu").main_process_first():
            if not (vectors / ABOUT).is_file():
                # Without the file that is written last nothing there counts.
                shutil.rmtree(vectors, ignore_errors=True)
                say(f"making the vectors of the entries of {store} once ...")
                freeze_vectors(model, store, vectors, domains=settings.domains)
        opened = LocalMemory(store, vectors=vectors, domains=settings.domains, device=device)
    else:
        say(f"computing the keys of the entries of {store} ...")
        encoder = KeyEncoderFactory(model.config.to_dict(), device)
        opened = LocalMemory(
            store,
            encoder=encoder,
            weights=model.key_weights(),
            domains=settings.domains,
            device=device,
        )
    with opened:
        yield ReadMemory(opened, settings, model, vectors)
