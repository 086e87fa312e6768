"""Keys of many entries from tables of the weights, instead of from every entry anew.

Where an entry's token vectors are embeddings alone, `x_tp = gamma (W_t + P_p) / sigma_tp + beta`, W
and P being the centred rows of words and of positions (with their type), so a key is

    key = key_proj(sum_p a_p x_tp) = sum_p s_p A[t_p] + sum_p s_p B[p] + (sum_p a_p) K beta + bias

with K the weight of key_proj, `A = W (K gamma)^T`, `B = P (K gamma)^T`, a the pooler's weights and
`s = a / sigma`. Every vector in it depends on the token alone or on the position alone; what
depends on both are scalars, sigma and the attention's score. They are computed once for every pair,
and a key is then a weighted sum of rows.

V vocabulary, S positions, H hidden, Q key width; t counts the tokens of a block, n its entries.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import PlugLMConfig
from model.key_table_rows import PRODUCT_TOKENS, RowBuilder
from model.pooling import POOL_EPS

# Tokens that an encoder reads at once: their indices and weights stay in a CPU's cache.
_BLOCK_TOKENS = {"cpu": 1 << 16, "cuda": 1 << 22}
_FEWEST_ROWS = 8
_NARROW = (torch.uint8, torch.int16, torch.uint16, torch.int32)
# To be raised when other code makes other tables of the same weights.
_FORMAT = 1
_TENSORS = ("token_keys_VQ", "position_keys_SQ", "scalars_VSC", "beta_key_Q", "bias_Q")


@dataclass(frozen=True)
class KeyTables:
    """The tables of one set of weights; immutable, on one device.

    Attributes:
        token_keys_VQ, position_keys_SQ: A and B of the identity.
        scalars_VSC: per token and position 1/sigma and, where the pooler attends (C=2), the score.
        beta_key_Q, bias_Q: K beta, and key_proj's bias.
        pooler: `attentive`, `mean` or `cls` (then S is 1: it reads the first position alone).
        longest: entries may have so many tokens.
        pad_token_id: tokens that are masked.
    """

    token_keys_VQ: Tensor
    position_keys_SQ: Tensor
    scalars_VSC: Tensor
    beta_key_Q: Tensor
    bias_Q: Tensor
    pooler: str
    longest: int
    pad_token_id: int

    @classmethod
    def of_weights(
        cls,
        weights: Mapping[str, Tensor],
        config: PlugLMConfig,
        *,
        entry_tokens: int | None = None,
        used: Tensor | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> KeyTables:
        """Build the tables: about V·S·H sigmoids and V·H·(H + Q) multiplications.

        Args:
            weights: the parameters of which `is_key_weight` holds.
            config: of which `has_tables` holds.
            entry_tokens: S, the tokens of the longest entry; None: every position of the model.
            used: the token ids that occur, int64 [any]; only their rows are built, the others'
                keys are NaN. None: all.

        Raises:
            ValueError: the config has no tables, or fewer positions than `entry_tokens`.
        """
        if not has_tables(config):
            raise ValueError(
                f"entry_encoder {config.entry_encoder!r} with entry_pooler "
                f"{config.entry_pooler!r} has no key tables; encode the entries instead"
            )
        longest = config.max_position_embeddings if entry_tokens is None else entry_tokens
        if not 1 <= longest <= config.max_position_embeddings:
            raise ValueError(
                f"entry_tokens is {longest}; allowed: 1 to max_position_embeddings "
                f"({config.max_position_embeddings})"
            )
        near = {n: w.detach().to(device=device, dtype=dtype) for n, w in weights.items()}
        positions = 1 if config.entry_pooler == "cls" else longest
        builder = RowBuilder.of_weights(near, config, positions)
        word_VH = builder.word_VH
        scalars = 1 if builder.attention is None else 2
        token_keys_VQ = word_VH.new_empty(len(word_VH), len(builder.bias_Q))
        scalars_VSC = word_VH.new_empty(len(word_VH), positions, scalars)
        wanted = torch.arange(len(word_VH), device=word_VH.device)
        if used is not None:
            wanted = used.to(wanted).unique()
            token_keys_VQ.fill_(torch.nan)
        for chosen in wanted.split(PRODUCT_TOKENS[word_VH.device.type]):
            token_keys_VQ[chosen], scalars_VSC[chosen] = builder.rows(word_VH[chosen])
        return cls(
            token_keys_VQ,
            builder.position_SH @ builder.project_QH.T,
            scalars_VSC,
            builder.beta_key_Q,
            builder.bias_Q,
            pooler=config.entry_pooler,
            longest=longest,
            pad_token_id=config.pad_token_id or 0,
        )

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], config: PlugLMConfig) -> KeyTables:
        """The tables that `tensors()` gave; shares their memory."""
        named = {name: tensors[name] for name in _TENSORS}
        return cls(
            **named,
            pooler=config.entry_pooler,
            longest=int(tensors["longest"]),
            pad_token_id=config.pad_token_id or 0,
        )

    def tensors(self) -> dict[str, Tensor]:
        """All that is not in the config, by name; to be stored or shared."""
        named: dict[str, Tensor] = {name: getattr(self, name) for name in _TENSORS}
        return named | {"longest": torch.tensor(self.longest)}

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def best_rows(self) -> int:
        """Entries per call that take well under a second and lose nothing by the call."""
        return max(1, 4 * _BLOCK_TOKENS[self.bias_Q.device.type] // self.longest)

    @torch.inference_mode()
    def __call__(self, tokens_NS: Tensor) -> Tensor:
        """Keys [N,Q] of entries, in the tables' dtype and on their device.

        Args:
            tokens_NS: any integer type, on any device; at most `longest` tokens per entry.

        Raises:
            ValueError: longer entries. IndexError: a token id beyond the vocabulary.
        """
        entries, length = tokens_NS.shape
        if length > self.longest:
            raise ValueError(
                f"entries of {length} tokens, but these tables are for at most {self.longest}; "
                "build them with a larger entry_tokens"
            )
        device = self.bias_Q.device
        keys_NQ = self.bias_Q.new_empty(entries, self.bias_Q.shape[0])
        rows = max(1, _BLOCK_TOKENS[device.type] // max(1, length))
        for start in range(0, entries, rows):
            block_nS = tokens_NS[start : start + rows].to(device)
            # Products of few rows are summed in another order: a key would depend on its company.
            filling = block_nS[:1].expand(max(0, _FEWEST_ROWS - len(block_nS)), -1)
            keys_nQ = self._block(torch.cat((block_nS, filling)) if len(filling) else block_nS)
            keys_NQ[start : start + rows] = keys_nQ[: len(block_nS)]
        return keys_NQ

    def _block(self, tokens_nS: Tensor) -> Tensor:
        positions, kinds = self.scalars_VSC.shape[1:]
        tokens_nS = tokens_nS[:, :positions]
        # A wide id is not made narrow: it might become that of another token.
        narrow = tokens_nS.dtype in _NARROW and self.scalars_VSC.shape[0] * positions < 2**31
        tokens_nS = tokens_nS.to(torch.int32 if narrow else torch.int64).contiguous()
        length = tokens_nS.shape[1]
        mask_nS = tokens_nS != self.pad_token_id
        index_nS = tokens_nS * positions + torch.arange(
            length, dtype=tokens_nS.dtype, device=tokens_nS.device
        )
        # As complex numbers both scalars of a pair are one read, and no row to be copied.
        flat = torch.view_as_complex(self.scalars_VSC) if kinds == 2 else self.scalars_VSC
        found = flat.view(-1).index_select(0, index_nS.view(-1))
        scalars = torch.view_as_real(found) if kinds == 2 else found
        scalars_nSC = scalars.view(*index_nS.shape, kinds)
        alpha_nS = self._alpha(scalars_nSC, mask_nS)
        weights_nS = alpha_nS * scalars_nSC[..., 0]
        keys_nQ = F.embedding_bag(
            tokens_nS, self.token_keys_VQ, per_sample_weights=weights_nS, mode="sum"
        )
        keys_nQ.addmm_(weights_nS, self.position_keys_SQ[:length])
        keys_nQ.addr_(alpha_nS.sum(-1), self.beta_key_Q)
        return keys_nQ.add_(self.bias_Q)

    def _alpha(self, scalars_nSC: Tensor, mask_nS: Tensor) -> Tensor:
        """The poolers' weights, as model.pooling computes them; zero where masked."""
        if self.pooler == "cls":
            return mask_nS.to(scalars_nSC.dtype)
        if self.pooler == "mean":
            kept_nS = mask_nS.to(scalars_nSC.dtype)
            return kept_nS / kept_nS.sum(-1, keepdim=True).clamp(min=1.0)
        scores_nS = scalars_nSC[..., 1].masked_fill(~mask_nS, float("-inf"))
        shift_n1 = scores_nS.amax(-1, keepdim=True).clamp(min=0.0)
        alpha_nS = scores_nS.sub_(shift_n1).exp_()
        total_n1 = alpha_nS.sum(-1, keepdim=True) + POOL_EPS * torch.exp(-shift_n1)
        return alpha_nS.div_(total_n1)


def has_tables(config: PlugLMConfig) -> bool:
    """Whether keys are weighted sums of rows: no layer reads the entry, and no maximum is taken."""
    return config.entry_encoder == "word_embedding" and config.entry_pooler != "max"


def tables_pay_from(config: PlugLMConfig, entry_tokens: int | None = None) -> int:
    """Entries that take as long directly as through tables, their building counted.

    A pure function of V, S, H and Q.
    """
    hidden, width = config.hidden_size, config.key_size
    length = config.max_position_embeddings if entry_tokens is None else entry_tokens
    # Nanoseconds on one thread of a 2024 server CPU, fitted to benchmarks/refresh_speed.py at H=256
    # and H=768: matrix products take 0.02 (0.01 in larger blocks) per multiplication, what is done
    # to each component 2.5 in the module and 0.6 in the tables. Only their ratios matter, so that
    # other devices are judged well enough.
    direct = length * (2.5 * hidden + 0.021 * hidden**2)
    read = length * (5.0 + 0.11 * width)
    build = config.vocab_size * (length * 0.6 * hidden + 0.01 * hidden * (hidden + width))
    return math.ceil(build / max(direct - read, 1.0))


def tables_bytes(config: PlugLMConfig, entry_tokens: int | None = None) -> int:
    """What the tables take in float32."""
    longest = config.max_position_embeddings if entry_tokens is None else entry_tokens
    positions = 1 if config.entry_pooler == "cls" else longest
    scalars = 2 if config.entry_pooler == "attentive" else 1
    vocabulary, width = config.vocab_size, config.key_size
    return 4 * (vocabulary * (width + positions * scalars) + (positions + 2) * width)


def tables_digest(
    weights: Mapping[str, Tensor], config: PlugLMConfig, entry_tokens: int | None = None
) -> str:
    """SHA-256 of all that the tables are made of, by which processes find the same tables."""
    settings = (
        _FORMAT,
        config.entry_encoder,
        config.entry_pooler,
        config.layer_norm_eps,
        config.pad_token_id,
        config.max_position_embeddings if entry_tokens is None else entry_tokens,
    )
    digest = hashlib.sha256(repr(settings).encode())
    for name in sorted(weights):
        weight = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
