"""Which documents are held out: a hash of the text decides, so that copies share a side."""

import hashlib

HASH_BYTES = 8


def document_share(text: str, *, salt: bytes) -> float:
    """A number in [0, 1) that depends on the text and the salt only, evenly spread."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=HASH_BYTES, salt=salt)
    return int.from_bytes(digest.digest(), "big") / (1 << 8 * HASH_BYTES)


def is_held_out(text: str, fraction: float) -> bool:
    """Whether this document is among the `fraction` that training never sees."""
    return document_share(text, salt=b"heldout") < fraction
