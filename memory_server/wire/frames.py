"""What travels between searchers and shards: a fixed preamble and a body of arrays, no pickle.

A message is two frames. The *preamble* (`Preamble`) has a fixed size: kind, shard, number, times
and the sender's proof. The *body* is a small JSON header that declares arrays by name, type and
shape, and then their raw bytes in that order; everything about it is checked before it is used, so
bytes from a stranger can at worst be refused. One body serves all shards of a search.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from memory_server.errors import BadMessage

MAGIC = b"PLM2"
MAX_HEADER_BYTES = 64 << 10
MAX_ARRAYS = 8
MAX_DIMENSIONS = 3
MAX_FRAMES = 3
PROOF_BYTES = 32
NO_PROOF = bytes(PROOF_BYTES)
SECRET_AT_LEAST_BYTES = 16
ALIGNMENT = 8  # arrays begin at multiples of this, so that views of a received body are aligned

INTEGERS = frozenset({"|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8"})
DTYPES = INTEGERS | {"<f2", "<f4"}

LIVE = -1  # in place of an epoch's number
# Magic, kind, shard, number, epoch, seconds until the deadline, seconds to wait for it, proof.
_PREAMBLE = struct.Struct(f"<4sBxxxIQqdd{PROOF_BYTES}s")
_LENGTH = struct.Struct("<I")

Arrays = Mapping[str, npt.NDArray[Any]]


class Kind(IntEnum):
    """What a message is; requests are below 16, replies from 16 on."""

    SEARCH = 1
    ENTRIES = 2
    RELAY = 3
    HITS = 16
    FOUND = 17
    ERROR = 18
    REFUSED = 19


KINDS = {int(kind): kind for kind in Kind}
_ENDLESS = float("inf")


class Preamble(NamedTuple):
    """The fixed part of a message.

    Attributes:
        shard: the one that is asked, or that answers: a port may have passed to another shard.
        number: chosen by who asks, repeated in the reply.
        epoch: the one to answer from; None: the live one.
        timeout_s: when it reaches the server, whoever asks waits this much longer at most.
        wait_s: how long an epoch that is being built again may be waited for.
        proof: `proof_of_request` or `proof_of_reply` of the memory's secret.
    """

    kind: Kind
    shard: int
    number: int
    epoch: int | None = None
    timeout_s: float = 0.0
    wait_s: float = 0.0
    proof: bytes = NO_PROOF

    def pack(self) -> bytes:
        return _PREAMBLE.pack(
            MAGIC,
            self.kind,
            self.shard,
            self.number,
            LIVE if self.epoch is None else self.epoch,
            self.timeout_s,
            self.wait_s,
            self.proof,
        )

    @classmethod
    def unpack(cls, frame: bytes) -> "Preamble":
        """Raises BadMessage: another size, another magic, an unknown kind, times that are none."""
        if len(frame) != _PREAMBLE.size:
            raise BadMessage(f"a preamble has {_PREAMBLE.size} bytes, this one has {len(frame)}")
        magic, number_of_kind, shard, number, epoch, timeout_s, wait_s, proof = _PREAMBLE.unpack(
            frame
        )
        kind = KINDS.get(number_of_kind)
        if magic != MAGIC or kind is None:
            raise BadMessage(f"magic {magic!r} and kind {number_of_kind} are not of this protocol")
        if not (0 <= timeout_s < _ENDLESS and 0 <= wait_s < _ENDLESS):
            raise BadMessage(f"times {timeout_s} s and {wait_s} s must be finite and at least 0")
        return cls(kind, shard, number, None if epoch == LIVE else epoch, timeout_s, wait_s, proof)


def proof_of_request(secret: bytes) -> bytes:
    """What shows a server that the sender knows the secret, which itself never travels."""
    return _proof(secret, b"request")


def proof_of_reply(secret: bytes) -> bytes:
    """What shows a client that a server knows the secret, and did not just take over a port."""
    return _proof(secret, b"reply")


def _proof(secret: bytes, person: bytes) -> bytes:
    if len(secret) < SECRET_AT_LEAST_BYTES:
        raise ValueError(
            f"a secret of {len(secret)} bytes can be guessed; give {SECRET_AT_LEAST_BYTES} to 64, "
            "for example secrets.token_bytes(32)"
        )
    return hashlib.blake2b(
        b"pluglm search", key=secret[:64], person=person, digest_size=PROOF_BYTES
    ).digest()


def pack_body(fields: Mapping[str, Any], arrays: Arrays) -> bytes:
    """One frame of plain JSON values and arrays; the arrays' types must be of `DTYPES`."""
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    declared = [[name, array.dtype.str, list(array.shape)] for name, array in whole.items()]
    header = json.dumps({"arrays": declared, **fields}, separators=(",", ":")).encode()
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(header)} bytes exceeds {MAX_HEADER_BYTES}")
    parts: list[Any] = [_LENGTH.pack(len(header)), header]
    at = _LENGTH.size + len(header)
    for array in whole.values():
        parts += [bytes(-at % ALIGNMENT), array.data if array.size else b""]
        at += -at % ALIGNMENT + array.nbytes
    return b"".join(parts)


def unpack_body(body: bytes) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """The fields and read-only views of the arrays.

    Raises:
        BadMessage: anything is not as declared: sizes, types, shapes, or bytes left over.
    """
    if len(body) < _LENGTH.size:
        raise BadMessage(f"a body of {len(body)} bytes has no header")
    (length,) = _LENGTH.unpack_from(body)
    at = _LENGTH.size + length
    if length > MAX_HEADER_BYTES or at > len(body):
        raise BadMessage(f"a header of {length} bytes does not fit a body of {len(body)}")
    try:
        fields = json.loads(body[_LENGTH.size : at])
    except (ValueError, RecursionError) as error:
        raise BadMessage("the header is not JSON") from error
    declared = fields.pop("arrays", None) if isinstance(fields, dict) else None
    if not isinstance(declared, list) or len(declared) > MAX_ARRAYS:
        raise BadMessage("the header declares no arrays, or too many")
    arrays: dict[str, npt.NDArray[Any]] = {}
    for item in declared:
        name, dtype, shape = _declaration(item)
        at += -at % ALIGNMENT
        count = 1
        for size in shape:
            count *= size
        end = at + count * dtype.itemsize
        if end > len(body) or name in arrays:
            raise BadMessage(f"array {name!r} of shape {shape} does not fit, or comes twice")
        arrays[name] = np.frombuffer(body, dtype, count=count, offset=at).reshape(shape)
        at = end
    if at != len(body):
        raise BadMessage(f"{len(body) - at} bytes are left over")
    return fields, arrays


def _declaration(item: Any) -> tuple[str, np.dtype[Any], tuple[int, ...]]:
    if not isinstance(item, list) or len(item) != 3:
        raise BadMessage("an array is declared by name, type and shape")
    name, dtype, shape = item
    if not isinstance(name, str) or not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadMessage(f"array {name!r} has type {dtype!r}; allowed: {sorted(DTYPES)}")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or not all(type(size) is int and 0 <= size < 2**31 for size in shape)
    ):
        raise BadMessage(f"array {name!r} has a shape that is not allowed")
    return name, np.dtype(dtype), tuple(shape)
