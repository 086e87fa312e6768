"""One rank's DeepSpeed engine: the only room of the trainer that knows DeepSpeed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import PlugLMForMaskedLM, is_key_weight
from model.query_norm import QueryBatchNorm
from trainer.deepspeed_config import deepspeed_config
from trainer.distributed import sum_over_ranks
from trainer.engine_counters import leave_step_out, read_counters, set_counters
from trainer.held_layouts import held_part, held_state
from trainer.lamb import Lamb
from trainer.optim import lr_factor, make_optimizer
from trainer.parameter_files import Written, load_buffers, read_parts, write_buffers, write_parts
from trainer.settings import ConfigError, TrainSettings

# A rank that waits for a refresh waits inside a collective; a dead rank is noticed by the driver,
# which ends the others, so this bound need not be short.
_COLLECTIVE_TIMEOUT = timedelta(hours=24)
# Ranks that cannot reach each other, behind a firewall perhaps, are to say so soon.
_MEETING_TIMEOUT = timedelta(minutes=10)


def start_process_group(device: str, *, rank: int, world_size: int, init_method: str) -> None:
    """Join the trainers' process group: gloo on the CPU, NCCL on GPUs. Collective.

    Args:
        device: "cpu" or "cuda".
        rank: this trainer.
        world_size: trainers.
        init_method: as in `torch.distributed.init_process_group`, e.g. ``tcp://127.0.0.1:29500``.
    """
    _deepspeed(device)
    # DeepSpeed reads these; each trainer sees its own device as the first (Ray shows it no other).
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size))
    backend = "nccl" if device == "cuda" else "gloo"
    meeting = dist.rendezvous(  # type: ignore[attr-defined]
        init_method, rank, world_size, timeout=_MEETING_TIMEOUT
    )
    store, rank, world_size = next(meeting)
    store.set_timeout(_COLLECTIVE_TIMEOUT)
    dist.init_process_group(
        backend, rank=rank, world_size=world_size, store=store, timeout=_COLLECTIVE_TIMEOUT
    )


def stop_process_group() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


class TrainingEngine:
    """A model, its optimizer and its schedule under DeepSpeed ZeRO."""

    def __init__(self, model: PlugLMForMaskedLM, settings: TrainSettings, device: str) -> None:
        """Wrap the model; collective. The process group must have been started."""
        deepspeed = _deepspeed(device)
        self.settings = settings
        self.device = torch.device(device)
        runtime = settings.runtime
        _check_number_format(deepspeed, runtime.precision)
        nn.Module.to(model, self.device)
        model.share_statistics()
        if runtime.activation_checkpointing:
            # transformers renamed it on the way; the older name is the only one of some versions.
            newer = getattr(model, "activation_checkpointing_enable", None)
            (newer or model.gradient_checkpointing_enable)()
        # What DeepSpeed does not wrap, and where it neither scales the loss nor tells the norm.
        self._bare = runtime.zero_stage == 0 and runtime.precision == "fp32"
        optimizer = make_optimizer(model, settings.optim)
        factor = lr_factor(settings.optim)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, factor),
            config=deepspeed_config(
                settings,
                on_gpu=device == "cuda",
                parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            ),
            dist_init_required=False,
        )
        self._bare_norm = torch.zeros(())
        self._scale_of_step = 1.0
        self._undo_first_update()
        if isinstance(optimizer, Lamb):
            sliced = runtime.zero_stage > 0
            layouts = held_state(self._engine).layouts()
            optimizer.set_layouts(layouts, sum_over_ranks if sliced else None)
        for module in model.modules():
            if isinstance(module, QueryBatchNorm):
                # DeepSpeed casts buffers with the weights; running statistics need float32.
                module.running_mean = module.running_mean.float()
                module.running_var = module.running_var.float()

    def _undo_first_update(self) -> None:
        """Stage 0 with narrow weights: DeepSpeed makes the moments by an update without gradient,
        which decays the weights and counts as a step."""
        refresh = getattr(self._engine.optimizer, "refresh_fp32_params", None)
        if self.settings.runtime.zero_stage == 0 and refresh is not None:
            self._engine.basic_optimizer.state.clear()
            refresh()

    @property
    def model(self) -> PlugLMForMaskedLM:
        """The wrapped model; under ZeRO-3 its weights are whole only inside `whole_weights`."""
        model: PlugLMForMaskedLM = self._engine.module
        return model

    @property
    def lr(self) -> float:
        """The learning rate of the next step (of the first parameter group)."""
        return float(self._engine.get_lr()[0])

    @property
    def grad_norm(self) -> float:
        """Norm of the last step's gradient, over ranks, before clipping; waits for the device."""
        known = self._engine.get_global_grad_norm()
        return float(self._bare_norm if known is None else known) / self._scale_of_step

    @property
    def step_applied(self) -> bool:
        """Whether the last step changed the weights, the same on all ranks.

        A step whose gradient is not finite is left out, under every stage and number format.
        """
        return bool(self._engine.was_step_applied())

    @property
    def scales_loss(self) -> bool:
        """Whether a step may be left out only because fp16 could not hold its gradient."""
        return self.settings.runtime.precision == "fp16"

    def weights_are_finite(self) -> bool:
        """Whether this rank's part of the weights is finite; not collective, waits."""
        parts = [held_part(parameter) for parameter in self.model.parameters()]
        return bool(torch.stack([torch.isfinite(part).all() for part in parts]).all())

    def forward_backward(self, **inputs: Any) -> Any:
        """One micro-batch: forward pass and backward pass; returns the model's output.

        A loss that is not finite makes the whole gradient so, and with it every rank's.
        """
        output = self._engine(**inputs)
        finite = torch.isfinite(output.loss.detach())
        loss = output.loss * torch.where(finite, 1.0, torch.nan).to(output.loss.dtype)
        if self._unscaled:
            loss = loss.float() * self._engine.optimizer.loss_scale
        self._engine.backward(loss)
        return output

    def step(self) -> None:
        """After every micro-batch: reduces; at the accumulation boundary updates the weights."""
        boundary = self._engine.is_gradient_accumulation_boundary()
        if boundary and self._unscaled:
            self._scale_of_step = float(self._engine.optimizer.loss_scale)
        if boundary and self._bare:
            # Here DeepSpeed clips, but does not tell the norm. The gradients are reduced by now.
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            self._bare_norm = torch.nn.utils.get_total_norm(grads)
            if not bool(torch.isfinite(self._bare_norm)):
                leave_step_out(self._engine)
                return
        self._engine.step()

    @property
    def _unscaled(self) -> bool:
        """Stage 0 with fp16: DeepSpeed divides gradients by a scale that it left out before."""
        return self.scales_loss and self.settings.runtime.zero_stage == 0

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation mode."""
        self._engine.train(mode)

    @contextmanager
    def whole_weights(self) -> Iterator[PlugLMForMaskedLM]:
        """The model with whole weights on every rank, for reading; collective under ZeRO-3."""
        if self.settings.runtime.zero_stage < 3:
            yield self.model
            return
        deepspeed = _deepspeed(self.device.type)
        with deepspeed.zero.GatheredParameters(list(self.model.parameters()), modifier_rank=None):
            yield self.model

    def key_weights(self) -> dict[str, Tensor]:
        """Float32 CPU copies of the weights that make keys; collective under ZeRO-3."""
        named = [
            (n, p)
            for n, p in self.model.pluglm.named_parameters()
            if is_key_weight(n, self.model.config)
        ]
        if self.settings.runtime.zero_stage < 3:
            return {name: _copy(p) for name, p in named}
        deepspeed = _deepspeed(self.device.type)
        with deepspeed.zero.GatheredParameters([p for _, p in named], modifier_rank=None):
            return {name: _copy(p) for name, p in named}

    def save(self, directory: Path) -> Written:
        """Write this rank's part of weights, moments and buffers; not collective.

        Raises:
            OSError: the disk refused.
        """
        rank, ranks = dist.get_rank(), dist.get_world_size()
        written = write_parts(directory, held_state(self._engine), rank=rank, ranks=ranks)
        if rank == 0:
            # They are the same on every rank.
            written.files.update(write_buffers(directory, self.model))
        return written

    def counters(self) -> dict[str, Any]:
        """What `load` needs beside the files: steps, and the loss scale of fp16. Plain values."""
        return read_counters(self._engine)

    def load(self, directory: Path, counters: Mapping[str, Any]) -> None:
        """Read what any number of trainers wrote under any ZeRO stage; collective.

        Args:
            directory: the checkpoint.
            counters: as `counters` told them when it was written.

        Raises:
            CheckpointError: it is damaged, or of another model.
        """
        shapes = {
            name: tuple(getattr(p, "ds_shape", p.shape))
            for name, p in self.model.named_parameters()
        }
        held = held_state(self._engine)
        steps = counters["global_steps"] - counters["skipped_steps"]
        read_parts(directory, held, shapes, step=steps)
        load_buffers(directory, self.model)
        held.spread()
        set_counters(self._engine, counters)


def _check_number_format(deepspeed: Any, precision: str) -> None:
    accelerator = deepspeed.accelerator.get_accelerator()
    for name, supported in (
        ("fp16", accelerator.is_fp16_supported),
        ("bf16", accelerator.is_bf16_supported),
    ):
        if precision == name and not supported():
            raise ConfigError(
                f'runtime.precision = "{name}": the {accelerator.device_name()} of this machine '
                'cannot compute in it; "fp32" works everywhere'
            )


def _copy(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)


def _deepspeed(device: str) -> Any:
    """Import DeepSpeed for a device; it reads its accelerator once, from the environment."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    import deepspeed
    import deepspeed.ops

    if device == "cpu":
        # Otherwise DeepSpeed compiles a C++ collective at first use, which takes a minute and can
        # hang or abort when processes do it at once; gloo and torch's AdamW need none of its ops.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed
