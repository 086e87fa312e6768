"""From the settings to an approximate index: what earlier epochs trained is used again."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from memory_server.index.approximate_index import ApproximateIndex
from memory_server.index.base import IndexInput, IndexSettings, RecentQueries
from memory_server.index.faiss_filling import build_block, sample_rows
from memory_server.index.faiss_gpu import check_device
from memory_server.index.faiss_index import FaissBlock
from memory_server.index.faiss_kinds import bytes_per_row, empty_index, least_rows
from memory_server.index.faiss_presets import SMALLEST_BLOCK, Recipe, recipe_for
from memory_server.index.recall_audit import judge_recall
from memory_server.index.recall_gate import RecallGate
from memory_server.keys.key_blocks import BlockView, KeyBlock

log = logging.getLogger(__name__)

Origin = tuple[str, int, int]
UNKNOWN_WIDTH = 1920  # divides by most numbers: for a check before the key width is known


def check_faiss(settings: IndexSettings, *, key_width: int | None, device: torch.device) -> None:
    """Raise ValueError if FAISS cannot build the index, or not on this device."""
    width = key_width or UNKNOWN_WIDTH
    empty_index(recipe_for(settings, rows=1 << 20, width=width), width)
    check_device(device)
    if device.type == "cuda" and settings.kind == "pq":
        raise ValueError(
            'index="pq" is for CPUs: FAISS has no 4-bit codes on a GPU; take index="ivf" or "flat"'
        )


def faiss_bytes(settings: IndexSettings, *, rows: int, width: int, with_room: bool = False) -> int:
    """About what FAISS will hold for one block of so many rows; see `bytes_per_row`."""
    if rows < SMALLEST_BLOCK:
        return 0
    recipe = recipe_for(settings, rows=rows, width=width)
    return rows * bytes_per_row(recipe, width, with_room=with_room)


def faiss_training_bytes(settings: IndexSettings, *, rows: int, width: int) -> int:
    """What FAISS takes while it is trained on one block: a sample, and its own copy of that."""
    if rows < SMALLEST_BLOCK:
        return 0
    recipe = recipe_for(settings, rows=rows, width=width)
    return 2 * 4 * width * min(rows, sample_rows(recipe.factory, settings.train_rows))


def build_approximate(
    settings: IndexSettings,
    rows: IndexInput,
    *,
    previous: ApproximateIndex | None,
    recent: RecentQueries | None,
    check: Callable[[], None],
) -> ApproximateIndex:
    """Index the large blocks that no epoch has indexed yet, and measure whether it may answer.

    How much a search looks at is measured, too, unless the settings say it.

    Parts that earlier epochs trained are kept until the keys have drifted too far, or until they
    alone can be the reason that an index which met `min_recall` no longer does.

    Raises:
        ValueError: FAISS cannot build it; what `check` raises.
    """
    check_device(rows.keys.device)
    builder = _Builder(settings, rows.keys.device, previous, check)
    large = [view for view in rows.keys.views if builder.suits(view)]
    accelerated = [(view, *builder.accelerator(view.block)) for view in large]
    gate, device = RecallGate(settings.min_recall), rows.keys.device
    effort = previous.effort if previous is not None and previous.parts else None
    index = ApproximateIndex(rows, accelerated, gate, effort)
    if not index.parts:
        index.gate.shut(f"no segment has the {SMALLEST_BLOCK} rows or more that FAISS is used for")
    elif previous is not None and _same_accelerators(index, previous):
        index.gate.take_over(previous.gate.state)
    else:
        judge_recall(index, recent, device=device)
        was_good = previous is not None and previous.gate.state.open
        if builder.kept and was_good and recent is not None and not index.gate.state.open:
            log.info("trained anew: %s", index.gate.state.reason)
            builder.keep_nothing()
            accelerated = [(view, *builder.accelerator(view.block)) for view in large]
            index = ApproximateIndex(rows, accelerated, gate, index.effort)
            judge_recall(index, recent, device=device)
    for view, accelerator, _ in accelerated:
        view.block.accelerator = accelerator
    return index


def _same_accelerators(index: ApproximateIndex, previous: ApproximateIndex) -> bool:
    """Whether what was measured on the one holds for the other: the rest is searched exactly."""
    mine, theirs = ({id(part.accelerator) for part in one.parts} for one in (index, previous))
    return mine == theirs


class _Builder:
    """The accelerators of one epoch's blocks: those that there are, and new ones."""

    def __init__(
        self,
        settings: IndexSettings,
        device: torch.device,
        previous: ApproximateIndex | None,
        check: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._device = device
        self._check = check
        self._old = (
            []
            if previous is None
            else [_Known.of(p.view.block, p.accelerator) for p in previous.parts]
        )
        self._least: dict[str, int] = {}
        self.built: dict[int, tuple[FaissBlock, Recipe]] = {}

    @property
    def kept(self) -> bool:
        """Whether a new accelerator has parts that an earlier epoch trained."""
        return any(not accelerator.trained_anew for accelerator, _ in self.built.values())

    def keep_nothing(self) -> None:
        """Build all those again, from nothing."""
        self._old = []
        self.built = {block: made for block, made in self.built.items() if made[0].trained_anew}

    def suits(self, view: BlockView) -> bool:
        """Whether FAISS pays for this view, and has keys enough to be trained on.

        It does not for a block of one epoch alone, as every edit would build it again.
        """
        if view.rows < SMALLEST_BLOCK or view.block.origin is None:
            return False
        recipe = self._recipe(view.block)
        if recipe.factory not in self._least:
            self._least[recipe.factory] = least_rows(recipe, view.block.codes.width)
        return view.block.rows >= self._least[recipe.factory]

    def accelerator(self, block: KeyBlock) -> tuple[FaissBlock, Recipe]:
        """The block's own; else a new one, which is not set on the block yet."""
        recipe = self._recipe(block)
        if block.accelerator is not None:
            return block.accelerator, recipe
        if id(block) not in self.built:
            like, kept_lists_n = _parts_for(block, recipe, self._old)
            accelerator = build_block(
                block,
                recipe,
                device=self._device,
                train_rows=self._settings.train_rows,
                like=like,
                kept_lists_n=kept_lists_n,
                check=self._check,
            )
            self.built[id(block)] = (accelerator, recipe)
        return self.built[id(block)]

    def _recipe(self, block: KeyBlock) -> Recipe:
        return recipe_for(self._settings, rows=block.rows, width=block.codes.width)


@dataclass(frozen=True, kw_only=True)
class _Known:
    """An accelerator of the previous epoch, and where its rows come from."""

    origin: Origin | None
    rows: int
    accelerator: FaissBlock

    @classmethod
    def of(cls, block: KeyBlock, accelerator: FaissBlock) -> "_Known":
        return cls(origin=block.origin, rows=block.rows, accelerator=accelerator)


def _parts_for(
    block: KeyBlock, recipe: Recipe, known: Iterable[_Known]
) -> tuple[FaissBlock | None, npt.NDArray[np.int32] | None]:
    """Whose trained parts a block takes over, and which lists its rows are known to be in.

    Those of the block that shares most rows with it; else those of the largest of its recipe.
    """
    fitting = [one for one in known if one.accelerator.parts.factory == recipe.factory]
    if not fitting:
        return None, None
    best = max(fitting, key=lambda one: (_overlap(block, one)[1], one.rows))
    start, count = _overlap(block, best)
    lists_n = best.accelerator.lists_n
    if not count or lists_n is None:
        return best.accelerator, None
    assert block.origin is not None
    assert best.origin is not None
    kept_lists_n = np.full(block.rows, -1, dtype=np.int32)
    mine, theirs = start - block.origin[1], start - best.origin[1]
    kept_lists_n[mine : mine + count] = lists_n[theirs : theirs + count]
    return best.accelerator, kept_lists_n


def _overlap(block: KeyBlock, known: _Known) -> tuple[int, int]:
    """(first row of the segment that both have, how many); rows of other segments: none."""
    mine, theirs = block.origin, known.origin
    if mine is None or theirs is None or mine[0] != theirs[0]:
        return 0, 0
    start = max(mine[1], theirs[1])
    return start, max(0, min(mine[2], theirs[2]) - start)
