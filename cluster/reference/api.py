"""The reference of what other programs import, out of the sources."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.reference.docstrings import docstring_markdown
from cluster.reference.markdown import GENERATED, block, code_cell
from cluster.reference.sources import Definition, Module

_INTRODUCTION = """\
What the documents import, and what that takes and returns. Other names may change without notice.
Shapes are in the names of tensors: B batch, T tokens, H hidden, K retrieved entries, S tokens of an
entry, Q width of keys, N entries, V vocabulary. [concepts.md](../concepts.md) has the words."""

PUBLIC: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("model", ()),
    ("model.export", ("export_graphs", "QueryGraph", "ReadGraph", "load_saved")),
    ("memory_server.local", ("LocalMemory",)),
    ("memory_server.actors.client", ("RayMemory",)),
    ("memory_server.api", ()),
    ("memory_server.index.base", ("IndexSettings",)),
    ("memory_server.keys.stored_vectors", ("StoredVectors",)),
    ("memory_server.stats", ("MemoryStats", "ShardStats", "EpochStats", "Latency")),
    ("memory_server.store.store", ("Store",)),
    ("memory_server.errors", ()),
    ("trainer.convert.freeze", ("freeze_vectors",)),
    ("cluster.trained_model", ("load_trained_model", "TrainedModel")),
    ("cluster.editing.edits", ("Editor", "NewDomain", "TokenizerPlace")),
    ("cluster.editing.passages", ("Knowledge", "Passage")),
    ("cluster.explain.measure", ("explain",)),
    (
        "cluster.explain.explanation",
        ("Explanation", "Prediction", "Guess", "LayerReading", "EntryRead", "EntryText", "Without"),
    ),
    ("cluster.config", ("load_config", "config_from_mapping", "PretrainConfig", "ConfigError")),
    ("cluster.cli", ()),
)
"""Modules, and which of their names; none named: all that are public in it."""


def api_reference() -> str:
    """Markdown: every public name with its signature and its docstring."""
    contents, parts = [], []
    for name, definitions in public_definitions():
        links = ", ".join(f"[`{each.name}`](#{_anchor(name, each)})" for each in definitions)
        contents.append(f"| {code_cell(name)} | {links} |")
        about = docstring_markdown(Module(name).docstring)
        parts.append("\n\n".join(part for part in (f"## `{name}`", about) if part))
        parts.extend(text for each in definitions for text in _described(name, each))
    table = "\n".join(["| module | names |", "|---|---|", *contents])
    head = f"# Python\n\n{GENERATED}\n\n{_INTRODUCTION}\n\n{table}"
    return "\n\n".join([head, *parts]) + "\n"


def public_definitions() -> Iterator[tuple[str, list[Definition]]]:
    """Every public module with its definitions, in the order of the page."""
    for name, chosen in PUBLIC:
        module = Module(name)
        yield name, [module.definition(each) for each in chosen or module.public_names]


def _anchor(module: str, definition: Definition) -> str:
    return f"{module}.{definition.name}".replace(".", "").lower()


def _described(module: str, definition: Definition) -> Iterator[str]:
    yield f"### `{module}.{definition.name}`"
    yield from _body(definition)
    for method in definition.methods:
        yield f"#### `{method.name}`"
        yield from _body(method)


def _body(definition: Definition) -> Iterator[str]:
    yield block(definition.code, "python")
    if definition.docstring:
        yield docstring_markdown(definition.docstring)
