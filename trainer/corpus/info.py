"""What a finished corpus is: its manifest corpus.json, read with errors that say what to do."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.corpus.errors import CorpusError

CORPUS_FORMAT = "pluglm-corpus-1"
MANIFEST = "corpus.json"
BUILD_DIRECTORY = ".build"
LOCK = ".build.lock"


@dataclass(frozen=True, kw_only=True)
class SourceCounts:
    """What one source gave. Its ids are `base` + ordinals."""

    name: str
    base: int
    documents: int
    entries: int


@dataclass(frozen=True, kw_only=True)
class CorpusInfo:
    """A finished corpus. Counts are of rows; `tokens` of the documents', without special ones.

    Attributes:
        path: the corpus directory.
        documents: non-empty documents read, held-out ones included.
        empty_documents: of these, those that tokenise to nothing, and so have no entry.
        sequences, heldout_sequences: training sequences, and those of held-out documents.
        arguments: what decided the content, as it was given to the build.
    """

    path: Path
    tokenizer_fingerprint: str
    vocab_size: int
    pad_token_id: int
    sequence_length: int
    entry_tokens: int
    documents: int
    heldout_documents: int
    empty_documents: int
    tokens: int
    entries: int
    sequences: int
    heldout_sequences: int
    sources: tuple[SourceCounts, ...]
    arguments: Mapping[str, Any]

    @property
    def tokenizer_path(self) -> Path:
        """A directory that `AutoTokenizer.from_pretrained` loads."""
        return self.path / "tokenizer"

    @property
    def memory_path(self) -> Path:
        """The store of all documents' entries, held-out ones included."""
        return self.path / "memory"

    @property
    def sequences_path(self) -> Path:
        """The training sequences, part-*.arrow."""
        return self.path / "sequences"

    @property
    def heldout_path(self) -> Path:
        """The held-out sequences, part-*.arrow."""
        return self.path / "heldout"

    @property
    def token_counts_path(self) -> Path:
        """int64 [V], occurrences of each token in the training sequences; 0 for special ones."""
        return self.path / "token_counts.npy"


COUNTS = (
    "vocab_size",
    "pad_token_id",
    "sequence_length",
    "entry_tokens",
    "documents",
    "heldout_documents",
    "empty_documents",
    "tokens",
    "entries",
    "sequences",
    "heldout_sequences",
)


def load_corpus_info(path: str | Path) -> CorpusInfo:
    """Read what a corpus is, and check that its parts are there.

    Raises:
        CorpusError: there is none, it is half-built, empty, damaged, or of another format.
    """
    path = Path(path).expanduser()
    raw = read_manifest(path)
    if raw is None:
        raise CorpusError(_why_none(path))
    try:
        info = CorpusInfo(
            path=path,
            tokenizer_fingerprint=str(raw["tokenizer_fingerprint"]),
            sources=tuple(SourceCounts(**source) for source in raw["sources"]),
            arguments=dict(raw["arguments"]),
            **{name: int(raw[name]) for name in COUNTS},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorpusError(_damaged(path, repr(error))) from error
    for part in (
        info.tokenizer_path / "tokenizer.json",
        info.memory_path,
        info.sequences_path,
        info.heldout_path,
        info.token_counts_path,
    ):
        if not part.exists():
            raise CorpusError(_damaged(path, f"{part.name} is missing"))
    if info.sequences == 0:
        raise CorpusError(
            f"the corpus {path} holds no training sequences; build one from more text"
        )
    return info


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest's values, or None when there is no manifest.

    Raises:
        CorpusError: it is unreadable or of another format.
    """
    try:
        raw = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CorpusError(_damaged(path, str(error))) from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != CORPUS_FORMAT:
        raise CorpusError(
            f"{path / MANIFEST} is of the format {found!r}, this version reads "
            f"{CORPUS_FORMAT!r}; build the corpus again into another directory"
        )
    assert isinstance(raw, dict)
    if not isinstance(raw.get("arguments"), dict) or not isinstance(raw.get("files"), list):
        raise CorpusError(_damaged(path, f"{MANIFEST} does not say what it was built from"))
    return raw


def _why_none(path: Path) -> str:
    build = "build one with `pluglm corpus build`"
    if not path.exists():
        return f"there is no corpus at {path}; correct the path, or {build}"
    if not path.is_dir():
        return f"{path} is a file; a corpus is a directory that `pluglm corpus build` makes"
    if (path / BUILD_DIRECTORY).exists():
        return (
            f"the corpus {path} is half-built: run the same `pluglm corpus build` again, and it "
            "goes on where it was interrupted"
        )
    if all(child.name == LOCK for child in path.iterdir()):
        return f"the directory {path} is empty; {build}"
    return f"{path} is no corpus (it has no {MANIFEST}); {build}"


def _damaged(path: Path, reason: str) -> str:
    return (
        f"the corpus {path} is damaged ({reason}); restore it from a copy, or build it again with "
        "overwrite (--overwrite)"
    )
