"""Opening what an explanation needs: a model and a store, or a model and a running server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cluster.config import ConfigError
from cluster.explain.explanation import Explanation
from cluster.explain.measure import check_question, explain
from cluster.memory_tools import check_document, chosen_device
from cluster.trained_model import load_trained_model
from memory_server.store.store import Store


def explained_by_store(
    place: Path | str,
    model: Path,
    text: str,
    *,
    k: int | None,
    answer: str | None,
    exclude: int | None,
    guesses: int,
    device: str,
    say: Callable[[str], None],
) -> Explanation:
    """Explain with a store's newest content; blocks while every entry's key is made.

    Raises:
        ConfigError: a text, an answer, a k or a document that cannot work. TokenizerMismatch: the
        entries are another tokenizer's. StoreError: no usable store.
    """
    store = Store.open(place)
    trained = load_trained_model(model, device=chosen_device(device))
    trained.check_fits(store)
    k = trained.model.config.top_k if k is None else k
    entries = store.manifest().entries
    check_document(exclude, store)
    check_question(trained, text, k=k, entries=entries, answer=answer, guesses=guesses)
    say(f"computing the keys of {entries:,} entries ...")
    with trained.memory(place) as memory:
        return explain(
            trained,
            memory,
            text,
            k=k,
            store=store,
            answer=answer,
            exclude=exclude,
            guesses=guesses,
            memory_name=str(place),
        )


def explained_by_server(
    server: str,
    address: str,
    model: Path,
    text: str,
    *,
    k: int | None,
    answer: str | None,
    exclude: int | None,
    guesses: int,
    device: str,
) -> Explanation:
    """Explain with a memory that runs, and the keys that it has.

    Raises:
        ConfigError: as `explained_by_store`, or the keys have another width.
        TokenizerMismatch: the entries are another tokenizer's. CoordinatorLost: no such server.
    """
    from cluster.memory_servers import attached

    check_document(exclude)
    with attached(server, address) as memory:
        trained = load_trained_model(model, device=chosen_device(device))
        info = memory.info()
        trained.check_fingerprint(info.tokenizer_fingerprint, "the memory that is served")
        if trained.model.config.key_size != info.key_width:
            raise ConfigError(
                f"the model {model} makes keys of {trained.model.config.key_size} numbers, the "
                f"memory that is served has {info.key_width}; give the model that made its keys"
            )
        return explain(
            trained,
            memory,
            text,
            k=trained.model.config.top_k if k is None else k,
            answer=answer,
            exclude=exclude,
            guesses=guesses,
            memory_name=server,
        )
