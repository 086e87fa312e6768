"""The whole report: self-contained, escaped, honest about what is missing."""

import json
import resource
import signal
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.trainer.report.run_files import ATTACK, evaluation, metrics, sample, write_run
from trainer.report import write_report

VOID = {"meta", "br", "hr"}


class Page(HTMLParser):
    """The elements, attributes and text of a page; fails on an element left open."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.ids: set[str] = set()
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attrs
        self.ids |= {value for name, value in attrs if name == "id" and value}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def report(run_dir: Path) -> Page:
    return Page(write_report(run_dir))


def test_a_whole_run_is_told(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "my-run"))
    for said in (
        "my-run",
        "at a loss of 2.00; without it, at 4.00: 50 % lower (case: own entry in the memory)",
        "right entry retrieved for 75 % of the sentences",
        "note of own entry in the memory",
        "Shuffled memory",
        "Staleness of the memory's keys",
        "1 memory refresh",
        "step 10: memory epoch 2 went live",
        "keys 3 MiB, tokens 1 MiB",
        "own document",
        "weight 62 %",
        "score 9.50",
        "wiki · entry 7",
        "top_k",
        "Some encyclopedia",
        "CC BY-SA 4.0",
    ):
        assert said in page.text, said
    assert page.elements.count("svg") == 10


def test_it_loads_nothing_and_its_links_lead_within(tmp_path: Path) -> None:
    page = report(write_run(tmp_path))
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.elements)
    assert not [name for name, _ in page.attributes if name == "src" or name.startswith("on")]
    targets = {value for name, value in page.attributes if name == "href" and value}
    assert targets == {f"#{place}" for place in page.ids & {t[1:] for t in targets}}
    text = (tmp_path / "report.html").read_text()
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_whatever_an_entry_says_stays_text(tmp_path: Path) -> None:
    attacked = sample(text=ATTACK, title=ATTACK)
    attacked["tokens"][2] = ATTACK
    attacked["layers"][0]["entries"][0]["source"] = ATTACK
    attacked["masked"][1]["predictions"][0]["token"] = ATTACK
    hostile = evaluation()
    hostile["cases"][0]["name"] = hostile["cases"][0]["note"] = ATTACK
    hostile["cases"][0]["conditions"][ATTACK] = {"loss": 1.0}
    lines = [*metrics(), {"kind": "event", "step": 20, "message": ATTACK}]
    notes = {"source": ATTACK, "licence": ATTACK}
    run = write_run(tmp_path, samples=[attacked], evaluation=hostile, metrics=lines, notes=notes)
    (run / "config.toml").write_text(f"[memory]\nname = {ATTACK!r}\n".replace('\\"', '"'))
    page = report(run)
    assert not {"script", "img"} & set(page.elements)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("<script>alert('x')</script>\"><img") >= 10


def test_an_empty_directory_says_what_is_missing(tmp_path: Path) -> None:
    page = report(tmp_path)
    for said in (
        "has no evaluation yet",
        "No training step has been recorded",
        "No evaluation has been made",
        "No sentences were sampled",
        "no curves to draw",
        "No config.toml",
        "No note on the text's source and licence",
    ):
        assert said in page.text, said


def test_a_run_without_refresh_or_memory_numbers_says_so(tmp_path: Path) -> None:
    lines = [{"kind": "train", "step": 1, "loss": 3.0}]
    page = report(write_run(tmp_path, metrics=lines))
    assert "The memory was not refreshed during this run." in page.text
    assert "keys never renewed" in page.text
    assert "Retrieval latency No such numbers were recorded." in page.text


def test_a_damaged_part_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "evaluation.json").write_text('{"k": ')
    (run / "samples.json").write_text('{"not": "a list"}')
    page = report(run)
    assert "evaluation.json could not be read" in page.text
    assert "samples.json does not hold what a run writes there" in page.text
    assert "Masked-LM loss" in page.text


def test_steps_whose_loss_was_no_number_are_counted(tmp_path: Path) -> None:
    lines = metrics()
    lines[3] |= {"loss": None, "mlm_loss": None, "non_finite": {"loss": "nan"}}
    assert "The loss was not a number at 1 step." in report(write_run(tmp_path, metrics=lines)).text


def test_faults_are_told_with_what_they_cost(tmp_path: Path) -> None:
    lines = metrics()
    assert "started again" not in report(write_run(tmp_path / "calm", metrics=lines)).text
    restart = {"kind": "restart", "step": 10, "time_s": 1.0, "reason": ATTACK, "restarts": 1}
    restart |= {"failed_step": 17, "steps_again": 7, "seconds": 12.3, "trainers": 2}
    page = report(write_run(tmp_path / "hit", metrics=[*lines, restart]))
    assert "Trainers were started again 1 time" in page.text
    assert "12" in page.text.split("training again after")[1][:80]
    assert "script" not in page.elements


@pytest.mark.parametrize(
    ("right", "none", "said"),
    [
        (3.0, 4.0, "25 % lower"),
        (3.999, 4.0, "makes no difference yet"),
        (4.5, 4.0, "does harm so far"),
    ],
)
def test_the_verdict_does_not_flatter(tmp_path: Path, right: float, none: float, said: str) -> None:
    assert said in report(write_run(tmp_path, evaluation=evaluation(right, none))).text


def test_a_full_disk_leaves_the_old_report_whole(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    before = write_report(run).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_report(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert (run / "report.html").read_bytes() == before
    assert [p.name for p in run.iterdir() if "report" in p.name] == ["report.html"]


def test_no_such_run_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_report(tmp_path / "nowhere")


def test_edits_are_shown_and_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    case = {"sentence": f"rome is in [MASK] {ATTACK}", "before": "italy", "edited_to": "spain"}
    case |= {"after": "spain", "put_back": "italy"}
    found = {"edits": 4, "followed": 3, "returned": 4, "cases": [case]}
    (run / "edits.json").write_text(json.dumps(found))
    page = report(run)
    assert "changed in 4 passages" in page.text
    assert "followed in 3" in page.text
    assert "rome is in [MASK]" in page.text
    assert not {"script", "img"} & set(page.elements)


def test_a_run_without_edits_says_so(tmp_path: Path) -> None:
    assert "No edit of the memory was tried" in report(write_run(tmp_path)).text
