"""What travels: it arrives as it was sent, or is refused; nothing else happens."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from memory_server import errors
from memory_server.api import Entry
from memory_server.errors import BadMessage, MemoryServerError
from memory_server.replies import ShardReply
from memory_server.wire.frames import (
    DTYPES,
    MAX_HEADER_BYTES,
    Kind,
    Preamble,
    pack_body,
    proof_of_reply,
    proof_of_request,
    unpack_body,
)
from memory_server.wire.messages import (
    pack_entries,
    pack_error,
    pack_group,
    unpack_entries,
    unpack_error,
    unpack_group,
)
from memory_server.wire.queries import as_it_arrives, to_half
from memory_server.wire.search_messages import (
    SearchRequest,
    pack_hits,
    pack_search,
    unpack_hits,
    unpack_search,
)

SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5)
ANY_ARRAY = st.sampled_from(sorted(DTYPES)).flatmap(lambda dtype: hnp.arrays(dtype, SHAPES))
FLOATS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)
SENT = ShardReply(
    shard=3,
    ids=np.arange(6, dtype=np.int64).reshape(2, 3),
    scores=np.ones((2, 3), dtype=np.float32),
    doc_ids=np.zeros((2, 3), dtype=np.int64),
    tokens=np.arange(24, dtype=np.uint16).reshape(2, 3, 4),
    epoch=7,
    encoder_step=9,
    exact=False,
)


def search(queries: npt.NDArray[np.float32]) -> SearchRequest:
    return SearchRequest(queries=queries, k=5, exclude_doc_ids=None, exact=True)


@given(st.dictionaries(st.text(max_size=5), ANY_ARRAY, max_size=4))
def test_arrays_arrive_with_their_types_shapes_and_bytes(
    arrays: dict[str, npt.NDArray[np.generic]],
) -> None:
    fields, arrived = unpack_body(pack_body({"k": 3}, arrays))
    assert fields == {"k": 3}
    assert arrived.keys() == arrays.keys()
    for name, array in arrays.items():
        assert arrived[name].dtype == array.dtype
        assert arrived[name].shape == array.shape
        assert arrived[name].tobytes() == array.tobytes()


@given(data=st.data())
def test_damaged_bytes_are_refused_or_are_another_message(data: st.DataObject) -> None:
    whole = bytearray(pack_hits(SENT))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    for body in (bytes(whole), bytes(whole[:cut]), bytes(whole) + bytes(whole[:cut])):
        for unpack in (
            lambda body: unpack_hits(body, 3, 2, 3),
            unpack_search,
            unpack_entries,
            unpack_error,
            unpack_group,
        ):
            try:
                unpack(body)
            except BadMessage:
                continue


@given(st.binary(max_size=200))
def test_bytes_from_a_stranger_are_refused(frame: bytes) -> None:
    with pytest.raises(BadMessage):
        Preamble.unpack(frame)
    with pytest.raises(BadMessage):
        unpack_search(frame)


def test_declared_sizes_are_limited_before_anything_is_made() -> None:
    body = pack_body({}, {"queries": np.zeros((1, 1), dtype=np.float32)})
    for shape in (b"[9,9]", b"[-1,1]", b"[1.0]", b"[2147483648]", b"[1,1,1,1]", b"[true,1]"):
        header = b'{"arrays":[["queries","<f4",' + shape + b"]]}"
        forged = len(header).to_bytes(4, "little") + header + body[-4:]
        with pytest.raises(BadMessage):
            unpack_body(forged)
    with pytest.raises(BadMessage, match="type"):
        unpack_body(body.replace(b'"<f4"', b'"|O8"'))
    with pytest.raises(BadMessage, match="header"):
        unpack_body((MAX_HEADER_BYTES + 1).to_bytes(4, "little") + bytes(2 * MAX_HEADER_BYTES))


def test_a_preamble_arrives() -> None:
    sent = Preamble(
        kind=Kind.SEARCH, shard=5, number=2**60, epoch=4, timeout_s=2.5, wait_s=1.0, proof=b"x" * 32
    )
    assert Preamble.unpack(sent.pack()) == sent
    live = Preamble(kind=Kind.HITS, shard=0, number=1)
    assert Preamble.unpack(live.pack()).epoch is None
    endless = Preamble(kind=Kind.SEARCH, shard=0, number=1, timeout_s=float("nan"))
    with pytest.raises(BadMessage, match="finite"):
        Preamble.unpack(endless.pack())


def test_client_and_server_prove_different_things() -> None:
    secret = bytes(range(32))
    assert proof_of_request(secret) != proof_of_reply(secret)
    assert secret not in (proof_of_request(secret), proof_of_reply(secret))
    assert proof_of_request(secret) != proof_of_request(bytes(32))
    with pytest.raises(ValueError, match="can be guessed"):
        proof_of_request(b"short")


@given(FLOATS)
def test_half_queries_keep_three_digits_and_the_order_of_their_numbers(
    queries: npt.NDArray[np.float32],
) -> None:
    arrived = as_it_arrives(queries, "float16")
    assert np.isfinite(arrived).all()
    wide, largest = queries.astype(np.float64), np.abs(queries.astype(np.float64)).max(axis=1)
    # Half of the last digit; 2^-10 where the very largest float32 numbers are cut off.
    allowed = np.maximum(np.abs(wide) * 2.0**-10, largest[:, None] * 2.0**-38 + 1e-45)
    assert (np.abs(arrived.astype(np.float64) - wide) <= allowed).all()
    for before, after in zip(queries, arrived, strict=True):
        assert (np.diff(after[np.argsort(before, kind="stable")]) >= 0).all()
    assert np.array_equal(unpack_search(pack_search(search(queries), "float16")).queries, arrived)


def test_half_queries_are_small_and_whole_numbers_exact() -> None:
    whole = np.array([[2048, -1, 0, 3], [0, 0, 0, 0]], dtype=np.float32)
    assert np.array_equal(as_it_arrives(whole, "float16"), whole)
    assert to_half(whole)[0].dtype == np.float16
    many = np.ones((64, 128), dtype=np.float32)
    assert len(pack_search(search(many), "float16")) < 0.55 * many.nbytes
    assert np.array_equal(unpack_search(pack_search(search(many), "float32")).queries, many)


def test_not_a_number_arrives_as_such_for_the_shard_to_refuse() -> None:
    for bad in (np.nan, np.inf):
        queries = np.array([[1, bad, 2]], dtype=np.float32)
        assert not np.isfinite(unpack_search(pack_search(search(queries), "float16")).queries).all()


def test_hits_arrive_and_are_refused_as_the_answer_to_another_question() -> None:
    arrived = unpack_hits(pack_hits(SENT), 3, 2, 3)
    for field in ("ids", "scores", "doc_ids", "tokens"):
        assert np.array_equal(getattr(arrived, field), getattr(SENT, field))
    assert arrived.tokens.dtype == np.uint16
    assert (arrived.epoch, arrived.encoder_step, arrived.exact) == (7, 9, False)
    for rows, k in ((1, 3), (2, 2)):
        with pytest.raises(BadMessage, match="asked for"):
            unpack_hits(pack_hits(SENT), 3, rows, k)


def test_entries_and_groups_arrive() -> None:
    entries = [
        Entry(id=2**40, doc_id=-1, tokens=(1, 2), text="ü 😀\x00", title="", source="s"),
        Entry(id=0, doc_id=5, tokens=(0, 0), text="x" * 70_000, title="t", source=""),
    ]
    assert unpack_entries(pack_entries(entries)) == entries
    assert unpack_entries(pack_entries([])) == []
    assert unpack_group(pack_group([(3, "tcp://127.0.0.1:1")])) == [(3, "tcp://127.0.0.1:1")]
    with pytest.raises(BadMessage):
        unpack_group(pack_body({"members": [[3, "ipc:///etc"]]}, {}))


def test_errors_arrive_as_what_they_are_and_no_other_type_is_ever_made() -> None:
    for error in (errors.UnknownEpoch("e"), ValueError("v"), TimeoutError("t"), errors.ShardLost()):
        arrived = unpack_error(pack_error(error))
        assert type(arrived) is type(error)
        assert str(arrived) == str(error)
    strange = unpack_error(pack_error(ZeroDivisionError("by zero")))
    assert type(strange) is MemoryServerError
    assert str(strange) == "ZeroDivisionError: by zero"
    forged = unpack_error(pack_body({"type": "SystemExit", "message": "now"}, {}))
    assert type(forged) is MemoryServerError
    assert len(str(unpack_error(pack_error(ValueError("x" * 10**6))))) < 10**4
