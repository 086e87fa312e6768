"""PlugLM with its pre-training head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.initialization import zeros_
from transformers.utils.generic import can_return_tuple

from model.attention import CopyLinear
from model.config import PlugLMConfig
from model.full_precision import widened
from model.inputs import (
    check_entries,
    check_labelled_tokens,
    check_labels,
    check_layout,
    describe,
)
from model.losses import retrieval_loss
from model.modeling import PlugLMModel, PlugLMPreTrainedModel
from model.outputs import MaskedLMOutput
from model.retrieval import Lookup


class MaskedLMHead(nn.Module):
    """`LN(gelu(dense(x)))·Dᵀ + bias`; D is the word embedding or, in legacy, its own matrix."""

    def __init__(self, config: PlugLMConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.dense = CopyLinear(hidden, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(hidden, config.vocab_size, bias=False)
        self.decoder_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        transformed = self.LayerNorm(F.gelu(self.dense(x)))
        logits: Tensor = self.decoder(transformed) + self.decoder_bias
        return logits


class PlugLMForMaskedLM(PlugLMPreTrainedModel):
    """PlugLM with its pre-training head."""

    _tied_weights_keys: dict[str, str] = {  # noqa: RUF012 (the base class declares it this way)
        "head.decoder.weight": "pluglm.embeddings.word_embeddings.weight"
    }

    def __init__(self, config: PlugLMConfig) -> None:
        super().__init__(config)
        self.pluglm = PlugLMModel(config)
        self.head = MaskedLMHead(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_output_embeddings(self) -> nn.Module:
        return self.head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.head.decoder = new_embeddings

    def resize_token_embeddings(self, *args: Any, **options: Any) -> Any:
        """As in transformers; the decoder's bias grows with zeros, or is cut, likewise."""
        embeddings = super().resize_token_embeddings(*args, **options)
        old_V, size = self.head.decoder_bias, int(embeddings.num_embeddings)
        if len(old_V) != size:
            bias_V = old_V.new_zeros(size)
            kept = min(len(old_V), size)
            bias_V[:kept] = old_V.detach()[:kept]
            self.head.decoder_bias = nn.Parameter(bias_V)
        return embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MaskedLMHead):
            zeros_(module.decoder_bias)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        lookup: Lookup | None = None,
        positive_tokens: Tensor | None = None,
        positive_ids: Tensor | None = None,
        doc_ids: Tensor | None = None,
        retrieval_loss_weight: float = 1.0,
        retrieval_temperature: float = 1.0,
        loss_denominator: Tensor | float | None = None,
        output_attention: bool = False,
        retrieval_chunks: int = 1,
    ) -> MaskedLMOutput:
        """Predict masked tokens, with a memory or without.

        Args:
            input_ids, attention_mask, token_type_ids, lookup, output_attention, retrieval_chunks:
                as in `PlugLMModel`.
            labels: int64 [B,T], -100 where nothing is to be predicted (legacy: -1).
            positive_tokens: int64 [B,S], an entry of each sequence's own document; asks for the
                retrieval warm-up loss, and needs positive_ids [B] and doc_ids [B].
            retrieval_loss_weight: its share in `loss`.
            retrieval_temperature: what its scores are divided by.
            loss_denominator: what the summed cross-entropy is divided by; None: the labels of this
                batch. A data-parallel trainer passes the labels of all micro-batches and ranks over
                their number, so that the mean is the same however the batch was cut.

        Raises:
            TypeError, ValueError: as in `PlugLMModel`; labels of another shape or beyond the
                vocabulary; positive_tokens without positive_ids and doc_ids, or without a memory.
        """
        if positive_tokens is not None:
            self._check_positives(positive_tokens, positive_ids, doc_ids, lookup, input_ids)
        wanted_BT = None
        if labels is not None:
            check_layout(input_ids, self.config)
            ignored = self.config.ignored_label
            check_labels("labels", labels, input_ids.shape, self.config.vocab_size, ignored)
            check_labelled_tokens(labels, ignored, attention_mask)
            wanted_BT = labels != ignored
        sparse = self.config.sparse_prediction
        encoded = self.pluglm(
            input_ids,
            attention_mask,
            token_type_ids,
            lookup=lookup,
            wanted_BT=wanted_BT if sparse else None,
            output_attention=output_attention,
            retrieval_chunks=retrieval_chunks,
            return_dict=True,
        )
        logits = self.head(encoded.last_hidden_state)
        if labels is None or wanted_BT is None:
            return MaskedLMOutput(logits=logits, retrievals=self._reported(encoded))
        logits_mV = logits if sparse else logits[wanted_BT]
        targets_m = labels[wanted_BT]
        total = F.cross_entropy(widened(logits_mV), targets_m.long(), reduction="sum")
        if loss_denominator is None:
            # A batch without any label has loss 0, not NaN.
            loss_denominator = max(len(targets_m), 1)
        mlm_loss = loss = total / loss_denominator
        contrast = None
        if positive_tokens is not None and positive_ids is not None and doc_ids is not None:
            key_BQ = self.pluglm.entry_keys(positive_tokens)
            losses = [
                retrieval_loss(r, key_BQ, positive_ids, doc_ids, retrieval_temperature)
                for r in encoded.retrievals or ()
            ]
            contrast = torch.stack(losses).mean()
            loss = mlm_loss + retrieval_loss_weight * contrast
        return MaskedLMOutput(
            loss=loss,
            mlm_loss=mlm_loss,
            retrieval_loss=contrast,
            logits=logits,
            retrievals=self._reported(encoded),
        )

    def _check_positives(
        self,
        positive_tokens: Tensor,
        positive_ids: Tensor | None,
        doc_ids: Tensor | None,
        lookup: Lookup | None,
        input_ids: Tensor,
    ) -> None:
        if positive_ids is None or doc_ids is None:
            raise ValueError("positive_tokens needs positive_ids and doc_ids beside it")
        check_entries("positive_tokens", positive_tokens, self.config)
        for name, given in (
            ("positive_tokens", positive_tokens[:, 0]),
            ("positive_ids", positive_ids),
            ("doc_ids", doc_ids),
        ):
            if given.shape != input_ids.shape[:1]:
                raise ValueError(
                    f"{name} is for {list(given.shape)} sequences, but input_ids is "
                    f"{describe(input_ids)}; give one row per sequence"
                )
        plugged = lookup is not None or self.has_memory
        if not plugged or not self.config.num_memory_layers:
            raise ValueError(
                "positive_tokens asks for the retrieval loss, which needs a lookup (or an attached "
                f"memory) and at least one memory layer; lookup is {lookup}, num_memory_layers "
                f"{self.config.num_memory_layers}"
            )
