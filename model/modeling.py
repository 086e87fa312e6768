"""PlugLM: the encoder, and the encoder with a masked-LM head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.initialization import constant_, eye_, ones_, zeros_
from transformers.utils.generic import ModelOutput

from model.attention import CopyLinear, KnowledgeAttention
from model.config import PlugLMConfig
from model.embeddings import Embeddings, TypeEmbedding
from model.entry_encoder import EntryEncoder
from model.layers import MemoryLayer, PlainLayer, select_positions
from model.losses import retrieval_loss
from model.query_norm import QueryBatchNorm
from model.retrieval import LayerRetrieval, Lookup


@dataclass
class PlugLMOutput(ModelOutput):
    """Output of `PlugLMModel`.

    Attributes:
        last_hidden_state: [B,T,H], or [B,P,H] when only some positions were asked for.
        retrievals: one report per memory layer.
    """

    last_hidden_state: Tensor | None = None
    retrievals: tuple[LayerRetrieval, ...] | None = None


@dataclass
class MaskedLMOutput(ModelOutput):
    """Output of `PlugLMForMaskedLM`.

    Attributes:
        loss: what training minimises: mlm_loss + weight · retrieval_loss (None without labels).
        mlm_loss: mean cross-entropy of the masked positions.
        retrieval_loss: mean over the memory layers; None when not asked for.
        logits: [B,T,V]; with labels only the labelled positions are computed: [m,V], row-major.
        retrievals: one report per memory layer.
    """

    loss: Tensor | None = None
    mlm_loss: Tensor | None = None
    retrieval_loss: Tensor | None = None
    logits: Tensor | None = None
    retrievals: tuple[LayerRetrieval, ...] | None = None


class PlugLMPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the transformers conventions."""

    config: PlugLMConfig
    config_class = PlugLMConfig
    base_model_prefix = "pluglm"
    supports_gradient_checkpointing = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        copying = self.config.memory_init == "copy"
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, QueryBatchNorm):
            ones_(module.weight)
            zeros_(module.bias)
            zeros_(module.running_mean)
            ones_(module.running_var)
            zeros_(module.num_batches_tracked)
        elif isinstance(module, KnowledgeAttention) and module.kind != "sentence_level":
            constant_(module.beta, self.config.memory_beta_init)
        elif isinstance(module, CopyLinear) and copying:
            # transformers' functions, because they leave alone what a checkpoint has filled.
            eye_(module.weight)
            if not getattr(module.weight, "_is_hf_initialized", False):
                module.weight.mul_(module.scale)
        elif isinstance(module, TypeEmbedding) and copying:
            zeros_(module.weight)
        elif isinstance(module, MaskedLMHead):
            zeros_(module.decoder_bias)


class PlugLMModel(PlugLMPreTrainedModel):
    """The encoder. `lookup` plugs a memory in for one forward pass."""

    def __init__(self, config: PlugLMConfig) -> None:
        super().__init__(config)
        first_memory = config.num_hidden_layers - config.num_memory_layers
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(
            PlainLayer(config) if i < first_memory else MemoryLayer(config, i)
            for i in range(config.num_hidden_layers)
        )
        if config.num_memory_layers:
            self.entry_encoder = EntryEncoder(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        if not isinstance(value, nn.Embedding):
            raise TypeError(
                f"the word embeddings must be an nn.Embedding, not {type(value).__name__}"
            )
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        lookup: Lookup | None = None,
        positions_BP: Tensor | None = None,
        output_attention: bool = False,
    ) -> PlugLMOutput:
        """Encode sequences.

        Args:
            input_ids: int64 [B,T].
            attention_mask: 0/1 [B,T]; None means every position is a token.
            token_type_ids: int64 [B,T]; None means type 0.
            lookup: the memory, asked once per memory layer with queries [B,Q]; None runs the plain
                encoder, whose memory term is absent.
            positions_BP: positions whose last hidden state is wanted; only these are computed in
                the last layer when that is a memory layer.
            output_attention: report the knowledge attention.

        Raises:
            ValueError: more tokens than positions.
        """
        mask_BT = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            mask_BT = attention_mask.to(torch.bool)
        x_BTH = self.embeddings(input_ids, token_type_ids)
        retrievals: list[LayerRetrieval] = []
        selected = False
        for i, layer in enumerate(self.layers):
            if isinstance(layer, MemoryLayer):
                selected = positions_BP is not None and i == len(self.layers) - 1
                x_BTH, retrieval = layer(
                    x_BTH,
                    mask_BT,
                    entry_encoder=self.entry_encoder,
                    embeddings=self.embeddings,
                    lookup=lookup,
                    positions_BP=positions_BP if selected else None,
                    output_attention=output_attention,
                )
                if retrieval is not None:
                    retrievals.append(retrieval)
            else:
                x_BTH = layer(x_BTH, mask_BT)
        if positions_BP is not None and not selected:
            x_BTH = select_positions(x_BTH, positions_BP)
        return PlugLMOutput(last_hidden_state=x_BTH, retrievals=tuple(retrievals))


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
    ) -> MaskedLMOutput:
        """Predict masked tokens, with a memory or without.

        Args:
            input_ids, attention_mask, token_type_ids, lookup, output_attention: as in
                `PlugLMModel`.
            labels: int64 [B,T], -100 where nothing is to be predicted (legacy: -1).
            positive_tokens: int64 [B,S], an entry of each sequence's own document; asks for the
                retrieval warm-up loss, and needs positive_ids [B] and doc_ids [B].
            retrieval_loss_weight: its share in `loss`.
            retrieval_temperature: what its scores are divided by.
            loss_denominator: what the summed cross-entropy is divided by; None: the labels of this
                batch. A data-parallel trainer passes the labels of all micro-batches and ranks over
                their number, so that the mean is the same however the batch was cut.

        Raises:
            ValueError: positive_tokens without positive_ids and doc_ids, or without a memory.
        """
        if positive_tokens is not None and (positive_ids is None or doc_ids is None):
            raise ValueError("positive_tokens needs positive_ids and doc_ids beside it")
        if positive_tokens is not None and (lookup is None or not self.config.num_memory_layers):
            raise ValueError(
                "positive_tokens asks for the retrieval loss, which needs a lookup and at least "
                f"one memory layer; lookup is {lookup}, num_memory_layers "
                f"{self.config.num_memory_layers}"
            )
        positions_BP = wanted_BP = None
        if labels is not None:
            positions_BP, wanted_BP = _labelled_positions(labels, self.config.ignored_label)
        encoded = self.pluglm(
            input_ids,
            attention_mask,
            token_type_ids,
            lookup=lookup,
            positions_BP=positions_BP,
            output_attention=output_attention,
        )
        hidden = encoded.last_hidden_state
        if labels is None or positions_BP is None or wanted_BP is None:
            return MaskedLMOutput(logits=self.head(hidden), retrievals=encoded.retrievals)
        logits_mV = self.head(hidden[wanted_BP])
        targets_m = labels.gather(1, positions_BP)[wanted_BP]
        wide = torch.promote_types(logits_mV.dtype, torch.float32)
        total = F.cross_entropy(logits_mV.to(wide), targets_m, reduction="sum")
        if loss_denominator is None:
            # A batch without any label has loss 0, not NaN.
            loss_denominator = max(len(targets_m), 1)
        mlm_loss = loss = total / loss_denominator
        contrast = None
        if positive_tokens is not None and positive_ids is not None and doc_ids is not None:
            key_BQ = self.pluglm.entry_encoder.keys(positive_tokens, self.pluglm.embeddings)
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
            logits=logits_mV,
            retrievals=encoded.retrievals,
        )


def _labelled_positions(labels_BT: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """Positions of the labels, in order, rows padded with position 0: (int64 [B,P], bool [B,P])."""
    labelled_BT = labels_BT != ignored
    counts_B = labelled_BT.sum(1)
    longest = int(counts_B.max()) if len(counts_B) else 0
    order_BT = torch.argsort((~labelled_BT).to(torch.int8), dim=1, stable=True)
    wanted_BP = torch.arange(longest, device=labels_BT.device) < counts_B[:, None]
    return order_BT[:, :longest] * wanted_BP, wanted_BP
