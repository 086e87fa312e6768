"""Attention against PyTorch's fused attention and against the loops of the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model import PlugLMConfig
from model.attention import KnowledgeAttention, SelfAttention, merge_heads, split_heads
from model.rows import Rows
from tests.reference.worlds import SIZES


def config(**settings: object) -> PlugLMConfig:
    return PlugLMConfig(**(SIZES | settings))


def test_self_attention_equals_attention_written_out() -> None:
    torch.manual_seed(0)
    block = SelfAttention(config()).double()
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    q, k, v = (split_heads(part(x), 4) for part in (block.query, block.key, block.value))
    scores = (q @ k.transpose(-1, -2)) / 2.0
    scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    attended = merge_heads(torch.softmax(scores, -1) @ v)
    wanted = block.LayerNorm(x + block.dense(attended))
    torch.testing.assert_close(block(x, Rows(mask)), wanted, rtol=1e-12, atol=1e-12)


def test_what_a_padded_position_holds_reaches_no_other() -> None:
    torch.manual_seed(0)
    block = SelfAttention(config())
    x = torch.randn(1, 5, 16)
    mask = torch.tensor([[True, True, True, False, False]])
    other = x.clone()
    other[:, 3:] = 100.0
    torch.testing.assert_close(block(x, Rows(mask))[:, :3], block(other, Rows(mask))[:, :3])


def make_knowledge(kind: str, **settings: object) -> KnowledgeAttention:
    torch.manual_seed(1)
    module = KnowledgeAttention(config(memory_attention=kind, **settings)).double()
    if kind != "sentence_level":
        torch.nn.init.normal_(module.beta)
    return module


def entries(j: int, positions: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = torch.randn(2, positions, 16, dtype=torch.float64)
    cos = torch.rand(2, 3, dtype=torch.float64) * 2 - 1
    values = torch.randn(2, 3, j, 16, dtype=torch.float64)
    mask = torch.rand(2, 3, j) > 0.3
    mask[0, 0, 0] = mask[1, 2, 0] = True
    return a, cos, values, mask


def read(
    module: KnowledgeAttention, a: Tensor, cos: Tensor, values: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    rows = Rows(torch.ones(a.shape[:2], dtype=torch.bool), full=True)
    return module(a, rows, cos, values, mask)


@pytest.mark.parametrize("positions", [5, 9], ids=["readers-mapped", "entries-mapped"])
@pytest.mark.parametrize("j", [1, 4])
@pytest.mark.parametrize("kind", ["multi_head", "single_head"])
def test_knowledge_attention_equals_fused_attention_with_a_bias(
    kind: str, j: int, positions: int
) -> None:
    module = make_knowledge(kind)
    a, cos, values, mask = entries(j, positions)
    heads = 4 if kind == "multi_head" else 1
    flat = values.reshape(2, 3 * j, 16)
    bias = module.beta[None, :, None, None] * cos.repeat_interleave(j, 1)[:, None, None, :]
    bias = bias.masked_fill(~mask.reshape(2, 1, 1, 3 * j), float("-inf"))
    wanted = F.scaled_dot_product_attention(
        split_heads(module.q_proj(a), heads),
        split_heads(module.k_proj(flat), heads),
        split_heads(module.v_proj(flat), heads),
        attn_mask=bias.expand(-1, -1, positions, -1),
    )
    memory, attention = read(module, a, cos, values, mask)
    torch.testing.assert_close(memory, module.out_proj(merge_heads(wanted)), rtol=1e-10, atol=1e-10)
    assert attention.shape == (2, heads, positions, 3 * j)
    torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))
    assert not attention[:, 0, 0][~mask.flatten(1)].any()


@pytest.mark.parametrize("kind", ["multi_head", "single_head", "sentence_level"])
def test_nothing_found_reads_zeros_and_disturbs_no_other_sequence(kind: str) -> None:
    module = make_knowledge(kind)
    a, cos, values, mask = entries(1)
    mask[0], mask[1] = False, True
    values.requires_grad_()
    memory, attention = read(module, a, cos, values, mask)
    assert not memory[0].any()
    assert not attention[0].any()
    alone, _ = read(module, a[1:], cos[1:], values[1:], mask[1:])
    torch.testing.assert_close(memory[1:], alone)
    memory.square().sum().backward()
    for reached in (values, *module.parameters()):
        assert reached.grad is not None
        assert reached.grad.isfinite().all()
    assert values.grad is not None
    assert not values.grad[0].any()


@pytest.mark.parametrize(("legacy", "depends"), [(False, False), (True, True)])
def test_only_the_published_merge_mixes_positions(legacy: bool, depends: bool) -> None:
    module = make_knowledge("multi_head", legacy=legacy)
    a, cos, values, _ = entries(1)
    mask = torch.ones(2, 3, 1, dtype=torch.bool)
    other = a.clone()
    other[:, 4] = 7.0
    first, second = (read(module, x, cos, values, mask)[0] for x in (a, other))
    assert torch.allclose(first[:, :4], second[:, :4]) is not depends
    assert module.mixes_positions is legacy


def test_dropout_falls_on_the_knowledge_attention_but_not_on_its_report() -> None:
    module = make_knowledge("multi_head", attention_probs_dropout_prob=0.5)
    a, cos, values, mask = entries(1)
    mask[:] = True
    memory, attention = read(module, a, cos, values, mask)
    torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))
    assert not torch.allclose(memory, read(module, a, cos, values, mask)[0])
    module.eval()
    first, second = (read(module, a, cos, values, mask)[0] for _ in range(2))
    assert torch.equal(first, second)
