"""A model as graphs that run without Python: the memory's search stays between them.

`QueryGraph` ends where a memory layer asks; `ReadGraph` takes what was found. Both are plain
modules, so that whoever wants other shapes or options can give them to `torch.export` or
`torch.onnx`; `export_graphs` writes them as files.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from model.config import PlugLMConfig
from model.heads import (
    PlugLMForQuestionAnswering,
    PlugLMForSequenceClassification,
    PlugLMForTokenClassification,
)
from model.inputs import checked_mask
from model.layers import MemoryLayer
from model.masked_lm import PlugLMForMaskedLM
from model.modeling import PlugLMModel, PlugLMPreTrainedModel
from model.retrieval import RetrievedEntries

_CLASSES: tuple[type[PlugLMPreTrainedModel], ...] = (
    PlugLMModel,
    PlugLMForMaskedLM,
    PlugLMForSequenceClassification,
    PlugLMForTokenClassification,
    PlugLMForQuestionAnswering,
)
# Sizes to trace with: torch.export would take a size of 1, or two equal ones, for fixed.
_BATCH, _TOKENS, _RETRIEVED, _ENTRY_TOKENS = 2, 7, 3, 5


@dataclass(frozen=True)
class _Given:
    """Retrieved entries that were handed in."""

    ids: Tensor
    tokens: Tensor
    doc_ids: Tensor


class QueryGraph(nn.Module):
    """(input_ids, attention_mask, token_type_ids, each int64 [B,T]) -> queries float32 [B,Q].

    For the memory layers above the first also what the layers below it read: retrieved_tokens
    int64 [B,m,K,S] and retrieved_ids int64 [B,m,K] for the `number` m.
    """

    def __init__(self, model: PlugLMPreTrainedModel, number: int = 0) -> None:
        """Take the layers up to the one that asks; the weights are the model's own.

        Args:
            model: any PlugLM.
            number: which memory layer asks, from 0.

        Raises:
            ValueError: there is no such memory layer, or the model reads stored vectors.
        """
        super().__init__()
        config = _checked(model)
        if not 0 <= number < config.num_memory_layers:
            raise ValueError(
                f"number is {number}; allowed: 0 to {config.num_memory_layers - 1}, the model's "
                "memory layers"
            )
        plain = config.num_hidden_layers - config.num_memory_layers
        shorter = PlugLMConfig.from_dict(
            config.to_dict()
            | {"num_hidden_layers": plain + number + 1, "num_memory_layers": number + 1}
        )
        whole = model._encoder().state_dict()
        with torch.device("meta"):
            self.encoder = PlugLMModel(shorter)
        wanted = {name: whole[name] for name in self.encoder.state_dict()}
        self.encoder.load_state_dict(wanted, assign=True)
        self.number = number
        self.eval()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        retrieved_tokens: Tensor | None = None,
        retrieved_ids: Tensor | None = None,
    ) -> Tensor:
        """The queries of the memory layer."""
        found: list[RetrievedEntries] = []
        if self.number:
            assert retrieved_tokens is not None
            assert retrieved_ids is not None
            found = _by_layer(retrieved_tokens, retrieved_ids, self.number)
        mask_BT = checked_mask(input_ids, attention_mask, token_type_ids, self.encoder.config)
        rows = self.encoder._layout(mask_BT, known_full=False)
        x = self.encoder.embeddings(input_ids, token_type_ids, rows)
        lookup = _in_turn(found)
        *below, asking = self.encoder.layers
        assert isinstance(asking, MemoryLayer)
        for layer in below:
            if isinstance(layer, MemoryLayer):
                x, _ = layer(x, rows, read=self.encoder._reader(lookup, layer.index))
            else:
                x = layer(x, rows)
        return asking.ask(x, rows)


class ReadGraph(nn.Module):
    """The inputs, and what was found for them, to the model's logits.

    (input_ids, attention_mask, token_type_ids, retrieved_tokens int64 [B,K,S], retrieved_ids int64
    [B,K], -1 where there is no entry). With several memory layers the last two are [B,M,K,S] and
    [B,M,K]. Returns the logits; (start_logits, end_logits) of a question-answering model;
    last_hidden_state of a bare encoder. Where there is padding, hidden states and the logits per
    token hold nothing of use.
    """

    def __init__(self, model: PlugLMPreTrainedModel) -> None:
        """Wrap the model itself, which is put into eval mode.

        Raises:
            ValueError: it has no memory layer, or reads stored vectors.
        """
        super().__init__()
        self.layers = _checked(model).num_memory_layers
        self.model = model
        self.eval()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        retrieved_tokens: Tensor,
        retrieved_ids: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The model's answer."""
        if retrieved_tokens.ndim == 3:
            retrieved_tokens, retrieved_ids = retrieved_tokens[:, None], retrieved_ids[:, None]
        found = _by_layer(retrieved_tokens, retrieved_ids, self.layers)
        output = self.model(input_ids, attention_mask, token_type_ids, lookup=_in_turn(found))
        if "start_logits" in output:
            return output.start_logits, output.end_logits
        answer: Tensor = output.logits if "logits" in output else output.last_hidden_state
        return answer


def example_inputs(graph: QueryGraph | ReadGraph) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs to trace a graph with, and which of their sizes may change.

    Returns:
        (inputs by name; `dynamic_shapes` as torch.export takes them).
    """
    reads = isinstance(graph, ReadGraph)
    config = graph.model.config if isinstance(graph, ReadGraph) else graph.encoder.config
    layers = graph.layers if isinstance(graph, ReadGraph) else graph.number
    longest = config.max_position_embeddings
    batch, tokens = Dim("batch"), Dim("tokens", max=longest)
    # Tensors of their own: one that is given twice would be traced as one input.
    shape = (_BATCH, min(_TOKENS, longest))
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = {name: torch.ones(shape, dtype=torch.int64) for name in names}
    inputs["token_type_ids"].zero_()
    shapes: dict[str, Any] = {name: {0: batch, 1: tokens} for name in inputs}
    if not reads and not layers:
        return inputs, shapes
    retrieved, entry_tokens = Dim("retrieved"), Dim("entry_tokens", max=longest)
    sizes = [_BATCH, layers, _RETRIEVED, min(_ENTRY_TOKENS, longest)]
    dims: list[Any] = [batch, None, retrieved, entry_tokens]
    if reads and layers == 1:
        del sizes[1], dims[1]
    inputs["retrieved_tokens"] = torch.ones(sizes, dtype=torch.int64)
    inputs["retrieved_ids"] = torch.arange(_RETRIEVED).expand(sizes[:-1]).contiguous()
    for name, axes in (("retrieved_tokens", dims), ("retrieved_ids", dims[:-1])):
        shapes[name] = {axis: dim for axis, dim in enumerate(axes) if dim is not None}
    return inputs, shapes


def export_graphs(
    model: PlugLMPreTrainedModel, directory: Path | str, *, file_format: str = "torch"
) -> list[Path]:
    """Write a model's graphs: `queries` (of several memory layers: `queries_0`, ...) and `reading`.

    Batch and lengths may change from call to call. The model is left in eval mode.

    Args:
        model: any PlugLM with a memory, on the CPU.
        directory: is made.
        file_format: "torch" writes .pt2 files for `torch.export.load`; "onnx" .onnx files, which
            need the packages onnx and onnxscript to be written.

    Returns:
        The files, in the order in which they are used.

    Raises:
        ValueError: another format, no memory layer, or a model that reads stored vectors.
        ModuleNotFoundError: onnxscript is not installed.
    """
    if file_format not in ("torch", "onnx"):
        raise ValueError(f"file_format is {file_format!r}; allowed: torch, onnx")
    if file_format == "onnx" and importlib.util.find_spec("onnxscript") is None:
        raise ModuleNotFoundError(
            "writing ONNX needs the packages onnx and onnxscript: pip install onnx onnxscript"
        )
    layers = _checked(model).num_memory_layers
    names = ["queries"] if layers == 1 else [f"queries_{number}" for number in range(layers)]
    graphs: dict[str, QueryGraph | ReadGraph] = {
        name: QueryGraph(model, number) for number, name in enumerate(names)
    }
    graphs["reading"] = ReadGraph(model)
    directory = Path(directory)
    beside = directory / ".writing"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    files = []
    for name, graph in graphs.items():
        inputs, shapes = example_inputs(graph)
        program = torch.export.export(graph, (), inputs, dynamic_shapes=shapes, strict=False)
        if file_format == "torch":
            files.append(beside / f"{name}.pt2")
            torch.export.save(program, files[-1])
            continue
        files.append(beside / f"{name}.onnx")
        if isinstance(graph, QueryGraph):
            outputs = ["queries"]
        else:
            spans = isinstance(model, PlugLMForQuestionAnswering)
            outputs = ["start_logits", "end_logits"] if spans else ["answer"]
        made = torch.onnx.export(program, dynamo=True, verbose=False, output_names=outputs)
        assert made is not None
        made.save(str(files[-1]), external_data=False)
    # All of them, or none: a query graph and a reading graph of two models do not belong together.
    placed = [file.replace(directory / file.name) for file in files]
    beside.rmdir()
    return placed


def load_saved(directory: Path) -> PlugLMPreTrainedModel:
    """Load the model that a directory holds, with the head that it was saved with, on the CPU.

    Raises:
        FileNotFoundError: there is no config.json. ValueError: it is no PlugLM, or weights are
            missing.
    """
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"there is no model at {directory} (no config.json); give a model's directory"
        )
    saved = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    classes = {one.__name__: one for one in _CLASSES}
    name = (saved.get("architectures") or [None])[0]
    if saved.get("model_type") != PlugLMConfig.model_type or name not in classes:
        raise ValueError(
            f"{directory} holds a {saved.get('model_type')!r} model of the class {name}; allowed: "
            f"{', '.join(classes)}"
        )
    loaded: Any = classes[name].from_pretrained(
        directory, output_loading_info=True, local_files_only=True
    )
    model, missing = loaded[0], sorted(loaded[1]["missing_keys"])
    if missing:
        raise ValueError(
            f"{directory} lacks {len(missing)} of the model's weights, such as {missing[0]}; "
            "restore it from a copy"
        )
    checked: PlugLMPreTrainedModel = model
    return checked


def _checked(model: PlugLMPreTrainedModel) -> PlugLMConfig:
    config = model.config
    if not config.num_memory_layers:
        raise ValueError(
            "this model has no memory layer (num_memory_layers 0), so nothing is asked or read; "
            "export it as any encoder"
        )
    if config.fixed_keys or config.fixed_values:
        raise ValueError(
            "this model reads keys or values that come with the memory's reply (fixed_keys, "
            "fixed_values), but the graphs take tokens only; set both to False"
        )
    return config


def _by_layer(tokens_BMKS: Tensor, ids_BMK: Tensor, layers: int) -> list[RetrievedEntries]:
    return [
        _Given(ids_BMK[:, m], tokens_BMKS[:, m], torch.full_like(ids_BMK[:, m], -1))
        for m in range(layers)
    ]


def _in_turn(found: list[RetrievedEntries]) -> Callable[[Tensor], RetrievedEntries]:
    """A lookup that answers each memory layer with what was found for it, from below."""
    waiting = iter(found)
    return lambda queries_BQ: next(waiting)
