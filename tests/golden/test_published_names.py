"""The published names, without any published number."""

from __future__ import annotations

import pytest

from tests.golden.published_names import our_name


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ("bert.embeddings.LayerNorm.bias", "pluglm.embeddings.LayerNorm.bias"),
        ("bert.encoder.layer.10.output.dense.weight", "pluglm.layers.10.ffn.dense_out.weight"),
        ("bert.encoder.layer.11.ffn.0.bias", "pluglm.layers.11.ffn.dense_in.bias"),
        (
            "bert.encoder.layer.3.memory_layer.know_attn.biased_multihead_attn.q_proj.bias",
            "pluglm.layers.3.knowledge_attention.q_proj.bias",
        ),
        (
            "bert.encoder.retriever.document_encoder.pooler.pooler.att_fc2.weight",
            "pluglm.entry_encoder.pooler.att_fc2.weight",
        ),
        ("cls.predictions.bias", "head.decoder_bias"),
        ("cls.predictions.transform.LayerNorm.weight", "head.LayerNorm.weight"),
    ],
)
def test_a_published_name_has_one_of_ours(published: str, ours: str) -> None:
    assert our_name(published) == ours


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bert\.pooler\.dense\.weight"):
        our_name("bert.pooler.dense.weight")
