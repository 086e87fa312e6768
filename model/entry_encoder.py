"""From an entry's tokens to its key and its value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.attention import CopyLinear
from model.config import PlugLMConfig
from model.embeddings import Embeddings
from model.pooling import AttentivePooler

_KEY_PATH = ("embeddings.", "entry_encoder.pooler.", "entry_encoder.key_proj.")


class EntryEncoder(nn.Module):
    """`e = pool(embed(tokens))`, `key = key_proj(e)`, `value = value_proj(e)`.

    The embeddings are the input's own and are passed in, so that no parameter has two names.
    """

    def __init__(self, config: PlugLMConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.pad_token_id = config.pad_token_id or 0
        self.value_pooling = config.value_pooling
        self.pooler = AttentivePooler(hidden)
        self.key_proj = CopyLinear(hidden, config.key_size)
        self.value_proj = CopyLinear(hidden, hidden)
        if config.value_pooling == "separate":
            self.value_pooler = AttentivePooler(hidden)

    def forward(self, tokens: Tensor, embeddings: Embeddings) -> tuple[Tensor, Tensor, Tensor]:
        """Encode entries with the current weights, with gradient.

        Args:
            tokens: int64 [..., S], padded with the pad token.
            embeddings: the model's embeddings.

        Returns:
            (keys [..., Q], values [..., J, H], mask bool [..., J]): J = 1, or S for `tokens`.
        """
        mask = tokens != self.pad_token_id
        embedded = embeddings(tokens)
        pooled = self.pooler(embedded, mask)
        keys = self.key_proj(pooled)
        if self.value_pooling == "tokens":
            return keys, self.value_proj(embedded), mask
        source = pooled if self.value_pooling == "shared" else self.value_pooler(embedded, mask)
        return keys, self.value_proj(source).unsqueeze(-2), torch.ones_like(mask[..., :1])

    def keys(self, tokens: Tensor, embeddings: Embeddings) -> Tensor:
        """The keys alone: int64 [..., S] -> [..., Q]."""
        keys: Tensor = self.key_proj(self.pooler(embeddings(tokens), tokens != self.pad_token_id))
        return keys


class _KeyModel(nn.Module):
    """The parts of a PlugLM that make keys, under the names that they have in the whole model."""

    def __init__(self, config: PlugLMConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.entry_encoder = EntryEncoder(config)

    @torch.inference_mode()
    def forward(self, tokens_NS: Tensor) -> Tensor:
        device = self.embeddings.word_embeddings.weight.device
        keys = [
            self.entry_encoder.keys(block.to(device), self.embeddings)
            # Small blocks stay in cache: 48 rows measured best at H=256 and at H=768.
            for block in tokens_NS.split(48)
        ]
        return torch.cat(keys) if keys else torch.empty(0, self.entry_encoder.key_proj.out_features)


def is_key_weight(name: str) -> bool:
    """Whether the parameter of this name (as in `PlugLMModel`) takes part in making keys."""
    return name.startswith(_KEY_PATH)


@dataclass(frozen=True)
class KeyEncoderFactory:
    """Builds key encoders from published weights; picklable, so that a memory can run it anywhere.

    Args:
        config: the model's configuration as a dictionary (`PlugLMConfig.to_dict()`).
        device: where the encoder computes.
    """

    config: dict[str, Any]
    device: str = "cpu"

    def __call__(self, weights: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """Make an encoder from int64 tokens [N,S] to float32 keys [N,Q].

        It runs in eval mode and without gradient.

        Args:
            weights: the parameters for which `is_key_weight` holds, named as in `PlugLMModel`.

        Raises:
            ValueError: a parameter is missing, left over or of another shape.
        """
        with torch.device("meta"):
            module = _KeyModel(PlugLMConfig.from_dict(self.config))
        expected = {name: p for name, p in module.named_parameters() if is_key_weight(name)}
        problems = [f"missing {name}" for name in expected if name not in weights]
        problems += [f"unknown {name}" for name in weights if name not in expected]
        problems += [
            f"{name} has shape {tuple(weights[name].shape)}, the config says {tuple(p.shape)}"
            for name, p in expected.items()
            if name in weights and weights[name].shape != p.shape
        ]
        if problems:
            raise ValueError(
                "published weights do not fit the entry encoder: " + "; ".join(problems)
            )
        state = {k: v.detach().to(self.device, torch.float32) for k, v in weights.items()}
        module.load_state_dict(state, strict=False, assign=True)
        return module.eval()
