"""Exported graphs: queries out, search outside, what was found in; equal to the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.cli import main
from memory_server.local import LocalMemory
from memory_server.store.store import Store
from model.export import QueryGraph, ReadGraph, export_graphs
from tests.ecosystem.colours import encode, fact, make_memory, make_model

# The head per token; the head of one position; two memory layers and two outputs.
PER_TOKEN = ("MaskedLM", {"query_norm": "batch", "value_pooling": "shared"})
ONE_POSITION = ("SequenceClassification", {"num_labels": 3})
TWO_LAYERS = ("QuestionAnswering", {"num_memory_layers": 2, "entry_pooler": "max"})
WORLDS: list[Any] = [
    pytest.param("torch", 1e-5, *ONE_POSITION, id="torch-one-position"),
    pytest.param("torch", 1e-5, *TWO_LAYERS, id="torch-two-layers", marks=pytest.mark.slow),
    pytest.param("onnx", 1e-4, *PER_TOKEN, id="onnx-per-token", marks=pytest.mark.slow),
]


def lively(head: str, **settings: Any) -> Any:
    """A model whose matrices are large enough that every part of it shows in the answer."""
    model = make_model(head, memory_init="normal", **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def runner(path: Path) -> Any:
    """Call a file's graph with tensors by name; returns a tuple of tensors."""
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()

        def run_torch(**inputs: Tensor) -> tuple[Tensor, ...]:
            found = module(**inputs)
            return found if isinstance(found, tuple) else (found,)

        return run_torch
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run_onnx(**inputs: Tensor) -> tuple[Tensor, ...]:
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        return tuple(torch.from_numpy(array) for array in session.run(None, arrays))

    return run_onnx


def answered(files: list[Path], inputs: dict[str, Tensor], memory: LocalMemory) -> Any:
    """The whole loop without the model: ask, search, ask again, read."""
    *asking, reading = (runner(path) for path in files)
    found: dict[str, Tensor] = {}
    for ask in asking:
        (queries_BQ,) = ask(**inputs, **found)
        reply = memory.search(queries_BQ, 3)
        tokens, ids = reply.tokens, reply.ids
        if len(asking) > 1:
            tokens, ids = tokens[:, None], ids[:, None]
        if found:
            tokens = torch.cat([found["retrieved_tokens"], tokens], 1)
            ids = torch.cat([found["retrieved_ids"], ids], 1)
        found = {"retrieved_tokens": tokens, "retrieved_ids": ids}
    return reading(**inputs, **found)


@torch.no_grad()
def differences(model: Any, given: tuple[Tensor, ...], inputs: dict[str, Tensor]) -> float:
    output = model(**inputs)
    wanted = [v for v in output.values() if isinstance(v, Tensor)]
    assert [v.shape for v in given] == [v.shape for v in wanted]
    kept = inputs["attention_mask"].bool()
    # Where there is padding nothing of use is promised.
    per_token = wanted[0].shape[:2] == kept.shape
    pairs = [
        (a[kept], b[kept]) if per_token else (a, b) for a, b in zip(given, wanted, strict=True)
    ]
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize(("file_format", "tolerance", "head", "settings"), WORLDS)
def test_ask_search_and_read_without_the_model_equals_the_model(
    file_format: str,
    tolerance: float,
    head: str,
    settings: dict[str, Any],
    store: Store,
    tmp_path: Path,
) -> None:
    model = lively(head, **settings)
    memory = make_memory(store, model)
    model.attach(memory)
    files = export_graphs(model, tmp_path / "graphs", file_format=file_format)
    assert all(path.is_file() for path in files)
    long = [fact("sun", "[MASK]"), "snow is", "what colour is the sky ?", "?", "coal is not bad"]
    for texts in (long, ["grass is [MASK]"], [fact("rose", "pink")] * 3):
        inputs = encode(*texts)
        given = answered(files, inputs, memory)
        assert differences(model, given, inputs) < tolerance
        model.detach()
        assert differences(model, given, inputs) > 100 * tolerance  # it did read the memory
        model.attach(memory)


def test_the_wrappers_are_modules_like_others(store: Store) -> None:
    model = lively("MaskedLM")
    seen: list[Tensor] = []
    memory = make_memory(store, model)

    def lookup(queries_BQ: Tensor) -> Any:
        seen.append(queries_BQ)
        return memory.search(queries_BQ, 2)

    inputs = encode(fact("apple", "[MASK]"), "snow is white")
    wanted = model(**inputs, lookup=lookup).logits
    asking = QueryGraph(model)
    assert torch.equal(asking(**inputs), seen[0])
    # It shares the model's weights, and has none of what lies above.
    assert asking.encoder.embeddings.word_embeddings.weight.data_ptr() == (
        model.get_input_embeddings().weight.data_ptr()
    )
    reply = memory.search(seen[0], 2)
    given = ReadGraph(model)(**inputs, retrieved_tokens=reply.tokens, retrieved_ids=reply.ids)
    assert torch.equal(given, wanted)


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no memory layer"):
        export_graphs(make_model(num_memory_layers=0), tmp_path)
    with pytest.raises(ValueError, match="fixed_keys"):
        ReadGraph(make_model(fixed_keys=True))
    with pytest.raises(ValueError, match="number is 1; allowed: 0 to 0"):
        QueryGraph(make_model(), 1)
    with pytest.raises(ValueError, match="file_format is 'tflite'; allowed: torch, onnx"):
        export_graphs(make_model(), tmp_path, file_format="tflite")


def test_the_command_writes_the_head_that_was_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = lively("TokenClassification", num_labels=3)
    model.save_pretrained(tmp_path / "m")
    out = tmp_path / "graphs"
    assert main(["export", str(tmp_path / "m"), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert all(str(out / name) in told for name in ("queries.pt2", "reading.pt2"))
    inputs = encode("snow is white")
    nothing = {"retrieved_tokens": torch.zeros(1, 2, 3, dtype=torch.int64)}
    nothing["retrieved_ids"] = torch.full((1, 2), -1)
    (logits,) = runner(out / "reading.pt2")(**inputs, **nothing)
    model.attach(None)
    torch.testing.assert_close(logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert main(["export", str(tmp_path / "nowhere"), "--out", str(out)]) == 2
    assert "no config.json" in capsys.readouterr().err
