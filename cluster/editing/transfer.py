"""A domain of another store as segments for this one."""

from __future__ import annotations

import numpy as np

from cluster.editing.segment_writer import SegmentWriter
from memory_server.errors import TokenizerMismatch, UnknownDomain
from memory_server.store.changes import Addition
from memory_server.store.store import Store


def transferred(
    writer: SegmentWriter, store: Store, other: Store, from_domain: str | None, domain: str
) -> list[Addition]:
    """The segments of a domain of `other`'s head; those with removed rows are written anew.

    Args:
        from_domain: its name there; None: the only one that there is.

    Raises:
        TokenizerMismatch: made with another tokenizer. UnknownDomain: there is none of that name,
        or several to choose from. ValueError: entries of another length. StoreDamaged: a segment
        there is not what was written.
    """
    theirs, ours = other.meta, store.meta
    if theirs.tokenizer_fingerprint != ours.tokenizer_fingerprint:
        raise TokenizerMismatch(
            f"the memory {other.location} was made with the tokenizer "
            f"{theirs.tokenizer_fingerprint}, {store.location} with {ours.tokenizer_fingerprint}; "
            "add its text instead"
        )
    if theirs.entry_tokens != ours.entry_tokens:
        raise ValueError(
            f"the memory {other.location} has entries of {theirs.entry_tokens} tokens, "
            f"{store.location} of {ours.entry_tokens}; add its text instead"
        )
    manifest = other.manifest()
    name = _chosen(list(manifest.domains()), from_domain, other.location)
    additions = []
    for ref in manifest.segments:
        if ref.domain != name:
            continue
        # Here it gets a checksum of its own, after which nothing could tell that it was altered.
        other.verify_segment(ref)
        segment, dead = other.segment(ref), other.deleted_rows(ref)
        if len(dead):
            rows = np.setdiff1d(np.arange(segment.rows), dead, assume_unique=True)
            additions.append(writer.copy(segment, rows, domain))
        else:
            additions.append(Addition(path=segment.path, domain=domain))
    return additions


def _chosen(domains: list[str], wanted: str | None, where: str) -> str:
    if wanted is None and len(domains) == 1:
        return domains[0]
    if wanted in domains:
        assert wanted is not None
        return wanted
    said = "several domains" if wanted is None else f"no domain {wanted!r}"
    raise UnknownDomain(f"the memory {where} has {said}; it has {', '.join(domains) or 'none'}")
