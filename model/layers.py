"""The two kinds of encoder layer: plain, and reading the memory."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import CopyLinear, KnowledgeAttention, SelfAttention
from model.config import PlugLMConfig
from model.full_precision import in_full_precision, widened
from model.pooling import make_pooler
from model.query_norm import make_query_norm
from model.retrieval import LayerRetrieval, ReadEntries, ReadMemory
from model.rows import Rows, Selection

COSINE_EPS = 1e-8


class FeedForward(nn.Module):
    """Linear, erf GELU, linear, dropout."""

    def __init__(self, config: PlugLMConfig, width: int) -> None:
        super().__init__()
        self.dense_in = nn.Linear(config.hidden_size, width)
        self.dense_out = nn.Linear(width, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.dense_out(F.gelu(self.dense_in(x))))
        return out


class PlainLayer(nn.Module):
    """A post-LayerNorm BERT layer."""

    def __init__(self, config: PlugLMConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.ffn = FeedForward(config, config.intermediate_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, rows: Rows, chosen: Selection | None = None) -> Tensor:
        """[B,T,H] or [n,H] in the layout `rows` -> the same, or [m,H] of the chosen positions."""
        a = self.attention(x, rows, chosen)
        out: Tensor = self.LayerNorm(a + self.ffn(a))
        return out


class MemoryLayer(nn.Module):
    """`x' = LN(a + FFN_small(a) + memory)`, with one query per sequence."""

    def __init__(self, config: PlugLMConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.attention = SelfAttention(config)
        self.pooler = make_pooler(config.query_pooler, config.hidden_size)
        self.query_proj = CopyLinear(config.hidden_size, config.key_size)
        self.query_norm = make_query_norm(config.query_norm, config.key_size)
        self.knowledge_attention = KnowledgeAttention(config)
        if config.memory_ffn_size:
            self.ffn = FeedForward(config, config.memory_ffn_size)
        self.has_ffn = config.memory_ffn_size > 0
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        x: Tensor,
        rows: Rows,
        *,
        read: ReadMemory | None = None,
        chosen: Selection | None = None,
        output_attention: bool = False,
    ) -> tuple[Tensor, LayerRetrieval | None]:
        """Run the layer.

        Args:
            x: [B,T,H], or [n,H] where `rows` packs.
            rows: the layout of x.
            read: answers queries [B,Q]; None leaves the memory term out.
            chosen: the only positions whose output is wanted.
            output_attention: report the knowledge attention per entry.

        Returns:
            (output like x, or [m,H] of the chosen positions; what was retrieved).
        """
        if read is None:
            a = self.attention(x, rows, chosen)
            return self.LayerNorm(self.beside_memory(a)), None
        a, raw_BQ = self.before_query(x, rows)
        query_BQ = self.query_norm(raw_BQ)
        a, rows, late = self.narrowed(a, rows, chosen)
        entries = read(query_BQ)
        return self.after_answer(
            a, rows, query_BQ, entries, late=late, output_attention=output_attention
        )

    def before_query(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """(the attention's output, like x; what `query_norm` makes the query [B,Q] of)."""
        a = self.attention(x, rows)
        return a, self._raw_query(rows.unpack(a), rows.mask_BT)

    def narrowed(
        self, a: Tensor, rows: Rows, chosen: Selection | None
    ) -> tuple[Tensor, Rows, Selection | None]:
        """Leave out what is not wanted, as early as it is not needed.

        Returns:
            (a and rows, of the chosen positions if every position stands alone from here on; what
            is to be chosen in the end, if they do not)
        """
        if chosen is None or self.knowledge_attention.mixes_positions:
            return a, rows, chosen
        return chosen.take(rows.unpack(a)), chosen.rows, None

    def after_answer(
        self,
        a: Tensor,
        rows: Rows,
        query_BQ: Tensor,
        entries: ReadEntries,
        *,
        beside: Tensor | None = None,
        late: Selection | None = None,
        output_attention: bool = False,
    ) -> tuple[Tensor, LayerRetrieval]:
        """The layer's output from what the memory answered; arguments as its steps return them.

        Args:
            beside: `beside_memory(a)`, if it was computed before.
        """
        wide_BQ = widened(query_BQ)
        cos_BK = F.cosine_similarity(
            wide_BQ.unsqueeze(1), entries.keys_BKQ.to(wide_BQ.dtype), dim=-1, eps=COSINE_EPS
        )
        memory, probs = self.knowledge_attention(
            a, rows, cos_BK, entries.values_BKJH, entries.mask_BKJ
        )
        if memory.shape[:-1] != a.shape[:-1]:
            # One vector for the whole sequence.
            memory = rows.pack(memory.expand(-1, rows.mask_BT.shape[1], -1))
        out = (self.beside_memory(a) if beside is None else beside) + memory
        if late is not None:
            out = late.take(rows.unpack(out))
        attention = None
        if output_attention:
            attention = probs.detach().unflatten(-1, tuple(entries.mask_BKJ.shape[1:])).sum(-1)
        retrieval = LayerRetrieval(
            layer=self.index,
            query_BQ=query_BQ,
            key_BKQ=entries.keys_BKQ,
            retrieved=entries.retrieved,
            attention_BATK=attention,
            asking_BT=rows.mask_BT if output_attention else None,
        )
        return self.LayerNorm(out), retrieval

    def ask(self, x: Tensor, rows: Rows) -> Tensor:
        """The query [B,Q] alone; arguments as in `forward`."""
        query_BQ: Tensor = self.query_norm(self.before_query(x, rows)[1])
        return query_BQ

    def _raw_query(self, a_BTH: Tensor, mask_BT: Tensor) -> Tensor:
        raw_BQ: Tensor = in_full_precision(self.query_proj, self.pooler(a_BTH, mask_BT))
        return raw_BQ

    def beside_memory(self, a: Tensor) -> Tensor:
        """What is added to the memory's part."""
        return a + self.ffn(a) if self.has_ffn else a
