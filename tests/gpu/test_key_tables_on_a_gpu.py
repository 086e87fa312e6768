"""Key tables on a GPU give the CPU's keys. Skipped where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memory_server.keys.key_sources import KeySources
from model import KeyEncoderFactory, PlugLMConfig, PlugLMForMaskedLM

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("pooler", ["attentive", "mean", "cls"])
def test_tables_on_the_device_give_the_cpus_keys(pooler: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = PlugLMConfig(
        vocab_size=3000,
        hidden_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=64,
        key_size=32,
        entry_pooler=pooler,
    )
    weights = PlugLMForMaskedLM(config).key_weights()
    tokens = torch.randint(1, 3000, (5000, 33))
    tokens *= torch.arange(33) < torch.randint(0, 34, (5000, 1))
    wanted = KeyEncoderFactory(config.to_dict())(weights)(tokens)
    sources = KeySources(
        KeyEncoderFactory(config.to_dict(), device="cuda"),
        device=torch.device("cuda"),
        scratch=tmp_path,
        entry_tokens=33,
    )
    encoder = sources.get(1, lambda: weights, tabled=True)
    assert callable(encoder)
    for given in (tokens, tokens.to("cuda"), tokens.to(torch.int32).to("cuda")):
        keys = encoder(given)
        assert keys.device.type == "cuda"
        torch.testing.assert_close(keys.cpu(), wanted, rtol=0, atol=1e-5)
    assert not list(tmp_path.iterdir())  # tables of a device are each process's own
    sources.close()
