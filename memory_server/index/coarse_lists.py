"""Which inverted lists are nearest to a query: torch's product, and a selection in two steps."""

import torch
from torch import Tensor

STRIDE_GROUPS = 16  # lists to a group
PLAIN_LISTS = 1024  # up to which one step is as fast


class CoarseLists:
    """The centroids of inverted lists on the CPU, float32 [L, Q], as they lie."""

    def __init__(self, centroids_LQ: Tensor) -> None:
        self._centroids_LQ = centroids_LQ

    @property
    def count(self) -> int:
        return self._centroids_LQ.shape[0]

    def nearest(self, queries_BQ: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        """The lists with the highest inner products, best first, and these products.

        Args:
            queries_BQ: float32, contiguous.
            wanted: 1 <= wanted <= the lists.

        Returns:
            (int64 [B, wanted]; float32 [B, wanted])
        """
        scores_BL = queries_BQ @ self._centroids_LQ.T
        groups = self.count // STRIDE_GROUPS
        if self.count <= PLAIN_LISTS or self.count % STRIDE_GROUPS or groups <= 2 * wanted:
            best = torch.topk(scores_BL, wanted, dim=1)
            return best.indices, best.values
        # The best lists are in the best groups; `topk` over all lists takes as long as the product.
        # numpy, because torch would wake other threads for it.
        strided = scores_BL.numpy().reshape(-1, STRIDE_GROUPS, groups)
        best_Bg = torch.from_numpy(strided.max(axis=1))
        groups_Bp = torch.topk(best_Bg, wanted, dim=1).indices
        inside = torch.arange(STRIDE_GROUPS).unsqueeze(1) * groups
        lists_BM = (groups_Bp.unsqueeze(1) + inside).flatten(1)
        best = torch.topk(scores_BL.gather(1, lists_BM), wanted, dim=1)
        return lists_BM.gather(1, best.indices), best.values
