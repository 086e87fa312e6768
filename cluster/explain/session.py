"""A model and a memory that a person asks and edits, one request after the other."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cluster.config import ConfigError
from cluster.editing.edits import Editor, NewDomain, TokenizerPlace
from cluster.editing.outcome import Edit
from cluster.editing.passages import Knowledge
from cluster.explain.measure import explain
from cluster.trained_model import TrainedModel
from memory_server.store.store import Store


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked: a text with [MASK]s, and a word to follow if one is given."""

    text: str
    answer: str | None = None


def private_copy(store: Store, folder: Path) -> Store:
    """A store with the same content, to be edited freely.

    Its segments are the same files as far as the filesystem can link them: they never change.

    Raises:
        ConfigError: the store is not on this machine's filesystem. OSError: no room.
    """
    source = Path(str(store.location))
    if "://" in str(store.location) or not source.is_dir():
        raise ConfigError(
            f"the store {store.location} is not a local directory, so it cannot be copied; give "
            "--write to edit it itself"
        )
    shutil.copytree(source, folder, copy_function=_link_or_copy)
    return Store.open(folder)


class Session:
    """Asks, edits and undoes; thread-safe, one at a time."""

    def __init__(
        self, trained: TrainedModel, store: Store, *, k: int, say: Callable[[str], None]
    ) -> None:
        """Make the keys of every entry; blocks.

        Args:
            store: is edited. k: entries that each memory layer reads.
        """
        self._trained, self._store, self._k = trained, store, k
        self._lock = threading.Lock()
        self._closing = ExitStack()
        say(f"computing the keys of {store.manifest().entries:,} entries ...")
        self._memory = self._closing.enter_context(trained.memory(store.location))
        self._editor = Editor(
            store=store, memory=self._memory, tokenizer=TokenizerPlace(given=trained.path)
        )
        self._versions: list[str] = []  # those that undo goes back to
        self._made = ""  # the version that the last edit or undo of this session made
        self._domains = set(store.manifest().domains())

    def ask(self, asked: Asked) -> dict[str, Any]:
        """The explanation as JSON. Raises ConfigError: it cannot be asked."""
        with self._lock:
            told = explain(
                self._trained,
                self._memory,
                asked.text,
                k=min(self._k, self._memory.info().entries),
                store=self._store,
                answer=asked.answer or None,
            )
        return told.as_json()

    def state(self) -> dict[str, Any]:
        """Domains with their entries, and what there is to undo."""
        with self._lock:
            head = self._store.manifest()
            here = head.domains()
            self._domains |= set(here)
            return {
                "domains": [
                    {"name": name, "entries": here.get(name, 0), "plugged": name in here}
                    for name in sorted(self._domains)
                ],
                "entries": head.entries,
                "message": head.message,
                "undo": len(self._versions),
            }

    def edit_entry(self, entry_id: int, text: str) -> None:
        """Give an entry another text."""
        if not text.strip():
            raise ConfigError("the new text is empty; remove the entry instead")
        self._commit(lambda e: e.update(Knowledge(text=text), entry_id=entry_id))

    def remove_entry(self, entry_id: int) -> None:
        """Take an entry out of the memory."""
        self._commit(lambda e: e.remove(ids=[entry_id]))

    def add_text(self, text: str, title: str) -> None:
        """Add a text to the domain "added"."""
        if not text.strip():
            raise ConfigError("the text is empty; write what the memory is to know")
        self._commit(lambda e: e.add(Knowledge(text=text, title=title), domain="added"))

    def unplug(self, domain: str) -> None:
        """Take a domain out of the memory."""
        if set(self._store.manifest().domains()) == {domain}:
            raise ConfigError(
                f"{domain!r} is all that the memory holds; without it nothing could be read"
            )
        self._commit(lambda e: e.unplug(domain))

    def plug(self, domain: str) -> None:
        """Plug a domain in again."""
        self._commit(lambda e: e.plug(domain, NewDomain()))

    def undo(self) -> None:
        """Go back to the content before the last edit.

        Raises:
            ConfigError: there is none, or another program has committed since.
        """
        with self._lock:
            if not self._versions:
                raise ConfigError("nothing was edited here, so there is nothing to undo")
            head = self._store.manifest()
            if head.version != self._made:
                raise ConfigError(
                    f"another program has changed the memory since ({head.message}), and undo "
                    "would take that back, too; see `pluglm memory log`, and go back with `pluglm "
                    "memory rollback`"
                )
            self._made = self._editor.rollback(self._versions[-1]).version or ""
            self._versions.pop()

    def close(self) -> None:
        """Let go of the memory."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _commit(self, change: Callable[[Editor], Edit]) -> None:
        with self._lock:
            done = change(self._editor)
            if done.parent != self._made:  # another program's commit, which is not undone here
                self._versions.clear()
            self._versions.append(done.parent)
            self._made = done.version or ""


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another filesystem, or one without links
        shutil.copy2(source, target)
