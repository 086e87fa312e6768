"""Everything that a pass of the model computes, beside what the reference computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.pluglm_reference import Result
from tests.reference.worlds import World, assert_close, leaves

BY_POSITION = ("embeddings", "output", "attention_output", "ffn_output", "memory_output")
"""Intermediates with a vector per position; the others have one per sequence."""


def capture(model: Any, run: Callable[[], Any]) -> tuple[Any, dict[str, Tensor]]:
    """Run and collect, by hooks, the intermediates under the reference's names, as they are laid
    out in the model (which leaves the padding out where it can)."""
    seen: dict[str, Tensor] = {}
    hooks = []

    def watch(module: nn.Module, name: str) -> None:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            # Embeddings and first layers serve the input first and the retrieved entries later.
            seen.setdefault(name, output[0] if isinstance(output, tuple) else output)

        hooks.append(module.register_forward_hook(keep))

    watch(model.pluglm.embeddings, "embeddings")
    for i, layer in enumerate(model.pluglm.layers):
        watch(layer.LayerNorm, f"layer{i}.output")
        if hasattr(layer, "query_proj"):
            watch(layer.attention, f"layer{i}.attention_output")
            watch(layer.pooler, f"layer{i}.pooled")
            watch(layer.query_proj, f"layer{i}.query_pre_batchnorm")
            watch(layer.query_norm, f"layer{i}.query")
            watch(layer.knowledge_attention, f"layer{i}.memory_output")
            if hasattr(layer, "ffn"):
                watch(layer.ffn, f"layer{i}.ffn_output")
    try:
        output = run()
    finally:
        for hook in hooks:
            hook.remove()
    return output, seen


def laid_out(value: Tensor, kept_BT: Tensor) -> Tensor:
    """[n,H] of the kept positions, [B,T,H] or [B,1,H] -> [B,T,H]."""
    if value.ndim == 2:
        assert len(value) == int(kept_BT.sum()), f"{len(value)} rows for {int(kept_BT.sum())}"
        return value.new_zeros(*kept_BT.shape, value.shape[-1]).masked_scatter(
            kept_BT[..., None], value
        )
    return value.expand(*kept_BT.shape, -1)


def reference_pass(world: World, *, training: bool) -> tuple[Result, dict[str, Tensor]]:
    """The reference's result and its gradients by name; it has none for what takes no part."""
    weights = leaves(world.model)
    result = world.reference(weights, training=training)
    assert result.loss is not None
    result.loss.backward()
    return result, {n: w.grad for n, w in weights.items() if w.grad is not None}


def compare_gradients(model: nn.Module, wanted: dict[str, Tensor], relative: float) -> None:
    """Every parameter's gradient; where one side has none, the other's is zero."""
    largest = max(float(g.abs().max()) for g in wanted.values())
    # Some gradients are zero but for rounding (a key's bias): measure these on the whole. In
    # float32 the rounding of any of them is about that of the largest terms on the way to it.
    floor = largest * (1e-2 if relative < 1e-7 else 3e-2)
    for name, parameter in model.named_parameters():
        grad = wanted.get(name, torch.zeros_like(parameter))
        given = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_close(given, grad, relative, f"gradient of {name}", floor=floor)
    assert set(wanted) <= {name for name, _ in model.named_parameters()}


def compare_everything(world: World, relative: float, *, training: bool) -> Result:
    """Assert that one pass agrees: intermediates, ids, logits, loss, gradients, statistics.

    Returns:
        What the reference gave.
    """
    model = world.model.train(training)
    config = model.config
    wanted, grads = reference_pass(world, training=training)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    world.memory.calls.clear()
    given, seen = capture(model, lambda: model(**world.inputs, lookup=world.memory.lookup))
    model.load_state_dict(before, strict=False)

    tokens_BT = world.inputs["attention_mask"].bool()
    kept_BT = torch.ones_like(tokens_BT) if config.legacy else tokens_BT
    parts = 6 - (config.memory_ffn_size == 0)
    layers, reading = config.num_hidden_layers, config.num_memory_layers
    assert len(seen) == 1 + layers + parts * reading, sorted(seen)
    first_BT = torch.zeros_like(kept_BT)
    first_BT[:, 0] = True
    for name, value in seen.items():
        what = wanted.values[name]
        if name.rpartition(".")[2] in BY_POSITION:
            # A classifier of sequences wants the last layer's first positions only.
            alone = world.task == "sequence" and len(value) == len(first_BT) and value.ndim == 2
            places_BT = first_BT if alone and name.startswith(f"layer{layers - 1}.") else kept_BT
            value, what = laid_out(value, places_BT)[places_BT], what[places_BT]
        assert_close(value, what, relative, name)
    compare_retrievals(world, given.retrievals, wanted, relative)
    compare_logits(world, given, wanted, kept_BT, relative)

    labelled = model(**world.inputs, **world.targets, lookup=world.memory.lookup)
    if world.task == "masked_lm":
        chosen = world.labels != config.ignored_label
        assert_close(labelled.logits, wanted.logits[chosen], relative, "labelled logits")
    else:
        compare_logits(world, labelled, wanted, kept_BT, relative)
    assert_close(labelled.loss, wanted.loss, relative, "loss")
    model.zero_grad()
    labelled.loss.backward()
    compare_gradients(model, grads, relative)
    for name, value in wanted.running.items():
        assert_close(model.state_dict()[name], value, relative, name)
    assert bool(wanted.running) == (training and config.query_norm == "batch" and reading > 0)
    if not training:
        assert all(torch.equal(buffer, before[n]) for n, buffer in model.named_buffers())
    return wanted


def compare_retrievals(world: World, retrievals: Any, wanted: Result, relative: float) -> None:
    """Ids exactly; stored keys' scores, the keys of the cosine and the queries."""
    assert len(retrievals) == len(wanted.ids)
    for retrieval, ids, asked in zip(retrievals, wanted.ids, world.memory.calls, strict=True):
        assert torch.equal(retrieval.retrieved.ids, ids)
        found = ids >= 0
        values = {part: wanted.values[f"layer{retrieval.layer}.{part}"] for part in
                  ("key", "query", "topk_scores")}  # fmt: skip
        key = retrieval.key_BKQ[found[..., None].expand_as(retrieval.key_BKQ)]
        assert_close(key.view_as(values["key"]), values["key"], relative, "key")
        assert_close(retrieval.query_BQ, values["query"], relative, "query")
        keys = world.memory.keys_NQ.to(asked)
        scores = (asked @ keys.T).topk(min(ids.shape[1], len(keys))).values
        # The memory is asked in float32, whatever the model computes in.
        assert_close(scores, values["topk_scores"], max(relative, 1e-6), "topk_scores")


def compare_logits(
    world: World, given: Any, wanted: Result, kept_BT: Tensor, relative: float
) -> None:
    """Logits of sequences, or of positions that hold a token (all, in the published layout)."""
    if world.task == "sequence":
        assert_close(given.logits, wanted.logits, relative, "logits")
    elif world.task == "spans":
        # No answer starts or ends in the padding, in either layout.
        tokens_BT = world.inputs["attention_mask"].bool()
        for end, name in enumerate(("start_logits", "end_logits")):
            logits_BT = wanted.logits[..., end]
            assert_close(given[name][tokens_BT], logits_BT[tokens_BT], relative, name)
            if not tokens_BT.all():
                assert float(given[name][~tokens_BT].detach().max()) < -1e30, (
                    f"{name} of the padding"
                )
    else:
        assert_close(given.logits[kept_BT], wanted.logits[kept_BT], relative, "logits")
