"""`pluglm export`: a model as graphs that run without Python."""

from __future__ import annotations

import argparse
from pathlib import Path

from cluster.cli.command import Command
from cluster.cli.text import pairs
from cluster.errors import LaunchError


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="DIR", help="a PlugLM's directory, any head")
    parser.add_argument(
        "--format",
        choices=("torch", "onnx"),
        default="torch",
        help="torch: .pt2 files for torch.export.load; onnx: needs the packages onnx and "
        "onnxscript (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the directory to write into"
    )


def _export(options: argparse.Namespace) -> int:
    from model.export import export_graphs, load_saved

    try:
        files = export_graphs(load_saved(options.model), options.out, file_format=options.format)
    except ModuleNotFoundError as error:
        raise LaunchError(str(error)) from error
    print(pairs([("model", str(options.model)), *(("written", str(path)) for path in files)]))
    print("\nnext: docs/ecosystem.md shows how to ask, search and read with them")
    return 0


EXPORT = Command(
    name="export",
    summary="write a model as torch.export or ONNX graphs",
    description="""\
Write a model as graphs that run without Python, for any batch and lengths:

  queries   input_ids, attention_mask, token_type_ids -> what to search for
  reading   the same, retrieved_tokens and retrieved_ids -> the model's answer

The memory's search stays between them. With several memory layers there is one
queries file for each, which also takes what the layers below it found.""",
    example="pluglm export runs/quickstart/model --format onnx --out graphs",
    configure=_arguments,
    run=_export,
    after_interrupt="the files that were there are as they were",
)
