"""What the models return, in transformers' manner: by name, by index, as a tuple."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils.generic import ModelOutput

from model.retrieval import LayerRetrieval


@dataclass
class PlugLMOutput(ModelOutput):
    """Output of `PlugLMModel`.

    Attributes:
        last_hidden_state: [B,T,H], or [m,H] when only some positions were asked for.
        hidden_states: the embeddings and each layer's output, where asked for.
        retrievals: one report per memory layer.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    retrievals: tuple[LayerRetrieval, ...] | None = None


@dataclass
class MaskedLMOutput(ModelOutput):
    """Output of `PlugLMForMaskedLM`.

    Attributes:
        loss: what training minimises: mlm_loss + weight · retrieval_loss (None without labels).
        mlm_loss: mean cross-entropy of the masked positions.
        retrieval_loss: mean over the memory layers; None when not asked for.
        logits: [B,T,V]; with labels and `sparse_prediction` only the labelled positions are
            computed: [m,V], row-major.
        retrievals: one report per memory layer.
    """

    loss: Tensor | None = None
    mlm_loss: Tensor | None = None
    retrieval_loss: Tensor | None = None
    logits: Tensor | None = None
    retrievals: tuple[LayerRetrieval, ...] | None = None


@dataclass
class TaskOutput(ModelOutput):
    """Output of the sequence and token classifiers.

    Attributes:
        loss: None without labels.
        logits: [B,C] per sequence, or [B,T,C] per token.
        retrievals: one report per memory layer.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    retrievals: tuple[LayerRetrieval, ...] | None = None


@dataclass
class QuestionAnsweringOutput(ModelOutput):
    """Output of `PlugLMForQuestionAnswering`.

    Attributes:
        loss: mean of the cross-entropies of start and end; None without positions.
        start_logits, end_logits: [B,T]; the lowest number in the padding.
        retrievals: one report per memory layer.
    """

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    retrievals: tuple[LayerRetrieval, ...] | None = None
