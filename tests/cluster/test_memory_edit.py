"""`pluglm memory add|remove|update`: what is in the memory afterwards, and what is refused."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from tests.cluster.memory_support import Capture, OwnMemory, refusal, run_json, write_rows
from tests.cluster.tiny_run import ENTRY_TOKENS, TinyRun
from tests.trainer.corpus.samples import make_rows, open_corpus, write_json_lines
from trainer.corpus.build import build_corpus
from trainer.corpus.tokenizer import load_tokenizer

FORMATS = (".jsonl", ".parquet", ".arrow")


@pytest.mark.parametrize("titled", [False, True])
def test_what_is_added_is_what_a_build_makes_of_the_same_text(
    own_memory: OwnMemory, tmp_path: Path, capsys: Capture, titled: bool
) -> None:
    text = write_json_lines(tmp_path / "new.jsonl", [*make_rows(50, seed=8), {"text": " "}])
    built = build_corpus(
        [text],
        tmp_path / "built",
        tokenizer=str(own_memory.corpus / "tokenizer"),
        entry_tokens=ENTRY_TOKENS,
        title_in_entry=titled,
        workers=1,
    )
    wanted = open_corpus(built)
    before = own_memory.rows()
    words = ["memory", "add", str(own_memory.path), str(text), "--domain", "new"]
    done = run_json(words + (["--title-in-entry"] if titled else []), capsys)
    after = own_memory.rows()

    assert {i: row for i, row in after.items() if i in before} == before
    new = [(i, row) for i, row in sorted(after.items()) if i not in before]
    assert [row.text for _, row in new] == wanted.texts
    assert [row.title for _, row in new] == wanted.titles
    assert [row.source for _, row in new] == wanted.sources
    padded = [[*row.tokens, *[0] * (ENTRY_TOKENS - len(row.tokens))] for _, row in new]
    assert padded == wanted.tokens.tolist()
    # Entries of one document, and only those, share a number that no document had.
    numbers = [row.doc_id for _, row in new]
    assert [a == b for a, b in pairwise(numbers)] == [
        bool(a == b) for a, b in pairwise(wanted.doc_ids)
    ]
    assert not set(numbers) & {row.doc_id for row in before.values()}
    assert min(i for i, _ in new) > max(before)
    assert done["added"] == len(new) == done["entries_after"] - done["entries_before"]
    assert done["read"] == {"passages": 51, "empty": 1, "entries": len(new)}
    assert done["domains"] == {
        "new": {"before": 0, "after": len(new), "added": len(new), "removed": 0}
    }
    assert done["version"] == own_memory.store.head()


@pytest.mark.parametrize("suffix", FORMATS)
def test_rows_give_ids_documents_sources_and_ready_tokens(
    own_memory: OwnMemory, tmp_path: Path, suffix: str
) -> None:
    vocabulary = own_memory.store.meta.vocab_size
    rows = [
        {"id": 7 + n, "doc_id": 3, "source": "hand", "tokens": [2, 5 + n, vocabulary - 1]}
        for n in range(10)
    ]
    path = write_rows(tmp_path / f"tokens{suffix}", rows)
    assert main(["memory", "add", str(own_memory.path), str(path)]) == 0
    after = own_memory.rows()
    for n in range(10):
        row = after[7 + n]
        assert (row.doc_id, row.source, row.text) == (3, "hand", "")
        assert row.tokens == (2, 5 + n, vocabulary - 1)


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_adds_the_same_entries(
    own_memory: OwnMemory, tiny_run: TinyRun, tmp_path: Path, suffix: str
) -> None:
    rows: list[dict[str, Any]] = [dict(row) for row in make_rows(30, seed=2, longest=60)]
    path = write_rows(tmp_path / f"rows{suffix}", rows)
    before = own_memory.rows()
    assert main(["memory", "add", str(own_memory.path), str(path)]) == 0
    new = [row for i, row in sorted(own_memory.rows().items()) if i not in before]
    tokenizer = load_tokenizer(tiny_run.corpus / "tokenizer")
    texts: dict[str, list[int]] = {}
    for row in new:
        texts.setdefault(row.title, []).extend(row.tokens[1:])
    for row in rows:
        ids = tokenizer(row["text"], add_special_tokens=False).input_ids
        assert texts[row["title"]] == ids


def test_one_text_is_added_with_its_title(own_memory: OwnMemory, capsys: Capture) -> None:
    before = own_memory.rows()
    words = ["memory", "add", str(own_memory.corpus), "--text", "the king", "--title", "Royal"]
    assert main([*words, "--source", "me", "--message", "a king"]) == 0
    ((entry_id, row),) = [(i, r) for i, r in own_memory.rows().items() if i not in before]
    assert (row.text, row.title, row.source, row.domain) == ("the king", "Royal", "me", "default")
    assert own_memory.store.manifest().message == "a king"
    assert main(words) == 0
    again = own_memory.rows()[entry_id + 1]
    assert again.doc_id != row.doc_id
    assert main(["memory", "remove", str(own_memory.path), "--id", str(entry_id + 1)]) == 0
    # A number that was given once is not given again, also when its entry is gone.
    assert main(["memory", "remove", str(own_memory.path), "--id", str(entry_id)]) == 0
    assert run_json([*words, "--source", "me"], capsys)["added_ids"] == [entry_id + 2]


def test_a_run_is_edited_with_its_own_models_tokenizer(
    own_memory: OwnMemory, tiny_run: TinyRun, tmp_path: Path, capsys: Capture
) -> None:
    """The store lies alone; the run that read it has the tokenizer."""
    store = tmp_path / "alone" / "store"
    shutil.copytree(own_memory.path, store)
    run = Path(shutil.copytree(tiny_run.run, tmp_path / "run"))
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace('store = ""', f'store = "{store}"'))
    capsys.readouterr()
    assert main(["memory", "add", str(run), "--text", "the king"]) == 0
    # A copy of a run leads to the memory of the first: which one was edited is told.
    assert f"the memory of {run} is {store}" in capsys.readouterr().err
    words = ["memory", "add", str(store), "--text", "the king"]
    assert "no tokenizer lies beside" in refusal(words, capsys)
    assert main([*words, "--tokenizer", str(tiny_run.model)]) == 0


def test_entries_documents_and_lists_of_ids_are_removed(
    own_memory: OwnMemory, tmp_path: Path, capsys: Capture
) -> None:
    before = own_memory.rows()
    document = own_memory.document(3)
    gone = {i for i, row in before.items() if row.doc_id == document}
    others = [i for i in before if i not in gone][:4]
    (tmp_path / "ids.txt").write_text("".join(f"{i}\n\n" for i in others[2:]))
    words = ["memory", "remove", str(own_memory.path), "--id", *map(str, others[:2])]
    words += ["--doc-id", str(document), "--ids-from", str(tmp_path / "ids.txt")]
    plan = run_json([*words, "--dry-run"], capsys)
    assert own_memory.rows() == before
    done = run_json(words, capsys)
    assert (plan["removed"], plan["dry_run"], plan["version"]) == (7, True, None)
    assert (done["removed"], done["dry_run"]) == (7, False)
    assert own_memory.rows() == {
        i: row for i, row in before.items() if i not in gone and i not in others
    }


def test_an_entry_keeps_its_id_document_title_and_source_when_its_text_changes(
    own_memory: OwnMemory, tmp_path: Path
) -> None:
    before = own_memory.rows()
    first, second = list(before)[:2]
    words = ["memory", "update", str(own_memory.path)]
    assert main([*words, "--id", str(first), "--text", "an island"]) == 0
    path = write_rows(tmp_path / "b.jsonl", [{"id": second, "text": "a city", "title": "City"}])
    assert main([*words, str(path)]) == 0
    after = own_memory.rows()
    assert after.keys() == before.keys()
    assert after[first].text == "an island"
    assert after[second].text == "a city"
    assert after[second].title == "City"
    for entry_id in (first, second):
        assert after[entry_id].doc_id == before[entry_id].doc_id
        assert after[entry_id].source == before[entry_id].source
    assert after[first].title == before[first].title
    assert {i: row for i, row in after.items() if i not in (first, second)} == {
        i: row for i, row in before.items() if i not in (first, second)
    }


@pytest.mark.parametrize("length", [1, 200])
def test_a_document_is_replaced_whole(own_memory: OwnMemory, tmp_path: Path, length: int) -> None:
    """Its ids are used again; shorter, some of them go; longer, new ones come."""
    before = own_memory.rows()
    document = own_memory.document(3)
    ids = sorted(i for i, row in before.items() if row.doc_id == document)
    (tmp_path / "page.txt").write_text(" ".join(["river"] * length))
    words = ["memory", "update", str(own_memory.path), str(tmp_path / "page.txt")]
    assert main([*words, "--doc-id", str(document)]) == 0
    after = own_memory.rows()
    new = sorted(i for i, row in after.items() if row.doc_id == document)
    assert new[:3] == ids[: len(new)]
    assert all(i > max(before) for i in new[3:])
    assert " ".join(after[i].text for i in new) == " ".join(["river"] * length)
    assert len(new) == 1 if length == 1 else len(new) > 3
    assert {i: r for i, r in after.items() if i not in new and i not in ids} == {
        i: r for i, r in before.items() if i not in ids
    }


def test_an_entry_of_a_domain_stays_in_it(own_memory: OwnMemory, capsys: Capture) -> None:
    words = ["memory", "add", str(own_memory.path), "--text", "the king", "--domain", "royal"]
    (entry_id,) = run_json(words, capsys)["added_ids"]
    update = ["memory", "update", str(own_memory.path), "--id", str(entry_id), "--text", "a queen"]
    assert main(update) == 0
    assert own_memory.rows()[entry_id].domain == "royal"


def test_a_dry_run_shows_what_would_come_and_changes_nothing(
    own_memory: OwnMemory, capsys: Capture
) -> None:
    before = own_memory.files()
    entry_id = next(iter(own_memory.rows()))
    add = ["memory", "add", str(own_memory.path), "--text", "the ancient king"]
    for words in (
        add,
        ["memory", "update", str(own_memory.path), "--text", "a queen", "--id", str(entry_id)],
        ["memory", "remove", str(own_memory.path), "--id", str(entry_id)],
        ["memory", "unplug", str(own_memory.path), "default"],
        ["memory", "swap", str(own_memory.path), "default", "b", "--from", str(own_memory.corpus)],
    ):
        if words[1] == "swap":
            words[-1] = str(own_memory.corpus.parent / "new.txt")
            Path(words[-1]).write_text("one\n\ntwo")
        assert main([*words, "--dry-run"]) == 0
        shown = capsys.readouterr().out
        assert "dry run: nothing is committed" in shown
        assert own_memory.files() == before
    assert main([*add, "--dry-run"]) == 0
    assert "the ancient king" in capsys.readouterr().out
    assert run_json([*add, "--dry-run"], capsys)["bytes_to_write"] > 0


def test_given_ids_replace_live_ones_only_when_asked(
    own_memory: OwnMemory, tmp_path: Path, capsys: Capture
) -> None:
    before = own_memory.rows()
    entry_id = next(iter(before))
    path = write_rows(tmp_path / "a.jsonl", [{"id": entry_id, "doc_id": 1, "text": "a king"}])
    words = ["memory", "add", str(own_memory.path), str(path)]
    assert f"{path}, line 1: an entry with id {entry_id} lives" in refusal(words, capsys)
    assert run_json([*words, "--replace"], capsys)["replaced"] == 1
    after = own_memory.rows()
    assert after[entry_id].text == "a king"
    assert len(after) == len(before)


TOO_LONG = [2] * (ENTRY_TOKENS + 1)
BAD_ROWS: list[tuple[list[Any], str]] = [
    ([{"text": "good"}, {"tokens": TOO_LONG}], "line 2: an entry of 17 tokens"),
    ([{"tokens": [2, 99999]}], "line 1: token id 99999 is not in the vocabulary"),
    ([{"tokens": [2, 2**70]}], "line 1: token id"),
    ([{"tokens": [-1]}], "line 1: token id -1"),
    ([{"tokens": []}], "line 1: field 'tokens' is an empty list"),
    ([{"tokens": [0, 0]}], "line 1: all tokens are padding"),
    ([{"tokens": ["king"]}], "line 1: field 'tokens' must be a list of token ids"),
    ([{"tokens": [True]}], "line 1: field 'tokens' must be a list of token ids"),
    ([{"text": "a", "id": -1}], "line 1: id is -1"),
    ([{"text": "a", "id": 2**63}], "line 1: id is 9223372036854775808"),
    ([{"text": "a", "id": 2**63 - 1}], "line 1: id is 9223372036854775807"),
    ([{"text": "a", "doc_id": 2**63 - 1}], "line 1: doc_id is 9223372036854775807"),
    ([{"text": "a", "id": "9" * 5000}], "line 1: id is '999"),
    ([{"text": "a", "source": "\ud800"}], "line 1: the source is no valid UTF-8"),
    ([{"text": "a", "doc_id": 1.5}], "line 1: doc_id is 1.5"),
    ([{"text": "a", "doc_id": True}], "line 1: doc_id is True"),
    ([{"text": "a", "source": 3}], "line 1: field 'source' holds int"),
    ([{"text": 3}], "line 1: field 'text' holds int"),
    ([{"body": "a"}], "line 1: there is no field 'text'"),
    ([{"text": "a", "id": 5}, {"text": "b", "id": 5}], "line 1 and "),
    ([{"text": "a", "id": 5}, {"text": "b"}], "line 2: there is no id, but"),
    ([{"text": "a", "doc_id": 5}, {"text": "b"}], "line 2: there is no doc_id, but"),
    ([{"text": "river " * 40, "id": 5}], "the text makes"),
    ([{"text": ""}, {"text": " "}], "there is no text in it"),
    ([{"text": "\ud800"}], "half of a surrogate pair"),
]


@pytest.mark.parametrize(("rows", "said"), BAD_ROWS)
def test_bad_rows_are_named_and_nothing_is_committed(
    own_memory: OwnMemory, tmp_path: Path, capsys: Capture, rows: list[Any], said: str
) -> None:
    before = own_memory.files()
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    error = refusal(["memory", "add", str(own_memory.path), str(path)], capsys)
    assert said in error
    assert path.name in error
    assert own_memory.files() == before


def test_bad_files_and_arguments_are_refused(
    own_memory: OwnMemory, other_tokenizer: Path, tmp_path: Path, capsys: Capture
) -> None:
    before = own_memory.files()
    store = str(own_memory.path)
    entry_id = next(iter(own_memory.rows()))
    document = own_memory.document(3)
    (tmp_path / "good.txt").write_text("a king")
    (tmp_path / "cut.jsonl").write_text('{"text": "a"}\n{"text": ')
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and then nothing")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin1"))
    (tmp_path / "x.pdf").write_bytes(b"%PDF")
    (tmp_path / "ids.txt").write_text(f"{entry_id}\nking\n")
    (tmp_path / "none.txt").write_text("\n")
    (tmp_path / "two.txt").write_text("one\n\ntwo")
    rows = {
        "unknown-id": [{"id": 5, "text": "a"}],
        "unknown-doc": [{"doc_id": 5, "text": "a"}],
        "no-id": [{"text": "a"}],
        "long": [{"id": entry_id, "text": "river " * 40}],
        "other-doc": [{"id": entry_id, "doc_id": 5, "text": "a"}],
        "empty": [{"id": entry_id, "text": " "}],
        "twice": [{"id": entry_id, "text": "a"}, {"id": entry_id, "text": "b"}],
    }
    for name, content in rows.items():
        write_rows(tmp_path / f"{name}.jsonl", content)

    def file(name: str) -> str:
        return str(tmp_path / name)

    add, update, remove = (["memory", word, store] for word in ("add", "update", "remove"))
    unknown = "no entry with id 5 lives"
    cases = [
        ([*add], "give either files or --text"),
        ([*add, file("good.txt"), "--text", "b"], "give either files or --text"),
        ([*add, "--text", " "], "the text is empty"),
        ([*add, file("good.txt"), "--title", "b"], "a title or a source goes with one text"),
        ([*add, file("no.txt")], "there is no file or directory"),
        ([*add, file("x.pdf")], "of no known kind"),
        ([*add, file("good.txt"), file("good.txt")], "more than once"),
        ([*add, file("good.txt"), file("cut.jsonl")], "cut.jsonl, line 2: not JSON"),
        ([*add, file("cut.parquet")], "cut.parquet is damaged"),
        ([*add, file("latin.txt")], "latin.txt, line 1: not UTF-8"),
        ([*add, file("good.txt"), "--domain", "a\nb"], "domain"),
        ([*add, file("good.txt"), "--domain", ""], "domain"),
        ([*add, file("good.txt"), "--tokenizer", str(other_tokenizer)], "fingerprint"),
        ([*add, file("good.txt"), "--tokenizer", file("nothing")], "there is no tokenizer at"),
        ([*update, file("unknown-id.jsonl")], f"unknown-id.jsonl, line 1: {unknown}"),
        ([*update, file("unknown-doc.jsonl")], "line 1: no entry of document 5 lives"),
        ([*update, file("no-id.jsonl")], "line 1: there is neither id nor doc_id"),
        ([*update, file("long.jsonl")], "replace the whole document"),
        ([*update, file("other-doc.jsonl")], "is of document"),
        ([*update, file("empty.jsonl")], "the new text has no tokens"),
        ([*update, file("twice.jsonl")], "line 1 and "),
        ([*update, file("twice.jsonl"), "--id", "5"], "the row says itself"),
        ([*update, file("two.txt"), "--id", str(entry_id)], "line 3: both are to be entry"),
        ([*update, "--text", "b"], "give --id or --doc-id"),
        ([*update, "--text", "b", "--id", "1", "--doc-id", "2"], "not both"),
        ([*update, "--text", "b", "--id", "5"], unknown),
        ([*update, "--text", "b", "--id", "-5"], "'-5' is not a whole number"),
        ([*remove], "nothing to remove is named"),
        ([*remove, "--id", str(entry_id), "5"], "5"),
        ([*remove, "--doc-id", str(document), "5"], "5"),
        ([*remove, "--domain", "biomed"], "biomed"),
        ([*remove, "--id", "x"], "'x' is not a whole number"),
        ([*remove, "--ids-from", file("ids.txt")], "ids.txt, line 2: 'king' is no entry's id"),
        ([*remove, "--ids-from", file("none.txt")], "there is no id in it"),
        ([*remove, "--ids-from", file("no.txt")], "cannot be read"),
        (["memory", "add", file("nowhere"), "--text", "b"], "there is no"),
        (["memory", "add", str(tmp_path), "--text", "b"], "no memory store at"),
    ]
    for words, said in cases:
        assert said in refusal(words, capsys), words
        assert own_memory.files() == before, words


FOREIGN = "caf\udcff"  # what Python makes of an argument that is not UTF-8
BAD_WORDS: list[tuple[list[str], str]] = [
    (["update", "STORE", "--id", str(2**64), "--text", "a"], "is no id"),
    (["update", "STORE", "--doc-id", str(2**64), "--text", "a"], "is no id"),
    (["remove", "STORE", "--id", str(2**70)], "is no id"),
    (["remove", "STORE", "--doc-id", str(2**70)], "is no id"),
    (["search", "STORE", "a", "--exclude-document", str(2**70)], "is no id"),
    (["search", "STORE", FOREIGN], "no valid UTF-8"),
    (["log", "STORE", "-n", str(2**70)], "the most"),
    (["gc", "STORE", "--min-age-hours", "-1"], "hours of 0 or more"),
    (["gc", "STORE", "--min-age-hours", "nan"], "hours of 0 or more"),
    (["gc", "STORE", "--min-age-hours", "soon"], "hours of 0 or more"),
    (["add", "STORE", "--text", "a", "-m", ""], "the message is empty"),
    (["add", "STORE", "--text", "a", "-m", FOREIGN], "no valid UTF-8"),
    (["compact", "STORE", "-m", " "], "the message is empty"),
    (["add", "STORE", "--text", FOREIGN], "no valid UTF-8"),
    (["add", "STORE", "--text", "a", "--source", FOREIGN], "no valid UTF-8"),
    (["add", "STORE", "--text", "a", "--title", FOREIGN], "no valid UTF-8"),
    (["add", "STORE", "--text", "a", "--domain", FOREIGN], "a domain's name"),
    (["add", "STORE", "--text", "a", "--domain", "a,b"], "no comma"),
    (["add", "STORE", "a\0b.txt"], "a NUL"),
    (["add", "STORE", f"{FOREIGN}.txt"], "the name of a file"),
    (["add", "STORE", "--text", "a", "--tokenizer", "a\0b"], "a NUL"),
    (["add", "a\0b", "--text", "a"], "a NUL"),
    (["remove", "STORE", "--ids-from", "a\0b"], "a NUL"),
    (["plug", "STORE", "b", "--from", "a\0b.txt"], "a NUL"),
    (["plug", "STORE", "b", "--from-store", "a\0b"], "a NUL"),
    (["tag", "STORE", FOREIGN], "cannot name a tag"),
    (["rollback", "STORE", FOREIGN], "no version or tag"),
]


@pytest.mark.parametrize(("words", "said"), BAD_WORDS)
def test_arguments_that_cannot_be_are_one_line(
    own_memory: OwnMemory, tmp_path: Path, capsys: Capture, words: list[str], said: str
) -> None:
    before = own_memory.files()
    given = [str(own_memory.path) if word == "STORE" else word for word in words]
    assert said in refusal(["memory", *given], capsys)
    assert own_memory.files() == before


def test_no_given_id_uses_up_the_numbers(
    own_memory: OwnMemory, tmp_path: Path, capsys: Capture
) -> None:
    highest = 2**63 - 2**38
    row = {"text": "a king", "id": highest, "doc_id": highest}
    path = write_rows(tmp_path / "high.jsonl", [row])
    assert main(["memory", "add", str(own_memory.path), str(path)]) == 0
    done = run_json(["memory", "add", str(own_memory.path), "--text", "a river"], capsys)
    assert done["added_ids"] == [highest + 1]
