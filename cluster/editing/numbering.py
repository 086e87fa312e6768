"""Ids of new entries and documents: the file's own, or the next ones that were never used."""

from __future__ import annotations

from cluster.editing.lookup import largest_doc_id
from cluster.editing.passages import Passage
from memory_server.store.manifest import Manifest
from memory_server.store.names import LARGEST_ID
from memory_server.store.store import Store
from trainer.corpus.errors import CorpusError


class Numbering:
    """Deals ids from one version on, so that the same files added to it get the same ids.

    New numbers are above all that the store ever gave, also in domains that are unplugged, so that
    these can come back. A new document's number is above all entries' too, as in a corpus.
    """

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self._next_id = store.next_id()
        self._next_doc_id = max(self._next_id, largest_doc_id(store, manifest) + 1)
        self._first: dict[str, tuple[bool, str]] = {}

    def document(self, passage: Passage) -> int:
        """The document's id of a passage.

        Raises:
            CorpusError: some rows have a doc_id and some have none, or no number is left.
        """
        self._refuse_mixture("doc_id", passage.doc_id, passage.place)
        if passage.doc_id is not None:
            return passage.doc_id
        self._next_doc_id += 1
        return self._checked(self._next_doc_id - 1, passage)

    def entries(self, passage: Passage, count: int) -> list[int]:
        """The ids of a passage's entries.

        Raises:
            CorpusError: an id is given for a text of several entries, some rows have an id and some
            have none, or no number is left.
        """
        self._refuse_mixture("id", passage.id, passage.place)
        if passage.id is not None:
            if count > 1:
                raise CorpusError(
                    f"{passage.place}: one id, {passage.id}, is given, but the text makes {count} "
                    "entries; leave the id out, or cut the text"
                )
            return [passage.id] * count
        return self.fresh(passage, count)

    def fresh(self, passage: Passage, count: int) -> list[int]:
        """Ids that were never used."""
        first = self._next_id
        self._next_id += count
        self._checked(self._next_id - 1, passage)
        return list(range(first, self._next_id))

    def _refuse_mixture(self, name: str, given: int | None, place: str) -> None:
        has = given is not None
        had, where = self._first.setdefault(name, (has, place))
        if had != has:
            with_it, without = (place, where) if has else (where, place)
            raise CorpusError(
                f"{without}: there is no {name}, but {with_it} has one; give every row one or none"
            )

    def _checked(self, number: int, passage: Passage) -> int:
        if number > LARGEST_ID:
            raise CorpusError(
                f"{passage.place}: ids up to 2**63-2**37 are used up in this memory; give ids that "
                "were not used (fields id and doc_id)"
            )
        return number
