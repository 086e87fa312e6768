"""Small JSON files that carry a checksum of what they say."""

import hashlib
import json
from typing import Any

from memory_server.errors import StoreDamaged

_CHECKSUM = "sha256"


def dump_checked(content: dict[str, Any]) -> bytes:
    """The file's bytes: the content, and a checksum of it."""
    return (json.dumps({**content, _CHECKSUM: _checksum(content)}, indent=1) + "\n").encode()


def parse_checked(data: bytes, where: str, *, required: bool = True) -> dict[str, Any]:
    """The content.

    Args:
        where: the file, for messages.
        required: False accepts a file of before, without a checksum.

    Raises:
        StoreDamaged: it is not JSON, or not what was written.
    """
    try:
        raw = json.loads(data)
    except ValueError as error:
        raise StoreDamaged(f"{where} is damaged: {error}; restore it from a copy") from error
    if not isinstance(raw, dict):
        raise StoreDamaged(f"{where} is damaged: no JSON object; restore it from a copy")
    stored = raw.pop(_CHECKSUM, None)
    if stored != _checksum(raw) and (required or stored is not None):
        raise StoreDamaged(f"{where} was altered: its checksum is wrong; restore it from a copy")
    return raw


def _checksum(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(canonical).hexdigest()
