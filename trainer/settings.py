"""The settings that a training run is made of, one frozen dataclass per section.

Each section checks itself when built; `TrainSettings` bundles them and checks what spans two
sections. How they are read from TOML is the business of `cluster.config`, not of the trainer.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from trainer.settings_fields import ConfigError, check_section, described, documented
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
        metadata=described("Directory made by `pluglm corpus build`; relative to where you start.")
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
