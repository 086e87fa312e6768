"""How the keys of one block are kept: the numbers themselves, or fewer bytes that stand for them.

Codes only *propose* winners; a winner's score is always computed from its exact key. A row's codes
are multiples of the row's scale, so that keys of any size fit: for int8 the scale makes the largest
number 127; for float16 and bfloat16 it is a power of two, and loses nothing. How far a row's codes
are from its exact key is measured when it is put and kept beside them: by it a search knows which
rows may win, and proves that no other can.
"""

from typing import Literal, Self, get_args

import torch
from torch import Tensor

from memory_server.index.products import by_int8, inner_products, int8_pays_on_cpu
from memory_server.index.search_queries import SearchQueries

KeyDtype = Literal["float32", "float16", "bfloat16", "int8"]
KEY_DTYPES: tuple[str, ...] = get_args(KeyDtype)
TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
DECODED_NUMBERS = {"cpu": 1 << 19, "cuda": 1 << 27}  # of codes decoded at once: cache-sized
MULTIPLIED = 1 << 19  # products of int8 at once, on a CPU
SMALLEST_SCALE = 2.0**-100


class KeyCodes:
    """Keys of n rows. Written once, by `put`, before anyone reads."""

    def __init__(
        self,
        numbers_nQ: Tensor,
        scales_n1: Tensor | None = None,
        errors_n: Tensor | None = None,
        largest_error: float = 0.0,
    ) -> None:
        """Take exact keys, float32 [n, Q]. The other arguments are for `empty` and `view`."""
        self._numbers_nQ = numbers_nQ
        self._scales_n1 = scales_n1
        self._errors_n = errors_n  # in units of the scale, rounded up
        self._largest_error = largest_error

    @classmethod
    def empty(cls, rows: int, width: int, dtype: KeyDtype, device: torch.device) -> Self:
        """Room for `rows` keys; its content is undefined until `put`."""
        numbers_nQ = torch.empty(rows, width, dtype=TORCH_DTYPES[dtype], device=device)
        if dtype == "float32":
            return cls(numbers_nQ)
        scales_n1 = torch.empty(rows, 1, device=device)
        return cls(numbers_nQ, scales_n1, torch.empty(rows, dtype=torch.float16, device=device))

    @property
    def rows(self) -> int:
        return self._numbers_nQ.shape[0]

    @property
    def width(self) -> int:
        return self._numbers_nQ.shape[1]

    @property
    def exact(self) -> bool:
        """Whether `gather` gives the very keys that were put."""
        return self._scales_n1 is None

    @property
    def exact_numbers(self) -> Tensor | None:
        """The very keys, float32 [n, Q], as they lie; None where only codes are kept."""
        return self._numbers_nQ if self.exact else None

    @property
    def largest_error(self) -> float:
        """The largest Euclidean distance of a row's codes from its exact key, at most."""
        return self._largest_error

    @property
    def nbytes(self) -> int:
        held = (self._numbers_nQ, self._scales_n1, self._errors_n)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def put(self, start: int, keys_nQ: Tensor) -> None:
        """Keep these keys, float32 [n, Q], as rows start, start + 1, ...

        Raises:
            ValueError: codes cannot stand for NaN or infinity.
        """
        rows = slice(start, start + len(keys_nQ))
        if self._scales_n1 is None or self._errors_n is None:
            self._numbers_nQ[rows] = keys_nQ
            return
        if not len(keys_nQ):
            return
        largest_n1 = keys_nQ.abs().amax(dim=1, keepdim=True)
        if not bool(torch.isfinite(largest_n1).all()):
            first = int((~torch.isfinite(largest_n1)).nonzero()[0, 0])
            raise ValueError(
                f"the key of row {start + first} has NaN or infinity; keys must be finite to be "
                f"held as {str(self._numbers_nQ.dtype).removeprefix('torch.')}"
            )
        scales_n1 = _scales(largest_n1, self._numbers_nQ.dtype)
        scaled_nQ = keys_nQ / scales_n1
        if self._numbers_nQ.dtype == torch.int8:
            codes_nQ = scaled_nQ.round().clamp_(-127, 127).to(torch.int8)
        else:
            codes_nQ = scaled_nQ.to(self._numbers_nQ.dtype)
        lost_n = torch.linalg.vector_norm(scaled_nQ - codes_nQ.float(), dim=1)
        # For the rounding of the scaling, and of the error itself to float16.
        lost_n += 2.0**-22 * torch.linalg.vector_norm(scaled_nQ, dim=1)
        errors_n = (lost_n * (1 + 2.0**-9) + 2.0**-23).half()
        self._numbers_nQ[rows], self._scales_n1[rows] = codes_nQ, scales_n1
        self._errors_n[rows] = errors_n
        largest = float((errors_n.float() * scales_n1.squeeze(1)).max())
        self._largest_error = max(self._largest_error, largest)

    def view(self, start: int, stop: int) -> "KeyCodes":
        """Rows [start, stop), without a copy."""
        return KeyCodes(
            self._numbers_nQ[start:stop],
            None if self._scales_n1 is None else self._scales_n1[start:stop],
            None if self._errors_n is None else self._errors_n[start:stop],
            self._largest_error,
        )

    def gather(self, rows: Tensor) -> Tensor:
        """What the codes of these rows stand for, float32 [..., Q]; rows int64 [...]."""
        numbers = self._numbers_nQ[rows]
        return numbers if self._scales_n1 is None else numbers.float().mul_(self._scales_n1[rows])

    def errors(self, rows: Tensor) -> Tensor:
        """How far from the exact key what `gather` gives is at most, float32 [...]."""
        if self._scales_n1 is None or self._errors_n is None:
            return torch.zeros(rows.shape, device=rows.device)
        return self._errors_n[rows].float().mul_(self._scales_n1.squeeze(1)[rows])

    def products(
        self, queries: SearchQueries, start: int, stop: int
    ) -> tuple[Tensor, Tensor | None]:
        """Inner products of rows [start, stop) with all queries.

        Returns:
            (float32 [n, B], undefined after the next call; what each query's products must be
            multiplied with, greater than 0, float32 [B], or None if nothing)
        """
        if self._scales_n1 is None:
            return inner_products(self._numbers_nQ[start:stop], queries.exact_BQ), None
        if self._multiplies_int8:
            return self._int8_products(queries, start, stop), queries.int8[1]
        return self._decoded_products(queries, start, stop), None

    def product_error(self, queries: SearchQueries, largest_norm: float) -> Tensor:
        """How far `products` can be from those of exact keys beside float32's rounding, [B]."""
        errors_B = queries.norms * self._largest_error
        if self._scales_n1 is not None and self._multiplies_int8:
            errors_B = errors_B + queries.int8[2] * (largest_norm + self._largest_error)
        return errors_B

    @property
    def _multiplies_int8(self) -> bool:
        numbers_nQ = self._numbers_nQ
        on_cpu = numbers_nQ.dtype == torch.int8 and numbers_nQ.device.type == "cpu"
        return on_cpu and int8_pays_on_cpu()

    def _int8_products(self, queries: SearchQueries, start: int, stop: int) -> Tensor:
        assert self._scales_n1 is not None
        scores_nB = queries.room(stop - start, queries.batch, torch.float32)
        for first, last in _runs(start, stop, MULTIPLIED // queries.batch):
            whole_mB = queries.room(last - first, queries.batch, torch.int32)
            by_int8(self._numbers_nQ[first:last], queries.int8[0], out_nB=whole_mB)
            part_mB = scores_nB[first - start : last - start]
            part_mB.copy_(whole_mB).mul_(self._scales_n1[first:last])
        return scores_nB

    def _decoded_products(self, queries: SearchQueries, start: int, stop: int) -> Tensor:
        assert self._scales_n1 is not None
        at_once = DECODED_NUMBERS[queries.device.type] // self.width
        parts = []
        for first, last in _runs(start, stop, at_once):
            keys_mQ = queries.room(last - first, self.width, torch.float32)
            keys_mQ.copy_(self._numbers_nQ[first:last]).mul_(self._scales_n1[first:last])
            parts.append(inner_products(keys_mQ, queries.exact_BQ))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _scales(largest_n1: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale of each row: what its codes are multiples of."""
    if dtype == torch.int8:
        return (largest_n1 / 127).clamp_(min=SMALLEST_SCALE)
    _, exponents = torch.frexp(largest_n1.clamp(min=SMALLEST_SCALE))
    # At most 2^126, so that a scale is finite: the codes are below 4 then.
    return torch.ldexp(torch.ones_like(largest_n1), exponents.clamp(max=126))


def _runs(start: int, stop: int, at_most: int) -> list[tuple[int, int]]:
    at_most = max(1, at_most)
    return [(first, min(first + at_most, stop)) for first in range(start, stop, at_most)]
