"""Reading a store: its head, manifests, segments and removed rows, each checked as it is read."""

import io
from hashlib import sha256

import numpy as np

from memory_server.errors import StoreDamaged, UnknownVersion
from memory_server.store.collected import Collected, read_collected
from memory_server.store.manifest import Manifest, SegmentRef, parse_manifest
from memory_server.store.names import CHECKSUM_LENGTH, checksum_in, is_version
from memory_server.store.segments import Int64Array, Segment, SegmentMeta
from memory_server.store.storage import Storage
from memory_server.store.version_line import VersionLine


class StoreReader:
    """What is in a store. Holds no state but where it is: any number may read at once."""

    def __init__(self, storage: Storage, meta: SegmentMeta) -> None:
        self.storage = storage
        self.meta = meta
        self.line = VersionLine(storage)

    def head_manifest(self) -> Manifest:
        return self.manifest(self.line.head())

    def manifest(self, version: str) -> Manifest:
        """The manifest of a whole version.

        Raises:
            UnknownVersion: there is none. StoreDamaged: it was altered, or is the head's and gone.
        """
        name = f"manifests/{version}.json"
        where = f"{self.storage.location}/{name}"
        if not is_version(version):
            raise UnknownVersion(
                f"{version!r} is no content version of the store {self.storage.location}; its head "
                f"is {self.line.head()}"
            )
        try:
            data = self.storage.read(name)
        except FileNotFoundError as error:
            head = self.line.head()
            if version == head:
                raise StoreDamaged(f"{where} is missing; restore it from a copy") from error
            gone = self.collected().get(version)
            if gone is not None:
                raise UnknownVersion(
                    f"version {version} of {gone.time[:16]} ({gone.message}) was given up when "
                    f"garbage was collected from {self.storage.location}; its head is {head}"
                ) from error
            raise UnknownVersion(
                f"the store {self.storage.location} has no content version {version!r}; its head "
                f"is {head}"
            ) from error
        return parse_manifest(data, version=version, where=where)

    def collected(self) -> dict[str, Collected]:
        """The versions that were given up by `gc`."""
        return read_collected(self.storage, self.line)

    def segment_name(self, ref: SegmentRef) -> str:
        return f"segments/{ref.file}"

    def where(self, name: str) -> str:
        return f"{self.storage.location}/{name}"

    def segment(self, ref: SegmentRef) -> Segment:
        """Map a segment after the checks that cost nothing: size, footer, row count, tokenizer.

        A remote one is fetched, and checked whole, unless this machine has a copy.

        Raises:
            StoreDamaged: names the file.
        """
        where = self.where(self.segment_name(ref))
        try:
            path = self.storage.local_path(
                self.segment_name(ref), sha256=ref.sha256, bytes_=ref.bytes
            )
        except FileNotFoundError as error:
            raise StoreDamaged(
                f"segment {where} is missing; restore the file from a copy, or roll back to a "
                "version without it"
            ) from error
        segment = Segment(path)
        size = path.stat().st_size
        if size != ref.bytes or segment.rows != ref.rows or segment.meta != self.meta:
            raise StoreDamaged(
                f"segment {where} has {segment.rows} rows in {size} bytes, but its manifest says "
                f"{ref.rows} in {ref.bytes}, or it is of another tokenizer; restore the file from "
                "a copy"
            )
        return segment

    def deleted_rows(self, ref: SegmentRef) -> Int64Array:
        """The removed rows of a segment, int64, ascending.

        Raises:
            StoreDamaged: names the file.
        """
        if ref.deletions is None:
            return np.empty(0, dtype=np.int64)
        where = self.where(f"deletions/{ref.deletions}")
        try:
            data = self.storage.read(f"deletions/{ref.deletions}")
        except FileNotFoundError as error:
            raise StoreDamaged(f"{where} is missing; restore it from a copy") from error
        if sha256(data).hexdigest()[:CHECKSUM_LENGTH] != checksum_in(ref.deletions, "npy"):
            raise StoreDamaged(
                f"{where} was altered: its checksum is wrong; restore it from a copy"
            )
        rows: Int64Array = np.load(io.BytesIO(data), allow_pickle=False)
        return rows

    def live_rows(self, ref: SegmentRef) -> Int64Array:
        """The rows of a segment that are not removed, ascending. Reads no segment."""
        is_live = np.ones(ref.rows, dtype=bool)
        is_live[self.deleted_rows(ref)] = False
        return np.flatnonzero(is_live)

    def live_ids(self, ref: SegmentRef) -> Int64Array:
        ids = self.segment(ref).ids
        return ids if ref.deletions is None else ids[self.live_rows(ref)]

    def check_files(self, manifest: Manifest) -> None:
        """The cheap checks of all that a version names: files there, of their sizes, and those on
        this machine's filesystem readable.

        Raises:
            StoreDamaged: names the file.
        """
        if self.storage.local_root is not None:
            for ref in manifest.segments:
                self.segment(ref)
                self.deleted_rows(ref)
            return
        names = {f"segments/{ref.file}": ref.bytes for ref in manifest.segments}
        names |= {f"deletions/{ref.deletions}": -1 for ref in manifest.segments if ref.deletions}
        found = {
            f"{directory}/{info.name}": info.bytes
            for directory in ("segments", "deletions")
            for info in (self.storage.list(directory) if names else ())
        }
        for name, size in names.items():
            if name not in found or size not in (-1, found[name]):
                raise StoreDamaged(
                    f"{self.where(name)} is missing or has {found.get(name)} instead of {size} "
                    "bytes; restore it from a copy"
                )

    def verify_segment(self, ref: SegmentRef) -> None:
        """Check a segment's whole content against its checksum: as slow as reading it.

        Raises:
            StoreDamaged: names the file.
        """
        self.segment(ref)
        where = self.where(self.segment_name(ref))
        try:
            found = self.storage.sha256(self.segment_name(ref))
        except FileNotFoundError as error:
            raise StoreDamaged(f"segment {where} is missing; restore it from a copy") from error
        if found != ref.sha256:
            raise StoreDamaged(
                f"segment {where} was altered: its sha256 is {found[:12]}…, its manifest says "
                f"{ref.sha256[:12]}…; restore the file from a copy, or use a version without it"
            )
