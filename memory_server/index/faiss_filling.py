"""FAISS indexes of blocks: trained, or with parts that an earlier epoch trained, and filled.

Lists that an earlier epoch sorted rows into are kept; their centroids follow the keys.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memory_server.index.block_keys import BlockKeys
from memory_server.index.faiss_index import FaissBlock, Filled, TrainedParts
from memory_server.index.faiss_kinds import (
    copy_of,
    empty_index,
    has_plain_lists,
    last_words,
    set_parameter,
    torch_threads,
)
from memory_server.index.faiss_presets import Recipe, inverted_lists
from memory_server.keys.key_blocks import KeyBlock

Check = Callable[[], None]
"""Called now and then by long work; raises to give it up."""

ASSIGN_SCORES = 1 << 22
POINTS_PER_LIST = 48  # FAISS warns below 39
TRAIN_ROWS = 1 << 16  # where there are no lists
SAMPLE_ROWS = 4096
RETRAIN_AT = 1.25
"""Kept parts are trained anew once their quantisation error, relative to the keys' variance, is
this many times what it was when they were trained."""


def build_block(
    block: KeyBlock,
    recipe: Recipe,
    *,
    device: torch.device,
    train_rows: int = 0,
    like: FaissBlock | None = None,
    kept_lists_n: npt.NDArray[np.int32] | None = None,
    check: Check = lambda: None,
) -> FaissBlock:
    """Index a block's keys.

    Args:
        like: a block whose trained parts are used, unless these keys have drifted too far.
        kept_lists_n: the list that each row is known to belong to, -1 where it is not known.

    Raises:
        ValueError: FAISS cannot build it from these keys; what `check` raises.
    """
    keys = BlockKeys(block, device)
    try:
        with torch_threads():
            if like is not None and like.parts.factory == recipe.factory:
                filled = _fill(keys, like.parts, recipe, kept_lists_n, check)
                drift = like.parts.drift(filled.errors)
                if drift <= RETRAIN_AT:
                    # Later epochs compare with the day of the training, not with today.
                    parts = replace(like.parts, template=filled.template)
                    return FaissBlock(filled, parts, device=device, drift=drift, anew=False)
                del filled
            untrained = empty_index(recipe, keys.width)
            trained = _trained(untrained, keys, train_rows, recipe.factory)
            parts = TrainedParts(factory=recipe.factory, template=trained, errors={})
            check()
            filled = _fill(keys, parts, recipe, None, check)
            parts = replace(parts, template=filled.template, errors=filled.errors)
            return FaissBlock(filled, parts, device=device, drift=1.0, anew=True)
    except RuntimeError as error:
        raise ValueError(
            f"FAISS could not build index={recipe.factory!r} from {keys.rows} keys: "
            f"{last_words(error)}"
        ) from error


def sample_rows(factory: str, train_rows: int) -> int:
    """Keys that an index is trained on, where there are as many; `train_rows` 0: not given."""
    return train_rows or max(TRAIN_ROWS, POINTS_PER_LIST * inverted_lists(factory))


def _trained(index: Any, keys: BlockKeys, train_rows: int, factory: str) -> Any:
    if not index.is_trained:
        index.train(keys.sample(sample_rows(factory, train_rows)))
    return index


def _fill(
    keys: BlockKeys,
    parts: TrainedParts,
    recipe: Recipe,
    kept_lists_n: npt.NDArray[np.int32] | None,
    check: Check,
) -> Filled:
    """The block's keys in an index of these parts, which are brought up to date first."""
    template = copy_of(parts.template)
    for part in filter(None, recipe.search.split(",")):
        set_parameter(template, part)
    errors: dict[str, float] = {}
    lists_n = None
    if has_plain_lists(template):
        lists_n, errors["lists"] = _sort_into_lists(template, keys, kept_lists_n, check)
        index = copy_of(template)
        _add_to_lists(index, keys, lists_n, check)
    else:
        index = copy_of(template)
        for rows in keys.chunks():
            index.add(keys.at(rows).cpu().numpy())
            check()
    errors.update(_codec_error(index, keys))
    return Filled(index=index, template=template, lists_n=lists_n, errors=errors)


def _sort_into_lists(
    template: Any, keys: BlockKeys, kept_lists_n: npt.NDArray[np.int32] | None, check: Check
) -> tuple[npt.NDArray[np.int32], float]:
    """The list of every row: the one it had, or else that of the nearest centroid.

    Where lists were kept, the template's centroids become the means of the keys they now hold.

    Returns:
        (the list of each row; how far keys lie from the mean of their list, see `_dispersion`)
    """
    lists = template.nlist
    centroids_LQ = torch.from_numpy(template.quantizer.reconstruct_n(0, lists)).to(keys.device)
    lists_n = torch.full((keys.rows,), -1, dtype=torch.int64, device=keys.device)
    if kept_lists_n is not None:
        lists_n = torch.from_numpy(kept_lists_n).to(keys.device, torch.int64)
    sums_LQ = torch.zeros(lists, keys.width, dtype=torch.float64, device=keys.device)
    squares = 0.0
    step = max(64, ASSIGN_SCORES // lists)
    for rows in keys.chunks():
        keys_nQ = keys.at(rows)
        chosen_n = lists_n[rows]
        for few in (chosen_n < 0).nonzero().squeeze(1).split(step):
            chosen_n[few] = (keys_nQ[few] @ centroids_LQ.T).argmax(dim=1)
            check()
        sums_LQ.index_add_(0, chosen_n, keys_nQ.double())
        squares += float(keys_nQ.double().square().sum())
    counts_L = torch.bincount(lists_n, minlength=lists)
    means_LQ = sums_LQ / counts_L.clamp(min=1).unsqueeze(1)
    error = _dispersion(squares, counts_L, means_LQ)
    if kept_lists_n is not None:
        if template.cp.spherical:  # FAISS's way for inner products
            means_LQ = torch.nn.functional.normalize(means_LQ)
        new_LQ = torch.where(counts_L.unsqueeze(1) > 0, means_LQ.float(), centroids_LQ)
        template.quantizer.reset()
        template.quantizer.add(new_LQ.cpu().numpy())
    if isinstance(template, faiss.IndexIVFScalarQuantizer):  # cheap: ranges are always today's
        template.is_trained = False
        template.train(keys.sample(TRAIN_ROWS))
    return lists_n.to(torch.int32).cpu().numpy(), error


def _add_to_lists(
    index: Any, keys: BlockKeys, lists_n: npt.NDArray[np.int32], check: Check
) -> None:
    counts = np.bincount(lists_n, minlength=index.nlist)
    for at, count in enumerate(counts.tolist()):  # else lists grow by doubling
        index.invlists.resize(at, count)
        index.invlists.resize(at, 0)
    for rows in keys.chunks():
        keys_nQ = keys.at(rows).cpu().numpy()
        ids = np.arange(rows.start, rows.stop)
        chosen = lists_n[rows].astype(np.int64)
        index.add_core(len(ids), *map(faiss.swig_ptr, (keys_nQ, ids, chosen)))
        check()


def _dispersion(squares: float, counts_L: Tensor, means_LQ: Tensor) -> float:
    """The mean squared distance of keys to their list's mean, over that to the mean of all."""
    count = counts_L.sum()
    weighted = counts_L.double().unsqueeze(1) * means_LQ
    around_all = squares - float((weighted.sum(0) / count).square().sum() * count)
    around_own = squares - float((weighted * means_LQ).sum())
    return around_own / around_all if around_all > 0 else 0.0


def _codec_error(index: Any, keys: BlockKeys) -> dict[str, float]:
    """The mean squared error of the codes, over the variance, where the index has codes."""
    sample_nQ = keys.sample(SAMPLE_ROWS)
    try:
        decoded_nQ = index.sa_decode(index.sa_encode(sample_nQ))
    except RuntimeError:  # such as HNSW, which has none
        return {}
    around_all = float(np.square(sample_nQ - sample_nQ.mean(axis=0)).sum())
    if around_all == 0:
        return {}
    return {"codes": float(np.square(sample_nQ - decoded_nQ).sum()) / around_all}
