"""Which positions of a [B,T] batch are computed: the tokens, without the padding between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """A batch's layout: padded `[B,T,...]`, or packed `[n,...]` with the padding left out.

    What works position by position (linear maps, LayerNorm, dropout) takes either; attention and
    pooling unpack.

    Attributes:
        mask_BT: bool, True where there is something to compute.
        index_n: int64, flat positions of the n kept ones in [B·T], ascending; None: not packed.
        full: every position is kept, so that attention needs no mask.
    """

    mask_BT: Tensor
    index_n: Tensor | None = None
    full: bool = False

    @classmethod
    def of_tokens(cls, mask_BT: Tensor, *, pack: bool) -> Rows:
        """The layout of a batch with this mask; packed if asked for and if there is padding.

        Waits for the device to count the tokens when `pack`.
        """
        if not pack:
            return cls(mask_BT)
        index_n = mask_BT.flatten().nonzero().squeeze(1)
        if len(index_n) == mask_BT.numel():
            return cls(mask_BT, full=True)
        return cls(mask_BT, index_n)

    @property
    def attention_mask(self) -> Tensor | None:
        """Bool [B,1,1,T] for attention over the padded layout; None where nothing is masked."""
        if self.full:
            return None
        # A row without any token may attend to all: to nothing would give NaN, here or in backward.
        attended_BT = self.mask_BT | ~self.mask_BT.any(1, keepdim=True)
        return attended_BT[:, None, None, :]

    def pack(self, x_BT: Tensor) -> Tensor:
        """[B,T,...] -> [n,...]; as it is where the batch is not packed."""
        if self.index_n is None:
            return x_BT
        flat = x_BT.flatten(0, 1)
        return flat if self.full else flat.index_select(0, self.index_n)

    def unpack(self, x: Tensor) -> Tensor:
        """[n,...] -> [B,T,...] with zeros in the padding; as it is where it is not packed."""
        if self.index_n is None:
            return x
        batch, length = self.mask_BT.shape
        if not self.full:
            x = x.new_zeros(batch * length, *x.shape[1:]).index_copy(0, self.index_n, x)
        padded: Tensor = x.unflatten(0, (batch, length))
        return padded

    def select(self, wanted_BT: Tensor) -> Selection:
        """Choose positions; waits for the device to count them.

        Args:
            wanted_BT: bool [B,T]; what is chosen in the padding reads zeros.
        """
        flat_m = wanted_BT.flatten().nonzero().squeeze(1)
        counts_B = wanted_BT.sum(1)
        longest = int(counts_B.max()) if wanted_BT.shape[0] else 0
        mask_BP = torch.arange(longest, device=wanted_BT.device) < counts_B[:, None]
        index_m = mask_BP.flatten().nonzero().squeeze(1)
        return Selection(Rows(mask_BP, index_m), flat_m)

    def first(self) -> Selection:
        """Choose the first position of every sequence; sizes are known without waiting."""
        batch, length = self.mask_BT.shape
        index_B = torch.arange(batch, device=self.mask_BT.device)
        rows = Rows(torch.ones_like(self.mask_BT[:, :1]), index_B, full=True)
        return Selection(rows, index_B * length)


@dataclass(frozen=True)
class Selection:
    """Chosen positions of a batch: `rows` is their own layout, packed, rows padded to the longest.

    Attributes:
        rows: layout [B,P] of the m chosen positions.
        flat_m: int64, where they stand in [B·T], ascending.
    """

    rows: Rows
    flat_m: Tensor

    def take(self, x_BTH: Tensor) -> Tensor:
        """The chosen positions of a padded [B,T,H]: [m,H]."""
        return x_BTH.flatten(0, 1).index_select(0, self.flat_m)
