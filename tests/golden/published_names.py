"""The names of the published checkpoints' tensors in this project's model."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_RULES: tuple[tuple[str, str], ...] = (
    (r"bert\.embeddings\.(.+)", r"pluglm.embeddings.\1"),
    (r"bert\.encoder\.retriever\.(key_proj|value_proj)\.(.+)", r"pluglm.entry_encoder.\1.\2"),
    (
        r"bert\.encoder\.retriever\.document_encoder\.pooler\.pooler\.(.+)",
        r"pluglm.entry_encoder.pooler.\1",
    ),
    (
        r"bert\.encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)\.(.+)",
        r"pluglm.layers.\1.attention.\2.\3",
    ),
    (
        r"bert\.encoder\.layer\.(\d+)\.attention\.output\.(dense|LayerNorm)\.(.+)",
        r"pluglm.layers.\1.attention.\2.\3",
    ),
    (
        r"bert\.encoder\.layer\.(\d+)\.intermediate\.dense\.(.+)",
        r"pluglm.layers.\1.ffn.dense_in.\2",
    ),
    (r"bert\.encoder\.layer\.(\d+)\.output\.dense\.(.+)", r"pluglm.layers.\1.ffn.dense_out.\2"),
    (r"bert\.encoder\.layer\.(\d+)\.output\.LayerNorm\.(.+)", r"pluglm.layers.\1.LayerNorm.\2"),
    (r"bert\.encoder\.layer\.(\d+)\.ffn\.0\.(.+)", r"pluglm.layers.\1.ffn.dense_in.\2"),
    (r"bert\.encoder\.layer\.(\d+)\.ffn\.1\.(.+)", r"pluglm.layers.\1.ffn.dense_out.\2"),
    (r"bert\.encoder\.layer\.(\d+)\.LayerNorm\.(.+)", r"pluglm.layers.\1.LayerNorm.\2"),
    (
        r"bert\.encoder\.layer\.(\d+)\.memory_layer\.pooler\.pooler\.(.+)",
        r"pluglm.layers.\1.pooler.\2",
    ),
    (
        r"bert\.encoder\.layer\.(\d+)\.memory_layer\.query_proj\.(.+)",
        r"pluglm.layers.\1.query_proj.\2",
    ),
    (
        r"bert\.encoder\.layer\.(\d+)\.memory_layer\.batch_norm\.(.+)",
        r"pluglm.layers.\1.query_norm.\2",
    ),
    (
        r"bert\.encoder\.layer\.(\d+)\.memory_layer\.know_attn\.beta",
        r"pluglm.layers.\1.knowledge_attention.beta",
    ),
    (
        r"bert\.encoder\.layer\.(\d+)\.memory_layer\.know_attn\.biased_multihead_attn\.(.+)",
        r"pluglm.layers.\1.knowledge_attention.\2",
    ),
    (r"cls\.predictions\.bias", r"head.decoder_bias"),
    (r"cls\.predictions\.decoder\.weight", r"head.decoder.weight"),
    (r"cls\.predictions\.transform\.(.+)", r"head.\1"),
)


def our_name(published: str) -> str:
    """The name in `PlugLMForMaskedLM` of a published parameter or BatchNorm buffer.

    Raises:
        ValueError: no such tensor is known (aliases and `position_ids` are not).
    """
    for pattern, ours in _RULES:
        match = re.fullmatch(pattern, published)
        if match:
            return match.expand(ours)
    raise ValueError(f"no tensor of this model has the published name {published!r}")


def our_state(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict without aliases, renamed; the `position_ids` buffer is left out."""
    return {
        our_name(name): value.reshape(()) if name.endswith("num_batches_tracked") else value
        for name, value in published.items()
        if not name.endswith(".position_ids")
    }
