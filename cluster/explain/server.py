"""The explorer's web server: this machine's loopback, one secret address, nothing else.

Any page that a browser shows may send requests to this machine. Therefore every address begins with
a random token, the Host header must name this server, and what changes something must be JSON,
which no foreign page can send without being asked first.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from cluster.config import ConfigError
from cluster.explain.explorer_page import render_explorer
from cluster.explain.page import with_written_ids
from cluster.explain.session import Asked, Session
from memory_server.errors import MemoryServerError
from trainer.corpus.errors import CorpusError

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
LARGEST_BODY = 1 << 20
_NOTHING = "there is nothing at this address"
_DRAIN_S, _DRAINED_PIECES = 0.5, 64
_REFUSED = (ConfigError, CorpusError, MemoryServerError, ValueError)


class ExplorerServer:
    """Serves one session until it is closed."""

    def __init__(self, session: Session, *, port: int = 0, note: str = "") -> None:
        """Listen.

        Args:
            port: 0 takes a free one.
            note: what the page says of the store that is edited.

        Raises:
            ConfigError: the port is taken.
        """
        self._session, self._note = session, note
        self._token = secrets.token_urlsafe(16)
        try:
            self._server = ThreadingHTTPServer((HOST, port), self._handler())
        except OSError as error:
            raise ConfigError(
                f"port {port} of {HOST} cannot be had ({error.strerror}); give another one with "
                "--port, or leave it out for a free one"
            ) from error
        self._server.daemon_threads = True
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where the page is; whoever knows it may ask and edit."""
        return f"http://{HOST}:{self._server.server_port}/{self._token}/"

    def serve_forever(self) -> None:
        """Answer until `close` or an interrupt; blocks."""
        self._server.serve_forever(poll_interval=0.2)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self.close()

    def close(self) -> None:
        """Stop listening."""
        self._server.server_close()

    def answer(self, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a request comes to. Raises KeyError: no such; one of `_REFUSED`: refused."""
        session = self._session
        actions: dict[str, Callable[[], object]] = {
            "edit": lambda: session.edit_entry(_id(given), _text(given, "text")),
            "remove": lambda: session.remove_entry(_id(given)),
            "add": lambda: session.add_text(_text(given, "text"), _text(given, "title")),
            "unplug": lambda: session.unplug(_text(given, "domain")),
            "plug": lambda: session.plug(_text(given, "domain")),
            "undo": session.undo,
            "state": lambda: None,
        }
        if name == "ask":
            asked = Asked(text=_text(given, "text"), answer=_text(given, "answer") or None)
            return {"explanation": with_written_ids(session.ask(asked))}
        actions[name]()
        return session.state()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        serving = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if not self._allowed():
                    return
                if self._rest():
                    self._refuse(HTTPStatus.NOT_FOUND, _NOTHING)
                    return
                page = render_explorer(serving._note)
                self._send(HTTPStatus.OK, page.encode(), "text/html; charset=utf-8")

            def do_POST(self) -> None:
                if not self._allowed():
                    return
                given = self._body()
                if given is None:
                    return
                try:
                    told = serving.answer(self._rest(), given)
                except KeyError:
                    self._refuse(HTTPStatus.NOT_FOUND, _NOTHING)
                except _REFUSED as error:
                    self._refuse(HTTPStatus.BAD_REQUEST, str(error).splitlines()[0])
                else:
                    self._send(HTTPStatus.OK, json.dumps(told).encode(), "application/json")

            def _rest(self) -> str:
                return self.path.split("?")[0].split("/", 2)[2]

            def _allowed(self) -> bool:
                port = serving._server.server_port
                named = self.headers.get("Host", "") in (f"{HOST}:{port}", f"localhost:{port}")
                parts = self.path.split("/", 2)
                token = parts[1] if len(parts) > 2 else ""
                if named and hmac.compare_digest(token.encode(), serving._token.encode()):
                    return True
                self._refuse(HTTPStatus.NOT_FOUND, _NOTHING)
                return False

            def _body(self) -> dict[str, Any] | None:
                """None: refused."""
                kind = self.headers.get("Content-Type", "").split(";")[0].strip()
                length = self.headers.get("Content-Length", "")
                if kind != "application/json" or not length.isdigit():
                    self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send JSON with its length")
                    self._let_go()
                    return None
                if int(length) > LARGEST_BODY:
                    self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the request is too long")
                    self._let_go()
                    return None
                try:
                    given = json.loads(self.rfile.read(int(length)))
                except (ValueError, RecursionError):
                    given = None
                if not isinstance(given, dict):
                    self._refuse(HTTPStatus.BAD_REQUEST, "this is no JSON object")
                    return None
                return given

            def _let_go(self) -> None:
                """Read what is still coming, or the refusal would be lost with the connection."""
                self.close_connection = True
                self.connection.settimeout(_DRAIN_S)
                with contextlib.suppress(OSError):
                    for _ in range(_DRAINED_PIECES):
                        if not self.rfile.read1(LARGEST_BODY):
                            break

            def _refuse(self, status: HTTPStatus, message: str) -> None:
                self._send(status, json.dumps({"error": message}).encode(), "application/json")

            def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.send_header("X-Content-Type-Options", "nosniff")
                self.send_header("Referrer-Policy", "no-referrer")
                self.send_header("Cross-Origin-Resource-Policy", "same-origin")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *values: Any) -> None:
                # Not the address: it holds the token.
                log.debug("request answered: %s", values[1] if len(values) > 1 else "")

        return Handler


def _text(given: Mapping[str, Any], name: str) -> str:
    value = given.get(name, "")
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text")
    return value


def _id(given: Mapping[str, Any]) -> int:
    text = _text(given, "id")
    if not text.isdigit():
        raise ValueError(f"id {text!r} is no entry's id")
    return int(text)
