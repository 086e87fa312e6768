"""From an entry's tokens to its key and its value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.attention import CopyLinear
from model.config import PlugLMConfig
from model.embeddings import Embeddings
from model.full_precision import in_full_precision
from model.key_tables import KeyTables, has_tables, tables_bytes, tables_digest, tables_pay_from
from model.layers import PlainLayer
from model.pooling import make_pooler
from model.rows import Rows

# Small blocks stay in a CPU's cache: 32 and 48 rows measured best at H=256 and at H=768.
DIRECT_ROWS = 48
_KEY_PATH = ("embeddings.", "entry_encoder.pooler.", "entry_encoder.key_proj.")


@dataclass(frozen=True)
class EncodedEntries:
    """Entries with the current weights: keys [n,Q], values [n,J,H], mask bool [n,J].

    J is 1, or S where every token is a value.
    """

    keys_nQ: Tensor
    values_nJH: Tensor
    mask_nJ: Tensor


class EntryEncoder(nn.Module):
    """`e = pool(x)`, `key = key_proj(e)`, `value = value_proj(e)`; x are an entry's token vectors.

    The vectors come from `embed_entries`, whose weights are the input's own, so that no parameter
    has two names.
    """

    def __init__(self, config: PlugLMConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.value_pooling = config.value_pooling
        self.pooler = make_pooler(config.entry_pooler, hidden)
        self.key_proj = CopyLinear(hidden, config.key_size)
        self.value_proj = CopyLinear(hidden, hidden)
        if config.value_pooling == "separate":
            self.value_pooler = make_pooler(config.entry_pooler, hidden)

    def forward(
        self, x_nSH: Tensor, mask_nS: Tensor, *, keys_only: bool = False
    ) -> EncodedEntries | Tensor:
        """Encode entries, with gradient.

        Args:
            x_nSH: token vectors.
            mask_nS: bool, True for tokens; an entry without any is pooled to zero.
            keys_only: return the keys [n,Q] alone.
        """
        pooled_nH = self.pooler(x_nSH, mask_nS)
        # Keys are searched and compared in full precision, under autocast too.
        keys_nQ = in_full_precision(self.key_proj, pooled_nH)
        if keys_only:
            return keys_nQ
        if self.value_pooling == "tokens":
            return EncodedEntries(keys_nQ, self.value_proj(x_nSH), mask_nS)
        shared = self.value_pooling == "shared"
        source_nH = pooled_nH if shared else self.value_pooler(x_nSH, mask_nS)
        values_nJH = self.value_proj(source_nH).unsqueeze(-2)
        return EncodedEntries(keys_nQ, values_nJH, torch.ones_like(mask_nS[:, :1]))


def embed_entries(
    tokens_nS: Tensor, mask_nS: Tensor, embeddings: Embeddings, layers: Iterable[nn.Module]
) -> Tensor:
    """Token vectors of entries: the embeddings, then the encoder's first layers (`first_n`).

    Args:
        tokens_nS: int64; mask_nS: bool, True for tokens.
        embeddings, layers: the model's own.

    Returns:
        [n,S,H].
    """
    x_nSH: Tensor = embeddings(tokens_nS)
    for layer in layers:
        x_nSH = layer(x_nSH, Rows(mask_nS))
    return x_nSH


class _KeyModel(nn.Module):
    """The parts of a PlugLM that make keys, under the names that they have in the whole model."""

    # Entries per call that take well under a second and lose nothing by the call.
    best_rows = 8 * DIRECT_ROWS

    def __init__(self, config: PlugLMConfig) -> None:
        super().__init__()
        self.pad_token_id = config.pad_token_id or 0
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(PlainLayer(config) for _ in range(config.entry_encoder_layers))
        self.entry_encoder = EntryEncoder(config)

    @torch.inference_mode()
    def forward(self, tokens_NS: Tensor) -> Tensor:
        device = self.embeddings.word_embeddings.weight.device
        keys = [self._block(b.to(device, torch.int64)) for b in tokens_NS.split(DIRECT_ROWS)]
        return torch.cat(keys) if keys else torch.empty(0, self.entry_encoder.key_proj.out_features)

    def _block(self, tokens_nS: Tensor) -> Tensor:
        mask_nS = tokens_nS != self.pad_token_id
        x_nSH = embed_entries(tokens_nS, mask_nS, self.embeddings, self.layers)
        keys: Tensor = self.entry_encoder(x_nSH, mask_nS, keys_only=True)
        return keys


def is_key_weight(name: str, config: PlugLMConfig) -> bool:
    """Whether the parameter of this name (as in `PlugLMModel`) takes part in making keys."""
    layers = tuple(f"layers.{i}." for i in range(config.entry_encoder_layers))
    return name.startswith(_KEY_PATH + layers)


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
        """Make an encoder from integer tokens [N,S] to float32 keys [N,Q].

        It runs in eval mode and without gradient.

        Args:
            weights: the parameters for which `is_key_weight` holds, named as in `PlugLMModel`.

        Raises:
            ValueError: a parameter is missing, left over or of another shape.
        """
        module = self._module(weights)
        state = {k: v.detach().to(self.device, torch.float32) for k, v in weights.items()}
        module.load_state_dict(state, strict=False, assign=True)
        return module.eval()

    def tables(
        self,
        weights: Mapping[str, Tensor],
        device: torch.device | str | None = None,
        *,
        entry_tokens: int | None = None,
    ) -> dict[str, Tensor] | None:
        """Make what `from_tables` needs for a fast encoder; None where the model has none.

        Args:
            weights: as above.
            device: where they are made; None: the factory's.
            entry_tokens: of the longest entry; None: every position of the model.

        Raises:
            ValueError: the weights do not fit, or the model has fewer positions.
        """
        config = PlugLMConfig.from_dict(self.config)
        if not has_tables(config):
            return None
        self._module(weights)
        return KeyTables.of_weights(
            weights, config, entry_tokens=entry_tokens, device=device or self.device
        ).tensors()

    def from_tables(self, tables: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """Make an encoder like the one of the same weights, equal to about 1e-6.

        It computes where the tables are and shares their memory.
        """
        return KeyTables.of_tensors(tables, PlugLMConfig.from_dict(self.config))

    def tables_digest(
        self, weights: Mapping[str, Tensor], *, entry_tokens: int | None = None
    ) -> str:
        """Hexadecimal; the same only where `tables` gives the same, on any machine."""
        return tables_digest(weights, PlugLMConfig.from_dict(self.config), entry_tokens)

    def tables_bytes(self, entry_tokens: int | None = None) -> int:
        """What the tables take in float32; 0 where the model has none."""
        config = PlugLMConfig.from_dict(self.config)
        return tables_bytes(config, entry_tokens) if has_tables(config) else 0

    def tables_pay_from(self, entry_tokens: int | None = None) -> int | None:
        """So many entries take as long to encode directly as the tables take to be made and read.

        None where the model has no tables.
        """
        config = PlugLMConfig.from_dict(self.config)
        return tables_pay_from(config, entry_tokens) if has_tables(config) else None

    def _module(self, weights: Mapping[str, Tensor]) -> _KeyModel:
        """The modules without weights, once it is known that these weights fit."""
        config = PlugLMConfig.from_dict(self.config)
        with torch.device("meta"):
            module = _KeyModel(config)
        expected = {n: p for n, p in module.named_parameters() if is_key_weight(n, config)}
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
        return module
