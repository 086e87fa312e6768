"""How the keys of one block are kept: the numbers themselves, or fewer bytes that stand for them.

Codes only *propose* winners; a winner's score is always computed from its exact key.
"""

from typing import Literal, Self, get_args

import torch
from torch import Tensor

from memory_server.products import inner_products

KeyDtype = Literal["float32", "float16", "bfloat16", "int8"]
KEY_DTYPES: tuple[str, ...] = get_args(KeyDtype)


class KeyCodes:
    """Keys of n rows as float32. Written once, by `put`, before anyone reads."""

    def __init__(self, keys_nQ: Tensor) -> None:
        self._keys_nQ = keys_nQ

    @classmethod
    def empty(cls, rows: int, width: int, dtype: KeyDtype, device: torch.device) -> Self:
        """Room for `rows` keys; its content is undefined until `put`."""
        return cls(torch.empty(rows, width, device=device))

    @property
    def rows(self) -> int:
        return self._keys_nQ.shape[0]

    @property
    def width(self) -> int:
        return self._keys_nQ.shape[1]

    @property
    def exact(self) -> bool:
        """Whether `gather` gives the very keys that were put."""
        return True

    @property
    def nbytes(self) -> int:
        return self._keys_nQ.nbytes

    def put(self, start: int, keys_nQ: Tensor) -> None:
        """Keep these keys as rows start, start + 1, ..."""
        self._keys_nQ[start : start + len(keys_nQ)] = keys_nQ

    def view(self, start: int, stop: int) -> "KeyCodes":
        """Rows [start, stop), without a copy."""
        return KeyCodes(self._keys_nQ[start:stop])

    def gather(self, rows: Tensor) -> Tensor:
        """What the codes of these rows stand for, float32 [..., Q]; rows int64 [...]."""
        return self._keys_nQ[rows]

    def products(self, queries_BQ: Tensor, start: int, stop: int) -> Tensor:
        """Inner products of rows [start, stop) with all queries, float32 [n, B], a new tensor."""
        return inner_products(self._keys_nQ[start:stop], queries_BQ)
