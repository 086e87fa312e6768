"""Flipped bits, cut files and foreign names are noticed; many processes write at once."""

import json
import shutil
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memory_server.errors import MemoryServerError, StoreDamaged, StoreError
from memory_server.store.manifest import dump_manifest, new_manifest
from memory_server.store.store import Store
from tests.memory_server.store_faults import content, prepared_store
from tests.toy_memory import toy_entries, toy_store


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = prepared_store(tmp_path_factory.mktemp("damage") / "store")
    store.gc(keep_versions=2, min_age_s=0)
    store.tag("second")
    return store.path


def _everything(store: Store) -> object:
    """All that the store says: what a reader may rely on."""
    log = list(store.log())
    readable = [entry.version for entry in log if not entry.collected]
    return store.meta, log, store.tags(), {v: content(store, v) for v in readable}


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_flipped_bit_or_a_cut_anywhere_is_noticed(prepared: Path, data: st.DataObject) -> None:
    expected = _everything(Store.open(prepared))
    files = sorted(str(f.relative_to(prepared)) for f in prepared.rglob("*") if f.is_file())
    file = data.draw(st.sampled_from(files))
    whole = (prepared / file).read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        changed = bytearray(whole)
        changed[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        changed = bytearray(whole[:position])
    with tempfile.TemporaryDirectory() as directory:
        path = shutil.copytree(prepared, Path(directory) / "s")
        (path / file).write_bytes(changed)
        try:
            store = Store.open(path)
            store.verify(all_versions=True)
            found = _everything(store)
        except MemoryServerError:
            return
        # Unnoticed is only what makes no difference, such as a space in JSON or a newline at its
        # end, or a file that is not needed any more.
        assert found == expected


def test_every_damaged_file_is_reported(tmp_path: Path) -> None:
    store = prepared_store(tmp_path / "s")
    paths = [store.segment_path(ref) for ref in store.manifest("HEAD~2").segments]
    (deletions, _) = sorted((store.path / "deletions").iterdir())
    manifest = store.path / "manifests" / f"{store.resolve('HEAD~3')}.json"
    paths = [paths[0], paths[2], deletions, manifest]
    for path in paths:
        path.write_bytes(path.read_bytes()[:-10])
    damaged = {Path(each.file).name for each in Store.open(tmp_path / "s", check=False).damages()}
    assert damaged == {path.name for path in paths}
    with pytest.raises(StoreDamaged) as caught:
        store.verify(all_versions=True)
    assert all(path.name in str(caught.value) for path in paths)
    with pytest.raises(StoreDamaged, match=paths[0].name):
        store.verify()


@pytest.mark.parametrize(
    "name", ["../../secret.arrow", "/etc/passwd", "a/b.arrow", "x.arrow", "..", "", "a\\b"]
)
@pytest.mark.parametrize("kind", ["file", "deletions", "parent"])
def test_a_manifest_that_leads_out_of_the_store_is_refused(
    tmp_path: Path, name: str, kind: str
) -> None:
    store = prepared_store(tmp_path / "s")
    data = json.loads((store.path / "manifests" / f"{store.head()}.json").read_bytes())
    if kind == "parent":
        data["parent"] = name
    else:
        data["segments"][0][kind] = name
    body = {key: value for key, value in data.items() if key != "version"}
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    data["version"] = sha256(canonical).hexdigest()[:16]  # as somebody who means it would
    (store.path / "manifests" / f"{data['version']}.json").write_text(json.dumps(data))
    (store.path / "next" / store.head()).write_text(f"{data['version']}\n")
    with pytest.raises(StoreDamaged, match="manifest"):
        Store.open(store.path)


@pytest.mark.parametrize("text", ["../../x\n", "/etc/passwd\n", "0" * 16, "", "0" * 15 + "\n"])
@pytest.mark.parametrize("file", ["tags/first", "HEAD"])
def test_a_pointer_that_is_no_version_is_refused(tmp_path: Path, text: str, file: str) -> None:
    store = prepared_store(tmp_path / "s")
    (store.path / file).write_text(text)
    with pytest.raises(StoreDamaged, match=file):
        Store.open(store.path).tags()


def test_a_store_of_before_opens_and_goes_on(tmp_path: Path) -> None:
    """Without `next` files, numbers for new ids and documents, or a checksum of its settings."""
    new = prepared_store(tmp_path / "s")
    manifests = [new.manifest(entry.version) for entry in new.log()][::-1]
    path = new.path
    for directory in ("next", "tags", "collected", "manifests"):
        shutil.rmtree(path / directory)
    (path / "manifests").mkdir()
    settings_ = json.loads((path / "store.json").read_bytes())
    settings_.pop("sha256")
    (path / "store.json").write_text(json.dumps(settings_))
    version, contents = None, []
    for manifest in manifests:
        segments = []
        for ref in manifest.segments:
            file = f"{ref.sha256[:32]}.arrow"
            if (path / "segments" / ref.file).exists():
                (path / "segments" / ref.file).rename(path / "segments" / file)
            deletions = ref.deletions and f"{ref.deletions[:32]}.npy"
            if deletions and (path / "deletions" / str(ref.deletions)).exists():
                (path / "deletions" / str(ref.deletions)).rename(path / "deletions" / deletions)
            old = {"file": file, "deletions": deletions, "min_doc_id": None, "max_doc_id": None}
            segments.append(type(ref)(**{**vars(ref), **old}))
        old_manifest = new_manifest(
            parent=version, time=manifest.time, message=manifest.message, segments=tuple(segments)
        )
        version = old_manifest.version
        raw = json.loads(dump_manifest(old_manifest))
        assert set(raw) == {"version", "parent", "time", "message", "segments"}
        assert all("min_doc_id" not in ref for ref in raw["segments"])
        (path / "manifests" / f"{version}.json").write_text(json.dumps(raw, indent=1) + "\n")
    (path / "HEAD").write_text(f"{version}\n")
    store = Store.open(path)
    store.verify(all_versions=True)
    assert store.head() == version
    assert len(list(store.log())) == len(manifests)
    assert store.next_id() == 43
    contents = content(store)
    assert store.resolve("HEAD~4") == store.resolve(store.resolve("HEAD~4")[:9])
    store.plug("third")
    store.commit(remove_doc_ids=[0], message="a document")
    assert content(store).keys() == contents.keys() - {0, 1, 2} | {40, 41, 42}
    store.rollback(str(version))
    assert content(store) == contents
    store.gc(keep_versions=1, min_age_s=0)
    store.verify(all_versions=True)
    assert content(store) == contents


WRITER = """
import sys
from memory_server.errors import StoreConflict
from memory_server.store.store import Store

path, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
store = Store.open(path)
for entry_id in range(first, last):
    while True:
        try:
            store.commit(remove_ids=[entry_id], message=f"remove {entry_id}")
            break
        except StoreConflict:
            pass
"""


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    store = toy_store(tmp_path / "s", toy_entries(range(40)))
    root = Path(__file__).parents[2]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(store.path), str(8 * n), str(8 * n + 8)], cwd=root
        )
        for n in range(3)
    ]
    # One of them is ended at any moment: what it held on to, if anything, holds nobody up.
    try:
        assert [writer.wait(timeout=120) for writer in writers[1:]] == [0, 0]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    store = Store.open(store.path)
    store.verify(all_versions=True)
    live = set(content(store))
    assert not live & set(range(8, 24))
    assert set(range(24, 40)) <= live
    children = [file.read_text() for file in (store.path / "next").iterdir()]
    assert len(set(children)) == len(children) == len(list(store.log()))
    with pytest.raises(StoreError):
        store.commit(remove_ids=[30], message="late", parent="HEAD~1")
