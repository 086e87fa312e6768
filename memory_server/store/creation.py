"""The first version of a store, and the file that makes it one."""

from dataclasses import asdict

from memory_server.errors import StoreConflict, StoreDamaged, StoreError, StoreNotFound
from memory_server.store.described import dump_checked, parse_checked
from memory_server.store.manifest import dump_manifest, new_manifest
from memory_server.store.names import new_nonce
from memory_server.store.publishing import DIRECTORIES, manifest_name, now
from memory_server.store.reader import StoreReader
from memory_server.store.segments import SegmentMeta
from memory_server.store.storage import Storage

STORE_FORMAT = "pluglm-store-1"
SETTINGS = "store.json"


def create_store(storage: Storage, meta: SegmentMeta) -> StoreReader:
    """Make an empty store with one empty version. `store.json` comes last, and makes it one: what a
    creator that died has left is taken over by the next.

    Raises:
        StoreError: there is one already. StoreReadOnly, StoreFull.
    """
    there = StoreError(f"{storage.location} holds a store already; open it, or choose another path")
    reader = StoreReader(storage, meta)
    if _is_there(storage, SETTINGS):
        raise there
    storage.check_writable()
    storage.prepare(DIRECTORIES)
    if reader.line.child(None) is None:
        first = new_manifest(
            parent=None, time=now(), message="created", segments=(), next_id=0, nonce=new_nonce()
        )
        storage.write(manifest_name(first.version), dump_manifest(first))
        try:
            reader.line.append(None, first.version)
        except StoreConflict:  # of two creators one goes on, with the first's version
            storage.remove(manifest_name(first.version))
    settings = {"format": STORE_FORMAT, **asdict(meta)}
    try:
        storage.create(SETTINGS, dump_checked(settings))
    except FileExistsError as error:
        raise there from error
    return reader


def read_meta(storage: Storage) -> SegmentMeta:
    """What all entries of the store have in common.

    Raises:
        StoreNotFound: no store. StoreDamaged: names the file.
    """
    where = f"{storage.location}/{SETTINGS}"
    try:
        data = storage.read(SETTINGS)
    except FileNotFoundError as error:
        raise StoreNotFound(
            f"no memory store at {storage.location} ({SETTINGS} is missing); give its "
            "directory, such as CORPUS/memory, or build one with `pluglm corpus build`"
        ) from error
    raw = parse_checked(data, where, required=False)
    if raw.pop("format", None) != STORE_FORMAT:
        raise StoreDamaged(f"{where} does not describe a {STORE_FORMAT} store")
    try:
        return SegmentMeta(**raw)
    except (TypeError, ValueError) as error:
        raise StoreDamaged(f"{where} is damaged: {error}") from error


def _is_there(storage: Storage, name: str) -> bool:
    try:
        storage.size(name)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
