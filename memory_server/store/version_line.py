"""The one line of versions of a store, and the step by which a commit joins it.

Every version has at most one child on the line, because a commit happens by creating
`next/<parent>`, which says the child, and only one writer can create a file. There is no lock, so
nothing is left to free when a writer dies. The head is where following the `next` files ends;
`HEAD` only says where to start. It may lag behind, by any distance, and do no harm, because
`next` files (17 bytes a version) are never removed: a writer that slept through other commits and
collections of garbage still finds that its parent has a child.
"""

import logging

from memory_server.errors import StoreConflict, StoreDamaged, StoreError, StoreNotFound
from memory_server.store.names import VERSION_LENGTH, is_version
from memory_server.store.storage import Storage

log = logging.getLogger(__name__)

HEAD = "HEAD"
NEXT = "next"
_ROOT = "root"


class VersionLine:
    """The versions of one store, by name. Holds no state: any number may be used at once."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def head(self) -> str:
        """The newest version.

        Raises:
            StoreNotFound: there is none. StoreDamaged: HEAD or a `next` file is not what was
            written.
        """
        version = self._said_by(HEAD) or self.child(None)
        if version is None:
            raise StoreNotFound(f"the store {self._storage.location} has no version (no {HEAD})")
        while (child := self.child(version)) is not None:
            version = child
        return version

    def child(self, version: str | None) -> str | None:
        """The version that was committed on this one; of None, the first; None for the head."""
        return self._said_by(_name(version))

    def append(self, parent: str | None, version: str) -> None:
        """Make `version` the child of `parent`: the step that decides, and makes it visible.

        Its manifest and all files that it names must be durable by now.

        Raises:
            StoreConflict: `parent` has another child. StoreError: it is visible, but the disk did
            not confirm that it will survive a loss of power.
        """
        name = _name(parent)
        try:
            self._storage.create(name, _text(version))
        except FileExistsError as error:
            # A client that repeats a request of its own may meet its own file.
            rival = self.child(parent)
            if rival != version:
                raise self._conflict(parent, rival) from error
        except OSError:
            # Whether it happened is not known before it is looked at.
            if self.child(parent) != version:
                raise
            self._confirm(name, version)
        self.note_head(version)

    def refuse_conflict(self, parent: str) -> None:
        """Raise StoreConflict when `parent` has a child already, before anything is written."""
        rival = self.child(parent)
        if rival is not None:
            raise self._conflict(parent, rival)

    def note_head(self, version: str) -> None:
        """Write the shortcut. Failing changes nothing but the time that the next look takes."""
        try:
            self._storage.write(HEAD, _text(version))
        except (OSError, StoreError) as error:
            log.warning("%s/%s could not be renewed: %s", self._storage.location, HEAD, error)

    def _conflict(self, parent: str | None, rival: str | None) -> StoreConflict:
        return StoreConflict(
            f"another writer moved {self._storage.location} from version {parent} to {rival}; "
            "nothing of this commit is visible: look at the new version and commit again"
        )

    def _confirm(self, name: str, version: str) -> None:
        try:
            self._storage.confirm(name)
        except OSError as error:
            raise StoreError(
                f"version {version} is the head of {self._storage.location}, but the disk did not "
                f"confirm it ({error}); do not commit the change again before looking at the head"
            ) from error

    def _said_by(self, name: str) -> str | None:
        try:
            data = self._storage.read(name)
        except FileNotFoundError:
            return None
        version = data[:VERSION_LENGTH].decode("ascii", "replace")
        if not is_version(version) or data != _text(version):
            raise StoreDamaged(
                f"{self._storage.location}/{name} does not hold a version; restore it from a copy"
                + (f", or delete it if {NEXT}/{_ROOT} is there" if name == HEAD else "")
            )
        return version


def _name(version: str | None) -> str:
    return f"{NEXT}/{_ROOT if version is None else version}"


def _text(version: str) -> bytes:
    return f"{version}\n".encode()
