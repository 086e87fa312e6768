"""FAISS's kinds of indexes: which may be built, their search parameters, bytes, threads, GPUs."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import faiss
import torch

from memory_server.index.faiss_presets import Recipe

CHANGE_PRODUCTS = (
    faiss.NormalizationTransform,
    faiss.CenteringTransform,
    faiss.PCAMatrix,
    faiss.ITQTransform,
)


CODES_PER_THREAD = 1 << 18  # of 8 bits a number: about 4 ms of work
# Lists of 4-bit codes double their room when they are full: a process grows by 54 bytes for a row's
# code of 32 and its id.
SHORT_CODE_ROOM = 1.35


@contextmanager
def torch_threads(codes: float | None = None) -> Iterator[None]:
    """FAISS uses as many threads as torch does here; other threads of the process keep theirs.

    Args:
        codes: that a search scans. Threads wait for each other, on a busy machine for as long as
            the system lets others run: so a short search is done by one.
    """
    before = faiss.omp_get_max_threads()  # of the calling thread, as OpenMP has it
    wanted = torch.get_num_threads()
    if codes is not None:
        wanted = max(1, min(wanted, int(codes / CODES_PER_THREAD)))
    faiss.omp_set_num_threads(wanted)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def empty_index(recipe: Recipe, width: int) -> Any:
    """The recipe's index, untrained and empty, with its search parameters set.

    Raises:
        ValueError: FAISS does not know the factory string or a parameter; the index is not for
            inner products, or changes them, or names rows itself.
    """
    try:
        index = faiss.index_factory(width, recipe.factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"FAISS cannot build index={recipe.factory!r} for keys of width {width}: "
            f"{last_words(error)}"
        ) from None
    _check_kind(index, recipe.factory)
    for part in filter(None, recipe.search.split(",")):
        try:
            set_parameter(index, part)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"search={recipe.search!r} does not suit index={recipe.factory!r}: "
                f"{last_words(error)}; allowed are FAISS's parameters of that index, such as "
                '"nprobe=8" for IVF or "efSearch=64" for HNSW'
            ) from None
    return index


def set_parameter(index: Any, part: str) -> None:
    """Set one search parameter, given as name=value, on an index that nobody searches yet."""
    name, _, value = part.partition("=")
    number = float(value)
    if not 1 <= number < 2**31 or (name.strip() != "k_factor" and not number.is_integer()):
        raise ValueError(f"{value!r} is no whole number of at least 1")
    faiss.ParameterSpace().set_index_parameter(index, name.strip(), number)


def _check_kind(index: Any, factory: str) -> None:
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ValueError(f"index={factory!r} is not for inner products; take another")
    if isinstance(index, faiss.IndexIDMap | faiss.IndexIDMap2):
        raise ValueError(f"index={factory!r}: leave IDMap out; the memory keeps the ids itself")
    if isinstance(index, faiss.IndexPreTransform):
        for at in range(index.chain.size()):
            step = faiss.downcast_VectorTransform(index.chain.at(at))
            if isinstance(step, CHANGE_PRODUCTS):
                raise ValueError(
                    f"index={factory!r}: {type(step).__name__} normalises or centres the keys, "
                    "which changes their order by inner product; OPQ and RR do not"
                )


def least_rows(recipe: Recipe, width: int) -> int:
    """Keys without which the recipe cannot be trained."""
    index = empty_index(recipe, width)
    needed = 1
    while isinstance(index, faiss.IndexPreTransform | faiss.IndexRefine):
        if isinstance(index, faiss.IndexPreTransform):
            needed = max(needed, width)
            index = faiss.downcast_index(index.index)
        else:
            index = faiss.downcast_index(index.base_index)
    if isinstance(index, faiss.IndexIVF):
        needed = max(needed, index.nlist)
    if hasattr(index, "pq"):
        needed = max(needed, index.pq.ksub)
    return int(needed)


def copy_of(index: Any) -> Any:
    """An independent copy. FAISS's own leaves a pointer into the original in 4-bit lists."""
    copy = faiss.clone_index(index)
    lists = faiss.try_extract_index_ivf(copy)
    if lists is not None:
        lists = faiss.downcast_index(lists)
        if isinstance(lists, faiss.IndexIVFPQFastScan):
            lists.fine_quantizer = lists.pq
    return copy


def search_parameters(index: Any, selection: Any = None, lists: int | None = None) -> Any:
    """Parameters of one search, which FAISS takes instead of those that are set on the index.

    Args:
        selection: of the rows that may be found; None: all.
        lists: inverted lists to scan, where the index has them; None: as the index is set.
    """
    if isinstance(index, faiss.IndexPreTransform):
        inner = search_parameters(faiss.downcast_index(index.index), selection, lists)
        return faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexRefine):
        inner = search_parameters(faiss.downcast_index(index.base_index), selection, lists)
        return faiss.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=inner)
    if hasattr(index, "nprobe"):
        scanned = min(lists or index.nprobe, index.nlist)
        # Only FAISS's CPU lists know max_codes.
        more = {"max_codes": index.max_codes} if isinstance(index, faiss.IndexIVF) else {}
        return faiss.SearchParametersIVF(sel=selection, nprobe=scanned, **more)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=selection, efSearch=index.hnsw.efSearch)
    if isinstance(index, faiss.IndexPQ):
        return faiss.SearchParametersPQ(sel=selection)
    return faiss.SearchParameters(sel=selection)


def has_plain_lists(index: Any) -> bool:
    """Whether rows can be put into lists that we name, and centroids replaced."""
    return (
        isinstance(index, faiss.IndexIVF)
        and not isinstance(index, faiss.IndexIVFFastScan)
        and isinstance(faiss.downcast_index(index.quantizer), faiss.IndexFlat)
        and isinstance(faiss.downcast_InvertedLists(index.invlists), faiss.ArrayInvertedLists)
    )


def index_bytes(index: Any) -> int:
    """What an index holds, by its parts; what has no known parts counts as when written."""
    if isinstance(index, faiss.IndexPreTransform):
        return index_bytes(faiss.downcast_index(index.index)) + 4 * int(index.d) ** 2
    if isinstance(index, faiss.IndexRefine):
        inner = (index.base_index, index.refine_index)
        return sum(index_bytes(faiss.downcast_index(part)) for part in inner)
    if isinstance(index, faiss.IndexIVF):
        lists = int(index.ntotal) * (int(index.code_size) + 8)
        return lists + index_bytes(faiss.downcast_index(index.quantizer))
    if isinstance(index, faiss.IndexHNSW):
        links = int(4 * index.hnsw.neighbors.size() + 8 * index.hnsw.offsets.size())
        return links + index_bytes(faiss.downcast_index(index.storage))
    if isinstance(index, faiss.IndexFlatCodes):
        return int(index.codes.size())
    if index.ntotal and hasattr(index, "code_size"):
        return int(index.ntotal) * int(index.code_size)
    return int(faiss.serialize_index(index).nbytes)


def bytes_per_row(recipe: Recipe, width: int, *, with_room: bool = False) -> int:
    """About what a row takes in the recipe's index; `with_room`: and what its lists keep free."""
    index = empty_index(recipe, width)
    extra = 12 if faiss.try_extract_index_ivf(index) is not None else 0
    room = SHORT_CODE_ROOM if with_room and recipe.short_codes else 1
    try:
        return int(index.sa_code_size() * room) + extra
    except RuntimeError:  # such as HNSW: the keys and their links
        links = int(index.hnsw.nb_neighbors(0)) if isinstance(index, faiss.IndexHNSW) else 0
        return 4 * width + 5 * links


def last_words(error: Exception) -> str:
    """FAISS's reason without the names of its files."""
    words = str(error).replace("\n", " ").split(": Error: ")[-1]
    return re.sub(r"^.*\.cpp:\d+: ", "", words)[-160:]
