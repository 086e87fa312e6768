"""torch.compile gives the same numbers and gradients; what it cannot trace only breaks graphs."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_server.store.store import Store
from tests.ecosystem.colours import encode, fact, make_memory, make_model

INPUTS = (fact("apple", "[MASK]"), "sky is [MASK]", "[MASK] is not good")
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def targets(head: str, inputs: dict[str, Tensor]) -> Tensor:
    if head == "MaskedLM":
        return torch.where(inputs["input_ids"] == 4, 7, -100)
    return torch.tensor([0, 1, 0])


def assert_same(model: Any, compiled: Any, own: Any, labels: Tensor, *, training: bool) -> None:
    """Logits, loss and gradients of `compiled`, whose parameters are those of `own`."""
    inputs = encode(*INPUTS)
    results = []
    for one, call in ((model, model), (own, compiled)):
        one.train(training)
        one.zero_grad()
        output = call(**inputs, labels=labels)
        output.loss.backward()
        results.append(output)
    torch.testing.assert_close(results[1].logits, results[0].logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[1].loss, results[0].loss)
    # Every path was trained, the one over the memory too.
    assert model.pluglm.layers[-1].query_proj.weight.grad.any()
    for (name, parameter), wanted in zip(own.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, wanted.grad, atol=1e-6, rtol=1e-4, msg=name)


def compile_layers(model: Any, backend: str) -> Any:
    for layer in model.pluglm.layers:
        layer.compile(backend=backend)
    return model


@pytest.mark.parametrize(("head", "whole"), [("MaskedLM", False), ("SequenceClassification", True)])
def test_traced_graphs_are_the_model(head: str, whole: bool, store: Store) -> None:
    """With padding, which is packed, and with batch statistics, which count: both break graphs."""
    model = make_model(head, query_norm="batch", memory_init="normal")
    model.attach(make_memory(store, model))
    own = copy.deepcopy(model)
    if whole:
        compiled = torch.compile(own, backend="aot_eager")
    else:
        compiled = compile_layers(own, "aot_eager")
    labels = targets(head, encode(*INPUTS))
    for training in (False, True):
        assert_same(model, compiled, own, labels, training=training)
    for (name, value), wanted in zip(own.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(value, wanted, msg=name)


def test_layers_without_padding_need_no_more_graphs_for_more_lengths() -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    model = make_model(num_memory_layers=0)
    compile_layers(model, counter)
    for texts in (["snow is white"], ["coal is not white"], ["what colour is the sky ?"] * 2):
        inputs = encode(*texts)
        model(inputs["input_ids"])
    seen = counter.frame_count
    model(torch.full((3, 11), 6))
    assert counter.frame_count == seen


@needs_compiler
@pytest.mark.slow
def test_inductor_gives_the_same_numbers(store: Store) -> None:
    model = make_model(num_hidden_layers=1, memory_init="normal")
    model.attach(make_memory(store, model))
    own = copy.deepcopy(model)
    compile_layers(own, "inductor")
    assert_same(model, own, own, targets("MaskedLM", encode(*INPUTS)), training=True)
