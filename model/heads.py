"""PlugLM with the heads of fine-tuning: sequences, tokens, and spans that answer questions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils.generic import can_return_tuple

from model.config import PlugLMConfig
from model.full_precision import widened
from model.inputs import (
    check_labelled_tokens,
    check_labels,
    check_layout,
    check_numbers,
    checked_mask,
    describe,
)
from model.modeling import PlugLMModel, PlugLMPreTrainedModel
from model.outputs import QuestionAnsweringOutput, TaskOutput
from model.retrieval import Lookup

IGNORED_LABEL = -100


class SequenceHead(nn.Module):
    """`out_proj(dropout(tanh(in_proj(x))))` of the first position, as BERT's classifiers."""

    def __init__(self, config: PlugLMConfig) -> None:
        super().__init__()
        # Not called like the masked-LM head's first map, which from_pretrained would take for it.
        self.in_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(_dropout(config))
        self.out_proj = nn.Linear(config.hidden_size, _classes(config))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out_proj(self.dropout(torch.tanh(self.in_proj(x))))
        return logits


class TokenHead(nn.Module):
    """`out_proj(dropout(x))` of every position."""

    def __init__(self, config: PlugLMConfig, outputs: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(config.hidden_size, outputs)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out_proj(self.dropout(x))
        return logits


class PlugLMForSequenceClassification(PlugLMPreTrainedModel):
    """One label, several labels or a number per sequence (or pair, by token_type_ids)."""

    def __init__(self, config: PlugLMConfig) -> None:
        super().__init__(config)
        self.pluglm = PlugLMModel(config)
        self.head = SequenceHead(config)
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        lookup: Lookup | None = None,
        output_attention: bool = False,
    ) -> TaskOutput:
        """Classify sequences by the last hidden state of their first position.

        Args:
            input_ids, attention_mask, token_type_ids, lookup, output_attention: as in
                `PlugLMModel`.
            labels: int64 [B] for one label of several (cross-entropy); float [B] or [B,C] for
                regression (mean squared error; num_labels is 1, or problem_type says so); float
                0/1 [B,C] for several labels at once (binary cross-entropy).

        Raises:
            TypeError, ValueError: as in `PlugLMModel`; labels that do not fit the problem type.
        """
        check_layout(input_ids, self.config)
        kind = None if labels is None else self._checked_kind(labels, len(input_ids))
        encoded = self.pluglm(
            input_ids,
            attention_mask,
            token_type_ids,
            lookup=lookup,
            first_only=True,
            output_attention=output_attention,
            return_dict=True,
        )
        logits_BC = self.head(encoded.last_hidden_state)
        loss = None
        if labels is not None:
            loss = _sequence_loss(widened(logits_BC), labels, kind)
        return TaskOutput(loss=loss, logits=logits_BC, retrievals=self._reported(encoded))

    def _checked_kind(self, labels: Tensor, batch: int) -> str:
        """The problem type that these labels, which it has, are for."""
        classes = _classes(self.config)
        if not isinstance(labels, Tensor):
            raise TypeError(
                f"labels is {describe(labels)}; allowed: a tensor, one row per sequence"
            )
        kind = str(self.config.problem_type or _problem_type(classes, labels))
        if kind == "single_label_classification":
            check_labels("labels", labels, torch.Size([batch]), classes, IGNORED_LABEL)
        else:
            check_numbers("labels", labels, torch.Size([batch, classes]), kind)
        return kind


class PlugLMForTokenClassification(PlugLMPreTrainedModel):
    """One label per token."""

    def __init__(self, config: PlugLMConfig) -> None:
        super().__init__(config)
        self.pluglm = PlugLMModel(config)
        self.head = TokenHead(config, _classes(config), _dropout(config))
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        lookup: Lookup | None = None,
        output_attention: bool = False,
    ) -> TaskOutput:
        """Classify tokens.

        Args:
            input_ids, attention_mask, token_type_ids, lookup, output_attention: as in
                `PlugLMModel`.
            labels: int64 [B,T], -100 where there is none; a batch without any has loss 0.

        Raises:
            TypeError, ValueError: as in `PlugLMModel`; labels of another shape or no class.
        """
        if labels is not None:
            check_layout(input_ids, self.config)
            classes = _classes(self.config)
            check_labels("labels", labels, input_ids.shape, classes, IGNORED_LABEL)
            check_labelled_tokens(labels, IGNORED_LABEL, attention_mask)
        encoded = self.pluglm(
            input_ids,
            attention_mask,
            token_type_ids,
            lookup=lookup,
            output_attention=output_attention,
            return_dict=True,
        )
        logits_BTC = self.head(encoded.last_hidden_state)
        loss = None
        if labels is not None:
            loss = _cross_entropy(widened(logits_BTC).flatten(0, 1), labels.flatten())
        return TaskOutput(loss=loss, logits=logits_BTC, retrievals=self._reported(encoded))


class PlugLMForQuestionAnswering(PlugLMPreTrainedModel):
    """The span of the sequence that answers a question."""

    def __init__(self, config: PlugLMConfig) -> None:
        super().__init__(config)
        self.pluglm = PlugLMModel(config)
        # No dropout, as in BERT's.
        self.head = TokenHead(config, 2, 0.0)
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        *,
        lookup: Lookup | None = None,
        output_attention: bool = False,
    ) -> QuestionAnsweringOutput:
        """Score every position as start and as end of the answer.

        Args:
            input_ids, attention_mask, token_type_ids, lookup, output_attention: as in
                `PlugLMModel`.
            start_positions, end_positions: int64 [B], both or none; 0 ([CLS]) where the window
                holds no answer.

        Raises:
            TypeError, ValueError: as in `PlugLMModel`; only one of the positions, or beyond T.
        """
        if (start_positions is None) != (end_positions is None):
            raise ValueError("start_positions and end_positions belong together; give both or none")
        if start_positions is not None and end_positions is not None:
            mask_BT = checked_mask(input_ids, attention_mask, token_type_ids, self.config)
            for name, position_B in (("start", start_positions), ("end", end_positions)):
                _check_positions(f"{name}_positions", position_B, mask_BT)
        encoded = self.pluglm(
            input_ids,
            attention_mask,
            token_type_ids,
            lookup=lookup,
            output_attention=output_attention,
            return_dict=True,
        )
        start_BT, end_BT = self.head(encoded.last_hidden_state).unbind(-1)
        if attention_mask is not None:
            # Padding is no place for an answer, and must not change the others' share.
            padding_BT = ~attention_mask.to(torch.bool)
            lowest = torch.finfo(start_BT.dtype).min
            start_BT = start_BT.masked_fill(padding_BT, lowest)
            end_BT = end_BT.masked_fill(padding_BT, lowest)
        loss = None
        if start_positions is not None and end_positions is not None:
            losses = [
                _cross_entropy(widened(logits_BT), position_B)
                for logits_BT, position_B in ((start_BT, start_positions), (end_BT, end_positions))
            ]
            loss = (losses[0] + losses[1]) / 2
        return QuestionAnsweringOutput(
            loss=loss, start_logits=start_BT, end_logits=end_BT, retrievals=self._reported(encoded)
        )


def _sequence_loss(logits_BC: Tensor, labels: Tensor, kind: str | None) -> Tensor:
    """The mean loss of checked labels for a problem type."""
    if kind == "single_label_classification":
        return _cross_entropy(logits_BC, labels)
    targets_BC = labels.view_as(logits_BC).to(logits_BC.dtype)
    if kind == "regression":
        return F.mse_loss(logits_BC, targets_BC)
    return F.binary_cross_entropy_with_logits(logits_BC, targets_BC)


def _cross_entropy(logits_nC: Tensor, labels_n: Tensor) -> Tensor:
    """The mean over the labels that are not ignored; 0, not NaN, if all are."""
    total = F.cross_entropy(logits_nC, labels_n.long(), ignore_index=IGNORED_LABEL, reduction="sum")
    return total / (labels_n != IGNORED_LABEL).sum().clamp(min=1)


def _check_positions(name: str, position_B: Tensor, mask_BT: Tensor) -> None:
    """Check where a span starts or ends: at a token of its own sequence."""
    batch, length = mask_BT.shape
    check_labels(name, position_B, torch.Size([batch]), length, IGNORED_LABEL)
    if torch.compiler.is_compiling():
        return
    told_B1 = (position_B != IGNORED_LABEL).unsqueeze(1)
    place_B1 = position_B.long().unsqueeze(1).clamp(min=0)
    outside_B1 = told_B1 & ~mask_BT.gather(1, place_B1)
    if bool(outside_B1.any()):
        row = int(outside_B1.squeeze(1).nonzero()[0])
        raise ValueError(
            f"{name} holds {int(position_B[row])} for sequence {row}, where attention_mask has "
            "padding; an answer stands in the sequence's own tokens (0 where there is none)"
        )


def _dropout(config: PlugLMConfig) -> float:
    given = config.classifier_dropout
    return float(config.hidden_dropout_prob if given is None else given)


def _classes(config: PlugLMConfig) -> int:
    classes = int(config.num_labels or 0)
    if classes < 1:
        raise ValueError(f"num_labels is {config.num_labels}; it must be at least 1")
    return classes


def _problem_type(num_labels: int, labels: Tensor) -> str:
    """As transformers infers it: one output is a number, integers are classes, floats are bits."""
    if num_labels == 1:
        return "regression"
    if labels.dtype in (torch.int64, torch.int32):
        return "single_label_classification"
    return "multi_label_classification"
