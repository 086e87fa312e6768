"""The settings of `pluglm finetune`, one frozen dataclass per section of the TOML file."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from trainer.finetune.settings_train import RunSettings, TrainSettings
from trainer.settings_fields import ConfigError, check_section, described, documented, shown

__all__ = [
    "METRICS",
    "EvaluateSettings",
    "FinetuneSettings",
    "MemorySettings",
    "ModelSettings",
    "RunSettings",
    "TaskSettings",
    "TrainSettings",
]

Kind = Literal["classification", "regression", "token_classification", "question_answering"]
Mode = Literal["live", "frozen"]

METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1_micro", "f1_macro", "matthews"),
    "regression": ("pearson", "spearman"),
    "token_classification": (
        "span_f1",
        "span_precision",
        "span_recall",
        "accuracy",
        "f1_micro",
        "f1_macro",
    ),
    "question_answering": ("f1", "exact_match"),
}
"""What each kind of task is measured by; the first one decides when task.metric is empty."""


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """The task: its kind, its files and what their columns are called."""

    SECTION: ClassVar[str] = "task"

    kind: Kind = field(metadata=described("What is learned; it decides the head and the metrics."))
    train: str = field(
        metadata=described(
            "Rows to learn from: .jsonl, .csv, .tsv or .parquet; from where you are."
        )
    )
    dev: str = field(
        metadata=described("Rows that decide which epoch is kept and when training stops.")
    )
    test: str = documented("", "Rows that are reported and decide nothing; empty: none.")
    text: str = documented("text", "Column of the text (classification, regression).")
    text_pair: str = documented(
        "text_pair",
        "Column of the second text of a pair. The default is used where the training file has it; "
        "any other name must be there; empty: no second text.",
    )
    label: str = documented("label", "Column of the label, or of the number to predict.")
    tokens: str = documented("tokens", "Column of a row's words, a list (token classification).")
    tags: str = documented("tags", "Column of the words' tags, a list (token classification).")
    question: str = documented("question", "Column of the question (question answering).")
    context: str = documented("context", "Column of the text that holds the answer.")
    answers: str = documented(
        "answers",
        'Column of the answers, {"text": [...], "answer_start": [...]}; where the training file '
        "has no such column, answer_text and answer_start are read.",
    )
    answer_text: str = documented("answer_text", "Column of the answer's text, or a list of them.")
    answer_start: str = documented(
        "answer_start", "Column of the characters before the answer, or a list of them."
    )
    id: str = documented(
        "id", "Column that names a row in predictions.jsonl; the row's number where there is none."
    )
    max_length: int = documented(
        128, "Longest sequence in tokens; longer text is cut, longer contexts are windowed.",
        minimum=8,
    )  # fmt: skip
    doc_stride: int = documented(
        64, "Tokens that one window of a context shares with the next.", minimum=0
    )
    max_answer_tokens: int = documented(
        30, "Longest answer that is predicted, in tokens.", minimum=1
    )
    train_rows: int = documented(0, "Learn from the first so many rows; 0: all.", minimum=0)
    metric: str = documented(
        "",
        "Metric on dev that decides, larger is better; empty: accuracy, pearson, span_f1 or f1, "
        "after the kind.",
    )

    def __post_init__(self) -> None:
        check_section(self)
        for name in ("train", "dev"):
            if not getattr(self, name).strip():
                raise ConfigError(
                    f"task.{name} is empty: give a .jsonl, .csv, .tsv or .parquet file"
                )
        allowed = METRICS[self.kind]
        if self.metric and self.metric not in allowed:
            choices = ", ".join(f'"{name}"' for name in allowed)
            raise ConfigError(
                f"task.metric = {shown(self.metric)}: must be one of {choices} with task.kind = "
                f'"{self.kind}"; empty: "{allowed[0]}"'
            )
        if self.kind == "question_answering" and self.doc_stride >= self.max_length:
            raise ConfigError(
                f"task.doc_stride = {self.doc_stride}: must be below task.max_length = "
                f"{self.max_length}, of which it is a part"
            )

    @property
    def deciding_metric(self) -> str:
        """The metric on dev that decides which epoch is kept."""
        return self.metric or METRICS[self.kind][0]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Where training starts."""

    SECTION: ClassVar[str] = "model"

    path: str = field(
        metadata=described(
            "Directory of the model with its tokenizer: a PlugLM that was pre-trained or "
            "converted, or plain BERT, which is the baseline and reads no memory."
        )
    )

    def __post_init__(self) -> None:
        check_section(self)
        if not self.path.strip():
            raise ConfigError("model.path is empty: give the directory of a model")


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """The memory that a PlugLM reads while it is fine-tuned; a plain BERT reads none."""

    SECTION: ClassVar[str] = "memory"

    store: str = documented("", "Directory of the memory's store; empty: no memory.")
    domains: tuple[str, ...] = documented(
        (),
        "Domains of the store that are read; empty: all that are plugged.",
        may_be_empty=True,
    )
    exclude_own_samples: bool = documented(
        False,
        "Keep a training row from finding entries made of its own text, as `pluglm in-task` "
        "makes them.",
    )
    mode: Mode = documented(
        "live",
        "live: retrieved entries are encoded with the current weights and learn with them; "
        "frozen: keys and values are made once, with the weights of the start.",
    )
    top_k: int = documented(5, "Entries K retrieved per sequence.", minimum=1)
    refresh_every_steps: int = documented(
        0,
        "Optimizer steps between refreshes of the keys that are searched, in live mode; 0: the "
        "keys of the start are searched throughout.",
        minimum=0,
    )
    retrieval_loss_weight: float = documented(
        0.0,
        "Weight of a loss by which a row's query must find the key of its own text among those of "
        "its pass, in live mode; 0: none, and nothing keeps the queries of different texts apart.",
        minimum=0,
    )
    right_entry: str = documented(
        "",
        "Column of the training rows with the text of the entry that answers them, whose key that "
        "loss lets their queries find instead of their own text's; empty: their own text's.",
    )
    find_own_label: bool = documented(
        False,
        "With exclude_own_samples: that loss lets a training row's query find the samples of other "
        "rows that have its label.",
    )

    def __post_init__(self) -> None:
        check_section(self)
        if self.mode == "frozen" and self.retrieval_loss_weight:
            raise ConfigError(
                f"memory.retrieval_loss_weight = {self.retrieval_loss_weight:g}: must be 0 with "
                'memory.mode = "frozen", whose keys cannot learn'
            )
        if self.right_entry and not self.retrieval_loss_weight:
            raise ConfigError(
                f"memory.right_entry = {shown(self.right_entry)}: needs a "
                "memory.retrieval_loss_weight above 0, whose loss learns from it"
            )
        if self.find_own_label:
            self._check_own_label()
        if self.mode == "frozen" and self.refresh_every_steps:
            raise ConfigError(
                f"memory.refresh_every_steps = {self.refresh_every_steps}: must be 0 with "
                'memory.mode = "frozen", whose keys never change'
            )
        if len(set(self.domains)) < len(self.domains):
            raise ConfigError(f"memory.domains = {shown(self.domains)}: one is given twice")

    def _check_own_label(self) -> None:
        what = "memory.find_own_label = true"
        if not self.retrieval_loss_weight:
            raise ConfigError(
                f"{what}: needs a memory.retrieval_loss_weight above 0, whose loss learns it"
            )
        if not self.exclude_own_samples:
            raise ConfigError(
                f"{what}: needs memory.exclude_own_samples = true, or rows would read their own "
                "labels; `pluglm in-task` sets both, with in_task.find_own_label"
            )
        if self.right_entry:
            raise ConfigError(
                f"{what}: memory.right_entry = {shown(self.right_entry)} names other entries to "
                "find; set one of the two"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """What is measured beside dev and test with the memory."""

    SECTION: ClassVar[str] = "evaluate"

    without_memory: bool = documented(
        False, "Measure the same fine-tuned model with its memory unplugged as well."
    )

    def __post_init__(self) -> None:
        check_section(self)


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """Everything that `pluglm finetune` needs to know."""

    task: TaskSettings
    model: ModelSettings
    memory: MemorySettings = field(default_factory=MemorySettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    run: RunSettings = field(default_factory=RunSettings)
