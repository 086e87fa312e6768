"""A memory server on the command line: started, edited by several tools, asked, and ended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.editing.edits import Editor
from cluster.editing.passages import Knowledge
from memory_server.actors.client import RayMemory
from tests.cluster.memory_support import Capture, OwnMemory, copied, refusal, run_json
from tests.cluster.tiny_run import TinyRun
from tests.ray_fixture import local_ray

pytestmark = pytest.mark.integration

NAME = "tiny"
SENTENCE = "the ancient king of the river"


@pytest.fixture(scope="module")
def served(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnMemory]:
    """A store that is served as `memory serve` does it, in a Ray that is there already."""
    own = copied(tiny_run, tmp_path_factory.mktemp("served") / "corpus")
    with local_ray():
        words = ["memory", "serve", str(own.path), "--model", str(tiny_run.model)]
        assert main([*words, "--name", NAME, "--shards", "2"]) == 0
        yield own


def found(tiny_run: TinyRun, k: int, capsys: Capture) -> dict[int, str]:
    """What a search of the server returns, by id."""
    words = ["memory", "search", SENTENCE, "--server", NAME, "--model", str(tiny_run.model)]
    return {hit["id"]: hit["text"] for hit in run_json([*words, "-k", str(k)], capsys)}


def test_every_edit_is_in_the_servers_next_reply(
    served: OwnMemory, tiny_run: TinyRun, capsys: Capture, tmp_path: Path
) -> None:
    store, by_name = str(served.path), ["--server", NAME]
    base = served.rows()

    def same() -> None:
        rows = served.rows()
        hits = found(tiny_run, len(rows), capsys)
        assert hits == {i: row.text for i, row in rows.items()}

    same()
    done = run_json(["memory", "add", store, "--text", SENTENCE, *by_name], capsys)
    (new,) = done["added_ids"]
    same()
    with RayMemory.attach(NAME) as memory:
        assert memory.info().content_version == done["version"]
        assert memory.info().epoch == done["server"]["epoch"]
    first = str(next(iter(base)))
    assert main(["memory", "update", store, "--id", first, "--text", "a harbour", *by_name]) == 0
    same()
    assert main(["memory", "remove", store, "--id", str(new), *by_name]) == 0
    same()
    (tmp_path / "b.txt").write_text("a city\n\nan island")
    words = ["memory", "swap", store, "default", "b", "--from", str(tmp_path / "b.txt")]
    assert main([*words, *by_name]) == 0
    same()
    assert len(served.rows()) == 2
    (tmp_path / "c.txt").write_text("a bridge")
    words = ["memory", "plug", store, "c", "--from", str(tmp_path / "c.txt")]
    assert main([*words, *by_name]) == 0
    words = ["memory", "search", SENTENCE, *by_name, "--model", str(tiny_run.model), "-k", "1"]
    for domain, texts in (("c", {"a bridge"}), ("b", {"a city", "an island"})):
        (hit,) = run_json([*words, "--domains", domain], capsys)
        assert hit["text"] in texts
    assert "has no domain 'x'; it has b, c" in refusal([*words, "--domains", "x"], capsys)
    assert main(["memory", "rollback", store, str(done["version"]), *by_name]) == 0
    same()
    assert served.rows().keys() == base.keys() | {new}


def test_a_commit_without_the_server_is_shown_when_asked(
    served: OwnMemory, tiny_run: TinyRun, capsys: Capture
) -> None:
    before = len(served.rows())
    assert main(["memory", "add", str(served.path), "--text", "a quiet king"]) == 0
    assert "a quiet king" not in found(tiny_run, before, capsys).values()
    assert main(["memory", "show", NAME]) == 0
    assert "a quiet king" in found(tiny_run, before + 1, capsys).values()
    # An earlier version can be looked at without a commit.
    assert main(["memory", "show", NAME, "HEAD~1"]) == 0
    assert "a quiet king" not in found(tiny_run, before, capsys).values()
    assert main(["memory", "show", NAME]) == 0


def test_tools_attach_at_once(served: OwnMemory, tiny_run: TinyRun, capsys: Capture) -> None:
    with RayMemory.attach(NAME) as one, RayMemory.attach(NAME) as other:
        Editor(store=served.store, memory=one).add(Knowledge(text="first tool"))
        Editor(store=served.store, memory=other).add(Knowledge(text="second tool"))
        assert one.info() == other.info()
    texts = set(found(tiny_run, len(served.rows()), capsys).values())
    assert {"first tool", "second tool"} <= texts


def test_what_the_server_tells_of_itself(served: OwnMemory, capsys: Capture) -> None:
    (row,) = run_json(["memory", "servers"], capsys)
    assert (row["name"], row["state"], row["shards"]) == (NAME, "serving", 2)
    stats = run_json(["memory", "stats", NAME], capsys)
    assert stats["entries"] == len(served.rows())
    assert stats["queries"] > 0
    assert len(stats["per_shard"]) == 2
    for words in (["servers"], ["stats", NAME], ["info", "--server", NAME]):
        assert main(["memory", *words]) == 0
        assert NAME in capsys.readouterr().out


def test_gc_keeps_what_the_server_answers_from(served: OwnMemory, capsys: Capture) -> None:
    store = str(served.path)
    with RayMemory.attach(NAME) as memory:
        used = memory.info().content_version
    for text in ("later", "and later"):
        assert main(["memory", "add", store, "--text", text]) == 0
    gc = ["memory", "gc", store, "--keep", "1", "--min-age-hours", "0"]
    # Its state, in the store, says so; one that keeps it elsewhere is asked.
    assert used not in run_json([*gc, "--dry-run"], capsys)["collected"]
    assert used not in run_json([*gc, "--server", NAME], capsys)["collected"]
    assert main(["memory", "compact", store, "--server", NAME]) == 0
    with RayMemory.attach(NAME) as memory:
        assert memory.info().content_version == served.store.head()
        assert memory.info().entries == len(served.rows())


def test_what_does_not_fit_the_server_is_refused_with_nothing_committed(
    served: OwnMemory, tiny_run: TinyRun, other_tokenizer: Path, tmp_path: Path, capsys: Capture
) -> None:
    alike = copied(tiny_run, tmp_path / "alike")
    assert main(["memory", "add", str(alike.path), "--text", "a king"]) == 0
    before, theirs = served.files(), alike.files()
    add = ["memory", "add", str(served.path), "--text", "a king"]
    serve = ["memory", "serve", str(served.path)]
    search = ["memory", "search", "a king", "--server", NAME]
    assert "no memory named 'none'" in refusal([*add, "--server", "none"], capsys, code=1)
    assert "no memory named 'none'" in refusal(["memory", "stop", "none"], capsys, code=1)
    assert "no memory named 'none'" in refusal(["memory", "stats", "none"], capsys, code=1)
    taken = [*serve, "--name", NAME, "--model", str(tiny_run.model)]
    assert f"a memory named '{NAME}' runs" in refusal(taken, capsys, code=1)
    cases = [
        (["memory", "unplug", str(served.path), "none", "--server", NAME], "'none'"),
        (["memory", "show", NAME, "nothing"], "no version or tag 'nothing'"),
        ([*search], "--model is needed"),
        ([*search, "--model", str(other_tokenizer)], "another tokenizer"),
        ([*search, "--model", str(tiny_run.model), "-k", "9999"], "must be from 1 to"),
        (["memory", "info"], "give either a STORE or --server"),
        (["memory", "info", str(served.path), "--server", NAME], "give either a STORE"),
        ([*serve, "--name", "b"], "--model is needed"),
        ([*serve, "--name", "b", "--model", str(other_tokenizer)], "another tokenizer"),
        ([*serve, "--name", "b", "--model", str(tiny_run.model), "--index", "no"], "no"),
        ([*serve, "--name", "b", "--model", str(tiny_run.model), "--version", "x"], "'x'"),
    ]
    for words, said in cases:
        assert said in refusal(words, capsys), words
    edit = ["memory", "unplug", str(alike.path), "default", "--server", NAME]
    assert "does not have" in refusal(edit, capsys)
    assert (served.files(), alike.files()) == (before, theirs)


def test_a_server_that_is_stopped_is_gone(served: OwnMemory, capsys: Capture) -> None:
    assert main(["memory", "stop", NAME]) == 0
    assert run_json(["memory", "servers"], capsys) == []
    assert main(["memory", "verify", str(served.path)]) == 0
