"""Edits of a memory that answers: later replies reflect them, also of several tools at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.editing.edits import Editor, NewDomain
from cluster.editing.live import NotYetLive, holds
from cluster.editing.passages import Knowledge
from cluster.trained_model import load_trained_model
from memory_server.errors import NotEnoughMemory, TokenizerMismatch, UnknownEntry, UnknownVersion
from memory_server.local import LocalMemory
from memory_server.store.store import Store
from tests.cluster.memory_support import OwnMemory, copied
from tests.cluster.tiny_run import TinyRun


@pytest.fixture
def memory(own_memory: OwnMemory, tiny_run: TinyRun) -> Iterator[LocalMemory]:
    with load_trained_model(tiny_run.model).memory(own_memory.path) as memory:
        yield memory


@pytest.fixture
def editor(own_memory: OwnMemory, memory: LocalMemory) -> Editor:
    return Editor(store=own_memory.store, memory=memory)


def answered(memory: LocalMemory) -> set[int]:
    """All ids that searches return."""
    info = memory.info()
    reply = memory.search(torch.randn(3, info.key_width), info.entries + 1)
    assert reply.ids[:, -1].tolist() == [-1] * 3
    return set(reply.ids[0, :-1].tolist())


def test_every_edit_is_in_the_next_reply(
    own_memory: OwnMemory, memory: LocalMemory, editor: Editor, tmp_path: Path
) -> None:
    base = set(own_memory.rows())
    assert answered(memory) == base

    def same() -> None:
        """What answers is what the store's head holds, read plainly."""
        rows = own_memory.rows()
        assert answered(memory) == set(rows)
        for entry in memory.entries(list(rows)):
            assert (entry.text, entry.doc_id) == (rows[entry.id].text, rows[entry.id].doc_id)

    added = editor.add(Knowledge(text="the ancient king"))
    (new,) = added.counts.added_ids
    same()
    assert memory.entries([new])[0].text == "the ancient king"
    assert memory.info().content_version == added.version
    assert memory.info().epoch == added.epoch

    first = next(iter(base))
    editor.update(Knowledge(text="a harbour"), entry_id=first)
    same()
    assert memory.entries([first])[0].text == "a harbour"
    editor.remove(ids=[new])
    same()
    with pytest.raises(UnknownEntry):
        memory.entries([new])
    (tmp_path / "b.txt").write_text("a city\n\nan island")
    editor.swap("default", "b", NewDomain(knowledge=Knowledge(files=(tmp_path / "b.txt",))))
    same()
    assert len(answered(memory)) == 2
    editor.rollback(str(added.version))
    same()
    assert answered(memory) == base | {new}


def test_a_dry_run_leaves_the_answers_as_they_are(memory: LocalMemory, editor: Editor) -> None:
    before = memory.info()
    dry = replace(editor, dry_run=True)
    dry.add(Knowledge(text="a king"))
    dry.unplug("default")
    dry.rollback("HEAD")
    assert memory.info() == before


def test_several_tools_edit_one_memory_at_once(own_memory: OwnMemory, memory: LocalMemory) -> None:
    """Each sees its own edit in every reply from its return on, and at the end all are there."""
    base, failed = set(own_memory.rows()), list[BaseException]()
    tools, edits = 4, 5

    def work(number: int) -> None:
        try:
            editor, mine = Editor(store=Store.open(own_memory.path), memory=memory), set[int]()
            for turn in range(edits):
                done = editor.add(Knowledge(text=f"king {number} river {turn}"))
                mine |= set(done.counts.added_ids)
                assert mine <= answered(memory)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(tools)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    rows = own_memory.rows()
    assert len(rows) == len(base) + tools * edits
    assert answered(memory) == set(rows)


def test_a_commit_that_the_server_refuses_is_told_to_be_made(
    own_memory: OwnMemory, memory: LocalMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = memory.info()

    def refuse(**options: object) -> int:
        raise NotEnoughMemory("staging needs 9 GiB, 1 GiB is free")

    monkeypatch.setattr(memory, "stage", refuse)
    editor = Editor(store=own_memory.store, memory=memory)
    with pytest.raises(NotYetLive) as told:
        editor.add(Knowledge(text="a king"))
    head = own_memory.store.head()
    assert f"version {head} is committed" in str(told.value)
    assert "9 GiB" in str(told.value)
    assert "pluglm memory show" in str(told.value)
    assert memory.info() == before
    assert "a king" in {row.text for row in own_memory.rows().values()}


def test_another_stores_server_is_refused_before_anything_is_committed(
    own_memory: OwnMemory,
    tiny_run: TinyRun,
    other_tokenizer: Path,
    memory: LocalMemory,
    tmp_path: Path,
) -> None:
    alike = copied(tiny_run, tmp_path / "alike")
    Editor(store=alike.store).add(Knowledge(text="a king"))
    before = own_memory.files()
    with (
        load_trained_model(tiny_run.model).memory(alike.path) as other,
        pytest.raises(UnknownVersion, match="does not have"),
    ):
        Editor(store=own_memory.store, memory=other).add(Knowledge(text="a queen"))
    foreign = other_tokenizer.parent / "other" / "memory"
    with pytest.raises(TokenizerMismatch, match="the store that it serves"):
        Editor(store=Store.open(foreign), memory=memory).unplug("default")
    assert own_memory.files() == before


def test_which_version_holds_a_commit(own_memory: OwnMemory) -> None:
    store = own_memory.store
    versions = [store.head()]
    for turn in range(3):
        versions.append(str(Editor(store=store).add(Knowledge(text=f"{turn}")).version))
    for a, one in enumerate(versions):
        for b, other in enumerate(versions):
            assert holds(store, one, other) == (a >= b)
