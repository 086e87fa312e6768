"""Training samples as entries of a copy of the memory, each under the document of its own text.

A row that is trained on leaves out entries of its own document (`memory.exclude_own_samples`), and
rows of the same text share one, so that no row can read its own label. Rows of dev and test never
become entries.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from cluster.adaptation.in_task_settings import InTaskConfig
from cluster.adaptation.prompt import LABEL, SLOTS, TEXT, TEXT_PAIR, check_template, prompted
from cluster.config import ConfigError
from cluster.editing.edits import Editor, TokenizerPlace
from cluster.editing.passages import Knowledge
from cluster.editing.segment_writer import SegmentWriter
from cluster.editing.transfer import transferred
from memory_server.store.store import Store
from trainer.corpus.settings import CLS_TOKENS
from trainer.corpus.tokenizer import load_tokenizer
from trainer.export import write_json
from trainer.finetune.identity import content_digest
from trainer.finetune.labels import label_name
from trainer.finetune.own_text import row_doc_ids, text_columns
from trainer.finetune.settings import TaskSettings
from trainer.finetune.tables import Table, read_table

COPY, SAMPLES, ABOUT = "memory", "samples.jsonl", "in-task.json"
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The training samples as knowledge.

    Attributes:
        rows: of `samples.jsonl`: text, source and doc_id; one entry each.
        cut: how many lost text, so that the label had room.
    """

    rows: list[dict[str, Any]]
    cut: int


def read_samples(config: InTaskConfig, *, say: Say) -> Samples:
    """Put every training row through the template, and tell what had to be cut.

    Raises:
        ConfigError: template, label words and task do not fit. TaskDataError, CorpusError: names
        file and row. StoreError, UnknownDomain: no usable memory.
    """
    task, settings = config.task, config.in_task
    table = read_table(task.train, "task.train")
    if task.train_rows:
        table = table.first(task.train_rows)
    columns = text_columns(task, table)
    _check_slots(settings.template, columns)
    store = Store.open(Path(config.memory.store).expanduser())
    store.manifest().of_domains(config.memory.domains)
    if settings.domain in base_domains(config, store):
        raise ConfigError(
            f'in_task.domain = "{settings.domain}": the memory {store.location} has a domain of '
            "this name, which is read beside the samples; choose another name"
        )
    backend = load_tokenizer(config.model.path).backend_tokenizer
    texts = prompted(
        settings.template,
        _slots(task, table, columns, config.in_task.words()),
        backend,
        room=store.meta.entry_tokens - CLS_TOKENS,
    )
    cut = sum(text.cut for text in texts)
    if cut:
        say(
            f"{cut:,} of {len(texts):,} samples are longer than an entry of "
            f"{store.meta.entry_tokens} tokens: their text is cut, the label stays"
        )
    name = Path(task.train).name
    rows = [
        {"text": text.text, "source": f"{name}, row {number}", "doc_id": doc_id}
        for number, (text, doc_id) in enumerate(
            zip(texts, row_doc_ids(table, columns), strict=True), start=1
        )
    ]
    return Samples(rows=rows, cut=cut)


def base_domains(config: InTaskConfig, store: Store) -> tuple[str, ...]:
    """The domains of the memory that are read beside the samples."""
    return config.memory.domains or tuple(store.manifest().domains())


def memory_with_samples(config: InTaskConfig, samples: Samples, *, say: Say) -> Path:
    """A copy of the memory, in the run's directory, with the samples as a domain; blocks.

    A copy that was made of the same things is taken as it is. The memory itself is not touched.

    Raises:
        ConfigError: a copy is there that was made of other things, and finished seeds read it, or
            something that is no copy.
        StoreError: the memory is damaged, or there is no room.
    """
    home = Path(config.run.dir)
    place, source = home / COPY, Store.open(Path(config.memory.store).expanduser())
    domains = base_domains(config, source)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples.rows)
    about = {
        "memory": source.location,
        "domains": list(domains),
        "content": content_digest(source.manifest().of_domains(domains)),
        "domain": config.in_task.domain,
        "samples": sha256(lines.encode()).hexdigest()[:16],
    }
    if place.resolve() == Path(source.location).resolve():
        raise ConfigError(
            f"memory.store = {config.memory.store!r}: is the copy that run.dir = {str(home)!r} is "
            "to hold; give the memory that it was made of, or another directory with --out DIR"
        )
    if (place / ABOUT).is_file():
        if json.loads((place / ABOUT).read_text(encoding="utf-8")) == about:
            return place
        if any(home.glob("*/seed-*")):
            raise ConfigError(
                f"run.dir = {str(home)!r}: its finished seeds read a memory of other samples, or "
                "of another memory; change it back, or choose another directory with --out DIR"
            )
    elif place.exists():
        raise ConfigError(
            f"run.dir = {str(home)!r}: holds a {COPY}/ that this command did not make; choose "
            "another directory with --out DIR"
        )
    say(f"copying the memory {source.location} and adding {len(samples.rows):,} samples ...")
    building = home / f".building-{COPY}"
    for old in (building, place):
        shutil.rmtree(old, ignore_errors=True)
    home.mkdir(parents=True, exist_ok=True)
    copy = _copied(source, domains, building)
    (building / SAMPLES).write_text(lines, encoding="utf-8")
    editor = Editor(
        store=copy,
        message=f"{len(samples.rows)} training samples",
        tokenizer=TokenizerPlace(given=Path(config.model.path), title_in_entry=False),
    )
    edit = editor.add(Knowledge(files=(building / SAMPLES,)), domain=config.in_task.domain)
    assert edit.read is not None
    assert edit.read.entries == len(samples.rows), "each sample is one entry"
    write_json(building / ABOUT, about)
    building.rename(place)
    return place


def _copied(source: Store, domains: tuple[str, ...], place: Path) -> Store:
    """A store of one version that has these domains of another's head."""
    meta = source.meta
    copy = Store.create(
        place,
        tokenizer_fingerprint=meta.tokenizer_fingerprint,
        entry_tokens=meta.entry_tokens,
        vocab_size=meta.vocab_size,
        pad_token_id=meta.pad_token_id,
    )
    with SegmentWriter(copy) as writer:
        additions = [
            addition
            for name in domains
            for addition in transferred(writer, copy, source, name, name)
        ]
        copy.commit(add_segments=additions, message=f"copied from {source.location}")
    return copy


def _check_slots(template: str, columns: tuple[str, ...]) -> None:
    slots = check_template("in_task.template", template)
    if TEXT_PAIR in slots and len(columns) == 1:
        raise ConfigError(
            "in_task.template has the slot {text_pair}, but the rows of task.train have one text; "
            "leave it out, or name the column of the second with task.text_pair"
        )
    if TEXT_PAIR not in slots and len(columns) == 2:
        raise ConfigError(
            "in_task.template has no slot {text_pair}, but the rows of task.train are pairs of "
            f'texts ("{columns[0]}" and "{columns[1]}"); add it'
        )


def _slots(
    task: TaskSettings, table: Table, columns: tuple[str, ...], words: dict[str, str]
) -> list[dict[str, str]]:
    """Each row's slots; a label is told in its words, where it has some."""
    values = table.column(task.label, "task.label")
    if task.kind == "classification":
        labels = [label_name(table, task.label, row, value) for row, value in enumerate(values)]
        unknown = [name for name in words if name not in set(labels)]
        if unknown:
            raise ConfigError(
                f"in_task.label_words: no row of task.train has the label {unknown[0]!r}; the "
                f"labels are {', '.join(sorted(set(labels)))}"
            )
    else:
        labels = [str(value) for value in values]
    texts = [table.columns[column] for column in columns]
    names = SLOTS[: len(columns)]
    assert names[0] == TEXT
    return [
        {
            **{name: texts[i][row] for i, name in enumerate(names)},
            LABEL: words.get(labels[row], labels[row]),
        }
        for row in range(len(table))
    ]
