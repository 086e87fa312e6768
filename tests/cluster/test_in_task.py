"""`pluglm in-task`: samples as entries, compared with and without; nothing leaks in training."""

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from torch.nn.modules.module import register_module_forward_hook

from cluster.adaptation.in_task_run import load_in_task_config
from cluster.adaptation.in_task_settings import InTaskConfig
from cluster.adaptation.prompt import prompted
from cluster.cli import main
from cluster.config_sections import build_config
from cluster.presets import preset
from memory_server.store.store import Store
from model import PlugLMForSequenceClassification
from tests.cluster.comparisons import Home, make_home
from tests.cluster.memory_support import Capture
from tests.trainer.finetune.tiny import make_tokenizer, pet_or_fruit, write_rows
from trainer.finetune.own_text import sample_doc_id


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return make_home(tmp_path_factory.mktemp("in-task") / "home")


# Entries of this memory have six tokens, so the template must be short.
TEMPLATE = "in_task.template={label} {text}"


def words(home: Home, out: Path, *settings: str) -> list[str]:
    given = home.settings(TEMPLATE, *settings)
    return ["in-task", str(preset("in-task")), *given, "--out", str(out)]


def entries_of(store: Store, domain: str) -> list[tuple[int, str]]:
    """(document, text) of every live entry."""
    return [
        (int(segment.doc_ids[row]), segment.strings("text", [row])[0])
        for ref in store.manifest().of_domains([domain])
        for segment in [store.segment(ref)]
        for row in range(segment.rows)
    ]


def test_queries_learn_to_find_samples_of_their_own_label(home: Home, tmp_path: Path) -> None:
    """By what training rows read in the last epoch, with that loss and without it."""

    def own_label_share(name: str, *given: str) -> float:
        tokenizer, read = make_tokenizer(), []
        label_of = {sample_doc_id([row["text"]]): row["label"] for row in pet_or_fruit(24)}
        own = {tuple(tokenizer(row["text"])["input_ids"]): row["label"] for row in pet_or_fruit(24)}

        def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            if isinstance(module, PlugLMForSequenceClassification) and module.training:
                tokens, mask = kwargs["input_ids"], kwargs["attention_mask"].bool()
                found = output.retrievals[-1].retrieved.doc_ids.tolist()
                for row, kept, ids in zip(tokens, mask, found, strict=True):
                    label = own[tuple(row[kept].tolist())]
                    read.append(sum(label_of[i] == label for i in ids) / len(ids))

        handle = register_module_forward_hook(look, with_kwargs=True)
        try:
            assert main(words(home, tmp_path / name, *SAMPLES_ALONE, *given)) == 0
        finally:
            handle.remove()
        return sum(read[-24:]) / 24

    without = own_label_share("without")
    learned = own_label_share("learned", "in_task.find_own_label=true")
    assert learned >= 0.85
    assert learned > without + 0.15


SAMPLES_ALONE = (
    'in_task.conditions=["in-task"]',
    "memory.retrieval_loss_weight=3",
    "memory.refresh_every_steps=2",
    "memory.top_k=3",
    "train.seeds=[4]",
    "train.epochs=12",
    "train.lr=0.005",
)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["in_task.find_own_label=true"], "memory.retrieval_loss_weight above 0"),
        (
            ["memory.find_own_label=true", "memory.retrieval_loss_weight=1"],
            "sets both, with in_task.find_own_label",
        ),
        (
            [
                "in_task.find_own_label=true",
                "memory.retrieval_loss_weight=1",
                "task.kind=regression",
                "task.metric=pearson",
            ],
            "whose rows have no label",
        ),
    ],
)
def test_finding_ones_own_label_needs_a_loss_and_labels(
    home: Home, capsys: Capture, given: list[str], told: str
) -> None:
    assert main(words(home, home.path / "none", *given)) == 2
    assert told in capsys.readouterr().err


def test_the_preset_loads_and_comes_back_equal() -> None:
    config = load_in_task_config(preset("in-task"))
    assert build_config(InTaskConfig, tomllib.loads(config.to_toml())) == config
    assert config.in_task.conditions == ("memory", "memory+in-task")


def test_samples_become_entries_of_a_copy_and_are_compared_with_and_without(
    home: Home, tmp_path: Path, capsys: Capture
) -> None:
    """And in training no row finds an entry of its own text: the first thing that could leak."""
    out, source = tmp_path / "run", Store.open(home.path / "store")
    before = source.head()
    tokenizer = make_tokenizer()
    own = {
        tuple(tokenizer(row["text"])["input_ids"]): sample_doc_id([row["text"]])
        for row in pet_or_fruit(24)
    }
    passes: list[tuple[int, set[int]]] = []

    def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        read = isinstance(module, PlugLMForSequenceClassification) and output.retrievals
        if read and module.training:
            tokens, mask = kwargs["input_ids"], kwargs["attention_mask"].bool()
            found = output.retrievals[-1].retrieved.doc_ids.tolist()
            passes.extend(
                (own[tuple(row[kept].tolist())], set(ids))
                for row, kept, ids in zip(tokens, mask, found, strict=True)
            )

    handle = register_module_forward_hook(look, with_kwargs=True)
    conditions = 'in_task.conditions=["no-memory", "memory", "memory+in-task", "in-task"]'
    # The tiny store has 8 and 3 entries; of the 24 samples some share a text, so a document.
    try:
        assert main(words(home, out, conditions, "train.seeds=[4]", "memory.top_k=11")) == 0
    finally:
        handle.remove()
    told = capsys.readouterr()
    assert "copying the memory" in told.err
    with_samples = passes[-2 * 24 :]  # of the last two conditions, 24 rows each
    assert len(passes) == 3 * 24
    documents = {doc_id for _, found in with_samples for doc_id in found}
    assert documents & set(own.values()), "samples are found at all"
    assert all(own_doc not in found for own_doc, found in with_samples)

    assert source.head() == before
    copy = Store.open(out / "memory")
    texts = {row["text"]: row["label"] for row in pet_or_fruit(24)}
    samples = entries_of(copy, "in-task")
    assert len(samples) == 24
    assert {doc for doc, _ in samples} == set(own.values())
    assert sorted(text for _, text in samples) == sorted(
        f"{row['label']} {row['text']}" for row in pet_or_fruit(24)
    )
    kept = {text for name in ("default", "places") for _, text in entries_of(copy, name)}
    assert kept == {text for name in ("default", "places") for _, text in entries_of(source, name)}
    # Neither dev nor test is in it.
    for split in ("dev", "test"):
        for line in (home.path / f"{split}.jsonl").open():
            text = json.loads(line)["text"]
            assert not any(text in entry for _, entry in samples) or text in texts
    found = json.loads((out / "comparison.json").read_text())
    read = {row["name"]: row["memory"] and row["memory"]["domains"] for row in found["conditions"]}
    assert read == {
        "no-memory": None,
        "memory": ["default", "places"],
        "memory+in-task": ["default", "places", "in-task"],
        "in-task": ["in-task"],
    }
    assert found["leaks"]["test"] == {"rows": 12, "seen_in_training": 3}
    assert all("test_unseen" in row["summary"] for row in found["conditions"])
    assert {row["against"] for row in found["differences"]} == {"no-memory", "memory"}
    assert "3 of 12 test rows have the text of a training row" in told.out


def test_it_goes_on_with_the_same_copy_and_refuses_another(
    home: Home, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "run"
    assert main(words(home, out, "train.seeds=[4]")) == 0
    stamp = (out / "memory" / "in-task.json").stat().st_mtime_ns
    assert main(words(home, out)) == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert main([*words(home, out), "--resume"]) == 0
    assert "copying" not in capsys.readouterr().err
    assert (out / "memory" / "in-task.json").stat().st_mtime_ns == stamp
    other = [*words(home, out, "in_task.template={text} {label}"), "--resume"]
    assert main(other) == 2
    assert "read a memory of other samples" in capsys.readouterr().err
    assert (out / "memory" / "in-task.json").stat().st_mtime_ns == stamp


def test_no_memory_that_another_command_made_is_written_over(
    home: Home, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "run"
    shutil.copytree(home.path / "store", out / "memory")
    before = sorted(path for path in out.rglob("*"))
    assert main(words(home, out)) == 2
    assert "holds a memory/ that this command did not make" in capsys.readouterr().err
    own = f"memory.store={out / 'memory'}"
    assert main(words(home, out, own)) == 2
    assert "is the copy that run.dir" in capsys.readouterr().err
    assert [path for path in before if not path.exists()] == []
    assert Store.open(out / "memory").manifest().entries == 11


def test_label_words_are_said_in_place_of_labels(
    home: Home, tmp_path: Path, capsys: Capture
) -> None:
    labels = 'in_task.label_words=["pet=cat dog", "fruit=apple"]'
    assert main([*words(home, tmp_path / "run", labels), "--check"]) == 0
    told = capsys.readouterr().out
    # An entry has room for five tokens beside [CLS]: "here is the cat" loses its last word.
    assert "an entry: cat dog here is the\n" in told
    assert "an entry: apple here is the apple\n" in told
    assert "12 of 24 samples are longer than an entry of 6 tokens" in told
    assert not (tmp_path / "run").exists()


def test_what_is_too_long_loses_text_and_never_its_label() -> None:
    backend = make_tokenizer().backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    samples = [
        {"text": "the cat is here", "label": "pet"},
        {"text": "the cat is here in rome", "label": "cat"},
        {"text": "fig", "label": "apple pear"},
    ]
    found = prompted("{text} is {label}", samples, backend, room=6)
    assert [(p.text, p.cut) for p in found] == [
        ("the cat is here is pet", False),
        ("the cat is here is cat", True),
        ("fig is apple pear", False),
    ]
    pair = {"text": "the cat is here in rome", "text_pair": "a fig", "label": "dog"}
    (cut,) = prompted("{text} {text_pair} {label}", [pair], backend, room=6)
    assert (cut.text, cut.cut) == ("the cat is a fig dog", True)
    with pytest.raises(ValueError, match=r"training row 1: .* alone take more than the 2 tokens"):
        prompted("{text} is {label}", [{"text": "fig", "label": "a plum"}], backend, room=2)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("in_task.template={text} only", "has no slot {label}"),
        ("in_task.template=about {label}", "has no slot {text}"),
        ("in_task.template={text} {tag} {label}", "{tag} must be one of {text}, {text_pair} and"),
        ("in_task.template={text!r} {label}", "{text} must be one of"),
        ("in_task.template={text} {label", "its braces do not match"),
        ("in_task.template={text} {text_pair} {label}", "the rows of task.train have one text"),
        ("task.text_pair=label", "has no slot {text_pair}, but the rows of task.train are pairs"),
        ('in_task.label_words=["pet"]', "'pet' must be \"LABEL=WORDS\""),
        ('in_task.label_words=["plant=tree"]', "no row of task.train has the label 'plant'"),
        ('in_task.label_words=["pet=a b c d the is"]', "alone take more than the 5 tokens"),
        ("model.path={home}/bert", "reads no memory, so there is nothing to compare"),
        ("model.path={home}", "holds no config.json; give the directory of a PlugLM"),
        ("in_task.domain=default", 'in_task.domain = "default": the memory'),
        ("in_task.domain= ", "in_task.domain"),
        ('in_task.conditions=["with"]', "'with' must be one of"),
        ('memory.domains=["law"]', "has no domain 'law'; it has default, places"),
        ("memory.store=", "memory.store is empty"),
        ("memory.exclude_own_samples=true", "leave it out"),
        ("task.kind=token_classification", 'must be one of "classification", "regression"'),
        ("task.test={home}/odd.jsonl", "the label 'plant' is not in the training file"),
        ("memory.top_k=12", "memory.top_k = 12: must be at most 11"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_nothing(
    home: Home, tmp_path: Path, capsys: Capture, setting: str, message: str
) -> None:
    write_rows(home.path / "odd.jsonl", [{"text": "a fig", "label": "plant"}])
    out = tmp_path / "run"
    given = words(home, out, setting.replace("{home}", str(home.path)))
    if setting.startswith("in_task.template"):
        at = given.index(TEMPLATE)
        del given[at - 1 : at + 1]
    if "task.kind" in setting:
        given[given.index("task.metric=accuracy")] = "task.metric="
    assert main(given) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert message in errors[0]
    assert not out.exists()
