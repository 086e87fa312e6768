"""Steps that are left out because loss or gradient is not finite: counted, told, and limited."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.distributed import sum_over_ranks
from trainer.engine import TrainingEngine
from trainer.errors import TrainingError

# Of the limit for a row, how many in all.
_IN_ALL = 10


class SkippedSteps:
    """One rank's count, the same on all ranks.

    The engine leaves a step out on all ranks together; the weights stay those of the step before.
    `after` is collective only where a step was left out.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        *,
        limit: int,
        rank: int,
        ranks: int,
        tell: Callable[[str], None],
    ) -> None:
        """Nothing was left out yet.

        Args:
            engine: whose steps.
            limit: steps in a row that may be left out; ten times as many in all.
            rank: this one of `ranks`.
            tell: records an event (rank 0).
        """
        self._engine, self._limit, self._tell = engine, limit, tell
        self._rank, self._ranks = rank, ranks
        self.in_a_row = self.in_all = 0
        self._untold = 0

    @property
    def too_many(self) -> bool:
        """Whether the run is to end, with its state saved."""
        return self.in_a_row > self._limit or self.in_all > _IN_ALL * self._limit

    def after(self, step: int, losses: Tensor) -> bool:
        """Whether the step that has just been made was left out for what is not finite.

        fp16 leaves out steps that its loss scale was too large for: those do not count.

        Args:
            step: its number, from 1.
            losses: this rank's, one per micro-batch.

        Raises:
            TrainingError: the weights are not finite, so no step can be sound again.
        """
        engine = self._engine
        if engine.step_applied:
            self.in_a_row = 0
            return False
        flags = torch.zeros(self._ranks + 1, device=engine.device)
        flags[self._rank] = float(not bool(torch.isfinite(losses).all()))
        flags[-1] = float(not engine.weights_are_finite())
        *of_ranks, weights = sum_over_ranks(flags).tolist()
        if weights:
            raise TrainingError(
                f"not finite at step {step}: weights; training has diverged; what was committed "
                "before is untouched: resume from it with --resume, or start another run with a "
                "lower optim.lr"
            )
        broken = [rank for rank, flag in enumerate(of_ranks) if flag]
        if not broken and engine.scales_loss:
            return False
        self.in_a_row += 1
        self.in_all += 1
        self._untold += 1
        named = ", ".join(str(rank) for rank in broken)
        what = f"loss (rank {named})" if broken else "gradient"
        self._tell(
            f"step {step} is left out on all ranks: its {what} is not finite ({self.in_a_row} in "
            f"a row, {self.in_all} in all; optim.max_skipped_steps = {self._limit})"
        )
        return True

    def take(self) -> int:
        """Steps left out since this was last asked."""
        untold, self._untold = self._untold, 0
        return untold

    def error(self, step: int, saved: str) -> TrainingError:
        """Why the run ends at a step, when there were too many; `saved` names the checkpoint."""
        return TrainingError(
            f"{self.in_a_row} steps in a row and {self.in_all} in all, up to step {step}, had a "
            f"loss or gradient that is not finite; optim.max_skipped_steps = {self._limit} allows "
            f"{self._limit} in a row and {_IN_ALL * self._limit} in all; the weights are those of "
            f"the last sound step, saved as {saved}: go on behind the steps left out with "
            "--resume, or start another run with a lower optim.lr"
        )
