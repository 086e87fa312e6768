"""A corpus on another filesystem (S3, GCS, HDFS, HTTP ...): what is small comes at once.

`local_corpus` makes a local directory that is read like any corpus. In it lie the manifest, the
tokenizer, the token counts and the held-out sequences; the training sequences are named in a file
and fetched part by part when they are wanted. The memory is read where it lies (`Store.open`).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import fsspec
from filelock import FileLock

from trainer.corpus.errors import CorpusError
from trainer.corpus.info import MANIFEST
from trainer.data.part_cache import PartCache
from trainer.data.sequences import ELSEWHERE

# Names of what a URL is signed with: AWS, Azure, Google, and tokens of any kind.
_SECRET = re.compile(r"sig|token|secret|password|credential|key", re.IGNORECASE)
_URL = re.compile(r"^[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://", re.IGNORECASE)
_CORPORA = "corpora"
_SEQUENCES, _HELDOUT, _MEMORY = "sequences", "heldout", "memory"


def is_url(corpus: str) -> bool:
    """Whether a corpus lies on another filesystem, by how it is written."""
    return _URL.match(corpus) is not None


def local_corpus(corpus: str | Path, cache: PartCache | None = None) -> Path:
    """The directory to read a corpus from; blocks while its small files are fetched.

    Args:
        corpus: a directory, which is returned as it is, or the fsspec URL of one.
        cache: where to put it; None: this machine's.

    Raises:
        CorpusError: nothing is there, or it cannot be fetched.
    """
    url = str(corpus)
    if not is_url(url):
        return Path(corpus).expanduser()
    cache = cache or PartCache.of_this_machine()
    try:
        filesystem, root = fsspec.core.url_to_fs(url.rstrip("/"))
        manifest = filesystem.cat_file(f"{root}/{MANIFEST}")
        # Its content is part of the name: a corpus that is built again is another one.
        digest = hashlib.sha256(url.rstrip("/").encode() + b"\0" + manifest).hexdigest()[:32]
        place = cache.folder / _CORPORA / digest
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):
            if not place.exists():
                _fetch(filesystem, root, url.rstrip("/"), place)
    except CorpusError:
        raise
    except Exception as error:  # every filesystem has exceptions of its own
        raise CorpusError(
            f"{url} cannot be read ({type(error).__name__}: {error}); correct the address, see "
            "that this node may read it and that the package of its filesystem is installed "
            "(s3fs, gcsfs, ...), and that the cache directory (PLUGLM_CACHE_DIR) is writable"
        ) from error
    return place


def corpus_memory(corpus: str | Path) -> Path | str:
    """Where a corpus's memory store is, as `Store.open` takes it."""
    if is_url(str(corpus)):
        return f"{str(corpus).rstrip('/')}/{_MEMORY}"
    return Path(corpus).expanduser() / _MEMORY


def refuse_secrets(text: str, setting: str) -> None:
    """Refuse a URL that holds what must not be written down: it goes into config files and logs.

    Raises:
        CorpusError: it names a password, a key or a signature; the message does not repeat it.
    """
    if not is_url(text):
        return
    parts = urlsplit(text)
    names = {name.lower() for name, _ in parse_qsl(parts.query)}
    found = "a user name or password" if "@" in parts.netloc else ""
    found = found or next((f"{n!r}" for n in sorted(names) if _SECRET.search(n)), "")
    if found:
        raise CorpusError(
            f"{setting} is a URL with {found} in it, which would be written into config.toml, "
            "checkpoints and logs; leave it out, and give it to the filesystem in the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, ...) or "
            "in fsspec's configuration (FSSPEC_CONFIG_DIR)"
        )


def location(text: str) -> Path | str:
    """A path, or a URL as it is."""
    return text if is_url(text) else Path(text)


def absolute(text: str) -> str:
    """The same from whatever directory it is read; a URL as it is."""
    return text if is_url(text) else str(Path(text).expanduser().resolve())


def _fetch(filesystem: Any, root: str, url: str, place: Path) -> None:
    part = place.parent / f".{uuid.uuid4().hex}"
    try:
        part.mkdir()
        for name in (MANIFEST, "token_counts.npy"):
            filesystem.get_file(f"{root}/{name}", str(part / name))
        _get_tree(filesystem, f"{root}/tokenizer", part / "tokenizer")
        _get_tree(filesystem, f"{root}/{_HELDOUT}", part / _HELDOUT)
        (part / _MEMORY).mkdir()  # a corpus has one; this one's is elsewhere
        names = sorted(Path(p).name for p in filesystem.ls(f"{root}/{_SEQUENCES}", detail=False))
        names = [name for name in names if name.startswith("part-")]
        if not names:
            raise CorpusError(f"{url}/{_SEQUENCES} holds no parts; build the corpus again")
        (part / _SEQUENCES).mkdir()
        manifest = json.loads((part / MANIFEST).read_text(encoding="utf-8"))
        rows: dict[str, int] = manifest.get("sequence_rows") or {}
        told = {
            "folder": f"{url}/{_SEQUENCES}",
            "parts": names,
            # A corpus of an earlier version does not say; its parts are all fetched at once.
            "rows": [rows[name] for name in names] if set(rows) == set(names) else None,
            "sequence_length": manifest["sequence_length"] if rows else None,
        }
        (part / _SEQUENCES / ELSEWHERE).write_text(json.dumps(told), encoding="utf-8")
        part.replace(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _get_tree(filesystem: Any, source: str, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    prefix = filesystem._strip_protocol(source).rstrip("/") + "/"
    for path in filesystem.find(source):
        inner = path.removeprefix(prefix)
        if ".." in Path(inner).parts or Path(inner).is_absolute():
            raise CorpusError(f"{path} would be written outside of {target}; it is no corpus")
        (target / inner).parent.mkdir(parents=True, exist_ok=True)
        filesystem.get_file(path, str(target / inner))
