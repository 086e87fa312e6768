"""What a fine-tuned classifier reads of its memory: how varied, how right, and whether it matters.

MODEL is `seed-N/model` of `pluglm finetune`, `adapt compare` or `in-task`, with a live memory. Of
the first --rows rows of a test file: predictions that change when the memory is unplugged; how even
attention is over a row's entries (1: flat); how many different entries all rows read together (few:
the queries have collapsed); how many are right, with the memory and without. Where training samples
are in the memory (--train): how many of those that are read have the row's own label, beside what
labels drawn by chance would have. Where rows have a title (--title): how many read an entry of that
title, and how many of these and of the others are right. --domains reads other domains than the
model was fine-tuned with: what is plugged in without training.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from harness import argument_parser, begin, finish, positive, table
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from memory_server.errors import MemoryServerError
from memory_server.local import LocalMemory
from memory_server.requests import MAX_TOP_K
from model import KeyEncoderFactory
from trainer.finetune.own_text import row_doc_ids
from trainer.finetune.tables import Table, read_table

_BATCH = 50


def opened(path: Path, domains: list[str] | None = None) -> tuple[Any, dict[str, Any], LocalMemory]:
    """The model, what `finetuned.json` tells, and the memory that it reads.

    Args:
        path: of the model.
        domains: of the memory's store; None: those that it was fine-tuned with.

    Raises:
        ValueError: it is no such model. StoreError: the memory is gone. UnknownDomain: one of them.
    """
    try:
        about = json.loads((path / "finetuned.json").read_text(encoding="utf-8"))
        memory = about["memory"]
        if memory["vectors"] or memory["keys_made_with"] != "this model":
            raise ValueError(f"{path} reads keys that it does not make itself; fine-tune it live")
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no fine-tuned model with a memory ({type(error).__name__}: {error}); give "
            "seed-N/model of a fine-tuning that read one"
        ) from error
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    encoder = KeyEncoderFactory(model.config.to_dict())
    opened_memory = LocalMemory(
        memory["store"],
        encoder=encoder,
        weights=model.key_weights(),
        domains=memory["domains"] if domains is None else domains,
    )
    return model, about, opened_memory


@torch.no_grad()
def predicted(
    model: Any, tokenizer: Any, texts: list[str], length: int, memory: LocalMemory | None, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Ask the model.

    Returns:
        (labels, int64 [N]; the entries read, int64 [N, k], -1 pads; each entry's share of the last
        memory layer's attention, [N, heads, k]); the last two are empty without a memory.
    """
    found: list[Tensor] = []
    attended: list[Tensor] = []

    def lookup(queries_BQ: Tensor) -> Any:
        assert memory is not None
        answer = memory.search(queries_BQ, k)
        found.append(answer.ids)
        return answer

    model.attach(None if memory is None else lookup)
    labels = []
    for first in range(0, len(texts), _BATCH):
        batch = tokenizer(
            texts[first : first + _BATCH],
            truncation=True,
            max_length=length,
            padding=True,
            return_tensors="pt",
        )
        output = model(**batch, output_attention=memory is not None)
        labels.append(output.logits.argmax(1))
        if memory is not None:
            # The last layer computes only the position that the class is read from.
            attended.append(output.retrievals[-1].attention_BATK[:, :, 0])
    if memory is None:
        return torch.cat(labels), torch.empty(0, dtype=torch.int64), torch.empty(0)
    return torch.cat(labels), torch.cat(found), torch.cat(attended)


def evenness(share_NAK: Tensor) -> float:
    """How even attention is over the entries: 1, all the same; 0, one has all. Mean entropy over
    the largest."""
    share_NAK = share_NAK / share_NAK.sum(-1, keepdim=True).clamp(min=1e-12)
    entropy_NA = -(share_NAK * share_NAK.clamp(min=1e-12).log()).sum(-1)
    return float((entropy_NA / math.log(max(share_NAK.shape[-1], 2))).mean())


def samples_read(
    memory: LocalMemory,
    ids_NK: Tensor,
    labels: list[str],
    train: Table,
    *,
    text: str,
    label_column: str,
) -> dict[str, Any]:
    """How many of the entries that were read are training samples, and of the row's own label."""
    label_of = dict(
        zip(row_doc_ids(train, (text,)), map(str, train.columns[label_column]), strict=True)
    )
    known = sorted({int(entry) for entry in ids_NK.flatten().tolist() if entry >= 0})
    doc_of = {entry.id: entry.doc_id for entry in memory.entries(known)}
    own = samples = 0
    for label, ids in zip(labels, ids_NK.tolist(), strict=True):
        for entry in ids:
            read = label_of.get(doc_of.get(entry, -1))
            samples += read is not None
            own += read == label
    trained, tested = Counter(label_of.values()), Counter(labels)
    chance = sum(
        count / len(labels) * trained[label] / trained.total() for label, count in tested.items()
    )
    return {"samples": samples, "of_the_rows_own_label": own, "chance": chance}


def own_article_read(
    memory: LocalMemory,
    ids_NK: Tensor,
    titles: list[str],
    right_N: Tensor,
    right_without_N: Tensor,
) -> dict[str, Any]:
    """How many rows read an entry of their own title, and how many of them and of others are right.

    Args:
        right_N, right_without_N: bool, with the memory and with it unplugged.
    """
    known = sorted({int(entry) for entry in ids_NK.flatten().tolist() if entry >= 0})
    title_of = {entry.id: entry.title for entry in memory.entries(known)}
    found_N = torch.tensor(
        [
            any(title_of.get(entry) == title for entry in ids)
            for title, ids in zip(titles, ids_NK.tolist(), strict=True)
        ]
    )
    first = sum(
        title_of.get(ids[0]) == title for title, ids in zip(titles, ids_NK.tolist(), strict=True)
    )
    figures: dict[str, Any] = {
        "read_their_own_article": float(found_N.float().mean()),
        "read_it_first": first / len(titles),
    }
    for name, of_N in (("own_article_read", found_N), ("not_read", ~found_N)):
        if of_N.any():
            figures[f"right_{name}"] = float(right_N[of_N].float().mean())
            figures[f"right_unplugged_{name}"] = float(right_without_N[of_N].float().mean())
    return figures


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("model", type=Path, help="seed-N/model of a fine-tuned classifier")
    parser.add_argument("test", type=Path, help="rows with a text and a label")
    parser.add_argument("--text", default="text", help="column of the text (default: text)")
    parser.add_argument("--label", default="label", help="column of the label (default: label)")
    parser.add_argument("--title", help="column of the title that the row's own entries have")
    parser.add_argument("--domains", nargs="+", help="domains to read (default: the model's own)")
    parser.add_argument("--train", type=Path, help="the training rows, if they are in the memory")
    parser.add_argument("--rows", type=positive, default=600)
    parser.add_argument("--top-k", type=positive, help="entries per row (default: the model's own)")
    args = parser.parse_args()
    try:
        test = read_table(args.test, "TEST").first(args.rows)
        train = None if args.train is None else read_table(args.train, "--train")
        for one in (test, train):
            needed = [args.text, args.label]
            if one is test and args.title:
                needed.append(args.title)
            if one is not None and not set(needed) <= set(one.columns):
                raise ValueError(
                    f"{one.path} has the columns {', '.join(one.columns)}; it must have "
                    f"{', '.join(needed)} (--text, --label, --title)"
                )
        model, about, memory = opened(args.model, args.domains)
        for label in map(str, test.columns[args.label]):
            if label not in model.config.label2id:
                raise ValueError(
                    f"{test.path}: the label {label!r} of --label {args.label} is none of the "
                    f"model's: {', '.join(model.config.label2id)}"
                )
        k = args.top_k or about["memory"]["top_k"]
        most = min(memory.info().entries, MAX_TOP_K)
        if k > most:
            raise ValueError(f"--top-k {k}: this memory answers with 1 to {most} entries")
    except (ValueError, OSError, MemoryServerError) as error:
        parser.error(str(error))
    facts = begin()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts, length = list(map(str, test.columns[args.text])), about["max_length"]
    labels = list(map(str, test.columns[args.label]))
    gold_N = torch.tensor([model.config.label2id[label] for label in labels])
    with memory:
        read, ids_NK, share_NAK = predicted(model, tokenizer, texts, length, memory, k)
        without, _, _ = predicted(model, tokenizer, texts, length, None, k)
        figures: dict[str, Any] = {
            "rows": len(test),
            "right": float((read == gold_N).float().mean()),
            "right_unplugged": float((without == gold_N).float().mean()),
            "changed_when_unplugged": float((read != without).float().mean()),
            "read": int((ids_NK >= 0).sum()),
            "attention_evenness": evenness(share_NAK),
            "different_entries": int(ids_NK[ids_NK >= 0].unique().numel()),
        }
        if train is not None:
            figures |= samples_read(
                memory, ids_NK, labels, train, text=args.text, label_column=args.label
            )
        if args.title:
            figures |= own_article_read(
                memory,
                ids_NK,
                list(map(str, test.columns[args.title])),
                read == gold_N,
                without == gold_N,
            )
    shown = [
        [name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.3f}"]
        for name, value in figures.items()
    ]
    print(table(["", "value"], shown))
    finish(args.json, facts, args, figures)


if __name__ == "__main__":
    main()
