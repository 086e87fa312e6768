"""The settings that a training run is made of, one frozen dataclass per section.

Each section checks itself when built; `TrainSettings` bundles them and checks what spans two
sections. How they are read from TOML is the business of `cluster.config`, not of the trainer.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from trainer.settings_fields import ConfigError, check_section, described, documented, shown
from trainer.settings_model import MemorySettings, ModelSettings
from trainer.settings_runtime import RuntimeSettings

__all__ = [
    "CheckpointSettings",
    "ConfigError",
    "DataSettings",
    "EvaluateSettings",
    "LoggingSettings",
    "MemorySettings",
    "ModelSettings",
    "OptimSettings",
    "RunSettings",
    "RuntimeSettings",
    "TrainSettings",
]

Schedule = Literal["linear", "polynomial", "constant"]
Optimizer = Literal["adamw", "lamb"]
WandbMode = Literal["disabled", "offline", "online"]

_SHORTEST = 8


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Which run this is and where it writes."""

    SECTION: ClassVar[str] = "run"

    dir: str = documented("runs/pretrain", "Directory that receives everything the run writes.")
    seed: int = documented(
        0, "Seed of the weights, the data order, the masks and dropout.", minimum=0
    )
    name: str = documented("", "Name shown in wandb and the report; empty: the directory's name.")

    def __post_init__(self) -> None:
        check_section(self)
        if not self.dir.strip():
            raise ConfigError("run.dir is empty: give the directory that the run writes to")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The text that is learned from, and how it is masked."""

    SECTION: ClassVar[str] = "data"

    corpus: str = field(
        metadata=described(
            "Directory made by `pluglm corpus build`, relative to where you start; or its URL on "
            "any filesystem that fsspec knows."
        )
    )
    more_corpora: tuple[str, ...] = documented(
        (),
        "Further corpora of the same tokenizer, learned from at the same time; their entries "
        "are in the memory only if memory.store holds them.",
        may_be_empty=True,
    )
    weights: tuple[float, ...] = documented(
        (),
        "Share of each corpus (data.corpus first) in the sequences, in any unit; empty: in "
        "proportion to their sizes. A corpus that is at its end begins anew, shuffled again.",
        above=0,
        may_be_empty=True,
    )
    phase_lengths: tuple[int, ...] = documented(
        (),
        "Most tokens of a sequence, phase by phase, such as [128, 512]; a longer one is seen as "
        "one of its pieces, in each epoch another. 0: as long as it is; empty: always so.",
        minimum=0,
        may_be_empty=True,
    )
    phase_steps: tuple[int, ...] = documented(
        (),
        "The step at which each further phase begins, such as [9000]; one fewer than "
        "data.phase_lengths.",
        minimum=1,
        may_be_empty=True,
    )
    shuffle_files: int = documented(
        0,
        "How many files of a corpus are shuffled together at a time, so that no others need be on "
        "the node; files come in another order each epoch. 0: all of them.",
        minimum=0,
    )
    cache_gib: float = documented(
        64.0,
        "GiB that parts of corpora on other filesystems, and of Parquet, may take on each node, in "
        "the directory of PLUGLM_CACHE_DIR.",
        above=0,
    )
    length_buckets: bool = documented(
        False,
        "Put a step's sequences of like length into one micro-batch; all trainers compute like "
        "lengths at the same time. A step holds the same sequences either way.",
    )
    mask_probability: float = documented(
        0.15,
        "Share of a sequence's tokens that are masked (80 % [MASK], 10 % random, 10 % kept).",
        above=0,
        below=1,
    )
    whole_word_mask: bool = documented(False, "Mask all pieces of a word together.")
    salient_mask: float = documented(
        0.0,
        "Share of the masks that is drawn by rarity, so that names and dates are asked for; "
        "the rest is drawn evenly.",
        minimum=0,
        maximum=1,
    )

    def __post_init__(self) -> None:
        check_section(self)
        if not self.corpus.strip():
            raise ConfigError(
                "data.corpus is empty: give the directory that `pluglm corpus build` made"
            )
        for corpus in self.more_corpora:
            if not corpus.strip() or self.corpora.count(corpus) > 1:
                raise ConfigError(
                    f"data.more_corpora = {shown(self.more_corpora)}: {shown(corpus)} is empty or "
                    "given twice (data.corpus counts, too); name each corpus once, and use "
                    "data.weights to see one more often"
                )
        if self.weights and len(self.weights) != len(self.corpora):
            raise ConfigError(
                f"data.weights = {shown(self.weights)}: must be one for each of the "
                f"{len(self.corpora)} corpora (data.corpus first), or none"
            )

        self._check_phases()

    def _check_phases(self) -> None:
        lengths, steps = self.phase_lengths, self.phase_steps
        if len(steps) != max(len(lengths) - 1, 0):
            raise ConfigError(
                f"data.phase_steps = {shown(steps)}: must be one fewer than data.phase_lengths = "
                f"{shown(lengths)}: the step at which each further phase begins"
            )
        if list(steps) != sorted(set(steps)):
            raise ConfigError(f"data.phase_steps = {shown(steps)}: must rise from phase to phase")
        if any(0 < length < _SHORTEST for length in lengths):
            raise ConfigError(
                f"data.phase_lengths = {shown(lengths)}: must each be at least {_SHORTEST} tokens, "
                "of which two are [CLS] and [SEP], or 0"
            )

    @property
    def corpora(self) -> tuple[str, ...]:
        """All corpora, `corpus` first."""
        return (self.corpus, *self.more_corpora)


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """The optimizer, its schedule and the losses."""

    SECTION: ClassVar[str] = "optim"

    optimizer: Optimizer = documented(
        "adamw",
        "lamb scales each matrix's step by its norm, for very large batches; it is right under "
        "every ZeRO stage.",
    )
    steps: int = documented(1000, "Optimizer steps of the whole run.", minimum=1)
    batch_size: int = documented(
        64, "Sequences per optimizer step, over all trainers; must divide evenly.", minimum=1
    )
    batch_tokens: int = documented(
        0,
        "Most tokens per optimizer step, over all trainers, padding not counted: a step ends there "
        "or at batch_size sequences. 0: no limit.",
        minimum=0,
    )
    lr: float = documented(1e-3, "Peak learning rate.", above=0)
    memory_lr_scale: float = documented(
        1.0, "Factor on the learning rate of the memory path's own weights.", above=0
    )
    min_lr_ratio: float = documented(
        0.0, "Learning rate at the end, as a share of the peak.", minimum=0, maximum=1
    )
    warmup_ratio: float = documented(
        0.1, "Share of the steps over which the learning rate rises.", minimum=0, below=1
    )
    schedule: Schedule = documented("linear", "How the learning rate falls after the warm-up.")
    decay_power: float = documented(1.0, "Degree of the polynomial schedule.", above=0)
    weight_decay: float = documented(
        0.01, "Decoupled weight decay; biases and normalisation have none.", minimum=0
    )
    betas: tuple[float, float] = documented(
        (0.9, 0.98), "Decay of the gradient's first and second moment.", minimum=0, below=1
    )
    eps: float = documented(1e-6, "Term that keeps the update's division finite.", above=0)
    fused: bool = documented(
        True, "AdamW in one kernel per tensor; false: torch's plain one. LAMB has one kind."
    )
    grad_clip: float = documented(1.0, "Largest norm of the gradient; 0: not clipped.", minimum=0)
    max_skipped_steps: int = documented(
        10,
        "Steps in a row that are left out because loss or gradient is not finite, before the run "
        "ends with its state saved; ten times as many in all. 0: the first one ends it.",
        minimum=0,
    )
    retrieval_warmup_steps: int = documented(
        0,
        "First steps in which a contrastive loss teaches the query to find an entry of its own "
        "document; 0: never, optim.steps or more: in all steps.",
        minimum=0,
    )
    retrieval_loss_weight: float = documented(
        1.0, "Weight of the retrieval warm-up's loss beside the masked-LM loss.", minimum=0
    )
    retrieval_temperature: float = documented(
        1.0, "What the inner products are divided by in the retrieval warm-up's loss.", above=0
    )

    def __post_init__(self) -> None:
        check_section(self)


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """When the run's state is written, and how much of it is kept."""

    SECTION: ClassVar[str] = "checkpoint"

    every_steps: int = documented(
        0, "Optimizer steps between checkpoints; 0: one, at the end.", minimum=0
    )
    keep: int = documented(2, "Newest checkpoints that are kept.", minimum=1)

    def __post_init__(self) -> None:
        check_section(self)


@dataclass(frozen=True, kw_only=True)
class LoggingSettings:
    """What is reported while the run goes on."""

    SECTION: ClassVar[str] = "logging"

    wandb: WandbMode = documented("disabled", "Weights & Biases; offline needs no account.")
    wandb_project: str = documented("pluglm", "Project in Weights & Biases.")
    log_every_steps: int = documented(10, "Optimizer steps between lines of metrics.", minimum=1)
    progress: bool = documented(True, "Show a progress bar.")
    memory_usage: bool = documented(
        True,
        "Count how often training reads which of the memory's entries; bounded, kept in "
        "checkpoints, told in the metrics and the report.",
    )

    def __post_init__(self) -> None:
        check_section(self)
        if self.wandb != "disabled" and not self.wandb_project.strip():
            raise ConfigError("logging.wandb_project is empty: name the project that receives runs")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Evaluation on held-out text: with the right memory, a shuffled one, and none."""

    SECTION: ClassVar[str] = "evaluate"

    every_steps: int = documented(
        0, "Optimizer steps between evaluations; 0: one, at the end.", minimum=0
    )
    sequences: int = documented(
        256, "Held-out sequences that are evaluated; at most what there is.", minimum=1
    )
    mask_probability: float = documented(
        0.15, "Share of a held-out sequence's tokens that are masked.", above=0, below=1
    )
    samples: int = documented(
        8, "Held-out sentences shown in the report with their entries.", minimum=0
    )

    def __post_init__(self) -> None:
        check_section(self)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """All that a trainer needs to know; checks what spans sections."""

    run: RunSettings = field(default_factory=RunSettings)
    data: DataSettings
    model: ModelSettings = field(default_factory=ModelSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)

    def __post_init__(self) -> None:
        batch, trainers = self.optim.batch_size, self.runtime.trainers
        if batch % trainers:
            raise ConfigError(
                f"optim.batch_size = {batch}: must be a multiple of runtime.trainers = {trainers}; "
                f"{batch - batch % trainers or trainers} would do"
            )
        micro = self.runtime.micro_batch_size
        if micro and batch // trainers % micro:
            raise ConfigError(
                f"runtime.micro_batch_size = {micro}: must divide the {batch // trainers} "
                "sequences of each trainer (optim.batch_size / runtime.trainers), or be 0"
            )
        if self.micro_batch_size == 1 and self.optim.retrieval_warmup_steps > 0:
            raise ConfigError(
                f"optim.retrieval_warmup_steps = {self.optim.retrieval_warmup_steps}: needs at "
                f"least 2 sequences per trainer and pass, which are each other's negatives, but "
                f"optim.batch_size = {batch}, runtime.trainers = {trainers} and "
                f"runtime.micro_batch_size = {micro} make it 1; raise the batch or use 0"
            )

    @property
    def micro_batch_size(self) -> int:
        """Sequences per trainer and pass, resolved (never 0)."""
        return self.runtime.micro_batch_size or self.optim.batch_size // self.runtime.trainers

    @property
    def accumulation_steps(self) -> int:
        """Passes per optimizer step on each trainer."""
        return self.optim.batch_size // (self.runtime.trainers * self.micro_batch_size)
