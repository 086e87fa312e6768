"""Text of a domain to a plugged-in domain, in one commit, and back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from cluster.config import ConfigError
from cluster.editing.edits import Editor, NewDomain
from cluster.editing.outcome import Edit
from cluster.editing.passages import Knowledge
from cluster.trained_model import TrainedModel
from memory_server.errors import DomainPlugged
from memory_server.store.changes import Addition
from memory_server.store.names import check_domain
from memory_server.store.segments import Segment
from model import KeyEncoderFactory

_ROWS = 4096
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A domain that was plugged in.

    Attributes:
        edit: the commit.
        tokens: of the new entries, padding apart.
        encoded: entries whose keys were made with a model to see that it can; None: no model was
            given.
        seconds: that it took.
    """

    edit: Edit
    tokens: int
    encoded: int | None
    seconds: float


class _NewEntries:
    """Looks at an edit's new segments: counts their tokens, makes their keys."""

    def __init__(self, model: TrainedModel | None, pad: int, say: Say) -> None:
        self._model, self._pad, self._say = model, pad, say
        self.tokens = self.rows = 0

    def __call__(self, additions: Sequence[Addition]) -> None:
        # An edit that another writer was in the way of is worked out again.
        segments = [Segment(addition.path) for addition in additions]
        self.rows = sum(segment.rows for segment in segments)
        self.tokens = sum(
            int((segment.tokens[start : start + _ROWS] != self._pad).sum())
            for segment in segments
            for start in range(0, segment.rows, _ROWS)
        )
        if self._model is not None:
            self._say(f"encoding {self.rows:,} entries with {self._model.path} ...")
            _check_keys(self._model, segments)


def plug_in_domain(
    editor: Editor,
    knowledge: Knowledge,
    domain: str,
    *,
    model: TrainedModel | None,
    replacing: bool = False,
    say: Say = lambda _: None,
) -> Adapted:
    """Cut text to entries, see that the model can encode them, and plug them in as a domain.

    Args:
        editor: of the memory; with a server, every later reply of it reflects the domain.
        model: that is to read the domain; None: whether one can is not looked at.
        replacing: the domain's content takes the place of the one of this name.
        say: told what is going on.

    Raises:
        DomainPlugged: there is one of this name, and it is not to be replaced.
        TokenizerMismatch: the memory is another tokenizer's than the model's. ConfigError: the
        model reads shorter entries, or makes keys that are no numbers. Else as `Editor`.
    """
    began = time.monotonic()
    check_domain(domain)
    _refuse_plugged(editor, domain, replacing)
    if model is not None:
        model.check_fits(editor.store)
    look = _NewEntries(model, editor.store.meta.pad_token_id, say)
    source = NewDomain(knowledge=knowledge)
    message = editor.message or f"adapt to {domain}, from {knowledge.name}"
    looking = replace(editor, inspect=look, message=message)
    edit = looking.swap(domain, domain, source) if replacing else looking.plug(domain, source)
    return Adapted(
        edit=edit,
        tokens=look.tokens,
        encoded=None if model is None else look.rows,
        seconds=time.monotonic() - began,
    )


def _refuse_plugged(editor: Editor, domain: str, replacing: bool) -> None:
    store = editor.store
    entries = store.manifest().domains().get(domain)
    if entries is not None and not replacing:
        raise DomainPlugged(
            f"the memory {store.location} has the domain {domain!r} already, with {entries:,} "
            "entries; put this text in its place with --replace, take it out with --undo, or "
            "choose another --name"
        )


def _check_keys(model: TrainedModel, segments: Sequence[Segment]) -> None:
    """Make every entry's key, as a memory of this model would.

    Raises:
        ConfigError: a key is no finite number.
    """
    factory = KeyEncoderFactory(model.model.config.to_dict(), device=model.device)
    weights = model.model.key_weights()
    rows = sum(segment.rows for segment in segments)
    longest = max((segment.tokens.shape[1] for segment in segments), default=1)
    pays_from = factory.tables_pay_from(longest)
    encode = factory(weights)
    if pays_from is not None and rows >= pays_from:
        tables = factory.tables(weights, entry_tokens=longest)
        assert tables is not None, "this model has tables, or they would not pay"
        encode = factory.from_tables(tables)
    for segment in segments:
        for start in range(0, segment.rows, _ROWS):
            tokens_nS = torch.from_numpy(segment.tokens[start : start + _ROWS].astype("int64"))
            keys_nQ = encode(tokens_nS.to(model.device))
            finite_n = torch.isfinite(keys_nQ).all(1)
            if not bool(finite_n.all()):
                raise ConfigError(
                    f"the model {model.path} makes keys that hold NaN or infinity of "
                    f"{int((~finite_n).sum()):,} entries; its weights are damaged: restore it from "
                    "a copy. Nothing was plugged in"
                )
