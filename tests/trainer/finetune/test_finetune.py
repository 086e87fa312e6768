"""Fine-tuning whole: every head, every kind of start and of memory, going on, and refusals."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from memory_server.errors import TokenizerMismatch
from memory_server.local import LocalMemory
from tests.trainer.finetune.tiny import (
    make_store,
    make_tokenizer,
    pet_or_fruit,
    save_bert,
    save_pluglm,
    settings,
    task,
    write_rows,
)
from trainer.errors import TrainingError
from trainer.finetune.run import check, claim, finetune
from trainer.finetune.seed_run import Job, one_is_left_over
from trainer.finetune.settings import FinetuneSettings
from trainer.finetune.start import build_model, open_start
from trainer.finetune.task import read_task
from trainer.settings_fields import ConfigError

LEARNED = 0.95


def silent(line: str) -> None:
    pass


def fine_tuned(
    given: FinetuneSettings, *, resume: bool = False, say: Callable[[str], None] = silent
) -> dict[str, Any]:
    checked = check(given, say=say)
    claim(given, resume=resume)
    results = finetune(given, checked, say=say)
    assert results is not None
    return results


def mean(results: dict[str, Any], name: str, metric: str) -> float:
    return float(results["summary"][name][metric]["mean"])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, a PlugLM, a plain BERT and a memory, which tests leave as they are."""
    home = tmp_path_factory.mktemp("finetune")
    write_rows(home / "pets.jsonl", pet_or_fruit(64))
    save_pluglm(home / "pluglm")
    save_bert(home / "bert")
    make_store(home / "store")
    return home


def pets(home: Path, **options: Any) -> Any:
    path = home / "pets.jsonl"
    return task("classification", path, test=str(path), **options)


def test_a_task_is_learned_with_a_live_memory_whose_keys_are_renewed(
    home: Path, tmp_path: Path
) -> None:
    memory = {"store": str(home / "store"), "top_k": 2, "refresh_every_steps": 5}
    lines: list[str] = []
    given = settings(
        pets(home),
        home / "pluglm",
        tmp_path / "run",
        memory=memory,
        train={"epochs": 8, "seeds": (0, 7)},
        evaluate={"without_memory": True},
    )
    results = fine_tuned(given, say=lines.append)
    assert mean(results, "test", "accuracy") > LEARNED
    assert mean(results, "test", "matthews") > 0.9
    values = [record["test"]["f1_macro"] for record in results["seeds"]]
    summed = results["summary"]["test"]["f1_macro"]
    assert summed["mean"] == pytest.approx(sum(values) / 2, abs=1e-6)
    assert summed["std"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2), abs=1e-6)
    assert set(results["summary"]) == {"test", "test_without_memory", "dev"}
    assert json.loads((tmp_path / "run/results.json").read_text()) == results
    assert sum("epoch" in line for line in lines) == 16

    seed = tmp_path / "run/seed-7"
    predictions = [json.loads(line) for line in (seed / "predictions.jsonl").open()]
    assert [p["gold"] for p in predictions] == [row["label"] for row in pet_or_fruit(64)]
    right = sum(p["predicted"] == p["gold"] for p in predictions)
    assert right / 64 == pytest.approx(
        json.loads((seed / "metrics.json").read_text())["test"]["accuracy"]
    )
    assert sum(predictions[0]["probabilities"].values()) == pytest.approx(1.0)
    assert (seed / "predictions_without_memory.jsonl").is_file()
    assert not list((tmp_path / "run").glob(".w*"))


def test_the_saved_model_and_a_memory_of_its_own_keys_give_the_predictions_again(
    home: Path, tmp_path: Path
) -> None:
    from model import KeyEncoderFactory

    memory = {"store": str(home / "store"), "top_k": 2, "refresh_every_steps": 3}
    given = settings(pets(home), home / "pluglm", tmp_path / "run", memory=memory)
    fine_tuned(given)
    saved = tmp_path / "run/seed-0/model"
    about = json.loads((saved / "finetuned.json").read_text())
    assert about["memory"]["keys_made_with"] == "this model"
    model = AutoModelForSequenceClassification.from_pretrained(saved).eval()
    encoder = KeyEncoderFactory(model.config.to_dict())
    with LocalMemory(
        about["memory"]["store"], encoder=encoder, weights=model.key_weights()
    ) as again:
        model.attach(again)
        inputs = AutoTokenizer.from_pretrained(saved)("the fig is here", return_tensors="pt")
        with torch.no_grad():
            shares = torch.softmax(model(**inputs).logits[0], 0).tolist()
    told = next(
        json.loads(line)["probabilities"]
        for line, row in zip(
            (tmp_path / "run/seed-0/predictions.jsonl").open(), pet_or_fruit(64), strict=True
        )
        if row["text"] == "the fig is here"
    )
    assert dict(zip(["fruit", "pet"], shares, strict=True)) == pytest.approx(told, abs=1e-5)


def test_every_split_is_measured_whole_in_its_own_order(home: Path, tmp_path: Path) -> None:
    dev = write_rows(tmp_path / "dev.jsonl", pet_or_fruit(21))
    rows = pet_or_fruit(37)[::-1]
    test = write_rows(tmp_path / "test.jsonl", rows)
    given = settings(
        task("classification", home / "pets.jsonl", dev=str(dev), test=str(test)),
        home / "pluglm",
        tmp_path / "run",
        train={"epochs": 4, "eval_batch_size": 5},
    )
    results = fine_tuned(given)
    assert results["sequences"] == {"train": 64, "dev": 21, "test": 37}
    predictions = [json.loads(line) for line in (tmp_path / "run/seed-0/predictions.jsonl").open()]
    assert [p["gold"] for p in predictions] == [row["label"] for row in rows]
    right = sum(p["predicted"] == p["gold"] for p in predictions)
    assert mean(results, "test", "accuracy") == round(right / 37, 6)
    # The first epoch that is right on the few rows of dev is kept; it need not be all right here.
    assert right / 37 > 0.9


def test_frozen_vectors_are_made_once_and_told(home: Path, tmp_path: Path) -> None:
    memory = {"store": str(home / "store"), "mode": "frozen", "top_k": 2}
    given = settings(
        pets(home), home / "pluglm", tmp_path / "run", memory=memory, train={"epochs": 10}
    )
    results = fine_tuned(given)
    assert mean(results, "test", "accuracy") > LEARNED
    saved = tmp_path / "run/seed-0/model"
    about = json.loads((saved / "finetuned.json").read_text())["memory"]
    assert (about["mode"], about["content_version"]) == (
        "frozen",
        (home / "store/HEAD").read_text().strip(),
    )
    model = AutoModelForSequenceClassification.from_pretrained(saved)
    assert model.config.fixed_keys
    assert model.config.fixed_values
    assert model.config.top_k == 2
    with LocalMemory(about["store"], vectors=about["vectors"]) as opened:
        model.attach(opened)
        assert model.has_memory


def test_the_same_settings_fine_tune_plain_bert_which_reads_no_memory(
    home: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    memory = {"store": str(home / "store"), "top_k": 2}
    given = settings(
        pets(home),
        home / "bert",
        tmp_path / "run",
        memory=memory,
        train={"epochs": 10},
        evaluate={"without_memory": True},
    )
    results = fine_tuned(given, say=lines.append)
    assert mean(results, "test", "accuracy") > LEARNED
    assert results["memory"] is None
    assert "reads no memory: [memory] is not used" in results["note"]
    assert results["note"] in lines
    assert "test_without_memory" not in results["summary"]
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/seed-0/model")
    assert type(saved).__name__ == "BertForSequenceClassification"
    assert saved.config.id2label == {0: "fruit", 1: "pet"}


@pytest.mark.parametrize("start", ["pluglm", "bert"])
def test_pairs_and_regression(home: Path, tmp_path: Path, start: str) -> None:
    rows = [
        {"text": row["text"], "text_pair": "a dog", "label": 2.0 * (row["label"] == "pet") - 1}
        for row in pet_or_fruit(64)
    ]
    path = write_rows(tmp_path / "numbers.jsonl", rows)
    given = settings(task("regression", path), home / start, tmp_path / "run", train={"epochs": 24})
    results = fine_tuned(given)
    assert mean(results, "dev", "pearson") > 0.8
    assert set(results["summary"]) == {"dev"}


@pytest.mark.parametrize("start", ["pluglm", "bert"])
def test_token_classification(home: Path, tmp_path: Path, start: str) -> None:
    tags = {"pet": "B-PET", "fruit": "B-FRUIT"}
    nouns = {"cat", "dog", "fish", "bird", "apple", "pear", "plum", "fig"}
    rows = []
    for row in pet_or_fruit(64):
        words = row["text"].split()
        rows.append(
            {"tokens": words, "tags": [tags[row["label"]] if w in nouns else "O" for w in words]}
        )
    path = write_rows(tmp_path / "tags.jsonl", rows)
    memory = {"store": str(home / "store"), "top_k": 2}
    given = settings(
        task("token_classification", path),
        home / start,
        tmp_path / "run",
        memory=memory,
        train={"epochs": 4},
    )
    results = fine_tuned(given)
    assert mean(results, "dev", "span_f1") > 0.9
    assert mean(results, "dev", "accuracy") > 0.9


@pytest.mark.parametrize("start", ["pluglm", "bert"])
def test_question_answering(home: Path, tmp_path: Path, start: str) -> None:
    rows = []
    for number, row in enumerate(pet_or_fruit(64)):
        place = ["rome", "oslo", "lima", "bern"][number % 4]
        context = f"{row['text']} and in {place}"
        answers = {"text": [place], "answer_start": [context.index(place)]}
        rows.append({"question": "where is", "context": context, "answers": answers})
    path = write_rows(tmp_path / "qa.jsonl", rows)
    given = settings(
        task("question_answering", path, doc_stride=3, max_length=20, max_answer_tokens=2),
        home / start,
        tmp_path / "run",
        train={"epochs": 4},
    )
    results = fine_tuned(given)
    assert mean(results, "dev", "exact_match") > LEARNED
    first = json.loads((tmp_path / "run/seed-0/predictions.jsonl").open().readline())
    assert first["predicted"] in first["gold"]
    assert 0 < first["probabilities"] <= 1


def test_a_run_goes_on_where_it_was_and_repeats_nothing(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    rows = write_rows(tmp_path / "rows.jsonl", pet_or_fruit(32))

    def given(*seeds: int, **train: Any) -> FinetuneSettings:
        return settings(
            task("classification", rows),
            home / "pluglm",
            run,
            train={"seeds": seeds, "epochs": 1} | train,
        )

    fine_tuned(given(3))
    before = (run / "seed-3/model/model.safetensors").stat().st_mtime_ns
    # What a killed seed leaves behind counts for nothing.
    for left in (".work-seed-4", ".writing-seed-4"):
        (run / left).mkdir()
        (run / left / "half").write_text("x")
    with pytest.raises(ConfigError, match="holds finished seeds already; go on with --resume"):
        fine_tuned(given(3, 4))
    lines: list[str] = []
    results = fine_tuned(given(3, 4), resume=True, say=lines.append)
    assert [record["seed"] for record in results["seeds"]] == [3, 4]
    assert (run / "seed-3/model/model.safetensors").stat().st_mtime_ns == before
    assert any("seed 3 is finished" in line for line in lines)
    assert not (run / "seed-4/half").exists()

    alone = fine_tuned(
        settings(
            task("classification", rows),
            home / "pluglm",
            tmp_path / "alone",
            train={"seeds": (4,), "epochs": 1},
        )
    )
    assert alone["seeds"][0]["dev"] == results["seeds"][1]["dev"]
    same = [(path / "seed-4/predictions.jsonl").read_text() for path in (run, tmp_path / "alone")]
    assert same[0] == same[1]

    with pytest.raises(ConfigError, match=r"train\.lr was 0\.005 and is 0\.1 now"):
        fine_tuned(given(3, 4, lr=0.1), resume=True)
    write_rows(rows, pet_or_fruit(33))
    with pytest.raises(ConfigError, match=r"the file rows\.jsonl of task.train was"):
        fine_tuned(given(3, 4), resume=True)


def test_training_stops_when_dev_gets_no_better_and_the_best_epoch_is_kept(
    home: Path, tmp_path: Path
) -> None:
    given = settings(
        pets(home),
        home / "pluglm",
        tmp_path / "run",
        train={"epochs": 50, "early_stopping_patience": 2, "lr": 0.01},
    )
    record = fine_tuned(given)["seeds"][0]
    measured = [epoch["accuracy"] for epoch in record["epochs"]]
    assert len(measured) < 50
    assert record["best_epoch"] == measured.index(max(measured)) + 1 == len(measured) - 2
    assert record["dev"]["accuracy"] == pytest.approx(max(measured))


def test_a_diverging_run_ends_and_says_so(home: Path, tmp_path: Path) -> None:
    rows = [{"text": "a cat", "label": 3e38}, {"text": "the fig", "label": -3e38}]
    path = write_rows(tmp_path / "rows.jsonl", rows * 4)
    given = settings(task("regression", path), home / "bert", tmp_path / "run")
    with pytest.raises(TrainingError, match=r"seed 0: loss is .* training diverged"):
        fine_tuned(given)
    assert not (tmp_path / "run/seed-0").exists()


def test_the_head_is_new_unless_training_goes_on_with_the_same_labels(
    home: Path, tmp_path: Path
) -> None:
    given = settings(pets(home), home / "pluglm", tmp_path / "run", train={"epochs": 1})
    head, start = read_task(given.task), open_start(given)
    pretrained = start.path / "model.safetensors"
    from safetensors.torch import load_file

    masked_lm = load_file(pretrained)["head.dense.weight"]
    first, second, other = (build_model(start, head, seed=seed) for seed in (1, 1, 2))
    assert not torch.equal(first.head.in_proj.weight, masked_lm)
    assert torch.equal(first.head.in_proj.weight, second.head.in_proj.weight)
    assert not torch.equal(first.head.in_proj.weight, other.head.in_proj.weight)
    word = "pluglm.embeddings.word_embeddings.weight"
    assert torch.equal(first.state_dict()[word], load_file(pretrained)[word])

    first.save_pretrained(tmp_path / "tuned")
    make_tokenizer().save_pretrained(tmp_path / "tuned")
    again = open_start(settings(pets(home), tmp_path / "tuned", tmp_path / "b"))
    kept = build_model(again, head, seed=9)
    assert torch.equal(kept.head.out_proj.weight, first.head.out_proj.weight)
    renamed = [{**row, "label": row["label"] + "s"} for row in pet_or_fruit(8)]
    others = read_task(task("classification", write_rows(tmp_path / "r.jsonl", renamed)))
    assert not torch.equal(
        build_model(again, others, seed=9).head.out_proj.weight, first.head.out_proj.weight
    )


def test_the_baselines_pooler_is_new_like_the_layer_of_pluglms_head(
    home: Path, tmp_path: Path
) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig.from_pretrained(home / "bert")
    pretrained = BertModel(config)
    torch.nn.init.ones_(pretrained.pooler.dense.bias)
    pretrained.save_pretrained(tmp_path / "bert")
    make_tokenizer().save_pretrained(tmp_path / "bert")
    given = settings(pets(home), tmp_path / "bert", tmp_path / "run")
    head, start = read_task(given.task), open_start(given)
    first, second, other = (build_model(start, head, seed=seed) for seed in (1, 1, 2))
    pooler = first.bert.pooler.dense
    assert not pooler.bias.any()
    assert pooler.weight.std().item() == pytest.approx(config.initializer_range, rel=0.1)
    assert not torch.equal(pooler.weight, pretrained.pooler.dense.weight)
    assert torch.equal(pooler.weight, second.bert.pooler.dense.weight)
    assert not torch.equal(pooler.weight, other.bert.pooler.dense.weight)
    word = "embeddings.word_embeddings.weight"
    assert torch.equal(first.bert.state_dict()[word], pretrained.state_dict()[word])

    torch.nn.init.ones_(pooler.bias)
    first.save_pretrained(tmp_path / "tuned")
    make_tokenizer().save_pretrained(tmp_path / "tuned")
    again = open_start(settings(pets(home), tmp_path / "tuned", tmp_path / "b"))
    assert build_model(again, head, seed=9).bert.pooler.dense.bias.all()


def test_query_norm_batch_is_never_given_a_single_sequence(home: Path, tmp_path: Path) -> None:
    save_pluglm(tmp_path / "batch", query_norm="batch")
    rows = write_rows(tmp_path / "rows.jsonl", pet_or_fruit(17))
    memory = {"store": str(home / "store"), "top_k": 2}
    given = settings(
        task("classification", rows),
        tmp_path / "batch",
        tmp_path / "run",
        memory=memory,
        train={"epochs": 1, "batch_size": 8},
    )
    assert fine_tuned(given)["seeds"][0]["epochs"][0]["step"] == 2
    predictions = (tmp_path / "run/seed-0/predictions.jsonl").read_text().splitlines()
    assert len(predictions) == 17  # in evaluation nothing is left out
    with pytest.raises(ConfigError, match=r"train\.batch_size = 1: must be at least 2"):
        check(
            settings(
                task("classification", rows),
                tmp_path / "batch",
                tmp_path / "run",
                memory=memory,
                train={"batch_size": 1},
            ),
            say=silent,
        )


@pytest.mark.parametrize(
    ("norm", "attached", "rows", "left"),
    [
        ("batch", True, 17, True),
        ("batch", True, 18, False),
        ("batch", False, 17, False),
        ("layer", True, 17, False),
    ],
)
def test_a_sequence_is_left_out_only_where_it_must_be(
    home: Path, tmp_path: Path, norm: str, attached: bool, rows: int, left: bool
) -> None:
    save_pluglm(tmp_path / "model", query_norm=norm)
    path = write_rows(tmp_path / "rows.jsonl", pet_or_fruit(rows))
    given = settings(task("classification", path), tmp_path / "model", tmp_path / "run")
    checked = check(given, say=silent)
    job = Job(
        settings=given,
        head=checked.head,
        start=checked.start,
        encoded=checked.encoded,
        memory=object() if attached else None,  # type: ignore[arg-type]
        device="cpu",
        say=silent,
    )
    assert one_is_left_over(job) is left


def test_what_does_not_fit_is_refused_before_training(home: Path, tmp_path: Path) -> None:
    store = {"store": str(home / "store")}

    def refused(kind: type[Exception], message: str, given: FinetuneSettings) -> None:
        with pytest.raises(kind, match=message):
            check(given, say=silent)

    run = tmp_path / "run"
    refused(FileNotFoundError, "holds no config.json", settings(pets(home), tmp_path, run))
    refused(
        ConfigError,
        "task.max_length = 64: must be at most 40",
        settings(pets(home, max_length=64), home / "bert", run),
    )
    refused(
        ConfigError,
        "memory.top_k = 9: must be at most 8",
        settings(pets(home), home / "pluglm", run, memory=store | {"top_k": 9}),
    )
    make_store(tmp_path / "other", fingerprint="0" * 32)
    refused(
        TokenizerMismatch,
        "made with another tokenizer",
        settings(pets(home), home / "pluglm", run, memory={"store": str(tmp_path / "other")}),
    )
    save_pluglm(tmp_path / "short", max_position_embeddings=8)
    make_store(tmp_path / "long", entry_tokens=9)
    memory = {"store": str(tmp_path / "long")}
    refused(
        ConfigError,
        "entries of 9 tokens, but the model .* at most 8",
        settings(pets(home, max_length=8), tmp_path / "short", run, memory=memory),
    )
    assert not run.exists()
