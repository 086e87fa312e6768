"""What a search may ask for. Clients and shards check alike, so a bad request fails in one way."""

import operator
from collections.abc import Iterable

import torch
from torch import Tensor

MAX_TOP_K = 1024
MAX_QUERIES = 1 << 16  # of one request: larger batches are split by who asks


def checked_request(
    queries_BQ: Tensor, k: int, exclude_doc_ids: Tensor | None, key_width: int
) -> tuple[Tensor, Tensor | None]:
    """The request as float32 queries [B, Q] and int64 documents [B], detached.

    Raises:
        ValueError, TypeError: says what was given and what is allowed.
    """
    for name, given in (("queries", queries_BQ), ("exclude_doc_ids", exclude_doc_ids)):
        if not isinstance(given, Tensor) and not (given is None and name == "exclude_doc_ids"):
            raise TypeError(
                f"{name} must be a torch tensor, not {type(given).__name__}; make one with "
                "torch.as_tensor"
            )
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MAX_TOP_K:
        raise ValueError(f"k={k!r} is out of range; allowed: integers from 1 to {MAX_TOP_K}")
    if queries_BQ.ndim != 2 or not queries_BQ.dtype.is_floating_point:
        raise ValueError(
            f"queries are {queries_BQ.dtype} of shape {tuple(queries_BQ.shape)}; floating point of "
            f"shape [B, {key_width}] is needed"
        )
    if queries_BQ.shape[1] != key_width:
        raise ValueError(
            f"queries have width {queries_BQ.shape[1]}, but the memory's keys have width "
            f"{key_width}; "
            "the query projection and the memory must come from the same model"
        )
    if queries_BQ.shape[0] > MAX_QUERIES:
        raise ValueError(
            f"{queries_BQ.shape[0]} queries in one request; at most {MAX_QUERIES} are allowed: "
            "split the batch"
        )
    queries_BQ = queries_BQ.detach().to(torch.float32).contiguous()
    bad_B = ~torch.isfinite(queries_BQ).all(dim=1)
    if bool(bad_B.any()):
        raise ValueError(
            f"{int(bad_B.sum())} of {len(queries_BQ)} queries hold NaN or infinity, the first is "
            "query "
            f"{int(bad_B.nonzero()[0])}; a search needs finite numbers"
        )
    if exclude_doc_ids is None:
        return queries_BQ, None
    wanted = (queries_BQ.shape[0],)
    if (
        tuple(exclude_doc_ids.shape) != wanted
        or exclude_doc_ids.dtype.is_floating_point
        or exclude_doc_ids.dtype in (torch.bool, torch.complex64, torch.complex128)
    ):
        raise ValueError(
            f"exclude_doc_ids is {exclude_doc_ids.dtype} of shape {tuple(exclude_doc_ids.shape)}; "
            f"one integer per query, shape {wanted}, is needed (-1 excludes nothing)"
        )
    return queries_BQ, exclude_doc_ids.detach().to(torch.int64).contiguous()


def checked_ids(ids: Iterable[int]) -> list[int]:
    """Entries' ids as plain integers, in their order.

    Raises:
        TypeError: not integers. ValueError: beyond int64.
    """
    try:
        checked = [operator.index(entry_id) for entry_id in ids]
    except TypeError as error:
        raise TypeError(f"ids must be integers ({error})") from error
    for entry_id in checked:
        if not -(2**63) <= entry_id < 2**63:
            raise ValueError(f"id {entry_id} is beyond int64; ids are from 0 to 2**63-1")
    return checked
