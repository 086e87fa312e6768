"""The PlugLM encoder: torch and transformers only. Importing it registers the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from model.config import PlugLMConfig
from model.entry_encoder import KeyEncoderFactory, is_key_weight
from model.modeling import PlugLMForMaskedLM, PlugLMModel
from model.retrieval import LayerRetrieval, Lookup, RetrievedEntries

AutoConfig.register(PlugLMConfig.model_type, PlugLMConfig)
AutoModel.register(PlugLMConfig, PlugLMModel)
AutoModelForMaskedLM.register(PlugLMConfig, PlugLMForMaskedLM)

__all__ = [
    "KeyEncoderFactory",
    "LayerRetrieval",
    "Lookup",
    "PlugLMConfig",
    "PlugLMForMaskedLM",
    "PlugLMModel",
    "RetrievedEntries",
    "is_key_weight",
]
