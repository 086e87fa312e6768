"""What a run was made of, so that a resumed one does not mix results of two."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from memory_server.store.manifest import SegmentRef
from memory_server.store.store import Store
from trainer.finetune.settings import FinetuneSettings
from trainer.finetune.task import splits_of

_MODEL_FILES = ("config.json", "*.safetensors", "pytorch_model*.bin", "tokenizer.json", "vocab.txt")
_FREE = ("run", "train.seeds", "train.eval_batch_size")
"""Settings that may change between a run and its going on."""
_LATER: dict[str, Any] = {
    "memory.domains": (),
    "memory.exclude_own_samples": False,
    "memory.retrieval_loss_weight": 0.0,
    "memory.right_entry": "",
    "memory.find_own_label": False,
}
"""Settings that runs of before do not have, and what they did."""


def run_identity(settings: FinetuneSettings) -> dict[str, Any]:
    """The settings that decide the results, and a checksum of every file that they name."""
    plain: dict[str, dict[str, Any]] = asdict(settings)
    kept = {
        f"{section}.{key}": value
        for section, values in plain.items()
        for key, value in values.items()
        if section not in _FREE and f"{section}.{key}" not in _FREE
    }
    kept = {name: v for name, v in kept.items() if name not in _LATER or v != _LATER[name]}
    model = Path(settings.model.path).expanduser()
    files = {
        f"the file {Path(path).name} of task.{split}": _checksum(Path(path).expanduser())
        for split in splits_of(settings.task)
        for path in [getattr(settings.task, split)]
    }
    files |= {
        f"{path.name} of model.path": _checksum(path)
        for pattern in _MODEL_FILES
        for path in sorted(model.glob(pattern))
    }
    if settings.memory.store.strip():
        store = Store.open(Path(settings.memory.store).expanduser())
        if settings.memory.domains:
            # What else is plugged, or was since, plays no part.
            refs = store.manifest().of_domains(settings.memory.domains)
            files["the content of memory.domains"] = content_digest(refs)
        else:
            files["the version of memory.store"] = store.head()
    return kept | files


def first_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two identities, in words; empty: nothing."""
    for name in dict.fromkeys([*before, *now]):
        was, is_now = before.get(name), now.get(name)
        # JSON has no tuples.
        was, is_now = (list(v) if isinstance(v, tuple) else v for v in (was, is_now))
        if was != is_now:
            return f"{name} was {was!r} and is {is_now!r} now"
    return ""


def content_digest(refs: Sequence[SegmentRef]) -> str:
    """What tells these segments, less the rows that were removed, from others."""
    text = json.dumps([[ref.domain, ref.sha256, ref.deletions] for ref in refs])
    return sha256(text.encode()).hexdigest()[:16]


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()[:16]
