"""`pluglm calibrate`: what it measures, writes and refuses; what is read back is checked."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from cluster.planning.constants import Constants, Figure
from cluster.planning.measure import calibrate

Capture = pytest.CaptureFixture[str]
SECONDS = 0.2


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Constants:
    return calibrate("cpu", seconds=SECONDS, directory=tmp_path_factory.mktemp("calibrate"))


def test_a_figure_is_the_median_with_its_range() -> None:
    assert Figure.of([4.0, 1.0, 2.0]) == Figure(median=2.0, low=1.0, high=4.0, count=3)
    assert Figure.of([1.0, 2.0, 4.0, 8.0]).median == 3.0
    assert Figure.of([2.0, 4.0, 5.0]).inverse(20) == Figure(median=5, low=4, high=10, count=3)


def test_all_that_a_cpu_has_is_measured_several_times(measured: Constants) -> None:
    assert measured.device == "cpu"
    assert measured.copies is None
    assert measured.ray is None
    assert {p.dtype for p in measured.products} == {"float32", "bfloat16"}
    assert {(s.key_dtype, s.batch) for s in measured.flat} == {
        (dtype, batch) for dtype in ("float32", "bfloat16", "int8") for batch in (1, 64)
    }
    counts = [int(n) for n in re.findall(r'"count": (\d+)', measured.to_json())]
    assert len(counts) > 20
    assert min(counts) >= 3


def test_what_is_measured_agrees_with_itself(measured: Constants) -> None:
    for search in measured.flat:
        bytes_each = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0}[search.key_dtype]
        keys = search.entries * search.width * bytes_each
        beside = 0 if search.key_dtype == "float32" else 6 * search.entries
        scanned = search.bytes_per_s.median * search.seconds.median
        # Of an even number of measurements the median of the inverse is not quite the inverse.
        assert scanned == pytest.approx(keys + beside, rel=0.25)
    assert measured.keys.tabled.median > measured.keys.direct.median
    assert measured.keys.refresh.median > measured.keys.build.low / 2
    assert measured.launch.median <= measured.round_trip.high


def test_nothing_is_left_in_the_directory(tmp_path: Path) -> None:
    calibrate("cpu", seconds=0.05, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_reads_back_equal(measured: Constants, tmp_path: Path) -> None:
    (tmp_path / "machine.json").write_text(measured.to_json(), encoding="utf-8")
    assert Constants.read(tmp_path / "machine.json") == measured


def _changed(tree: dict[str, Any], path: str, value: Any) -> None:
    *way, last = path.split(".")
    at: Any = tree
    for step in way:
        at = at[int(step)] if step.isdecimal() else at[step]
    if value is None:
        del at[last]
    else:
        at[last] = value


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("format", "pluglm-calibration-0", "'pluglm-calibration-0', not 'pluglm-calibration-1'"),
        ("device", "tpu", 'device \'tpu\'; allowed: "cpu", "cuda"'),
        ("host_bytes", "many", "host_bytes = 'many': must be a whole number"),
        ("host_bytes", 0, "host_bytes = 0: must be at least 1"),
        ("launch.median", -1.0, "must be finite, above 0"),
        ("launch.median", 1e9, "in this order"),
        ("launch.median", None, "launch.median is missing"),
        ("launch.speed", 1.0, "launch.speed: unknown key; known are median, low, high, count"),
        ("flat", [], "must each have at least one measurement"),
        ("flat", 3, "flat = 3: must be a list"),
        ("flat.1.batch", True, "flat[1].batch = True: must be a whole number"),
        ("keys", 7, "keys = 7: must be an object"),
    ],
)
def test_a_damaged_file_is_refused_by_the_key(
    measured: Constants, tmp_path: Path, path: str, value: Any, said: str
) -> None:
    tree = json.loads(measured.to_json())
    _changed(tree, path, value)
    file = tmp_path / "machine.json"
    file.write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(ValueError, match="write it anew with `pluglm calibrate") as caught:
        Constants.read(file)
    assert said in str(caught.value)
    assert str(file) in str(caught.value)


def test_no_json_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "machine.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="not JSON"):
        Constants.read(tmp_path / "machine.json")


def test_the_command_shows_and_writes(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["calibrate", "--device", "cpu", "--seconds", str(SECONDS), "--out", "machine.json"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    written = Constants.read(tmp_path / "machine.json")
    assert written.name in out
    assert "float32 products" in out
    assert "the index ivf: 512 entries are too few" in out
    assert "measuring exact search of 256 keys held as int8" in err
    assert [path.name for path in tmp_path.iterdir()] == ["machine.json"]


def test_the_command_prints_json(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", "--device", "cpu", "--seconds", "0.05", "--json"]) == 0
    assert Constants.from_json(capsys.readouterr().out).device == "cpu"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seconds", "0"], "--seconds 0.0: give a number above 0"),
        (["--seconds", "nan"], "--seconds nan: give a number above 0"),
        (["--out", "/no/such/machine.json"], "there is no directory /no/such"),
        (["--device", "tpu:x"], 'device \'tpu:x\'; allowed: "cpu", "cuda" or "cuda:N"'),
        (["--device", "meta"], 'device \'meta\'; allowed: "cpu", "cuda" or "cuda:N"'),
        (["--device", "cuda:99"], "device 'cuda:99', but torch sees"),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str, capsys: Capture) -> None:
    assert main(["calibrate", *words]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert said in err[0]


@pytest.mark.gpu
def test_a_gpu_has_copies_and_half_precision(tmp_path: Path) -> None:
    measured = calibrate("cuda", seconds=1.0, directory=tmp_path)
    assert measured.device == "cuda"
    assert measured.copies is not None
    assert measured.copies.to_device_pinned.median > 1e9
    assert measured.device_copy.median > measured.copies.to_device_pinned.median
    assert len(measured.products) == 2
    assert Constants.from_json(measured.to_json()) == measured
