"""What a build is asked for, checked when made."""

from dataclasses import dataclass

from trainer.corpus.errors import CorpusError

CLS_TOKENS = 1
EDGE_TOKENS = 2
MAX_TOKENS = 65_536


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """The arguments that decide a corpus's content; the same ones and files give the same corpus.

    Attributes:
        tokenizer: a path or name that `transformers` loads, or "train:SIZE".
        sequence_length: T, tokens of a training sequence with [CLS] and [SEP].
        entry_tokens: S, tokens of a memory entry with [CLS].
        heldout_fraction: share of the documents that training never sees, in [0, 1).
        text_field, title_field: which fields of a row to read; plain text has none.
        title_in_entry: begin each entry's tokens with its document's title.
        minimum_sequence_tokens: a document's last sequence is dropped when it has fewer tokens.
        documents_per_chunk: unit of work, of progress and of what an interruption loses.
        rows_per_file: rows of a finished Arrow file, rounded up to whole chunks.
        limit_documents: read no more than this many documents, the sources in their order.
    """

    tokenizer: str
    sequence_length: int = 128
    entry_tokens: int = 64
    heldout_fraction: float = 0.02
    text_field: str = "text"
    title_field: str = "title"
    title_in_entry: bool = False
    minimum_sequence_tokens: int = 8
    documents_per_chunk: int = 1000
    rows_per_file: int = 131_072
    limit_documents: int | None = None

    def __post_init__(self) -> None:
        if not self.tokenizer:
            raise CorpusError("tokenizer is empty; give a path, a name or train:SIZE")
        for name, lowest, highest in (
            ("sequence_length", EDGE_TOKENS + 1, MAX_TOKENS),
            ("entry_tokens", CLS_TOKENS + 1, MAX_TOKENS),
            ("minimum_sequence_tokens", 1, MAX_TOKENS),
            ("documents_per_chunk", 1, 1_000_000),
            ("rows_per_file", 1, 1 << 30),
        ):
            value = getattr(self, name)
            if not lowest <= value <= highest:
                raise CorpusError(f"{name}={value} is not allowed; give {lowest} to {highest}")
        if not 0 <= self.heldout_fraction < 1:
            raise CorpusError(
                f"heldout_fraction={self.heldout_fraction} is not allowed; give 0 or more and less "
                "than 1, for example 0.02"
            )
        if self.minimum_sequence_tokens > self.sequence_length - EDGE_TOKENS:
            raise CorpusError(
                f"minimum_sequence_tokens={self.minimum_sequence_tokens} exceeds the "
                f"{self.sequence_length - EDGE_TOKENS} tokens of text that fit in a sequence; "
                "lower it or raise sequence_length"
            )
        if self.limit_documents is not None and self.limit_documents < 1:
            raise CorpusError(
                f"limit_documents={self.limit_documents}; give 1 or more, or leave it out"
            )
