"""push_to_hub, against a hub of our own on this machine."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForMaskedLM, AutoTokenizer

PUSH = """
import sys, model
from transformers import AutoModelForMaskedLM, AutoTokenizer
for kind in (AutoModelForMaskedLM, AutoTokenizer):
    kind.from_pretrained(sys.argv[1]).push_to_hub("me/colours", token="hf_" + "x" * 34)
"""


class Hub(ThreadingHTTPServer):
    """As much of a hub as an upload needs: every file is sent inside the commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.created: list[Any] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self._body()
        hub = self.server
        if self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self._reply({"url": f"{hub.url}/me/colours", "id": "me/colours", "name": "me/colours"})
        elif self.path.startswith("/api/validate-yaml"):
            self._reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self._reply(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in asked
                    ]
                }
            )
        elif "/commit/" in self.path:
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    value = item["value"]
                    hub.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{hub.url}/me/colours/commit/1"
            self._reply({"success": True, "commitUrl": url, "commitOid": "1", "hookOutput": ""})
        else:
            self._reply({"error": self.path}, 404)

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/me/colours"):
            self._reply({"id": "me/colours", "sha": "0" * 40, "siblings": []})
        else:
            self._reply({"error": "not found"}, 404)

    def do_HEAD(self) -> None:
        self._reply({}, 404)

    def log_message(self, *message: Any) -> None:
        pass

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _reply(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_is_pushed_is_what_is_loaded(hub: Hub, reader_dir: Path, tmp_path: Path) -> None:
    # A process of its own: huggingface_hub reads its environment once, and the tests are offline.
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", PUSH, str(reader_dir)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {one["name"] for one in hub.created} == {"colours"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(hub.files)
    pulled = tmp_path / "pulled"
    pulled.mkdir()
    for name, content in hub.files.items():
        (pulled / name).write_bytes(content)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (pulled / name).read_bytes() == (reader_dir / name).read_bytes(), name
    assert type(AutoModelForMaskedLM.from_pretrained(pulled)).__name__ == "PlugLMForMaskedLM"
    assert AutoTokenizer.from_pretrained(pulled).is_fast
