"""Ratios are told from figures, recorded by machine, and compared; what got worse fails."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "benchmarks"

FAKE = """
import argparse, sys
sys.path.insert(0, {folder!r})
from harness import Spread, argument_parser, begin, finish
parser = argument_parser("fake")
parser.add_argument("--median", type=float)
args = parser.parse_args()
with open({runs!r}, "a") as log:
    log.write("run ")
if args.median is None:
    sys.exit("out of tea")
spread = Spread(median=args.median, low=args.median, high=args.median, count=3)
finish(args.json, begin(), args, [{{"batch": 8, "ratio": spread}}])
"""


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, imported as a script does: with its own folder on the path."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("records", "suite", "harness", "run_all"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import records

    return records


def write_suite(folder: Path, median: str, *, better: str = "lower") -> Path:
    """Two benchmarks in a table of their own: one has a ratio, the other fails."""
    runs = str(folder / "runs")
    for name in ("fake", "broken"):
        script = FAKE.format(folder=str(FOLDER), runs=runs)
        (folder / f"{name}.py").write_text(script, encoding="utf-8")
    suite = folder / "suite.toml"
    suite.write_text(
        f'[[benchmark]]\nname = "broken"\nquick = ""\n'
        f'[[benchmark]]\nname = "fake"\nquick = "--median {median}"\n'
        f'[[benchmark.ratio]]\nfield = "ratio"\nagainst = "tea"\nbetter = "{better}"\n'
        'rows = ["batch"]\n',
        encoding="utf-8",
    )
    return suite


def call(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a command as a person does."""
    return subprocess.run(
        [sys.executable, FOLDER / f"{script}.py", *map(str, words)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.parametrize(
    ("better", "low", "high", "limit"),
    [("lower", 0.9, 1.1, 1.3), ("lower", 0.9, 2.0, 2.0), ("higher", 0.9, 1.1, 1 / 1.3),
     ("higher", 0.5, 1.1, 0.5)],
)  # fmt: skip
def test_tolerance_has_a_direction_and_is_at_least_the_recorded_range(
    records: ModuleType, better: str, low: float, high: float, limit: float
) -> None:
    recorded = records.Spread(median=1.0, low=low, high=high, count=3)
    assert records.allowed(recorded, better, 0.3) == pytest.approx(limit)


def test_worse_gone_and_new_ratios_are_told_apart(records: ModuleType) -> None:
    def ratio(name: str, median: float, better: str) -> object:
        spread = records.Spread(median=median, low=median, high=median, count=1)
        return records.Ratio(name=name, against="peer", better=better, spread=spread)

    old = [ratio("a", 1, "lower"), ratio("b", 1, "higher"), ratio("gone", 1, "lower")]
    for a, b, told in [(1.29, 0.78, "ok"), (1.31, 0.76, "WORSE"), (0.1, 9.0, "ok")]:
        now = [ratio("a", a, "lower"), ratio("b", b, "higher"), ratio("new", 1, "lower")]
        verdicts = records.compare("x", now, old, 0.3)
        assert [v.verdict for v in verdicts] == [told, told, "not recorded", "MISSING"]
        shown = records.verdict_table(verdicts)
        assert "at most 1.30" in shown
        assert "at least 0.77" in shown


def test_only_the_document_between_the_markers_changes(records: ModuleType) -> None:
    import run_all

    old = f"before\n{run_all.BEGIN}\nold\n{run_all.END}\nafter"
    marked = (run_all.BEGIN, run_all.END)
    new = run_all.between_markers(old, "table", *marked)
    assert new == f"before\n{run_all.BEGIN}\n\ntable\n\n{run_all.END}\nafter"
    with pytest.raises(ValueError, match="each once"):
        run_all.between_markers("no markers", "table", *marked)


def test_the_shipped_table_names_every_command(records: ModuleType) -> None:
    import suite

    helpers = {"harness", "invented", "records", "recovery_watch", "served", "suite", "watch",
               "simulation_parts", "simulation_whole", "run_all", "check"}  # fmt: skip
    scripts = {path.stem for path in FOLDER.glob("*.py")} - helpers
    assert set(suite.read_suite()) == scripts


def test_one_that_fails_stops_no_other_and_what_is_finished_is_kept(tmp_path: Path) -> None:
    suite = write_suite(tmp_path, "2.5")
    words = ["--suite", suite, "--out", tmp_path / "out", "--no-document"]
    for again in ([], ["--only", "fake"], ["--only", "fake", "--again"]):
        done = call("run_all", *words, *again)
        assert done.returncode == (0 if again else 1), done.stderr
        assert "|     tea | 2.50 (2.50 to 2.50) |  lower |" in done.stdout, done.stdout
        assert ("out of tea" in done.stderr) is not bool(again)
    assert (tmp_path / "runs").read_text(encoding="utf-8").split() == ["run"] * 3
    whole = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert whole["benchmarks"]["fake"]["ratios"][0]["spread"]["median"] == 2.5


def test_a_worse_ratio_fails_the_check(tmp_path: Path) -> None:
    folder = tmp_path / "recorded"
    words = ["--suite", write_suite(tmp_path, "1"), "--recorded", folder, "--only", "fake"]
    none = call("check", *words)
    assert none.returncode == 2
    assert "--record" in none.stderr
    assert call("check", *words, "--record", "--note", "busy").returncode == 0
    (path,) = folder.glob("*.json")
    assert call("check", *words).returncode == 0
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["benchmarks"]["fake"]["note"] == "busy"
    spread = record["benchmarks"]["fake"]["ratios"][0]["spread"]
    spread.update(median=0.5, low=0.5, high=0.5)
    path.write_text(json.dumps(record), encoding="utf-8")
    worse = call("check", *words)
    assert worse.returncode == 1
    assert "WORSE" in worse.stdout
    write_suite(tmp_path, "1.1")
    other = call("check", *words)
    assert other.returncode == 2
    assert "other arguments" in other.stderr
    assert "allowed at quick: broken, fake" in call("check", *words, "tea").stderr


def test_a_real_benchmark_is_run_and_its_ratio_told(tmp_path: Path) -> None:
    table = (FOLDER / "suite.toml").read_text(encoding="utf-8")
    (one,) = (part for part in table.split("[[benchmark]]") if 'name = "refresh_speed"' in part)
    one = one.replace("--sizes 20000x128", "--sizes 3000x32")
    (tmp_path / "suite.toml").write_text("[[benchmark]]" + one, encoding="utf-8")
    (tmp_path / "refresh_speed.py").symlink_to(FOLDER / "refresh_speed.py")
    done = call("run_all", "--suite", tmp_path / "suite.toml", "--out", tmp_path, "--no-document")
    assert done.returncode == 0, done.stderr
    assert "ratio (entries 3000, hidden 32)" in done.stdout
