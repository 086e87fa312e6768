"""Build a corpus: text to training sequences and a memory of entries.

A straight line: find the files → the tokenizer → chunks of documents, encoded in parallel and
journalled → joined to the finished files → the memory's first commit → corpus.json, whose presence
means complete.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.corpus.documents import Document, Fields
from trainer.corpus.encode import ChunkDone, ChunkTask, TokenizerFacts, encode_chunk
from trainer.corpus.errors import CorpusError
from trainer.corpus.finish import finish, no_documents
from trainer.corpus.info import LOCK, CorpusInfo, load_corpus_info, read_manifest
from trainer.corpus.marks import difference, mark_files
from trainer.corpus.pool import default_workers, run_tasks
from trainer.corpus.progress import BuildProgress, Report
from trainer.corpus.settings import BuildSettings
from trainer.corpus.sources import Source, find_sources
from trainer.corpus.tokenizer import load_tokenizer, tokenizer_fingerprint
from trainer.corpus.wordpiece import survey, train_wordpiece, wanted_size
from trainer.corpus.workspace import Workspace, locked, remove

CHUNK_CHARACTERS = 4_000_000  # a chunk ends here too, so that long documents do not fill memory


def build_corpus(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: str,
    sequence_length: int = 128,
    entry_tokens: int = 64,
    heldout_fraction: float = 0.02,
    text_field: str = "text",
    title_field: str = "title",
    title_in_entry: bool = False,
    minimum_sequence_tokens: int = 8,
    documents_per_chunk: int = 1000,
    rows_per_file: int = 131_072,
    limit_documents: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Report | None = None,
) -> CorpusInfo:
    """Build a corpus, or go on with one that was interrupted, or return at once if it is finished.

    Blocks. The same files and arguments give the same sequences, entries and ids, however often the
    build was interrupted and however many workers it had.

    Args:
        sources: files and directories; `sources.FORMATS_HELP` lists the kinds.
        out: the corpus directory; new, empty, or of an earlier build with the same arguments.
        tokenizer: a path or name that `transformers` loads, or "train:SIZE" for WordPiece.
        workers: processes; None: as many as there are cores; 1: this process alone.
        overwrite: throw away what `out` holds of an earlier build.
        progress: called with a `BuildProgress` now and then; a `ProgressBar`, for example.

    The other arguments are those of `BuildSettings`.

    Raises:
        CorpusError: an argument, a source or `out` cannot be used; says what to do.
        KeyboardInterrupt: as usual; what was finished stays, and the same call goes on.
    """
    if isinstance(sources, str | Path):
        raise CorpusError(f"sources must be a list of paths; give [{str(sources)!r}]")
    if workers is not None and workers < 1:
        raise CorpusError(f"workers={workers}; give 1 or more, or leave it out for all cores")
    settings = BuildSettings(
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        entry_tokens=entry_tokens,
        heldout_fraction=heldout_fraction,
        text_field=text_field,
        title_field=title_field,
        title_in_entry=title_in_entry,
        minimum_sequence_tokens=minimum_sequence_tokens,
        documents_per_chunk=documents_per_chunk,
        rows_per_file=rows_per_file,
        limit_documents=limit_documents,
    )
    build = _Build(
        settings=settings,
        sources=find_sources(sources),
        out=Path(out).expanduser().resolve(),
        workers=default_workers() if workers is None else workers,
        report=progress or (lambda _: None),
    )
    with locked(build.out):
        try:
            return build.run(overwrite=overwrite)
        except OSError as error:
            raise CorpusError(
                f"cannot write the corpus {out} ({error}); make room or correct the permissions, "
                "then run the same command again: finished chunks are kept"
            ) from error


class _Build:
    """One build's arguments, and its steps."""

    def __init__(
        self,
        *,
        settings: BuildSettings,
        sources: tuple[Source, ...],
        out: Path,
        workers: int,
        report: Report,
    ) -> None:
        self.settings = settings
        self.sources = sources
        self.out = out
        self.workers = workers
        self.report = report
        self.space = Workspace(out)
        self.total: int | None = None  # documents, when they were counted
        self.fields = Fields(text=settings.text_field, title=settings.title_field)

    def run(self, *, overwrite: bool) -> CorpusInfo:
        size = wanted_size(self.settings.tokenizer)
        loaded = load_tokenizer(self.settings.tokenizer) if size is None else None
        if overwrite:
            self.space.clear()
        manifest = read_manifest(self.out)
        earlier = manifest or self.space.read_request()
        request = self._request(loaded, earlier)
        if earlier is None:
            self._refuse_foreign_files()
        elif change := difference(earlier, request):
            self._refuse_change(change, finished=manifest is not None)
        if manifest is not None:
            self.space.discard()  # left when a build was killed just after it wrote the manifest
            return load_corpus_info(self.out)
        self.space.begin(request)
        if not self.space.tokenizer.exists():
            self._save_tokenizer(loaded if size is None else self._train(size))
        facts = _facts(self.space.tokenizer)
        finish(
            self.space,
            settings=self.settings,
            sources=self.sources,
            tokenizer=facts,
            done=self._encode(facts),
            request=request,
            workers=self.workers,
            report=self.report,
        )
        return load_corpus_info(self.out)

    def _request(self, loaded: Any, earlier: Mapping[str, Any] | None) -> dict[str, Any]:
        """What decides the content. A tokenizer counts by its fingerprint, not by where it lies."""
        arguments = asdict(self.settings)
        arguments["sources"] = [source.name for source in self.sources]
        if loaded is not None:
            arguments["tokenizer"] = f"fingerprint:{tokenizer_fingerprint(loaded)}"

        def seen(done: int, total: int) -> None:
            self.report(BuildProgress(stage="checking", done=done, total=total))

        marks = mark_files(self.sources, earlier["files"] if earlier else (), seen)
        return {"arguments": arguments, "files": marks}

    def _refuse_foreign_files(self) -> None:
        found = sorted(path.name for path in self.out.iterdir() if path.name != LOCK)
        if found:
            raise CorpusError(
                f"{self.out} is not empty and holds no corpus (it has {', '.join(found[:3])}); "
                "choose a new directory"
            )

    def _refuse_change(self, change: str, *, finished: bool) -> None:
        if not finished and not self.space.finished_chunks():
            self.space.clear()  # an attempt that came to nothing, a wrong field name say
            return
        raise CorpusError(
            f"{self.out} holds a corpus that was {'built' if finished else 'begun'} from "
            f"something else: {change}. Choose another output directory, give the same arguments "
            "and files, or start anew with overwrite (--overwrite)"
        )

    def _train(self, size: int) -> Any:
        def counted(done: int) -> None:
            self.report(BuildProgress(stage="counting", done=done))

        found = survey(self._documents(), counted)
        if not found.documents:
            raise no_documents(self.sources)
        self.total = found.documents

        def trained(done: int) -> None:
            self.report(BuildProgress(stage="tokenizer", done=done, total=found.documents))

        return train_wordpiece(self._documents(), found, size, trained)

    def _save_tokenizer(self, tokenizer: Any) -> None:
        temporary = self.space.root / ".tmp-tokenizer"
        remove(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.rename(self.space.tokenizer)

    def _documents(self) -> Iterator[Document]:
        every = (document for source in self.sources for document in source.documents(self.fields))
        return islice(every, self.settings.limit_documents)

    def _encode(self, facts: TokenizerFacts) -> list[ChunkDone]:
        """Encode the chunks that no earlier run has finished; all of them, in order."""
        finished = self.space.finished_chunks()
        done: dict[int, ChunkDone] = {}
        documents = entries = sequences = 0

        def keep(chunk: ChunkDone) -> None:
            nonlocal documents, entries, sequences
            done[chunk.index] = chunk
            documents += chunk.documents
            entries += chunk.entries
            sequences += chunk.sequences
            self.report(
                BuildProgress(
                    stage="encoding",
                    done=documents,
                    total=self.total,
                    entries=entries,
                    sequences=sequences,
                )
            )

        def unfinished() -> Iterator[ChunkTask]:
            for task in self._tasks(facts):
                if task.index in finished:
                    keep(finished[task.index])
                else:
                    yield task

        with (
            self.space.journal() as journal,
            closing(run_tasks(encode_chunk, unfinished(), workers=self.workers)) as results,
        ):
            for chunk in results:
                journal.add(chunk)
                keep(chunk)
        return [done[index] for index in sorted(done)]

    def _tasks(self, facts: TokenizerFacts) -> Iterator[ChunkTask]:
        """Cut the stream of documents into chunks, the same ones every time."""
        index = 0
        left = self.settings.limit_documents
        for source in self.sources:
            documents = islice(source.documents(self.fields), left)
            ordinal = 0
            while chunk := _next_chunk(documents, self.settings.documents_per_chunk):
                yield ChunkTask(
                    index=index,
                    base=source.base,
                    first_doc_id=source.base + ordinal,
                    documents=chunk,
                    settings=self.settings,
                    tokenizer=facts,
                    directory=str(self.space.chunks),
                )
                index += 1
                ordinal += len(chunk)
            left = None if left is None else left - ordinal


def _next_chunk(documents: Iterator[Document], most: int) -> tuple[Document, ...]:
    chunk: list[Document] = []
    characters = 0
    while len(chunk) < most and characters < CHUNK_CHARACTERS:
        document = next(documents, None)
        if document is None:
            break
        chunk.append(document)
        characters += len(document.text)
    return tuple(chunk)


def _facts(directory: Path) -> TokenizerFacts:
    """The saved tokenizer as it will be read again, so that its fingerprint is what others find."""
    tokenizer: Any = load_tokenizer(directory)
    return TokenizerFacts(
        file=str(directory / "tokenizer.json"),
        fingerprint=tokenizer_fingerprint(tokenizer),
        vocab_size=len(tokenizer),
        pad=tokenizer.pad_token_id,
        cls=tokenizer.cls_token_id,
        sep=tokenizer.sep_token_id,
    )
