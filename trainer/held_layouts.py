"""DeepSpeed's three layouts of the training state, each as the same list of parts.

They go by attributes of DeepSpeed 0.19's optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer.held_state import WEIGHT, HeldState, Part
from trainer.lamb import Layout, Span


def held_state(engine: Any) -> HeldState:
    """The state of a DeepSpeed engine."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return _SliceOfEach(engine)
    # Stages 1 and 2, and stage 1 with bfloat16 weights and float32 gradients, which is a class of
    # its own.
    return _SliceOfAll(engine) if stage else _Whole(engine)


def held_part(parameter: Any) -> Tensor:
    """What a rank holds of a parameter, [n] or of its shape: without what fills up its slice.

    Under ZeRO-3 the parameter itself is empty. DeepSpeed never writes the end of the last slices,
    so that there is whatever the memory held before.
    """
    if not hasattr(parameter, "ds_tensor"):
        whole: Tensor = parameter.detach()
        return whole
    _, numel = _place(parameter)
    slice_: Tensor = parameter.ds_tensor.detach().view(-1)[:numel]
    return slice_


def _place(parameter: Any) -> tuple[int, int]:
    """ZeRO-3: (where this rank's slice of a parameter begins, its elements without padding)."""
    padded = parameter.partition_numel()
    start = padded * parameter.ds_zero_partition_rank
    return start, max(0, min(padded, parameter.ds_numel - start))


class _Whole(HeldState):
    """Stage 0: every rank holds every parameter, in float32 beside a narrower one or by itself."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        narrow = getattr(engine.optimizer, "fp16_groups", [])
        masters = getattr(engine.optimizer, "fp32_groups", [])
        self._masters: dict[int, Tensor] = {
            id(parameter): master
            for group, wide in zip(narrow, masters, strict=True)
            for parameter, master in zip(group, wide, strict=True)
        }

    def parts(self) -> list[Part]:
        return [_whole(name, p, self._flat(p)) for name, p in self._model.named_parameters()]

    def spread(self) -> None:
        for parameter in self._model.parameters():
            master = self._masters.get(id(parameter))
            if master is not None:
                parameter.data.copy_(master.data)

    def _stores(self) -> Iterator[Tensor]:
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                yield self._masters.get(id(parameter), parameter)

    def _flat(self, parameter: nn.Parameter) -> Callable[[str], Tensor]:
        store = self._masters.get(id(parameter), parameter)
        return lambda kind: self._state(store, kind).view(-1)


class _SliceOfAll(HeldState):
    """Stages 1 and 2: a rank's slice of each group's parameters, laid end to end."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        wrapper = engine.optimizer
        flat = getattr(wrapper, "single_partition_of_fp32_groups", None)
        self._slices: list[Tensor] = wrapper.fp32_groups_flat_partition if flat is None else flat

    def parts(self) -> list[Part]:
        parts = []
        for name, parameter in _named(self._model):
            if not parameter.requires_grad:
                parts.append(_whole(name, parameter, partial(_frozen, parameter)))
            elif parameter._hp_mapping is not None:
                parts.append(self._part(name, parameter, parameter._hp_mapping))
        return parts

    def spread(self) -> None:
        self._engine.optimizer.update_lp_params()

    def layouts(self) -> dict[int, Layout]:
        wrapper = self._engine.optimizer
        groups = getattr(wrapper, "bit16_groups", None) or wrapper.bf16_groups
        found = {}
        for store, group in zip(self._slices, groups, strict=True):
            spans = []
            for which, parameter in enumerate(group):
                if parameter._hp_mapping is not None:
                    place = parameter._hp_mapping.hp_fragment_address
                    spans.append(Span(start=place.start, numel=place.numel, which=which))
            found[id(store)] = Layout(spans=tuple(spans), parameters=len(group))
        return found

    def _stores(self) -> Iterator[Tensor]:
        yield from self._slices

    def _part(self, name: str, parameter: nn.Parameter, mapping: Any) -> Part:
        store, place = self._slices[mapping.param_group_index], mapping.hp_fragment_address

        def read(kind: str) -> Tensor:
            return self._state(store, kind).narrow(0, place.start, place.numel)

        return Part(
            name=name,
            shape=tuple(parameter.shape),
            start=mapping.lp_fragment_address.start,
            numel=place.numel,
            trainable=True,
            replicated=False,
            read=read,
            write=lambda kind, values: _set(read(kind), values),
        )


class _SliceOfEach(HeldState):
    """Stage 3: a rank's slice of every parameter, the last one padded; perhaps on NVMe."""

    def parts(self) -> list[Part]:
        parts = []
        for name, parameter in _named(self._model):
            padded = parameter.partition_numel()
            start, numel = _place(parameter)
            if not numel:
                continue
            parts.append(
                Part(
                    name=name,
                    shape=tuple(parameter.ds_shape),
                    start=start,
                    numel=numel,
                    trainable=parameter.requires_grad,
                    replicated=False,
                    read=partial(self._read, parameter, numel),
                    write=partial(self._write, parameter, padded),
                )
            )
        return parts

    def spread(self) -> None:
        wrapper = self._engine.optimizer
        wrapper._partition_all_parameters()
        for number in range(len(wrapper.fp32_partitioned_groups_flat)):
            swapped = wrapper._swappable_optimizer_subgroup(number)
            if swapped:
                wrapper._optimizer_states_and_gradient_swap_in(number)
            wrapper._reassign_or_swap_out_partitioned_parameters(number)
            if swapped:
                wrapper._optimizer_states_and_gradient_swap_out(number)
        if wrapper.persistent_parameters:
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)

    def begin_moments(self, names: Sequence[str], step: int) -> None:
        wrapper = self._engine.optimizer
        for number, store in enumerate(wrapper.fp32_partitioned_groups_flat):
            swapped = wrapper._swappable_optimizer_subgroup(number)
            if swapped:
                wrapper._optimizer_states_and_gradient_swap_in(number)
            self._make(store, names, step)
            if swapped:
                wrapper._optimizer_states_and_gradient_swap_out(number)

    def layouts(self) -> dict[int, Layout]:
        wrapper = self._engine.optimizer
        found = {}
        stores = wrapper.fp32_partitioned_groups_flat
        for store, group in zip(stores, wrapper.fp16_groups, strict=True):
            spans, before = [], 0
            for which, parameter in enumerate(group):
                _, numel = _place(parameter)
                if numel:
                    spans.append(Span(start=before, numel=numel, which=which))
                before += parameter.partition_numel()
            found[id(store)] = Layout(spans=tuple(spans), parameters=len(group))
        return found

    def _stores(self) -> Iterator[Tensor]:
        yield from self._engine.optimizer.fp32_partitioned_groups_flat

    def _read(self, parameter: Any, numel: int, kind: str) -> Tensor:
        if not parameter.requires_grad:
            frozen: Tensor = parameter.ds_tensor.detach()
            return frozen.view(-1)[:numel]
        key = None if kind == WEIGHT else kind
        held: Tensor = self._engine.optimizer.get_local_fp32_param(parameter, key)
        return held.detach()[:numel]

    def _write(self, parameter: Any, padded: int, kind: str, values: Tensor) -> None:
        whole = torch.zeros(padded, dtype=values.dtype)
        whole[: len(values)] = values
        if not parameter.requires_grad:
            _set(parameter.ds_tensor.detach().view(-1), whole)
            return
        key = None if kind == WEIGHT else kind
        self._engine.optimizer.set_local_hp_param(whole, parameter, key)


def _named(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The parameters with what DeepSpeed has hung on them."""
    yield from model.named_parameters()


def _frozen(parameter: nn.Parameter, kind: str) -> Tensor:
    return parameter.detach().view(-1)


def _whole(name: str, parameter: nn.Parameter, read: Callable[[str], Tensor]) -> Part:
    return Part(
        name=name,
        shape=tuple(parameter.shape),
        start=0,
        numel=parameter.numel(),
        trainable=parameter.requires_grad,
        replicated=True,
        read=read,
        write=lambda kind, values: _set(read(kind), values),
    )


def _set(place: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        place.copy_(values)
