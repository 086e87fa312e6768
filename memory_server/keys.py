"""The keys of a shard's rows: kept where nothing changed, encoded where it did."""

import zlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from memory_server.api import KeysById, KeySource
from memory_server.content import ShardContent
from memory_server.segments import Int64Array

ENCODE_ROWS = {"cpu": 64, "cuda": 4096}  # small batches stay in a CPU's cache: measured the fastest
CHECKSUM_ROWS = 1 << 16


class Cancelled(Exception):
    """The epoch is not wanted any more."""


def make_keys(
    content: ShardContent,
    *,
    source: tuple[ShardContent, Tensor] | None,
    encoder: Callable[[], KeySource],
    device: torch.device,
    advance: Callable[[int], None],
) -> tuple[Tensor, int]:
    """Make the keys of every live row; removed rows get zeros and are never returned.

    Args:
        source: content and keys that the same weights made; their rows are kept.
        encoder: gives the encoder, or the stored keys; called only if a row must be encoded.
        advance: called with the number of rows that now have keys; may raise Cancelled.

    Returns:
        (keys_NQ float32 on `device`, how many rows were encoded). When no row differs from the
        source, its very tensor.

    Raises:
        ValueError: the encoder's reply has a wrong shape or type, or is not finite; names the
            entry.
    """
    keys_NQ: Tensor | None = None
    missing = content.is_live.copy()
    if source is not None:
        old_content, old_keys = source
        if content.same_rows(old_content):
            advance(content.live_rows)
            return old_keys, 0
        mine, theirs = content.rows_kept_from(old_content)
        keys_NQ = torch.zeros(content.rows, old_keys.shape[1], device=device)
        for start in range(0, len(mine), CHECKSUM_ROWS):
            block = slice(start, start + CHECKSUM_ROWS)
            kept = old_keys[torch.from_numpy(theirs[block]).to(device)]
            keys_NQ[torch.from_numpy(mine[block]).to(device)] = kept
        missing[mine] = False
        advance(len(mine))
    rows: Int64Array = np.flatnonzero(missing)
    if keys_NQ is None and not len(rows):
        width = _width_of(encoder(), content, device)
        return torch.zeros(content.rows, width, device=device), 0
    stored = len(rows) > 0 and isinstance(encoder(), KeysById)
    step = CHECKSUM_ROWS if stored else ENCODE_ROWS[device.type]
    for start in range(0, len(rows), step):
        chosen = rows[start : start + step]
        keys = _encode(encoder(), content, chosen, device)
        if keys_NQ is None:
            keys_NQ = torch.zeros(content.rows, keys.shape[1], device=device)
        if keys.shape[1] != keys_NQ.shape[1]:
            raise ValueError(
                f"the encoder made keys of width {keys.shape[1]}, and {keys_NQ.shape[1]} before; "
                "a key "
                "width must not change"
            )
        keys_NQ[torch.from_numpy(chosen).to(device)] = keys
        advance(len(chosen))
    assert keys_NQ is not None
    return keys_NQ, len(rows)


def key_checksum(keys_NQ: Tensor) -> int:
    """CRC-32 of the keys' bytes in row order."""
    checksum = 0
    for start in range(0, keys_NQ.shape[0], CHECKSUM_ROWS):
        block = keys_NQ[start : start + CHECKSUM_ROWS].cpu().contiguous().numpy()
        checksum = zlib.crc32(block.tobytes(), checksum)
    return checksum


def _encode(
    encoder: KeySource, content: ShardContent, rows: Int64Array, device: torch.device
) -> Tensor:
    if isinstance(encoder, KeysById):
        return encoder.keys_of(content.ids[rows], content.tokens(rows)).to(device)
    tokens_nS = torch.from_numpy(content.tokens(rows).astype(np.int64)).to(device)
    with torch.no_grad():
        keys_nQ = encoder(tokens_nS)
    if keys_nQ.ndim != 2 or keys_nQ.shape[0] != len(rows) or not keys_nQ.dtype.is_floating_point:
        raise ValueError(
            f"the encoder turned {tuple(tokens_nS.shape)} tokens into {keys_nQ.dtype} "
            f"{tuple(keys_nQ.shape)}; floating point [{len(rows)}, key width] is needed"
        )
    keys_nQ = keys_nQ.to(device=device, dtype=torch.float32)
    bad_n = ~torch.isfinite(keys_nQ).all(dim=1)
    if bool(bad_n.any()):
        first = int(content.ids[rows[int(bad_n.nonzero()[0])]])
        raise ValueError(
            f"the encoder made a key with NaN or infinity for entry {first}; its weights are not "
            "usable"
        )
    return keys_nQ


def _width_of(encoder: KeySource, content: ShardContent, device: torch.device) -> int:
    """The key width of an encoder, for a shard that has no row to encode."""
    if isinstance(encoder, KeysById):
        return encoder.key_width
    pads_1S = torch.full((1, content.entry_tokens), content.pad_token_id, device=device)
    with torch.no_grad():
        return int(encoder(pads_1S).shape[1])
