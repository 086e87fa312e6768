"""Small texts, and a look at a finished corpus, for the tests of the corpus build."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memory_server.store.store import Store
from trainer.corpus.info import CorpusInfo
from trainer.corpus.parts import read_batch, token_rows

WORDS = (
    *("river", "mountain", "Café", "city", "ancient", "king", "temple", "music,", "novel."),
    *("battle", "naïve", "empire", "trade", "1901", "physics", "theory", "(quantum)", "energy"),
    *("island", "harbour", "painter", "東京", "século", "don't", "well-known", "university"),
)

Build = Callable[..., CorpusInfo]
"""The fixture `build`."""


def make_rows(count: int, *, seed: int = 0, longest: int = 120) -> list[dict[str, str]]:
    """Documents of random words, of very different lengths."""
    draw = random.Random(seed)
    return [
        {
            "title": f"Title {number}",
            "text": " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, longest))),
        }
        for number in range(count)
    ]


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Opened:
    """A corpus's rows, all parts joined."""

    ids: np.ndarray
    doc_ids: np.ndarray
    tokens: np.ndarray
    texts: list[str]
    titles: list[str]
    sources: list[str]
    sequences: dict[str, np.ndarray]
    heldout: dict[str, np.ndarray]


def _sequences(folder: Path) -> dict[str, np.ndarray]:
    batches = [read_batch(path) for path in sorted(folder.glob("part-*.arrow"))]
    columns = {"input_ids": np.concatenate([token_rows(batch, "input_ids") for batch in batches])}
    for name in ("doc_id", "first_entry", "num_entries"):
        columns[name] = np.concatenate([batch.column(name).to_numpy() for batch in batches])
    return columns


def open_corpus(info: CorpusInfo) -> Opened:
    store = Store.open(info.memory_path)
    segments = [store.segment(ref) for ref in store.manifest().segments]

    def strings(name: str) -> list[str]:
        return [text for s in segments for text in s.strings(name, range(s.rows))]

    return Opened(
        ids=np.concatenate([segment.ids for segment in segments]),
        doc_ids=np.concatenate([segment.doc_ids for segment in segments]),
        tokens=np.concatenate([segment.tokens for segment in segments]),
        texts=strings("text"),
        titles=strings("title"),
        sources=strings("source"),
        sequences=_sequences(info.sequences_path),
        heldout=_sequences(info.heldout_path),
    )


def contents(root: Path) -> dict[str, bytes]:
    """Every file that two equal builds must share; manifests carry the time of their commit, and
    names in the store end with what makes a commit's files its own."""
    return {
        re.sub(r"-[0-9a-f]{12}\.arrow$", ".arrow", str(path.relative_to(root))): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not {"manifests", "next"} & set(path.parts) and path.name != "HEAD"
    }
