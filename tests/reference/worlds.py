"""Small random worlds on which the model and its reference are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import model
from model import PlugLMConfig
from tests.reference.pluglm_reference import Reference, Result, StoredMemory

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "key_size": 8,
    "memory_ffn_size": 12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LIVE = {"fixed_keys": False, "fixed_values": False}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a memory answers."""

    ids: Tensor
    tokens: Tensor
    doc_ids: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None


class FlatMemory:
    """Exact search in one product, and the contract's pads when there are too few entries.

    Its answers carry the stored keys and, where it has them, values: a model that encodes entries
    again must not look at them.
    """

    def __init__(
        self,
        keys_NQ: Tensor,
        tokens_NS: Tensor,
        ids_N: Tensor,
        k: int,
        values_NJH: Tensor | None = None,
    ) -> None:
        self.keys_NQ, self.tokens_NS, self.ids_N, self.k = keys_NQ, tokens_NS, ids_N, k
        self.values_NJH = values_NJH
        self.calls: list[Tensor] = []

    @property
    def stored(self) -> StoredMemory:
        return StoredMemory(
            keys_NQ=self.keys_NQ,
            tokens_NS=self.tokens_NS,
            ids_N=self.ids_N,
            values_NJH=self.values_NJH,
        )

    def lookup(self, queries_BQ: Tensor) -> Answer:
        self.calls.append(queries_BQ)
        found = min(self.k, len(self.ids_N))
        rows_Bf = (queries_BQ @ self.keys_NQ.to(queries_BQ).T).topk(found, dim=1).indices

        def answer(of_N: Tensor, pad: float) -> Tensor:
            places = of_N.new_full((len(queries_BQ), self.k, *of_N.shape[1:]), pad)
            places[:, :found] = of_N[rows_Bf]
            return places

        ids_BK = answer(self.ids_N, -1)
        return Answer(
            ids=ids_BK,
            tokens=answer(self.tokens_NS, 0),
            doc_ids=document_of(ids_BK),
            keys=answer(self.keys_NQ.float(), 0),
            values=None if self.values_NJH is None else answer(self.values_NJH, 0),
        )


def document_of(ids: Tensor) -> Tensor:
    """Two entries to a document; -1 stays -1."""
    return torch.where(ids >= 0, ids // 10, -1)


HEADS = {
    "masked_lm": "PlugLMForMaskedLM",
    "sequence": "PlugLMForSequenceClassification",
    "tokens": "PlugLMForTokenClassification",
    "spans": "PlugLMForQuestionAnswering",
}
"""The model's class for each of the reference's tasks."""


@dataclass(frozen=True, kw_only=True)
class World:
    """A model with random weights everywhere, a padded batch, and a memory with stale keys.

    Attributes:
        labels: the masked-LM labels; `targets` is what the model's own head takes.
    """

    model: Any
    inputs: dict[str, Tensor]
    labels: Tensor
    memory: FlatMemory
    task: str
    targets: dict[str, Tensor]

    def reference(self, weights: dict[str, Tensor], *, training: bool) -> Result:
        """The reference's pass over this world, with these weights."""
        return Reference(
            weights, self.model.config.to_dict(), training=training, task=self.task
        ).run(
            *self.inputs.values(), targets=self.targets, memory=self.memory.stored, k=self.memory.k
        )


def make_model(seed: int = 0, task: str = "masked_lm", **settings: Any) -> Any:
    """A float64 model whose every parameter and statistic differs from its neutral value."""
    model_class = getattr(model, HEADS[task])
    made = model_class(PlugLMConfig(**(SIZES | settings))).double()
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor, scale: float) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype) * scale

    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(("LayerNorm.weight", "query_norm.weight", "beta")):
                parameter.copy_(1 + noise(parameter, 0.3))
            elif parameter.ndim == 2:
                parameter.copy_(noise(parameter, parameter.shape[1] ** -0.5))
            else:
                parameter.copy_(noise(parameter, 0.3))
        for name, buffer in made.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(noise(buffer, 0.5))
            elif name.endswith("running_var"):
                buffer.copy_(noise(buffer, 0.5).exp())
    return made


def make_world(
    *,
    seed: int = 0,
    entries: int = 14,
    k: int = 3,
    staleness: float = 0.5,
    task: str = "masked_lm",
    **settings: Any,
) -> World:
    """Sequences of 9, 6, 2 and 1 tokens; entries of 0 to 6 tokens, the emptiest of them found."""
    made = make_model(seed, task, **settings)
    config = made.config
    generator = torch.Generator().manual_seed(seed + 1)
    lengths = torch.tensor([9, 6, 2, 1])
    mask = (torch.arange(9) < lengths[:, None]).long()
    vocab = config.vocab_size
    input_ids = torch.randint(1, vocab, (4, 9), generator=generator) * mask
    labels = torch.full((4, 9), -1 if config.legacy else -100)
    for row, position in ((0, 1), (0, 4), (0, 8), (1, 0), (1, 5), (3, 0)):
        labels[row, position] = int(torch.randint(1, vocab, (), generator=generator))
    tokens = torch.randint(1, vocab, (entries, 6), generator=generator)
    entry_lengths = torch.randint(1, 7, (entries,), generator=generator)
    entry_lengths[0] = 0
    tokens = tokens * (torch.arange(6) < entry_lengths[:, None])
    inputs = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "token_type_ids": (torch.arange(9) > 3).long().expand(4, -1) * mask,
    }
    noise = torch.randn(entries, config.key_size, generator=generator, dtype=torch.float64)
    keys = noise
    values = None
    if config.num_memory_layers:
        oracle = Reference(leaves(made), config.to_dict() | LIVE, training=False)
        with torch.no_grad():
            encoded = [oracle.encode_entry(row) for row in tokens]
        # As exact in the types in which a memory keeps them.
        keys = (torch.stack([key for key, _ in encoded]) + staleness * noise).float().double()
        if config.fixed_values:
            values = stale_values([v for _, v in encoded], tokens, staleness, generator)
    world = World(
        model=made,
        inputs=inputs,
        labels=labels,
        memory=FlatMemory(keys, tokens, torch.arange(entries) * 5 + 2, k, values),
        task=task,
        targets={"labels": labels} if task == "masked_lm" else targets_of(task, made, mask),
    )
    if config.num_memory_layers:
        # The entry without tokens must be found: give it the key that one sequence asks for.
        with torch.no_grad():
            asked = world.reference(leaves(made), training=False).values
        first = config.num_hidden_layers - config.num_memory_layers
        keys[0] = (2 * asked[f"layer{first}.query"][1]).float()
    return world


def stale_values(
    values: list[Tensor], tokens_NS: Tensor, staleness: float, generator: torch.Generator
) -> Tensor:
    """Float16 [N,J,H], away from what the weights give; J is 1 or, an entry's tokens, S."""
    many = any(len(v) != 1 for v in values)
    size = values[0].shape[-1]
    stored = torch.zeros(len(values), tokens_NS.shape[1] if many else 1, size, dtype=torch.float64)
    for row, value_JH in enumerate(values):
        stored[row, : len(value_JH)] = value_JH
    noise = torch.randn(stored.shape, generator=generator, dtype=torch.float64)
    return (stored + staleness * noise).half()


def targets_of(task: str, made: Any, mask_BT: Tensor) -> dict[str, Tensor]:
    """What each head but the masked LM's is to say about the four sequences."""
    if task == "spans":
        start, end = torch.tensor([2, 0, 1, 0]), torch.tensor([5, 3, 1, 0])
        return {"start_positions": start, "end_positions": end}
    classes = made.config.num_labels
    if task == "tokens":
        labels = torch.arange(mask_BT.numel()).view(mask_BT.shape) % classes
        labels[0, 2:4] = -100
        return {"labels": torch.where(mask_BT.bool(), labels, -100)}
    kind = made.config.problem_type
    if kind == "single_label_classification":
        return {"labels": torch.arange(4) % classes}
    generator = torch.Generator().manual_seed(11)
    real = torch.randn(4, classes, generator=generator, dtype=torch.float64)
    if kind == "multi_label_classification":
        return {"labels": (real > 0).double()}
    return {"labels": real[:, 0] if classes == 1 else real}


def leaves(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights and statistics by name, copied to float64; parameters want a gradient."""
    trained = dict(model.named_parameters())
    return {
        name: value.detach().double().clone().requires_grad_(name in trained)
        for name, value in model.state_dict().items()
    }


def assert_close(
    given: Tensor, wanted: Tensor, relative: float, what: str, floor: float = 0
) -> None:
    """The largest error is at most `relative` of the largest wanted value (or of `floor`)."""
    assert given.shape == wanted.shape, f"{what}: {tuple(given.shape)}, not {tuple(wanted.shape)}"
    if not wanted.numel():
        return
    given, wanted = given.detach().double(), wanted.detach().double()
    error = float((given - wanted).abs().max())
    scale = max(float(wanted.abs().max()), floor)
    assert error <= relative * scale, f"{what}: error {error:.3g} where values reach {scale:.3g}"
