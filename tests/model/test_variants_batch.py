"""What the model saves itself computing changes nothing: padding, duplicates, unasked positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.reference.worlds import Answer, World, assert_close, make_world

EXACT = 1e-10

VARIANTS: dict[str, dict[str, Any]] = {
    "shared": {},
    "separate": {"value_pooling": "separate", "query_norm": "layer"},
    "tokens": {"value_pooling": "tokens", "query_norm": "layer"},
    "single-head": {"memory_attention": "single_head", "value_pooling": "tokens"},
    "sentence-level": {"memory_attention": "sentence_level", "query_norm": "none"},
    "two-layers": {"num_memory_layers": 2, "value_pooling": "tokens"},
    "first-1": {"entry_encoder": "first_n", "entry_encoder_layers": 1},
    "first-1-tokens-max": {
        "entry_encoder": "first_n",
        "entry_encoder_layers": 1,
        "entry_pooler": "max",
        "value_pooling": "tokens",
    },
    "fixed-keys": {"fixed_keys": True},
    "fixed-values": {"fixed_values": True, "value_pooling": "tokens"},
}
variants = pytest.mark.parametrize("variant", VARIANTS)
Lookup = Callable[[Tensor], Answer]


def loss_and_gradients(
    world: World, lookup: Lookup | None = None, **inputs: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """In training mode, without dropout."""
    model = world.model.train()
    model.zero_grad()
    given = world.inputs | world.targets | inputs
    loss = model(**given, lookup=lookup or world.memory.lookup).loss
    loss.backward()
    return loss.detach(), {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def assert_same(
    given: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]]
) -> None:
    assert_close(given[0], wanted[0], EXACT, "loss")
    largest = max(float(g.abs().max()) for g in wanted[1].values())
    assert largest > 1e-3
    assert given[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        assert_close(given[1][name], grad, EXACT, name, floor=largest)


def crowded(world: World) -> Lookup:
    """Answers in which every sequence gets the same entries, the first of them twice."""

    def lookup(queries_BQ: Tensor) -> Answer:
        found = world.memory.lookup(queries_BQ)
        parts = {name: getattr(found, name) for name in vars(found)}

        def crowd(of_BK: Tensor) -> Tensor:
            first = of_BK[:1].expand_as(of_BK)
            return torch.cat([first, first[:, :1], of_BK[:, 1:2]], 1)

        return Answer(**{n: None if v is None else crowd(v) for n, v in parts.items()})

    return lookup


def each_its_own(lookup: Lookup) -> Lookup:
    """The same answers under ids of which no two are equal, so that none can be merged."""

    def renamed(queries_BQ: Tensor) -> Answer:
        found = lookup(queries_BQ)
        fresh = torch.arange(found.ids.numel()).view_as(found.ids)
        return replace(found, ids=torch.where(found.ids >= 0, fresh, -1))

    return renamed


@variants
def test_entries_that_are_retrieved_again_count_again(variant: str) -> None:
    world = make_world(**VARIANTS[variant])
    lookup = crowded(world)
    ids = lookup(torch.zeros(4, 8)).ids
    assert len(ids.unique()) <= 5 < ids.numel()
    assert_same(loss_and_gradients(world, lookup), loss_and_gradients(world, each_its_own(lookup)))


@pytest.mark.parametrize("entries", [2, 14])
@variants
def test_results_do_not_depend_on_which_sequences_share_entries(variant: str, entries: int) -> None:
    world = make_world(**VARIANTS[variant], entries=entries, k=4)
    plain = world.memory.lookup
    assert_same(loss_and_gradients(world), loss_and_gradients(world, each_its_own(plain)))


def test_each_entry_of_a_batch_is_encoded_once() -> None:
    world = make_world(num_memory_layers=1, k=4)
    rows: list[int] = []
    hook = world.model.pluglm.entry_encoder.register_forward_hook(
        lambda _module, args, _output: rows.append(len(args[0]))
    )
    output = world.model(**world.inputs, lookup=crowded(world))
    hook.remove()
    assert rows == [len(output.retrievals[0].retrieved.ids.unique())]


MASKS = {
    "right": [[1] * 9, [1] * 6 + [0] * 3, [1] * 2 + [0] * 7, [1] + [0] * 8],
    "left": [[1] * 9, [0] * 3 + [1] * 6, [0] * 7 + [1] * 2, [0] * 8 + [1]],
    "holes": [[1] * 9, [1, 0] * 4 + [1], [1, 1, 0, 0, 1, 1, 0, 0, 1], [1, 0, 0, 1, 0, 0, 0, 0, 0]],
    "none": [[1] * 9] * 4,
}


def masked(world: World, where: str) -> dict[str, Tensor]:
    """The world's inputs under another mask, labels on some of its tokens."""
    mask = torch.tensor(MASKS[where])
    labels = torch.where((mask == 1) & (torch.arange(9) % 3 == 0), 7, -100)
    return {"attention_mask": mask, "labels": labels, "input_ids": torch.arange(36).view(4, 9) + 1}


@pytest.mark.parametrize("where", MASKS)
@variants
def test_padding_that_is_not_computed_changes_nothing(variant: str, where: str) -> None:
    settings = VARIANTS[variant]
    worlds = [make_world(**settings, unpad_inputs=unpad) for unpad in (True, False)]
    inputs = masked(worlds[0], where)
    assert_same(*(loss_and_gradients(world, **inputs) for world in worlds))
    kept = inputs["attention_mask"].bool()
    given = worlds[0].inputs | inputs
    del given["labels"]
    hidden = [
        w.model.eval().pluglm(**given, lookup=w.memory.lookup).last_hidden_state for w in worlds
    ]
    assert_close(hidden[0][kept], hidden[1][kept], EXACT, "hidden states of tokens")
    assert not hidden[0][~kept].any(), "where nothing is computed there are zeros"


@pytest.mark.parametrize("unpad", [True, False])
@variants
def test_what_stands_in_the_padding_does_not_matter(variant: str, unpad: bool) -> None:
    world = make_world(**VARIANTS[variant], unpad_inputs=unpad)
    padding = world.inputs["attention_mask"] == 0
    noise = {
        "input_ids": torch.where(padding, 9, world.inputs["input_ids"]),
        "token_type_ids": torch.where(padding, 1, world.inputs["token_type_ids"]),
        "attention_mask": world.inputs["attention_mask"].bool(),
    }
    assert_same(loss_and_gradients(world, **noise), loss_and_gradients(world))


@pytest.mark.parametrize("task", ["sequence", "tokens", "spans"])
def test_no_heads_loss_depends_on_how_far_a_batch_is_padded(task: str) -> None:
    settings = {"num_labels": 3, "problem_type": "single_label_classification"}
    world = make_world(task=task, **(settings if task != "spans" else {}))
    longer = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in world.inputs.items()}
    if task == "tokens":
        longer["labels"] = torch.nn.functional.pad(world.targets["labels"], (0, 3), value=-100)
    assert_same(loss_and_gradients(world, **longer), loss_and_gradients(world))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("variant", ["shared", "sentence-level", "first-1", "fixed-keys"])
def test_asked_positions_in_both_layouts(variant: str, legacy: bool) -> None:
    few_positions_equal_many(make_world(**VARIANTS[variant], legacy=legacy))


@pytest.mark.parametrize(
    "variant", ["separate", "tokens", "single-head", "two-layers", "fixed-values"]
)
def test_asked_positions_of_what_the_published_layout_lacks(variant: str) -> None:
    few_positions_equal_many(make_world(**VARIANTS[variant]))


def few_positions_equal_many(world: World) -> None:
    """Few asking positions are read another way than many; both must be right."""
    model = world.model.eval()
    ignored = model.config.ignored_label
    every = model(**world.inputs, lookup=world.memory.lookup).logits
    for asked in (1, 2, 3, 5, 6, 9):
        place = torch.zeros(4, 9, dtype=torch.bool)
        place[0, :asked] = True
        place[1, 5 : 5 + (asked > 3)] = True
        labels = torch.where(place, world.inputs["input_ids"], ignored)
        model.zero_grad()
        given = model(**world.inputs, labels=labels, lookup=world.memory.lookup)
        assert_close(given.logits, every[place], EXACT, f"logits of {asked} positions")
        given.loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        whole = model(**world.inputs, lookup=world.memory.lookup).logits
        torch.nn.functional.cross_entropy(whole[place], labels[place]).backward()
        largest = max(float(g.abs().max()) for g in grads.values())
        for name, parameter in model.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            mine = grads.get(name, torch.zeros_like(parameter))
            assert_close(mine, grad, EXACT, f"{name}, {asked} positions", floor=largest)


class FixedDropout(nn.Module):
    """Drops the same share of [B,A,T,N] each time, position by position."""

    def __init__(self, kept_BATN: Tensor) -> None:
        super().__init__()
        self.kept_BATN = kept_BATN

    def forward(self, probs_BATN: Tensor) -> Tensor:
        return probs_BATN * self.kept_BATN[:, :, : probs_BATN.shape[2]] / 0.7


@pytest.mark.parametrize("variant", ["shared", "tokens"])
def test_few_asked_positions_equal_many_under_the_same_dropout(variant: str) -> None:
    """Dropped shares do not sum to one, and what is added once per share must know it."""
    world = make_world(**VARIANTS[variant])
    model = world.model.train()
    attention = model.pluglm.layers[2].knowledge_attention
    places = 3 * (6 if model.config.value_pooling == "tokens" else 1)
    attention.dropout = FixedDropout(torch.rand(4, attention.heads, 9, places) < 0.7)
    place = torch.zeros(4, 9, dtype=torch.bool)
    place[:3, :2] = True
    found = world.memory.lookup(torch.zeros(4, 8))

    def fixed(_queries_BQ: Tensor) -> Answer:
        # The same entries in both passes, all of them full.
        return replace(found, tokens=found.tokens.clamp(min=1))

    every = model(**world.inputs, lookup=fixed).logits[place]
    labels = torch.where(place, world.inputs["input_ids"], -100)
    few = model(**world.inputs, labels=labels, lookup=fixed).logits
    assert_close(few, every, EXACT, "logits")


@variants
def test_longer_rows_of_pads_in_entries_change_no_gradient(variant: str) -> None:
    world = make_world(**VARIANTS[variant])

    def wider(queries_BQ: Tensor) -> Answer:
        found = world.memory.lookup(queries_BQ)
        values = found.values
        if values is not None and values.shape[2] > 1:
            values = torch.nn.functional.pad(values, (0, 0, 0, 4))
        return replace(found, tokens=torch.nn.functional.pad(found.tokens, (0, 4)), values=values)

    assert_same(loss_and_gradients(world, wider), loss_and_gradients(world))


@pytest.mark.parametrize("dropout", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
@variants
def test_dropout_is_drawn_afresh_in_training_and_absent_in_evaluation(
    variant: str, dropout: str
) -> None:
    world = make_world(**(VARIANTS[variant] | {dropout: 0.3}))
    clean = make_world(**VARIANTS[variant])
    model = world.model.train()
    losses = [model(**world.inputs, **world.targets, lookup=world.memory.lookup).loss
              for _ in range(2)]  # fmt: skip
    assert all(bool(torch.isfinite(loss)) for loss in losses)
    assert abs(float((losses[0] - losses[1]).detach())) > 1e-6
    losses[0].backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    model.load_state_dict(clean.model.state_dict())
    wanted = clean.model.eval()(**clean.inputs, lookup=clean.memory.lookup).logits
    given = [model.eval()(**world.inputs, lookup=clean.memory.lookup).logits for _ in range(2)]
    assert torch.equal(*given)
    assert_close(given[0], wanted, EXACT, "logits in evaluation")
