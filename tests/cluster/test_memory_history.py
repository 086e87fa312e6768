"""Domains, history and upkeep on the command line: what is there afterwards, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.editing.edits import Editor
from cluster.editing.passages import Knowledge
from memory_server.actors.server_book import ServerBook
from memory_server.actors.state import StateDirectory
from memory_server.errors import StoreConflict
from memory_server.store.store import Store
from tests.cluster.memory_support import Capture, OwnMemory, Row, copied, refusal, run_json
from tests.cluster.tiny_run import TinyRun
from tests.trainer.corpus.samples import make_rows, write_json_lines
from trainer.corpus.build import build_corpus


def texts(rows: dict[int, Row], domain: str) -> list[str]:
    return [row.text for _, row in sorted(rows.items()) if row.domain == domain]


def write(path: Path, *paragraphs: str) -> str:
    path.write_text("\n\n".join(paragraphs))
    return str(path)


def test_domains_come_and_go_and_come_back(
    own_memory: OwnMemory, tmp_path: Path, capsys: Capture
) -> None:
    store = str(own_memory.path)
    base = own_memory.rows()
    may = write(tmp_path / "may.txt", "a king", "a river")
    june = write(tmp_path / "june.txt", "a city")
    assert main(["memory", "plug", store, "may", "--from", may]) == 0
    with_may = own_memory.rows()
    assert texts(with_may, "may") == ["a king", "a river"]

    assert main(["memory", "swap", store, "may", "june", "--from", june]) == 0
    with_june = own_memory.rows()
    assert texts(with_june, "june") == ["a city"]
    assert {i: r for i, r in with_june.items() if r.domain == "default"} == base
    assert not texts(with_june, "may")

    assert main(["memory", "swap", store, "june", "may"]) == 0  # from history
    assert own_memory.rows() == with_may
    assert main(["memory", "unplug", store, "may"]) == 0
    assert own_memory.rows() == base
    assert main(["memory", "plug", store, "june"]) == 0
    assert own_memory.rows() == with_june
    # A domain's whole content is replaced in one step; and had from an earlier version again.
    done = run_json(["memory", "swap", store, "june", "june", "--from", may], capsys)
    assert (done["added"], done["removed"]) == (2, 1)
    assert texts(own_memory.rows(), "june") == ["a king", "a river"]
    assert main(["memory", "swap", store, "june", "june", "--version", "HEAD~1"]) == 0
    assert own_memory.rows() == with_june


def test_another_stores_domain_is_plugged_without_what_was_removed_there(
    own_memory: OwnMemory, tmp_path: Path, capsys: Capture
) -> None:
    rows = write_json_lines(tmp_path / "law.jsonl", make_rows(9, seed=4))
    tokenizer = str(own_memory.corpus / "tokenizer")
    info = build_corpus([rows], tmp_path / "law", tokenizer=tokenizer, entry_tokens=16, workers=1)
    other = OwnMemory(info.path)
    removed = next(iter(other.rows()))
    assert main(["memory", "remove", str(info.path), "--id", str(removed)]) == 0
    theirs, before = other.files(), own_memory.rows()
    words = ["memory", "plug", str(own_memory.path), "law", "--from-store", str(info.path)]
    assert main(words) == 0
    after = own_memory.rows()
    assert {i: r for i, r in after.items() if r.domain == "default"} == before
    law = {i: (r.doc_id, r.tokens, r.text) for i, r in after.items() if r.domain == "law"}
    assert law == {i: (r.doc_id, r.tokens, r.text) for i, r in other.rows().items()}
    assert removed not in law
    assert other.files() == theirs
    assert "has the domain 'law' already" in refusal(words, capsys)


def test_what_does_not_fit_is_refused(
    own_memory: OwnMemory, other_tokenizer: Path, tmp_path: Path, capsys: Capture
) -> None:
    before = own_memory.files()
    store = str(own_memory.path)
    text = write(tmp_path / "a.txt", "a king")
    foreign = str(other_tokenizer.parent / "other")
    longer = tmp_path / "longer"
    long_text = write(tmp_path / "long.txt", "a king " * 20)
    build_corpus([long_text], longer, tokenizer=str(own_memory.corpus / "tokenizer"), workers=1)
    version = own_memory.store.head()
    plug, swap = ["memory", "plug", store], ["memory", "swap", store]
    cases = [
        ([*plug, "default", "--from", text], "has the domain 'default' already"),
        ([*plug, "new"], "'new'"),
        ([*plug, "new", "--version", "nothing"], "no version or tag 'nothing'"),
        ([*plug, "new", "--version", "HEAD"], "has no domain 'new'"),
        ([*plug, "new", "--from", text, "--version", "HEAD"], "give one"),
        ([*plug, "new", "--from-domain", "x"], "--from-domain needs --from-store"),
        ([*plug, "new", "--from-store", foreign], "was made with the tokenizer"),
        ([*plug, "new", "--from-store", str(longer)], "has entries of 64 tokens"),
        ([*plug, "new", "--from-store", str(longer / "no")], "there is no"),
        ([*plug, "new", "--from-store", store, "--from-domain", "x"], "no domain 'x'"),
        ([*plug, "new", "--from-store", store], "live already"),
        (["memory", "unplug", store, "new"], "'new'"),
        ([*swap, "new", "b", "--from", text], "'new'"),
        ([*swap, "default", "default"], "changes nothing"),
        ([*swap, "default", "b"], "'b'"),
        (["memory", "rollback", store, "nothing"], "no version or tag 'nothing'"),
        (["memory", "rollback", store, "HEAD~9"], "HEAD~9"),
        (["memory", "rollback", store, "../../HEAD"], "no version or tag '../../HEAD'"),
        (["memory", "diff", store, "HEAD", "0000"], "0000"),
        (["memory", "log", store, "--start", "x"], "no version or tag 'x'"),
        (["memory", "tag", store, "HEAD"], "cannot name a tag"),
        (["memory", "tag", store, "../../up"], "cannot name a tag"),
        (["memory", "tag", store, "one", "nothing"], "no version or tag 'nothing'"),
        (["memory", "tag", store, "--delete"], "--delete takes a TAG"),
        (["memory", "tag", store, version], "cannot name a tag"),
        (["memory", "gc", store, "--keep", "0"], "'0' is not a whole number"),
        (["memory", "gc", store, "--min-age-hours", "-1"], "hours of 0 or more"),
        (["memory", "compact", store, "--domain", "new"], "'new'"),
    ]
    for words, said in cases:
        assert said in refusal(words, capsys), words
        assert own_memory.files() == before, words


def test_the_log_tells_versions_with_their_messages_and_tags(
    own_memory: OwnMemory, capsys: Capture
) -> None:
    store = str(own_memory.path)
    first = own_memory.store.head()
    assert main(["memory", "tag", store, "begin"]) == 0
    assert main(["memory", "add", store, "--text", "a king", "-m", "first king"]) == 0
    assert main(["memory", "add", store, "--text", "a queen"]) == 0
    log = run_json(["memory", "log", store], capsys)
    assert [entry["message"] for entry in log[:2]] == ["add a text", "first king"]
    assert log[2]["version"] == first
    assert log[2]["tags"] == ["begin"]
    assert log[0]["entries"] == log[2]["entries"] + 2
    assert run_json(["memory", "log", store, "--start", "begin", "-n", "1"], capsys) == [log[2]]
    assert main(["memory", "log", store, "-n", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["version", *(e["version"] for e in log[:2])]


def test_a_tag_is_made_moved_listed_and_forgotten(own_memory: OwnMemory, capsys: Capture) -> None:
    store = str(own_memory.path)
    first = own_memory.store.head()
    assert main(["memory", "tag", store, "good"]) == 0
    assert main(["memory", "add", store, "--text", "a king"]) == 0
    assert "already" in refusal(["memory", "tag", store, "good"], capsys)
    assert run_json(["memory", "tag", store], capsys) == {"good": first}
    assert main(["memory", "tag", store, "good", "--move"]) == 0
    assert own_memory.store.tags() == {"good": own_memory.store.head()}
    assert main(["memory", "tag", store, "good", "--delete"]) == 0
    assert run_json(["memory", "tag", store], capsys) == {}


def test_a_diff_tells_what_came_went_and_changed(own_memory: OwnMemory, capsys: Capture) -> None:
    store = str(own_memory.path)
    first, second = list(own_memory.rows())[:2]
    assert main(["memory", "add", store, "--text", "a new king"]) == 0
    assert main(["memory", "remove", store, "--id", str(first)]) == 0
    assert main(["memory", "update", store, "--id", str(second), "--text", "a new river"]) == 0
    diff = run_json(["memory", "diff", store, "HEAD~3", "HEAD"], capsys)
    assert (diff["removed"], diff["replaced"]) == ([first], [second])
    (added,) = diff["added"]
    assert own_memory.rows()[added].text == "a new king"
    assert diff["domains"] == {"default": {"added": 1, "removed": 1, "replaced": 1}}
    assert main(["memory", "diff", store]) == 0
    shown = capsys.readouterr().out
    assert f"> {second}" in shown
    assert "a new river" in shown
    assert "a new king" not in shown
    assert main(["memory", "diff", store, "HEAD", "HEAD"]) == 0
    assert "no entry differs" in capsys.readouterr().out


def test_a_rollback_is_a_version_of_its_own(own_memory: OwnMemory, capsys: Capture) -> None:
    store, base = str(own_memory.path), own_memory.rows()
    first = own_memory.store.head()
    assert main(["memory", "add", store, "--text", "a king"]) == 0
    assert main(["memory", "remove", store, "--id", str(next(iter(base)))]) == 0
    edited, files = own_memory.rows(), own_memory.files()
    plan = run_json(["memory", "rollback", store, "HEAD~2", "--dry-run"], capsys)
    assert (plan["added"], plan["removed"], plan["version"]) == (1, 1, None)
    assert own_memory.files() == files
    done = run_json(["memory", "rollback", store, "HEAD~2", "-m", "as it was"], capsys)
    assert own_memory.rows() == base
    assert own_memory.store.manifest().message == "as it was"
    assert done["entries_after"] == len(base)
    assert own_memory.store.head() != first
    assert main(["memory", "rollback", store, "HEAD~1"]) == 0
    assert own_memory.rows() == edited
    # The message tells the content, and not every rollback that it went through.
    for _ in range(2):
        assert main(["memory", "rollback", store, "HEAD~1"]) == 0
        assert main(["memory", "rollback", store, "HEAD~1"]) == 0
    message = own_memory.store.manifest().message
    assert message.startswith("roll back to ")
    assert message.count("roll back to ") == 1
    assert own_memory.rows() == edited


def test_upkeep_drops_what_is_not_needed_and_keeps_the_rest(
    own_memory: OwnMemory, capsys: Capture
) -> None:
    store = str(own_memory.path)
    for text in ("a king", "a queen", "a river"):
        assert main(["memory", "add", store, "--text", text]) == 0
    assert main(["memory", "remove", store, "--id", str(next(iter(own_memory.rows())))]) == 0
    rows, files = own_memory.rows(), own_memory.files()
    assert run_json(["memory", "compact", store, "--dry-run"], capsys)["version"] is None
    assert own_memory.files() == files
    done = run_json(["memory", "compact", store], capsys)
    assert (done["segments_before"], done["segments_after"], done["rows_dropped"]) == (4, 1, 1)
    assert own_memory.rows() == rows

    files = own_memory.files()
    gc = ["memory", "gc", store, "--keep", "1", "--min-age-hours", "0"]
    plan = run_json([*gc, "--dry-run"], capsys)
    assert own_memory.files() == files
    assert plan["files"]
    assert main([*gc, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "would be removed" in shown
    assert plan["files"][0] in shown
    done = run_json(gc, capsys)
    assert set(done["files"]) == set(plan["files"])
    assert not set(done["files"]) & own_memory.files().keys()
    assert own_memory.rows() == rows
    assert main(["memory", "verify", store, "--all"]) == 0
    assert "gc gave up" in refusal(["memory", "rollback", store, "HEAD~3"], capsys)


def test_gc_keeps_what_servers_answer_from_without_being_told(
    own_memory: OwnMemory, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = str(own_memory.path)
    versions = [own_memory.store.head()]
    for text in ("a king", "a queen", "a river", "a town"):
        assert main(["memory", "add", store, "--text", text]) == 0
        versions.append(own_memory.store.head())
    for name, live, starts in (("a", versions[1], False), ("b", versions[3], True)):
        state = StateDirectory(own_memory.path / "servers" / name)
        book = ServerBook()
        book.epochs.begin(encoder_step=0, new_weights=True, content_version=live)
        book.epochs.live = 1
        state.create(book)
        if starts:  # and has not come up yet: what it answered from before may be needed again
            state.create(ServerBook())
    gone = StateDirectory(own_memory.path / "servers" / "gone")
    book = ServerBook()
    book.epochs.begin(encoder_step=0, new_weights=True, content_version="f" * len(versions[0]))
    gone.create(book)
    capsys.readouterr()
    gc = ["memory", "gc", store, "--keep", "1", "--min-age-hours", "0"]
    collected = set(run_json(gc, capsys)["collected"])
    assert collected >= {versions[0], versions[2]}
    assert not collected & {versions[1], versions[3], versions[4]}
    book_file = own_memory.path / "servers" / "a" / "book.json"
    book_file.write_text("{")
    assert str(book_file) in refusal(gc, capsys, code=1)
    # What another user's server needs is not known, so nothing is collected.
    look = Path.iterdir

    def not_ours(path: Path) -> Iterator[Path]:
        if path == book_file.parent:
            raise PermissionError(13, "Permission denied")
        return look(path)

    monkeypatch.setattr(Path, "iterdir", not_ours)
    assert "run this as the user who runs that server" in refusal(gc, capsys, code=1)


def test_a_copy_of_a_store_without_its_empty_directory_is_edited(
    own_memory: OwnMemory, capsys: Capture
) -> None:
    shutil.rmtree(own_memory.path / "incoming")
    before = own_memory.store.head()
    assert main(["memory", "add", str(own_memory.path), "--text", "a king"]) == 0
    assert own_memory.store.head() != before


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_verify_names_every_damaged_file(
    own_memory: OwnMemory, capsys: Capture, damage: str
) -> None:
    store = str(own_memory.path)
    assert main(["memory", "add", store, "--text", "a king"]) == 0
    assert main(["memory", "verify", store]) == 0
    for segment in (own_memory.path / "segments").iterdir():
        data = bytearray(segment.read_bytes())
        if damage == "missing":
            segment.unlink()
        else:
            data[len(data) // 2] ^= 1
            segment.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    capsys.readouterr()
    assert main(["memory", "verify", store, "--json"]) == 1
    named = json.loads(capsys.readouterr().out)
    assert len(named) == 2
    assert main(["memory", "verify", store]) == 1
    assert "2 damaged" in capsys.readouterr().out


def test_an_edit_that_meets_another_commit_is_worked_out_again(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    """Another tool commits between this one's reading and its own commit: both edits are there,
    and no id is given twice."""
    own = copied(tiny_run, tmp_path / "corpus")
    before = own.rows()

    class Slow(Store):
        meddled = 0

        def publish(self, plan, *, message):  # type: ignore[no-untyped-def]
            if Slow.meddled < 2:
                Slow.meddled += 1
                Editor(store=Store.open(own.path)).add(Knowledge(text=f"other {Slow.meddled}"))
            return super().publish(plan, message=message)

    done = Editor(store=Slow.open(own.path)).add(Knowledge(text="mine"))
    after = own.rows()
    assert {r.text for i, r in after.items() if i not in before} == {"other 1", "other 2", "mine"}
    assert done.version == own.store.head()
    assert not list((own.path / "incoming").iterdir())


def test_a_rollback_that_meets_another_commit_is_told(tiny_run: TinyRun, tmp_path: Path) -> None:
    """It would undo what nobody has seen."""
    own = copied(tiny_run, tmp_path / "corpus")
    Editor(store=own.store).add(Knowledge(text="first"))

    class Slow(Store):
        def rollback(self, version, **options):  # type: ignore[no-untyped-def]
            Editor(store=Store.open(own.path)).add(Knowledge(text="other"))
            return super().rollback(version, **options)

    with pytest.raises(StoreConflict):
        Editor(store=Slow.open(own.path)).rollback("HEAD~1")
    assert "other" in {row.text for row in own.rows().values()}


def test_a_store_below_a_foreign_directory_is_found_by_its_run(
    own_memory: OwnMemory, tiny_run: TinyRun, tmp_path: Path, capsys: Capture
) -> None:
    run = Path(shutil.copytree(tiny_run.run, tmp_path / "run"))
    text = (run / "config.toml").read_text().replace(str(tiny_run.corpus), str(own_memory.corpus))
    (run / "config.toml").write_text(text)
    for where in (run, own_memory.corpus, own_memory.path):
        (entry,) = run_json(["memory", "log", str(where), "-n", "1"], capsys)
        assert entry["version"] == own_memory.store.head()


@pytest.mark.parametrize("part", ["segments", "manifests"])
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_store_is_not_edited(
    own_memory: OwnMemory, capsys: Capture, part: str, damage: str
) -> None:
    (path,) = [
        path
        for path in (own_memory.path / part).iterdir()
        if part == "segments" or path.stem == own_memory.store.head()
    ]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    if (part, damage) == ("segments", "flip"):
        # Only reading every byte finds it.
        assert main(["memory", "verify", str(own_memory.path)]) == 1
        assert path.name in capsys.readouterr().out
        return
    before = own_memory.files()
    edits = [["add", "--text", "a king"], ["update", "--id", "0", "--text", "a king"]]
    if part == "manifests":
        edits += [["unplug", "default"], ["rollback", "HEAD~1"]]
    for words in edits:
        line = ["memory", words[0], str(own_memory.path), *words[1:]]
        assert path.name in refusal(line, capsys, code=1)
    assert own_memory.files() == before


def damaged_segment(own: OwnMemory, damage: str, *, newest: bool) -> Path:
    """One of the head's segments, no longer what was written: `flip` changes a title, in place."""
    ref = own.store.manifest().segments[-1 if newest else 0]
    path = own.store.segment_path(ref)
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        at = data.index(b"Ada")
        data[at] ^= 1
        path.write_bytes(data)
    return path


def test_altered_content_is_not_taken_over(
    own_memory: OwnMemory, tmp_path: Path, capsys: Capture
) -> None:
    store = str(own_memory.path)
    words = ["--text", "a king", "--title", "Ada", "--source", "a book"]
    added = run_json(["memory", "add", store, "--domain", "new", *words], capsys)
    (entry_id,) = added["added_ids"]
    other = Path(shutil.copytree(own_memory.corpus, tmp_path / "other"))
    (doc_id,) = {row.doc_id for row in own_memory.rows().values() if row.title == "Ada"}
    assert main(["memory", "unplug", str(other), "new"]) == 0
    path = damaged_segment(own_memory, "flip", newest=True)
    before = {"own": own_memory.files(), "other": OwnMemory(other).files()}
    for edit in (
        ["plug", str(other), "newer", "--from-store", store, "--from-domain", "new"],
        ["update", store, "--id", str(entry_id), "--text", "a queen"],
        ["update", store, "--doc-id", str(doc_id), "--text", "a queen"],
    ):
        said = refusal(["memory", *edit], capsys, code=1)
        assert path.name in said
        assert "was altered" in said
    assert {"own": own_memory.files(), "other": OwnMemory(other).files()} == before


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_head_can_be_left_behind(
    own_memory: OwnMemory, capsys: Capture, damage: str
) -> None:
    store, rows = str(own_memory.path), own_memory.rows()
    for name in ("one", "two"):
        words = ["--text", "a king", "--title", "Ada", "--domain", name]
        assert main(["memory", "add", store, *words]) == 0
    path = damaged_segment(own_memory, damage, newest=True)
    assert path.name in refusal(["memory", "add", store, "--text", "a king"], capsys, code=1)
    for words in (
        ["log", store],
        ["tag", store, "damaged"],
        ["gc", store, "--dry-run"],
        ["diff", store, "HEAD~2", "HEAD~1"],
        ["rollback", store, "HEAD~1", "--dry-run"],
        ["unplug", store, "two", "--dry-run"],
        ["rollback", store, "HEAD~1"],
    ):
        assert main(["memory", *words]) == 0, words
    assert main(["memory", "unplug", store, "one"]) == 0
    assert own_memory.rows() == rows
    assert main(["memory", "verify", store]) == 0
    # What leads to the damage again is refused, with nothing committed.
    head = own_memory.store.head()
    assert path.name in refusal(["memory", "rollback", store, "damaged"], capsys, code=1)
    assert own_memory.store.head() == head


def test_a_damaged_domain_can_be_unplugged(own_memory: OwnMemory, capsys: Capture) -> None:
    store, rows = str(own_memory.path), own_memory.rows()
    words = ["--text", "a king", "--title", "Ada", "--domain", "two"]
    assert main(["memory", "add", store, *words]) == 0
    damaged_segment(own_memory, "missing", newest=True)
    assert main(["memory", "unplug", store, "two"]) == 0
    assert own_memory.rows() == rows


def test_a_store_that_is_no_directory_is_edited_by_its_url(
    own_memory: OwnMemory, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLUGLM_CACHE_DIR", str(tmp_path / "cache"))
    meta = own_memory.store.meta
    url = "memory://edited/store"
    Store.create(
        url,
        tokenizer_fingerprint=meta.tokenizer_fingerprint,
        entry_tokens=meta.entry_tokens,
        vocab_size=meta.vocab_size,
        pad_token_id=meta.pad_token_id,
    )
    words = ["memory", "add", url, "--text", "the king", "--domain", "far"]
    assert "no tokenizer lies beside" in refusal(words, capsys)
    words += ["--tokenizer", str(own_memory.corpus / "tokenizer")]
    assert run_json(words, capsys)["entries_after"] == 1
    assert main(["memory", "unplug", url, "far"]) == 0
    assert main(["memory", "plug", url, "far"]) == 0
    assert Store.open(url).manifest().domains() == {"far": 1}
    assert main(["memory", "verify", url]) == 0
