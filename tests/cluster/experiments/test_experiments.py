"""An experiment runs each stage once, goes on where it was, and compares over seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.cli import main
from cluster.config import ConfigError
from cluster.experiments.plan import read_experiment
from cluster.experiments.results import write_section
from cluster.experiments.running import Place, _settings, number_at
from cluster.experiments.selecting import select
from tests.trainer.corpus.samples import make_rows
from trainer.export import write_json

PLAN = """
description = "articles, as often as there are seeds"
seeds = [0, 1, 2]
[variables]
size = "300"
[[stage]]
name = "articles"
select = { from = "{data}/articles.parquet", to = "{out}/articles.jsonl", columns = ["title", \
"text"], where = { kept = true }, shuffle = 1, rows = 12 }
[[stage]]
name = "corpus"
per_seed = true
run = ["corpus", "build", "{out}/articles.jsonl", "--out", "{out}/seed-{seed}/corpus",
    "--tokenizer", "train:{size}", "--sequence-length", "24", "--entry-tokens", "16", "--workers",
    "1"]
[[stage]]
name = "search"
per_seed = true
json = true
run = ["explain", "--help"]
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [dict(row, kept=number % 2 == 0) for number, row in enumerate(make_rows(40, seed=3))]
    pq.write_table(pa.Table.from_pylist(rows), folder / "articles.parquet")
    return folder


def write(folder: Path, text: str) -> Path:
    path = folder / "plan.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_stages_run_once_and_a_failure_is_gone_on_from(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = PLAN.replace("seeds = [0, 1, 2]", "seeds = [0, 1]")
    plan, out = write(tmp_path, two), tmp_path / "out"
    words = ["experiment", str(plan), "--data", str(data), "--out", str(out)]
    assert main(words) == 1
    assert "printed no JSON" in capsys.readouterr().err
    built = out / "seed-0" / "corpus" / "corpus.json"
    assert len((out / "articles.jsonl").read_text(encoding="utf-8").splitlines()) == 12
    before = built.stat().st_mtime_ns
    # The mended stage alone is run; those before are kept.
    mended = two.replace(
        'run = ["explain", "--help"]',
        'run = ["memory", "log", "{out}/seed-{seed}/corpus", "--json"]',
    )
    write(tmp_path, mended)
    assert main(words) == 0
    assert built.stat().st_mtime_ns == before
    capsys.readouterr()
    assert main(words) == 0
    assert capsys.readouterr().err.count("finished before") == 5
    # A changed stage is not silently kept, and not silently run again.
    assert main([*words, "--set", "size=310"]) == 2
    assert "--again" in capsys.readouterr().err


def test_seeds_run_at_the_same_time_and_one_that_fails_ends_the_others_chains(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails = PLAN.replace(
        'run = ["explain", "--help"]', 'run = ["memory", "log", "{out}/seed-{seed}/none", "--json"]'
    )
    plan, out = write(tmp_path, fails), tmp_path / "out"
    words = ["experiment", str(plan), "--data", str(data), "--out", str(out), "--jobs", "2"]
    assert main(words) == 1
    lines = capsys.readouterr().err.splitlines()
    began = [
        n for n, line in enumerate(lines) if line.startswith("corpus, seed ") and "..." in line
    ]
    ended = [
        n
        for n, line in enumerate(lines)
        if line.startswith("corpus, seed ") and line.endswith(" s")
    ]
    assert sorted(lines[n] for n in began[:2]) == ["corpus, seed 0 ...", "corpus, seed 1 ..."]
    assert max(began[:2]) < min(ended), "two at a time"
    kept = [(out / f"seed-{seed}" / "stages" / "corpus.json").exists() for seed in range(3)]
    assert kept[:2] == [True, True]
    assert not (out / "seed-2" / "stages" / "search.json").exists()
    write(tmp_path, fails.replace("/none", "/corpus"))
    assert main(words) == 0
    assert capsys.readouterr().err.count("finished before") == 1 + sum(kept)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("seeds = [0, 1, 2]", "seeds = [0, 0]"), "seeds = "),
        (("seeds = [0, 1, 2]", "sseeds = [0]"), "unknown key 'sseeds'"),
        (('name = "corpus"', 'name = "Corpus!"'), "a stage is named"),
        (('name = "corpus"', 'name = "articles"'), "different names"),
        (('run = ["explain", "--help"]', ""), "either run or select"),
        (("description", "[[measure]]\nname='x'\nat='corpus/y'\n#"), "whose JSON is kept"),
        (("description", "[[measure]]\nname='x'\n#"), "must have at, name, or mean_of, name"),
        (("description", "[[measure]]\nname='x'\nmean_of=['y']\n#"), "is the mean of ['y']"),
        (("description", "[[measure]]\nname='x'\nmean_of=[]\n#"), "is the mean of none"),
        (("description", "[[comparison]]\nname='x'\nlarger='a'\nsmaller='b'\n#"), "names 'a'"),
        (("description", "[[comparison]]\nname='x'\n#"), "must have larger, name, smaller"),
        (("description", "description = "), "is no TOML"),
    ],
)
def test_a_bad_plan_is_refused(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    text = PLAN.replace(*change, 1)
    if change[0] == "description":  # tables belong behind the top-level keys
        kept = PLAN.split("\n", 2)[2]
        text = kept + "\n" + change[1] if change[1].startswith("[[") else text
    with pytest.raises(ConfigError, match=says.replace("[", r"\[")):
        read_experiment(write(tmp_path, text))


def test_unknown_slots_and_variables_are_refused(tmp_path: Path) -> None:
    plan = read_experiment(write(tmp_path, PLAN))
    with pytest.raises(ConfigError, match=r"uses \{nowhere\}"):
        plan.filled("{nowhere}/x", {"out": "o"})
    assert plan.filled("{out}: {{text}}, {{nowhere}}", {"out": "o"}) == "o: {text}, {nowhere}"
    with pytest.raises(ConfigError, match="no such variable"):
        read_experiment(tmp_path / "plan.toml", {"sizes": "3"})
    assert read_experiment(tmp_path / "plan.toml", {"size": "3"}).variables == {"size": "3"}


def test_what_a_later_stage_lacks_is_told_before_the_first_runs(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("no markers\n", encoding="utf-8")
    out = tmp_path / "out"
    for old, new, more, says in (
        ('"explain", "--help"', '"explein", "--help"', [], "did you mean `pluglm explain`"),
        ('"explain", "--help"', '"explain", "{sed}"', [], "uses {sed} in '{sed}'; known are"),
        ("300", "300", ["--write-docs", str(page)], "must have one line <!-- plan -->"),
        ("300", "300", ["--write-docs", str(tmp_path / "no.md")], "there is no document"),
    ):
        plan = write(tmp_path, PLAN.replace(old, new))
        words = ["experiment", str(plan), "--data", str(data), "--out", str(out), *more]
        assert main(words) == 2
        assert says in capsys.readouterr().err
        assert not out.exists()
    plan.write_bytes(b"\xff\xfe\x00")
    assert main(["experiment", str(plan), "--data", str(data), "--out", str(out)]) == 2
    assert "not UTF-8 text at byte 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"from": "{data}/none.parquet", "to": "x", "columns": ["title"]}, "cannot be read"),
        ({"from": "{data}/articles.parquet", "to": "x", "columns": ["nothing"]}, "cannot be read"),
        ({"from": "a", "to": "x"}, "missing"),
        (
            {"from": "{data}/articles.parquet", "to": "x", "columns": ["title"],
             "where": {"kept": 7}},
            "0 rows have",
        ),
        (
            {"from": "{data}/articles.parquet", "to": "x", "columns": ["title"], "skip": 40},
            "40 of which are skipped: none is left",
        ),
    ],
)  # fmt: skip
def test_a_selection_that_finds_nothing_is_refused(
    data: Path, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        select(settings, lambda text: text.replace("{data}", str(data)))


def test_parts_of_a_selection_do_not_overlap_and_are_all_of_it(tmp_path: Path, data: Path) -> None:
    def chosen(**more: Any) -> list[str]:
        target = tmp_path / "part.jsonl"
        settings = {"from": str(data / "articles.parquet"), "to": str(target), "shuffle": 3,
                    "columns": ["text"], "unless": {"kept": False}, **more}  # fmt: skip
        select(settings, str)
        return [json.loads(line)["text"] for line in target.read_text("utf-8").splitlines()]

    whole = chosen()
    assert len(whole) == 20
    assert chosen(rows=12) + chosen(skip=12, rows=5) + chosen(skip=17) == whole
    kept = pq.read_table(data / "articles.parquet").to_pylist()
    assert sorted(whole) == sorted(row["text"] for row in kept if row["kept"])


def test_a_number_is_read_where_it_is() -> None:
    assert number_at({"cases": [{"loss": 2}, {"loss": 3}]}, ("cases", "1", "loss")) == 3.0
    with pytest.raises(ConfigError, match="no 'cases/1'"):
        number_at({"cases": [1]}, ("cases", "1"))
    result = {"stages": {"after": {"mrr": 0.5, "all": True}}}
    assert number_at(result, ("stages", "after", "mrr")) == 0.5
    for path, says in ((("stages", "before"), "no 'stages/before'"), (("stages",), "not a number")):
        with pytest.raises(ConfigError, match=says):
            number_at(result, path)
    with pytest.raises(ConfigError, match="not a number"):
        number_at(result, ("stages", "after", "all"))


def test_a_documents_section_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- /x -->\nb\n", encoding="utf-8")
    write_section(page, "x", "new")
    assert page.read_text(encoding="utf-8") == "a\n<!-- x -->\n\nnew\n\n<!-- /x -->\nb\n"
    with pytest.raises(ConfigError, match="must have one line <!-- y -->"):
        write_section(page, "y", "new")


def test_measures_are_compared_seed_by_seed(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = PLAN[: PLAN.index('[[stage]]\nname = "corpus"')] + (
        '[[stage]]\nname = "info"\nper_seed = true\njson = true\n'
        'run = ["launch", "torchrun", "--help"]\n'
        '[[measure]]\nname = "one"\nat = "info/a"\n[[measure]]\nname = "two"\nat = "info/b"\n'
        '[[measure]]\nname = "both"\nmean_of = ["one", "two"]\n'
        '[[comparison]]\nname = "two above one"\nlarger = "two"\nsmaller = "one"\n'
    )
    plan, out = write(tmp_path, stages), tmp_path / "out"
    words = ["experiment", str(plan), "--data", str(data), "--out", str(out)]
    assert main(words) == 1  # the command prints no JSON
    experiment = read_experiment(plan)
    place = Place(experiment=experiment, here=tmp_path, data=data, out=out)
    for seed, (one, two) in enumerate(((1.0, 2.0), (1.0, 2.5), (2.0, 2.5))):
        path = place.record(experiment.stages[-1], seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = _settings(place, experiment.stages[-1], seed)
        write_json(path, {"settings": settings, "result": {"a": one, "b": two}})
    document = tmp_path / "doc.md"
    document.write_text("<!-- plan -->\n<!-- /plan -->\n", encoding="utf-8")
    capsys.readouterr()
    assert main([*words, "--write-docs", str(document)]) == 0
    told = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert told["measures"][2]["values"] == [1.5, 1.75, 2.25]
    (compared,) = told["comparisons"]
    assert compared["difference"]["mean"] == pytest.approx(1.0)
    assert compared["difference"]["pairs"] == compared["difference"]["better"] == 3
    assert compared["difference"]["p"] == pytest.approx(0.0742, abs=1e-3)
    assert "| two above one | +1.0000 |" in document.read_text(encoding="utf-8")
