"""The settings of fine-tuning's loop, and of where a run writes."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from trainer.settings_fields import ConfigError, check_section, documented, shown


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How long and how fast it is learned, and with which seeds."""

    SECTION: ClassVar[str] = "train"

    epochs: int = documented(3, "Most passes over the training rows.", minimum=1)
    batch_size: int = documented(16, "Sequences per pass and process.", minimum=1)
    accumulation_steps: int = documented(1, "Passes whose gradients make one step.", minimum=1)
    eval_batch_size: int = documented(64, "Sequences per pass of an evaluation.", minimum=1)
    lr: float = documented(3e-5, "Peak learning rate; it falls linearly to 0.", above=0)
    warmup_ratio: float = documented(
        0.1, "Share of the steps over which the learning rate rises.", minimum=0, below=1
    )
    weight_decay: float = documented(
        0.01, "Decoupled weight decay; biases and normalisation have none.", minimum=0
    )
    grad_clip: float = documented(1.0, "Largest norm of the gradient; 0: not clipped.", minimum=0)
    seeds: tuple[int, ...] = documented(
        (0, 1, 2),
        "One run each, whose mean and deviation are reported; a seed decides the new head, the "
        "order of the rows and dropout.",
        minimum=0,
        maximum=2**32 - 1,
    )
    early_stopping_patience: int = documented(
        0, "Epochs without a better dev metric after which a seed ends; 0: never.", minimum=0
    )
    group_by_length: bool = documented(
        True, "Put sequences of like length into a batch, so that less padding is computed."
    )
    precision: Literal["fp32", "bf16", "fp16"] = documented(
        "fp32", "Number format of activations; weights stay in fp32."
    )
    device: Literal["auto", "cpu", "cuda"] = documented(
        "auto", "Where it is computed; auto: CUDA where there is a GPU."
    )

    def __post_init__(self) -> None:
        check_section(self)
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"train.seeds = {shown(self.seeds)}: one seed is given twice")
        if self.precision == "fp16" and self.device == "cpu":
            raise ConfigError(
                'train.precision = "fp16": must be "fp32" or "bf16" with train.device = "cpu"'
            )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where the results are written, and who is told of the progress."""

    SECTION: ClassVar[str] = "run"

    dir: str = documented("runs/finetune", "Directory that receives models, predictions, results.")
    wandb: Literal["disabled", "offline", "online"] = documented(
        "disabled", "Weights & Biases; offline needs no account."
    )
    wandb_project: str = documented("pluglm", "Project in Weights & Biases.")
    progress: bool = documented(False, "Show a progress bar.")

    def __post_init__(self) -> None:
        check_section(self)
        if not self.dir.strip():
            raise ConfigError("run.dir is empty: give the directory that the run writes to")
        if self.wandb != "disabled" and not self.wandb_project.strip():
            raise ConfigError("run.wandb_project is empty: name the project that receives runs")
