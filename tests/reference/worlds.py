"""Small random worlds on which the model and its reference are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model import PlugLMConfig, PlugLMForMaskedLM
from tests.reference.pluglm_reference import StoredMemory

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


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a memory answers."""

    ids: Tensor
    tokens: Tensor
    doc_ids: Tensor


class FlatMemory:
    """Exact search in one product, and the contract's pads when there are too few entries."""

    def __init__(self, keys_NQ: Tensor, tokens_NS: Tensor, ids_N: Tensor, k: int) -> None:
        self.keys_NQ, self.tokens_NS, self.ids_N, self.k = keys_NQ, tokens_NS, ids_N, k
        self.calls: list[Tensor] = []

    @property
    def stored(self) -> StoredMemory:
        return StoredMemory(keys_NQ=self.keys_NQ, tokens_NS=self.tokens_NS, ids_N=self.ids_N)

    def lookup(self, queries_BQ: Tensor) -> Answer:
        self.calls.append(queries_BQ)
        batch, entry_tokens = len(queries_BQ), self.tokens_NS.shape[1]
        ids = torch.full((batch, self.k), -1)
        tokens = torch.zeros((batch, self.k, entry_tokens), dtype=torch.int64)
        found = min(self.k, len(self.ids_N))
        rows = (queries_BQ @ self.keys_NQ.to(queries_BQ).T).topk(found, dim=1).indices
        ids[:, :found] = self.ids_N[rows]
        tokens[:, :found] = self.tokens_NS[rows]
        return Answer(ids=ids, tokens=tokens, doc_ids=document_of(ids))


def document_of(ids: Tensor) -> Tensor:
    """Two entries to a document; -1 stays -1."""
    return torch.where(ids >= 0, ids // 10, -1)


@dataclass(frozen=True, kw_only=True)
class World:
    """A model with random weights everywhere, a padded batch, and a memory with stale keys."""

    model: PlugLMForMaskedLM
    inputs: dict[str, Tensor]
    labels: Tensor
    memory: FlatMemory


def make_model(seed: int = 0, **settings: Any) -> PlugLMForMaskedLM:
    """A float64 model whose every parameter and statistic differs from its neutral value."""
    model = PlugLMForMaskedLM(PlugLMConfig(**(SIZES | settings))).double()
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor, scale: float) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype) * scale

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("LayerNorm.weight", "query_norm.weight", "beta")):
                parameter.copy_(1 + noise(parameter, 0.3))
            elif parameter.ndim == 2:
                parameter.copy_(noise(parameter, parameter.shape[1] ** -0.5))
            else:
                parameter.copy_(noise(parameter, 0.3))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(noise(buffer, 0.5))
            elif name.endswith("running_var"):
                buffer.copy_(noise(buffer, 0.5).exp())
    return model


def make_world(
    *, seed: int = 0, entries: int = 14, k: int = 3, staleness: float = 0.5, **settings: Any
) -> World:
    """Sequences of 9, 6, 2 and 1 tokens; entries of 0 to 6 tokens, the emptiest of them found."""
    model = make_model(seed, **settings)
    generator = torch.Generator().manual_seed(seed + 1)
    lengths = torch.tensor([9, 6, 2, 1])
    mask = (torch.arange(9) < lengths[:, None]).long()
    vocab = model.config.vocab_size
    input_ids = torch.randint(1, vocab, (4, 9), generator=generator) * mask
    labels = torch.full((4, 9), model.config.ignored_label)
    for row, position in ((0, 1), (0, 4), (0, 8), (1, 0), (1, 5), (3, 0)):
        labels[row, position] = int(torch.randint(1, vocab, (), generator=generator))
    tokens = torch.randint(1, vocab, (entries, 6), generator=generator)
    entry_lengths = torch.randint(1, 7, (entries,), generator=generator)
    entry_lengths[0] = 0
    tokens = tokens * (torch.arange(6) < entry_lengths[:, None])
    keys = torch.randn(entries, model.config.key_size, generator=generator, dtype=torch.float64)
    if model.config.num_memory_layers:
        with torch.no_grad():
            fresh = model.pluglm.entry_encoder.keys(tokens, model.pluglm.embeddings)
        keys = fresh + staleness * keys
    inputs = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "token_type_ids": (torch.arange(9) > 3).long().expand(4, -1) * mask,
    }
    memory = FlatMemory(keys, tokens, torch.arange(entries) * 5 + 2, k)
    if model.config.num_memory_layers:
        # The entry without tokens must be found: give it the key that one sequence asks for.
        with torch.no_grad():
            (first, *_) = model.eval()(**inputs, lookup=memory.lookup).retrievals
        keys[0] = 2 * first.query_BQ[1]
        memory.calls.clear()
    return World(model=model, inputs=inputs, labels=labels, memory=memory)


def leaves(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights and statistics by name, copied to float64; parameters want a gradient."""
    trained = dict(model.named_parameters())
    return {
        name: value.detach().double().clone().requires_grad_(name in trained)
        for name, value in model.state_dict().items()
    }


def capture(model: PlugLMForMaskedLM, run: Callable[[], Any]) -> tuple[Any, dict[str, Tensor]]:
    """Run and collect, by hooks, the intermediates under the reference's names."""
    seen: dict[str, Tensor] = {}
    hooks = []

    def watch(module: nn.Module, name: str) -> None:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            # The embeddings serve the input first and the retrieved entries later.
            seen.setdefault(name, output[0] if isinstance(output, tuple) else output)

        hooks.append(module.register_forward_hook(keep))

    watch(model.pluglm.embeddings, "embeddings")
    for i, layer in enumerate(model.pluglm.layers):
        watch(layer, f"layer{i}.output")
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
