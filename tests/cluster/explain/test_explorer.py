"""The explorer: edits change answers, undo brings them back, and strangers are refused."""

from __future__ import annotations

import json
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.cli import main
from cluster.config import ConfigError
from cluster.explain.server import LARGEST_BODY, ExplorerServer
from cluster.explain.session import Asked, Session, private_copy
from cluster.trained_model import load_trained_model
from memory_server.store.store import Store
from tests.cluster.explain.browser import chromium, texts, until
from tests.cluster.tiny_run import TinyRun, make_tiny_run

TEXT = "The [MASK] of the river."


@dataclass(frozen=True)
class Served:
    run: TinyRun
    store: Store
    session: Session
    server: ExplorerServer

    def post(self, name: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """(status, what was answered)"""
        raw = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        given = {"Content-Type": "application/json", **headers}
        request = urllib.request.Request(self.server.url + name, raw, given)
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    run = make_tiny_run(tmp_path)
    trained = load_trained_model(run.model)
    store = private_copy(Store.open(run.store), tmp_path / "copy")
    with (
        Session(trained, store, k=3, say=lambda line: None) as session,
        ExplorerServer(session, note="a copy") as server,
    ):
        yield Served(run, store, session, server)


def test_an_edit_is_seen_and_undone_and_the_original_is_left_alone(served: Served) -> None:
    original = Store.open(served.run.store).manifest()
    before = served.session.ask(Asked(text=TEXT))
    entry = before["entries"][0]
    status, told = served.post("edit", {"id": str(entry["id"]), "text": "harbour harbour king"})
    assert (status, told["undo"]) == (200, 1)
    after = served.session.ask(Asked(text=TEXT))
    assert after["predictions"] != before["predictions"]
    found = [e["text"] for e in after["entries"] if e["id"] == entry["id"]]
    assert found in ([], ["harbour harbour king"])
    status, told = served.post("undo")
    assert (status, told["undo"]) == (200, 0)
    assert served.session.ask(Asked(text=TEXT))["predictions"] == before["predictions"]
    assert served.post("undo")[0] == 400
    assert Store.open(served.run.store).manifest() == original


def test_entries_and_domains_come_and_go(served: Served) -> None:
    _, start = served.post("state")
    assert start["domains"] == [{"name": "default", "entries": start["entries"], "plugged": True}]
    status, told = served.post("unplug", {"domain": "default"})
    assert status == 400
    assert "all that the memory holds" in told["error"]
    _, told = served.post("add", {"text": "a king by the river", "title": "King"})
    assert told["entries"] == start["entries"] + 1
    _, told = served.post("unplug", {"domain": "default"})
    assert told["entries"] == 1
    assert {"name": "default", "entries": 0, "plugged": False} in told["domains"]
    _, explained = served.post("ask", {"text": TEXT})
    assert [e["title"] for e in explained["explanation"]["entries"]] == ["King"]
    _, told = served.post("plug", {"domain": "default"})
    assert told["entries"] == start["entries"] + 1
    entry = served.session.ask(Asked(text=TEXT))["entries"][0]
    _, told = served.post("remove", {"id": str(entry["id"])})
    assert told["entries"] == start["entries"]


def test_undo_leaves_another_programs_commit_alone(served: Served) -> None:
    assert served.post("add", {"text": "a king by the river"})[1]["undo"] == 1
    other = ["memory", "add", str(served.store.location), "--text", "a queen by the sea"]
    assert main([*other, "--tokenizer", str(served.run.model)]) == 0
    entries = Store.open(served.store.location).manifest().entries
    status, told = served.post("undo")
    assert status == 400
    assert "another program has changed the memory since (add a text)" in told["error"]
    # An edit on top of it can be undone, and what lies below the other program's commit cannot.
    assert served.post("add", {"text": "a fisher by the sea"})[1]["undo"] == 1
    assert served.post("undo")[1]["undo"] == 0
    assert served.post("undo")[0] == 400
    assert Store.open(served.store.location).manifest().entries == entries


def test_an_emptied_memory_is_told_and_comes_back(served: Served) -> None:
    _, told = served.post("add", {"text": "a king by the river"})
    served.post("unplug", {"domain": "default"})
    entry = served.session.ask(Asked(text=TEXT))["entries"][0]
    _, told = served.post("remove", {"id": str(entry["id"])})
    assert told["entries"] == 0
    status, told = served.post("ask", {"text": TEXT})
    assert status == 400
    assert "the memory holds no entry" in told["error"]
    served.post("undo")
    assert served.post("ask", {"text": TEXT})[0] == 200


def test_what_cannot_be_done_is_said(served: Served) -> None:
    for name, given, says in (
        ("ask", {"text": "nothing to guess"}, "has no [MASK]"),
        ("ask", {"text": 7}, "text must be text"),
        ("edit", {"id": "x", "text": "a"}, "is no entry's id"),
        ("edit", {"id": "999999999", "text": "a"}, "999999999"),
        ("edit", {"id": "1", "text": " "}, "is empty"),
        ("plug", {"domain": "default"}, "already"),
        ("unplug", {"domain": "nowhere"}, "nowhere"),
    ):
        status, told = served.post(name, given)
        assert status == 400, name
        assert says in told["error"]
    assert served.post("format_the_disk")[0] == 404


def test_strangers_are_refused(served: Served) -> None:
    url = served.server.url
    assert url.startswith("http://127.0.0.1:")
    assert served.post("state", Host="evil.example")[0] == 404
    assert served.post("state", **{"Content-Type": "text/plain"})[0] == 415
    assert served.post("state", b"[1]")[0] == 400
    assert served.post("state", b"{" * 2000)[0] == 400
    assert served.post("state", **{"Content-Length": str(LARGEST_BODY + 1)})[0] == 413
    for wrong in (url[:-2] + "x/", url.rsplit("/", 2)[0] + "/", url + "../../etc/passwd"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(wrong, timeout=30)


def test_a_taken_port_is_told(served: Served) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 cannot be had"):
            ExplorerServer(served.session, port=port)


def test_a_k_that_no_answer_could_have_is_refused_at_once(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explorer", str(served.run.run), "-k", "1024"]) == 2
    assert "-k 1024: at most 1023 entries can be explained" in capsys.readouterr().err


def test_a_store_elsewhere_is_not_copied(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    there: Any = SimpleNamespace(location="s3://bucket/memory")
    with pytest.raises(ConfigError, match="cannot be copied"):
        private_copy(there, served.run.run / "copy")
    assert main(["explorer", str(served.run.store)]) == 2
    assert "--model is needed" in capsys.readouterr().err


def test_by_hand_in_a_browser(served: Served) -> None:
    with chromium() as browser:
        browser.implicitly_wait(10)
        browser.get(served.server.url)
        browser.find_element("id", "question").send_keys(TEXT)
        browser.find_element("css selector", "#asking .go").click()
        browser.find_element("css selector", ".entry .edit").click()
        first = texts(browser, ".guess > span:last-child")
        area = browser.find_element("css selector", ".entry textarea")
        area.clear()
        area.send_keys("harbour harbour king")
        browser.find_element("css selector", ".entry .save").click()
        until(lambda: texts(browser, ".guess > span:last-child") != first)
        browser.find_element("css selector", "#undo:enabled").click()
        until(lambda: texts(browser, ".guess > span:last-child") == first)
        assert browser.find_element("id", "undo").get_attribute("disabled")
        assert "roll back" in browser.find_element("id", "holds").text
        assert browser.get_log("browser") == []


def test_a_copy_shares_no_file_that_is_written(tmp_path: Path) -> None:
    run = make_tiny_run(tmp_path)
    kept = {p: p.read_bytes() for p in run.store.rglob("*") if p.is_file()}
    copy = private_copy(Store.open(run.store), tmp_path / "copy")
    copy.commit(remove_ids=[int(copy.segment(copy.manifest().segments[0]).ids[0])], message="x")
    assert {p: p.read_bytes() for p in run.store.rglob("*") if p.is_file()} == kept
    shutil.rmtree(tmp_path / "copy")
