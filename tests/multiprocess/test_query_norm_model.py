"""Two ranks of 16 sequences equal one of 32: the whole model's loss and all its gradients."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.multiprocess.ranks import run_ranks
from tests.reference.worlds import FlatMemory, World, assert_close, leaves, make_model

pytestmark = pytest.mark.multiprocess

BATCH, LENGTH, ENTRIES, K = 32, 9, 60, 3
CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "two-layers-of-tokens": {"num_memory_layers": 2, "value_pooling": "tokens"},
    "published": {"legacy": True},
}
SPLITS = ([16, 16], [27, 5])
Numbers = dict[str, Tensor]


def world_of(case: str) -> World:
    """32 sequences of different lengths in float32; the same on every rank."""
    made = make_model(**CASES[case]).float().train()
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, LENGTH + 1, (BATCH, 1), generator=generator)
    mask = (torch.arange(LENGTH) < lengths).long()
    ids = torch.randint(1, 40, (BATCH, LENGTH), generator=generator) * mask
    tokens = torch.randint(1, 40, (ENTRIES, 6), generator=generator)
    tokens *= torch.arange(6) < torch.randint(1, 7, (ENTRIES, 1), generator=generator)
    wanted = (torch.rand(BATCH, LENGTH, generator=generator) < 0.3) & mask.bool()
    labels = torch.where(wanted, ids, made.config.ignored_label)
    keys = torch.randn(ENTRIES, 8, generator=generator)
    return World(
        model=made,
        inputs={"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)},
        labels=labels,
        memory=FlatMemory(keys, tokens, torch.arange(ENTRIES), K),
        task="masked_lm",
        targets={"labels": labels},
    )


def one_pass(world: World, rows: slice, *, bf16: bool = False) -> Numbers:
    """Loss (over the labels of all 32), gradients, statistics, and the queries before the norm."""
    model = world.model
    raw: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _m, _a, out: raw.append(out.detach()))
        for name, module in model.named_modules()
        if name.endswith("query_proj")
    ]
    count = int((world.labels != model.config.ignored_label).sum())
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = model(
            **{name: value[rows] for name, value in world.inputs.items()},
            labels=world.labels[rows],
            lookup=world.memory.lookup,
            loss_denominator=count,
        )
    output.loss.backward()
    for hook in hooks:
        hook.remove()
    queries = [r.query_BQ.detach() for r in output.retrievals]
    ids = torch.stack([r.retrieved.ids for r in output.retrievals], 1)
    numbers: Numbers = {"loss": output.loss.detach(), "ids": ids}
    numbers |= {f"raw.{i}": q for i, q in enumerate(raw)}
    numbers |= {f"query.{i}": q for i, q in enumerate(queries)}
    numbers |= {f"grad.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return numbers | {f"after.{n}": b.clone() for n, b in model.named_buffers()}


def on_a_rank(rank: int) -> dict[tuple[str, int, bool], Numbers]:
    """Every case, cut in both ways, in float32 and under bf16 autocast."""
    results = {}
    for case, (cut, sizes), bf16 in itertools.product(CASES, enumerate(SPLITS), (False, True)):
        world = world_of(case)
        world.model.share_statistics()
        first = sum(sizes[:rank])
        rows = slice(first, first + sizes[rank])
        results[case, cut, bf16] = one_pass(world, rows, bf16=bf16)
    return results


@cache
def both_ranks() -> list[dict[tuple[str, int, bool], Numbers]]:
    return run_ranks(on_a_rank, 2)


def merged(first: Numbers, second: Numbers) -> Numbers:
    """What the two ranks hold together: rows beside each other, losses and gradients summed."""
    both: Numbers = {}
    for name in first.keys() | second.keys():
        parts = [numbers[name] for numbers in (first, second) if name in numbers]
        if name.startswith("after."):
            assert torch.equal(*parts), f"ranks keep the same {name}"
            both[name] = parts[0]
        elif name.startswith(("raw", "query", "ids")):
            both[name] = torch.cat(parts)
        else:
            both[name] = torch.stack(parts).sum(0)
    return both


def test_loss_and_all_gradients_of_two_ranks_are_those_of_one() -> None:
    ranks = both_ranks()
    for case in CASES:
        world = world_of(case)
        weights = leaves(world.model)
        exact = world.reference(weights, training=True)
        assert exact.loss is not None
        exact.loss.backward()
        wanted = one_pass(world, slice(0, BATCH))
        alone = one_pass(world_of(case), slice(0, 16))
        assert not torch.allclose(alone["query.0"], wanted["query.0"][:16], atol=0.01)
        for cut, sizes in enumerate(SPLITS):
            what = f"{case} {sizes}"
            given = merged(ranks[0][case, cut, False], ranks[1][case, cut, False])
            assert torch.equal(given["ids"], wanted["ids"]), what
            assert given.keys() == wanted.keys()
            largest = max(float(g.abs().max()) for n, g in wanted.items() if n.startswith("grad."))
            for name, value in wanted.items():
                floor = largest if name.startswith("grad.") else 0
                assert_close(given[name].float(), value.float(), 1e-5, f"{what} {name}", floor)
            # And both are what the formulas say, so that no rank's share is lost on both sides.
            assert_close(given["loss"], exact.loss, 1e-5, f"{what} loss")
            for name, weight in weights.items():
                if weight.grad is not None and f"grad.{name}" in given:
                    assert_close(
                        given[f"grad.{name}"], weight.grad, 1e-5, f"{what} {name}", largest
                    )


def test_under_bf16_autocast_the_statistics_are_float32s() -> None:
    ranks = both_ranks()
    for case in CASES:
        before = dict(world_of(case).model.named_buffers())
        layers = sorted(n for n in before if n.endswith("running_mean"))
        for cut in range(len(SPLITS)):
            given = merged(ranks[0][case, cut, True], ranks[1][case, cut, True])
            for i, name in enumerate(layers):
                raw = given[f"raw.{i}"]
                assert raw.dtype == torch.float32, "queries are made in full precision"
                # In bf16, where 1.004 is 1, the sums would be off by a part in a hundred.
                mean, variance = raw.double().mean(0), raw.double().var(0)
                for part, moved in (("running_mean", mean), ("running_var", variance)):
                    key = name.replace("running_mean", part)
                    assert given[f"after.{key}"].dtype == torch.float32
                    wanted = 0.9 * before[key].double() + 0.1 * moved
                    assert_close(given[f"after.{key}"], wanted, 1e-6, f"{case} {key}")
                assert given[f"query.{i}"].dtype == torch.float32
            assert all(bool(g.isfinite().all()) for g in given.values())
