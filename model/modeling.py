"""PlugLM, the encoder: embeddings, plain layers, memory layers, and how a memory is plugged in."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import constant_, eye_, ones_, zeros_
from transformers.utils.generic import can_return_tuple

from model.attention import CopyLinear, KnowledgeAttention
from model.config import PlugLMConfig
from model.embeddings import Embeddings, TypeEmbedding
from model.entry_encoder import EncodedEntries, EntryEncoder, embed_entries, is_key_weight
from model.inputs import check_entries, check_wanted, checked_mask
from model.layers import MemoryLayer, PlainLayer
from model.outputs import PlugLMOutput
from model.overlap import Startable, run_in_chunks
from model.plug import lookup_of
from model.query_norm import QueryBatchNorm, sum_over_ranks
from model.reading import read_memory
from model.recompute import AskedOnce, run_layer
from model.retrieval import LayerRetrieval, Lookup, ReadMemory
from model.rows import Rows

log = logging.getLogger(__name__)


class PlugLMPreTrainedModel(PreTrainedModel):
    """Weight initialisation, the plugging of a memory, and the transformers conventions."""

    config: PlugLMConfig
    config_class = PlugLMConfig
    base_model_prefix = "pluglm"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def attach(self, memory: Any, k: int | None = None) -> None:
        """Plug a memory in: every later forward pass reads it, unless it is given another `lookup`.

        Args:
            memory: an object with `search(queries_BQ, k)`, such as a `LocalMemory`; or a callable
                that takes queries float32 [B,Q] and returns `RetrievedEntries`; or None: run
                without a memory, on purpose.
            k: entries per query; None: `config.top_k`.

        Raises:
            TypeError: none of these. ValueError: the memory does not fit the model (key width,
                tokenizer, entry length, fewer than k entries); says what differs.
        """
        base = self._encoder()
        base._lookup = None if memory is None else lookup_of(memory, k, self.config)
        base._said = memory is None

    def detach(self) -> None:
        """Unplug the memory."""
        self.attach(None)

    @property
    def has_memory(self) -> bool:
        """Whether a memory is attached."""
        return self._encoder()._lookup is not None

    def share_statistics(self) -> None:
        """Make the query BatchNorm's statistics those of all data-parallel ranks.

        For training loops other than this project's, such as `transformers.Trainer` under torchrun;
        the process group must have been started, and from then on every rank must call the model
        in training mode equally often. Without query_norm "batch" it does nothing.
        """
        for module in self.modules():
            if isinstance(module, QueryBatchNorm):
                module.reduce_sum = sum_over_ranks

    def key_weights(self) -> dict[str, Tensor]:
        """Float32 CPU copies of the weights that make the memory's keys, named as in `PlugLMModel`.

        What `KeyEncoderFactory` needs beside the configuration, and what a memory is given:
        `LocalMemory(store, encoder=KeyEncoderFactory(model.config.to_dict()),
        weights=model.key_weights())`.
        """
        return {
            name: p.detach().to("cpu", torch.float32, copy=True)
            for name, p in self._encoder().named_parameters()
            if is_key_weight(name, self.config)
        }

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = run_layer,
        every_n_layers: int = 1,
    ) -> None:
        """What `activation_checkpointing_enable` calls."""
        if enable and every_n_layers != 1:
            raise ValueError(f"every_n_layers = {every_n_layers}: must be 1, every layer")
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "use_reentrant = True: a layer that reads a memory can only be recomputed with "
                "use_reentrant = False, which is the default"
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func)

    def _reported(self, encoded: PlugLMOutput) -> tuple[LayerRetrieval, ...] | None:
        return encoded.retrievals if self.config.output_retrievals else None

    def _encoder(self) -> PlugLMModel:
        return cast("PlugLMModel", self.base_model)

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


class PlugLMModel(PlugLMPreTrainedModel):
    """The encoder. `attach` plugs a memory in; `lookup` does so for one forward pass."""

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
        self._lookup: Lookup | None = None
        self._said = False
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        if not isinstance(value, nn.Embedding):
            raise TypeError(
                f"the word embeddings must be an nn.Embedding, not {type(value).__name__}"
            )
        self.embeddings.word_embeddings = value

    def encode_entries(self, tokens_nS: Tensor) -> EncodedEntries:
        """Keys and values of entries with the current weights, with gradient.

        Args:
            tokens_nS: int64, padded with the pad token; [CLS] or not as the memory's entries are.
        """
        check_entries("tokens_nS", tokens_nS, self.config)
        return self._encode(tokens_nS)

    def entry_keys(self, tokens_nS: Tensor) -> Tensor:
        """The keys [n,Q] alone."""
        check_entries("tokens_nS", tokens_nS, self.config)
        return cast(Tensor, self.entry_encoder(*self._entry_vectors(tokens_nS), keys_only=True))

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        lookup: Lookup | None = None,
        wanted_BT: Tensor | None = None,
        first_only: bool = False,
        output_attention: bool = False,
        output_hidden_states: bool | None = None,
        retrieval_chunks: int = 1,
    ) -> PlugLMOutput:
        """Encode sequences.

        Args:
            input_ids: int64 [B,T].
            attention_mask: 0/1 [B,T]; None means every position is a token.
            token_type_ids: int64 [B,T]; None means type 0.
            lookup: the memory, asked once per memory layer with queries [B,Q]; None: the attached
                one, and without any the memory term is absent.
            wanted_BT: bool [B,T], the positions whose last hidden state is wanted; the last layer
                computes only these, and last_hidden_state is [m,H], row-major.
            first_only: likewise for every sequence's first position; [B,H]. Its sizes are known, so
                that nothing waits and graphs can be traced.
            output_attention: report the knowledge attention.
            output_hidden_states: report the embeddings and every layer's output.
            retrieval_chunks: pieces that the batch is cut in, so that one's search runs while
                others compute; for a lookup whose searches can be begun (see overlap.py).

        `return_dict=False` returns a tuple, as in transformers.

        Raises:
            TypeError, ValueError: the inputs, or the memory's answer, do not fit the model.
        """
        mask_BT = checked_mask(input_ids, attention_mask, token_type_ids, self.config)
        if wanted_BT is not None:
            check_wanted(wanted_BT, input_ids, first_only=first_only)
        if lookup is not None and not callable(lookup):
            raise TypeError(
                f"lookup is {type(lookup).__name__}; allowed: a callable that takes queries [B,Q], "
                "or None; attach() takes a memory"
            )
        rows = self._layout(mask_BT, known_full=attention_mask is None)
        chosen = rows.first() if first_only else None
        if wanted_BT is not None:
            chosen = rows.select(wanted_BT)
        lookup = self._lookup if lookup is None else lookup
        if lookup is None and self.config.num_memory_layers:
            self._say_no_memory()
        x = self.embeddings(input_ids, token_type_ids, rows)
        chunks = min(retrieval_chunks, input_ids.shape[0])
        if chunks > 1 and isinstance(lookup, Startable) and self.config.num_memory_layers:
            if first_only or output_hidden_states or self.config.legacy:
                raise ValueError(
                    f"retrieval_chunks = {retrieval_chunks}: first_only, output_hidden_states and "
                    "the published variant need the whole batch at once; use 1"
                )
            x, joined = run_in_chunks(
                list(self.layers),
                x,
                rows,
                lookup=lookup,
                reader=self._reader,
                wanted_BT=wanted_BT,
                chunks=chunks,
                recompute=self.gradient_checkpointing and self.training,
                pack=self.config.unpad_inputs,
                output_attention=output_attention,
            )
            return PlugLMOutput(last_hidden_state=x, retrievals=tuple(joined))
        hidden_states = [rows.unpack(x)] if output_hidden_states else None
        retrievals: list[LayerRetrieval] = []
        last = len(self.layers) - 1
        again = self.gradient_checkpointing and self.training
        for i, layer in enumerate(self.layers):
            wanted = chosen if i == last else None
            if isinstance(layer, MemoryLayer):
                asked = AskedOnce(lookup) if lookup is not None and again else lookup
                read = None if asked is None else self._reader(asked, layer.index)
                options = {"read": read, "chosen": wanted, "output_attention": output_attention}
                x, retrieval = run_layer(layer, again, x, rows, **options)
                if retrieval is not None:
                    retrievals.append(retrieval)
            else:
                x = run_layer(layer, again, x, rows, wanted)
            if hidden_states is not None:
                hidden_states.append(x if wanted is not None else rows.unpack(x))
        hidden = x if chosen is not None else rows.unpack(x)
        return PlugLMOutput(
            last_hidden_state=hidden,
            hidden_states=None if hidden_states is None else tuple(hidden_states),
            retrievals=tuple(retrievals),
        )

    def _layout(self, mask_BT: Tensor, *, known_full: bool) -> Rows:
        """Whether padding is computed: where positions mix, or sizes must be static, it is."""
        if known_full:
            return Rows(mask_BT, full=True)
        pack = self.config.unpad_inputs and not self.config.legacy
        return Rows.of_tokens(mask_BT, pack=pack and not torch.compiler.is_compiling())

    def _reader(self, lookup: Lookup, layer: int) -> ReadMemory:
        return partial(
            read_memory,
            lookup=lookup,
            # The memory's answer has been checked.
            encode=self._encode,
            config=self.config,
            layer=layer,
        )

    def _encode(self, tokens_nS: Tensor) -> EncodedEntries:
        return cast(EncodedEntries, self.entry_encoder(*self._entry_vectors(tokens_nS)))

    def _entry_vectors(self, tokens_nS: Tensor) -> tuple[Tensor, Tensor]:
        mask_nS = tokens_nS != (self.config.pad_token_id or 0)
        first = self.layers[: self.config.entry_encoder_layers]
        return embed_entries(tokens_nS, mask_nS, self.embeddings, first), mask_nS

    def _say_no_memory(self) -> None:
        if not self._said:
            self._said = True
            log.warning(
                "no memory is attached: the encoder runs with its memory term absent. Attach one "
                "with model.attach(memory); model.attach(None) says that it is meant so."
            )
