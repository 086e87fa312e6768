"""The PlugLM encoder: torch and transformers only. Importing it registers the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from model.config import PlugLMConfig
from model.entry_encoder import EncodedEntries, KeyEncoderFactory, is_key_weight
from model.heads import (
    PlugLMForQuestionAnswering,
    PlugLMForSequenceClassification,
    PlugLMForTokenClassification,
)
from model.masked_lm import PlugLMForMaskedLM
from model.modeling import PlugLMModel, PlugLMPreTrainedModel
from model.reading import QueryNotFinite
from model.retrieval import LayerRetrieval, Lookup, RetrievedEntries

AutoConfig.register(PlugLMConfig.model_type, PlugLMConfig)
AutoModel.register(PlugLMConfig, PlugLMModel)
AutoModelForMaskedLM.register(PlugLMConfig, PlugLMForMaskedLM)
AutoModelForSequenceClassification.register(PlugLMConfig, PlugLMForSequenceClassification)
AutoModelForTokenClassification.register(PlugLMConfig, PlugLMForTokenClassification)
AutoModelForQuestionAnswering.register(PlugLMConfig, PlugLMForQuestionAnswering)

__all__ = [
    "EncodedEntries",
    "KeyEncoderFactory",
    "LayerRetrieval",
    "Lookup",
    "PlugLMConfig",
    "PlugLMForMaskedLM",
    "PlugLMForQuestionAnswering",
    "PlugLMForSequenceClassification",
    "PlugLMForTokenClassification",
    "PlugLMModel",
    "PlugLMPreTrainedModel",
    "QueryNotFinite",
    "RetrievedEntries",
    "is_key_weight",
]
