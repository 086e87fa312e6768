"""The keys of a shard's rows: shared or copied where nothing changed, encoded where it did."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from memory_server.api import KeysById, KeySource
from memory_server.index.base import IndexSettings
from memory_server.index.factory import expected_index_bytes, training_bytes
from memory_server.keys.key_blocks import BlockedKeys, KeyBlock
from memory_server.keys.key_codes import KeyCodes, KeyDtype
from memory_server.shard.content import Part, ShardContent
from memory_server.store.segments import Int64Array

ENCODE_ROWS = {"cpu": 4096, "cuda": 1 << 16}  # rows between two looks at whether to go on
COPY_ROWS = 1 << 16

Encode = Callable[[], KeySource]
"""Gives the encoder; called only if it is needed."""


class Cancelled(Exception):
    """The epoch is not wanted any more."""


def held_spans(blocks: Sequence[KeyBlock]) -> dict[str, list[tuple[int, int]]]:
    """The spans of segments that these blocks cover, as `ShardContent` takes them."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for sha256, start, stop in (block.origin for block in blocks if block.origin is not None):
        spans.setdefault(sha256, []).append((start, stop))
    return spans


def staging_bytes(
    content: ShardContent, held: Sequence[KeyBlock], settings: IndexSettings, width: int
) -> int:
    """What an epoch of this content adds to what is held: an upper bound."""
    return content.bytes_beside_tokens + bytes_to_come(content, held, settings, width)


def bytes_to_come(
    content: ShardContent,
    held: Sequence[KeyBlock],
    settings: IndexSettings,
    width: int,
    *,
    made: int = 0,
) -> int:
    """The same once the content is loaded and `made` rows of its large parts have their keys."""
    numbers = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}[settings.key_dtype]
    per_row = numbers * width + 8  # a scale and an error bound
    by_segment = _by_segment(held)
    new = [part.rows for part in content.large_parts if _covering(part, by_segment) is None]
    approximate = sum(
        expected_index_bytes(settings, rows=rows, width=width, with_room=True) for rows in new
    )
    training = max((training_bytes(settings, rows=rows, width=width) for rows in new), default=0)
    tail = (content.rows - content.tail_start) * 4 * width
    return (sum(new) - made) * per_row + tail + approximate + training


def make_keys(
    content: ShardContent,
    *,
    held: Sequence[KeyBlock],
    source: tuple[ShardContent, BlockedKeys] | None,
    encoder: Encode,
    dtype: KeyDtype,
    device: torch.device,
    fits: Callable[[int, int], None],
    advance: Callable[[int], None],
) -> tuple[BlockedKeys, int]:
    """Make the keys of every row.

    Args:
        held: blocks that the same weights made, whose rows are shared.
        source: content and keys that the same weights made; the tail's rows are copied from it.
        dtype: how new blocks hold their keys. The tail always holds float32: it is small, and
            copied from epoch to epoch.
        fits: called with how many rows of large parts have their keys already, and the key width,
            before room is made for keys that are to be encoded; may raise.
        advance: called with the number of rows that now have keys; may raise Cancelled.

    Returns:
        (the keys, how many rows were encoded). Removed rows of the tail have zeros; no search
        returns a removed row.

    Raises:
        ValueError: the encoder's reply has a wrong shape or type, or is not finite; names the
            entry.
    """
    parts: list[tuple[KeyBlock, int, int]] = []
    encoded = 0
    by_segment = _by_segment(held)
    missing = [part for part in content.large_parts if _covering(part, by_segment) is None]
    tail, kept = _tail_kept(content, source)
    to_do = sum(part.rows for part in missing) + len(tail)
    keys_of: Mapping[str, KeySource] = {"it": encoder()} if to_do else {}
    for part in content.large_parts:
        block = _covering(part, by_segment)
        if block is None:
            room = partial(fits, encoded)
            block = _new_block(content, part, keys_of["it"], dtype, device, room, advance)
            parts.append((block, 0, part.rows))
            encoded += part.rows
            continue
        assert block.origin is not None
        parts.append((block, part.start - block.origin[1], part.stop - block.origin[1]))
        advance(part.rows)
    if content.rows > content.tail_start:
        rows_before, keys_before = kept
        advance(len(rows_before))
        width = _known_width(parts, source)
        keys_tQ = None if width is None else _zeros(content, width, device)
        step = _rows_at_once(keys_of.get("it"), device)
        for start in range(0, len(tail), step):
            rows = tail[start : start + step]
            keys_nQ = encode(keys_of["it"], content, rows, device)
            if keys_tQ is None:
                fits(encoded, keys_nQ.shape[1])
                keys_tQ = _zeros(content, keys_nQ.shape[1], device)
            _same_width(keys_nQ, keys_tQ.shape[1])
            keys_tQ[_on(rows - content.tail_start, device)] = keys_nQ
            advance(len(rows))
        if keys_tQ is None:
            keys_tQ = _zeros(content, width_of(encoder(), content, device), device)
        if len(rows_before):
            assert source is not None
            for start in range(0, len(rows_before), COPY_ROWS):
                block_of = slice(start, start + COPY_ROWS)
                into = _on(rows_before[block_of] - content.tail_start, device)
                keys_tQ[into] = source[1].gather(_on(keys_before[block_of], device))
        encoded += len(tail)
        parts.append((_tail_block(keys_tQ), 0, len(keys_tQ)))
    if not parts:
        return BlockedKeys([], width_of(encoder(), content, device), device), 0
    widths = {block.codes.width for block, _, _ in parts}
    if len(widths) > 1:
        raise ValueError(f"the encoder made keys of widths {sorted(widths)}; it must not change")
    return BlockedKeys(parts, widths.pop(), device), encoded


def encode(
    encoder: KeySource, content: ShardContent, rows: Int64Array, device: torch.device
) -> Tensor:
    """Exact keys of these rows, float32 [n, Q], finite."""
    tokens_nS = content.tokens(rows)
    if isinstance(encoder, KeysById):
        return encoder.keys_of(content.ids[rows], tokens_nS).to(device)
    return _checked(encoder, tokens_nS, content.ids[rows], device)


def layout_and_checksum(keys: BlockedKeys) -> tuple[int, int]:
    """What a receipt says of the keys: of which blocks they are, and of what numbers."""
    layout, checksum = xxhash.xxh3_64(), xxhash.xxh3_64()
    for view in keys.views:
        layout.update(repr((view.block.origin, view.start, view.stop)).encode())
        checksum.update(view.block.checksum.to_bytes(8, "little"))
    return layout.intdigest() >> 1, checksum.intdigest() >> 1


def width_of(encoder: KeySource, content: ShardContent, device: torch.device) -> int:
    """The key width of an encoder, for a shard that has no row to encode."""
    if isinstance(encoder, KeysById):
        return encoder.key_width
    pads_1S = torch.full((1, content.entry_tokens), content.pad_token_id, device=device)
    with torch.no_grad():
        return int(encoder(pads_1S).shape[1])


def _by_segment(held: Sequence[KeyBlock]) -> dict[str, list[KeyBlock]]:
    blocks: dict[str, list[KeyBlock]] = {}
    for block in held:
        if block.origin is not None:
            blocks.setdefault(block.origin[0], []).append(block)
    return blocks


def _covering(part: Part, held: Mapping[str, Sequence[KeyBlock]]) -> KeyBlock | None:
    for block in held.get(part.ref.sha256, ()):
        assert block.origin is not None
        if block.origin[1] <= part.start and part.stop <= block.origin[2]:
            return block
    return None


def _tail_kept(
    content: ShardContent, source: tuple[ShardContent, BlockedKeys] | None
) -> tuple[Int64Array, tuple[Int64Array, Int64Array]]:
    """The tail's rows that must be encoded, and (rows, the source's rows) of those that need not.

    Codes cannot be copied into exact keys, so only rows that the source holds exactly are kept.
    """
    missing = content.is_live.copy()
    missing[: content.tail_start] = False
    none = np.empty(0, dtype=np.int64)
    kept = (none, none)
    if source is not None:
        mine, theirs = content.tail_rows_kept_from(source[0])
        exact = source[1].exact_rows(theirs)
        kept = mine[exact], theirs[exact]
        missing[kept[0]] = False
    return np.flatnonzero(missing), kept


def _new_block(
    content: ShardContent,
    part: Part,
    encoder: KeySource,
    dtype: KeyDtype,
    device: torch.device,
    fits: Callable[[int], None],
    advance: Callable[[int], None],
) -> KeyBlock:
    """The keys of a whole part.

    Removed rows are encoded too: a later version may have them back. Stored keys may lack them, so
    that a block of those has zeros there and is never shared.
    """
    codes: KeyCodes | None = None
    checksum, largest = xxhash.xxh3_64(), 0.0
    step = _rows_at_once(encoder, device)
    for start in range(0, part.rows, step):
        stop = min(start + step, part.rows)
        keys_nQ = _keys_of_part(content, part, start, stop, encoder, device)
        if codes is None:
            fits(keys_nQ.shape[1])
            codes = KeyCodes.empty(part.rows, keys_nQ.shape[1], dtype, device)
        _same_width(keys_nQ, codes.width)
        codes.put(start, keys_nQ)
        checksum.update(_bytes(keys_nQ))
        largest = max(largest, _largest_norm(keys_nQ))
        advance(stop - start)
    assert codes is not None
    shared = not isinstance(encoder, KeysById)
    return KeyBlock(
        codes=codes,
        largest_norm=largest,
        checksum=checksum.intdigest(),
        origin=(part.ref.sha256, part.start, part.stop) if shared else None,
    )


def _keys_of_part(
    content: ShardContent,
    part: Part,
    start: int,
    stop: int,
    encoder: KeySource,
    device: torch.device,
) -> Tensor:
    """Exact keys of rows [start, stop) of the part."""
    if not isinstance(encoder, KeysById):
        inside = slice(part.start + start, part.start + stop)
        return _checked(encoder, part.segment.tokens[inside], part.segment.ids[inside], device)
    rows = np.arange(part.offset + start, part.offset + stop, dtype=np.int64)
    live = content.is_live[rows]
    keys_nQ = torch.zeros(len(rows), encoder.key_width, device=device)
    keys_nQ[torch.from_numpy(live).to(device)] = encode(encoder, content, rows[live], device)
    return keys_nQ


def _tail_block(keys_tQ: Tensor) -> KeyBlock:
    return KeyBlock(
        codes=KeyCodes(keys_tQ),
        largest_norm=_largest_norm(keys_tQ),
        checksum=xxhash.xxh3_64(_bytes(keys_tQ)).intdigest(),
        origin=None,
    )


def _checked(
    encoder: KeySource, tokens_nS: npt.NDArray[np.generic], ids: Int64Array, device: torch.device
) -> Tensor:
    assert not isinstance(encoder, KeysById)
    # int32 is what lookups take without another copy.
    tokens = torch.from_numpy(tokens_nS.astype(np.int32)).to(device)
    with torch.no_grad():
        keys_nQ = encoder(tokens)
    if keys_nQ.ndim != 2 or keys_nQ.shape[0] != len(ids) or not keys_nQ.dtype.is_floating_point:
        raise ValueError(
            f"the encoder turned {tuple(tokens.shape)} tokens into {keys_nQ.dtype} "
            f"{tuple(keys_nQ.shape)}; floating point [{len(ids)}, key width] is needed"
        )
    keys_nQ = keys_nQ.to(device=device, dtype=torch.float32)
    # One sum tells of NaN and infinity, and is much faster than looking at each number.
    if not bool(torch.isfinite(keys_nQ.sum(dtype=torch.float64))):
        bad_n = ~torch.isfinite(keys_nQ).all(dim=1)
        first = int(ids[int(bad_n.nonzero()[0])])
        raise ValueError(
            f"the encoder made a key with NaN or infinity for entry {first}; its weights are not "
            "usable"
        )
    return keys_nQ


def _rows_at_once(encoder: KeySource | None, device: torch.device) -> int:
    """What the encoder likes best, if it says so."""
    if isinstance(encoder, KeysById):
        return COPY_ROWS
    rows: int = getattr(encoder, "best_rows", ENCODE_ROWS[device.type])
    return rows


def _known_width(
    parts: Sequence[tuple[KeyBlock, int, int]], source: tuple[ShardContent, BlockedKeys] | None
) -> int | None:
    if parts:
        return parts[0][0].codes.width
    return None if source is None else source[1].width


def _zeros(content: ShardContent, width: int, device: torch.device) -> Tensor:
    return torch.zeros(content.rows - content.tail_start, width, device=device)


def _same_width(keys_nQ: Tensor, width: int) -> None:
    if keys_nQ.shape[1] != width:
        raise ValueError(
            f"the encoder made keys of width {keys_nQ.shape[1]}, and {width} before; a key width "
            "must not change"
        )


def _largest_norm(keys_nQ: Tensor) -> float:
    if not len(keys_nQ):
        return 0.0
    return float(torch.linalg.vector_norm(keys_nQ, dim=1).max())


def _on(rows: Int64Array, device: torch.device) -> Tensor:
    return torch.from_numpy(rows).to(device)


def _bytes(keys_nQ: Tensor) -> memoryview:
    return keys_nQ.cpu().contiguous().numpy().data
