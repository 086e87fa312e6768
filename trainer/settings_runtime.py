"""The settings of how a training is carried out."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from trainer.settings_fields import ConfigError, check_section, documented

Offload = Literal["none", "cpu", "nvme"]
Precision = Literal["fp32", "bf16", "fp16"]
Device = Literal["auto", "cpu", "cuda"]
NVME_NEEDS = (
    "needs GPUs and DeepSpeed's async_io operator, which is compiled at first use with a compiler "
    'and libaio; "cpu" and "none" work everywhere'
)


@dataclass(frozen=True, kw_only=True)
class RuntimeSettings:
    """How the training is carried out: changes speed and memory, and hardly what is learned.

    The exception is the retrieval warm-up, whose negatives are a pass's own sequences: fewer
    sequences per pass (more trainers, smaller micro-batches) make its task easier.
    """

    SECTION: ClassVar[str] = "runtime"

    trainers: int = documented(2, "Trainer workers, each a rank.", minimum=1)
    zero_stage: int = documented(2, "DeepSpeed's ZeRO stage.", minimum=0, maximum=3)
    precision: Precision = documented("fp32", "Number format of weights and activations.")
    device: Device = documented("auto", "Where trainers run; auto: CUDA where there is a GPU.")
    micro_batch_size: int = documented(
        0,
        "Sequences per trainer and pass; 0: optim.batch_size / trainers. Smaller ones are "
        "accumulated. They are each other's negatives in the retrieval warm-up, whose loss "
        "depends on their number a little and which needs at least 2.",
        minimum=0,
    )
    node_resource: str = documented(
        "", "Custom resource of Ray that a node must have to run trainers; empty: any node."
    )
    gpus_per_trainer: float = documented(
        1.0,
        "Share of a GPU that each trainer reserves, where they run on GPUs; below 1 the rest is "
        "for shards (memory.gpus_per_shard). More than half where there are several trainers: NCCL "
        "needs a GPU of its own for each.",
        above=0,
        maximum=1,
    )
    threads_per_trainer: int = documented(1, "CPU threads of each trainer.", minimum=1)
    retrieval_chunks: int = documented(
        1,
        "Pieces that a micro-batch is cut in, so that one's search runs while others compute; "
        "worth it where retrieval takes long (retrieval_ms in the metrics). 1: it is not cut.",
        minimum=1,
    )
    activation_checkpointing: bool = documented(
        False,
        "Make a layer's activations again for its gradient instead of keeping them: less memory, "
        "about a third more time. The memory is not searched again.",
    )
    offload_optimizer: Offload = documented(
        "none",
        "Where master weights and moments are kept: beside the weights, in the host's memory "
        "(ZeRO 1 to 3), or on NVMe (ZeRO 3, GPUs).",
    )
    offload_parameters: Offload = documented(
        "none", "Where ZeRO 3 keeps the weights that are not in use."
    )
    nvme_path: str = documented("", "Directory on a fast local disk, for nvme; on every node.")
    deepspeed_config: str = documented(
        "", "JSON file merged over the generated DeepSpeed configuration; empty: none."
    )

    def __post_init__(self) -> None:
        check_section(self)
        if self.trainers > 1 and self.gpus_per_trainer <= 0.5:
            raise ConfigError(
                f"runtime.gpus_per_trainer = {self.gpus_per_trainer:g}: {self.trainers} trainers "
                "need more than 0.5 each, as two must not meet on one GPU (NCCL refuses that)"
            )
        for key, given, least in (
            ("offload_optimizer", self.offload_optimizer, 3 if self._nvme_optimizer else 1),
            ("offload_parameters", self.offload_parameters, 3),
        ):
            if given == "none":
                continue
            if self.zero_stage < least:
                raise ConfigError(
                    f'runtime.{key} = "{given}": needs runtime.zero_stage of at least {least}, not '
                    f"{self.zero_stage}"
                )
            if given == "nvme" and not self.nvme_path.strip():
                raise ConfigError(
                    f'runtime.{key} = "nvme": name a directory on a fast local disk with '
                    "runtime.nvme_path"
                )
            if given == "nvme" and self.device == "cpu":
                raise ConfigError(f'runtime.{key} = "nvme": {NVME_NEEDS}')

    @property
    def _nvme_optimizer(self) -> bool:
        return self.offload_optimizer == "nvme"
