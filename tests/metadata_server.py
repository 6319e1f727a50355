"""A server that plays Compute Engine's metadata service, for what the training listens to.

Like the real one it refuses requests without its header, tags every value, holds a question with
``wait_for_change=true`` until the value has another tag or the time is up, and answers 503 to
``upcoming-maintenance`` while nothing was ever announced. Faults can be switched on.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

ROOT = "/computeMetadata/v1/"


class MetadataServer:
    """The values of one machine, at :attr:`url`."""

    def __init__(self) -> None:
        self._values = {"instance/preempted": "FALSE", "instance/maintenance-event": "NONE"}
        self._changed = threading.Condition()
        self._fault: int | str | None = None
        self.flavor: str | None = "Google"
        """What it says it is; None = it does not say."""
        self.holds = True
        """Whether it holds a question until there is something new."""
        self.asked: list[str] = []
        """Path and query of every request."""
        self._stopping = False
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}{ROOT.rstrip('/')}"

    def set(self, key: str, value: str) -> None:
        """Change ``instance/{key}``, and answer those who wait for it."""
        with self._changed:
            self._values[f"instance/{key}"] = value
            self._changed.notify_all()

    def fault(self, kind: int | str | None) -> None:
        """Answer everything with a status; or ``drop`` connections, ``garbage`` for HTTP, ``stall``; None = be well."""
        with self._changed:
            self._fault = kind
            self._changed.notify_all()

    def count(self, text: str) -> int:
        return sum(text in one for one in self.asked)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        self.asked.append(handler.path)
        with self._changed:
            fault = self._fault
            while self._fault == "stall" and not self._stopping:
                self._changed.wait()
        if fault in ("drop", "stall"):
            handler.close_connection = True
        elif fault == "garbage":
            handler.wfile.write(b"\x00\x01 what is this\r\n\r\n")
        elif isinstance(fault, int):
            self._send(handler, fault, "out of order", "")
        elif handler.headers.get("Metadata-Flavor") != "Google":
            self._send(handler, 403, "Missing Metadata-Flavor:Google header.", "")
        else:
            value = self._read(parts.path.removeprefix(ROOT), query)
            if value is not None:
                self._send(handler, 200, value, _tag(value))
            elif parts.path.endswith("upcoming-maintenance"):
                self._send(handler, 503, '{ "error": "no notifications have been received yet, try again later" }', "")
            else:
                self._send(handler, 404, "not found", "")

    def _read(self, key: str, query: dict[str, str]) -> str | None:
        with self._changed:
            if self.holds and query.get("wait_for_change") == "true":
                before = query.get("last_etag") or _tag(self._values.get(key, ""))
                seconds = float(query["timeout_sec"]) if "timeout_sec" in query else None
                self._changed.wait_for(
                    lambda: self._stopping or self._fault is not None or _tag(self._values.get(key, "")) != before,
                    seconds,
                )
            return self._values.get(key)

    def _send(self, handler: BaseHTTPRequestHandler, status: int, text: str, tag: str) -> None:
        body = text.encode()
        handler.send_response(status)
        if self.flavor is not None:
            handler.send_header("Metadata-Flavor", self.flavor)
        if tag:
            handler.send_header("ETag", tag)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def serve(self) -> None:
        self._http.serve_forever(poll_interval=0.05)

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._http.shutdown()
        self._http.server_close()


def _tag(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()[:16]


def _handler(server: MetadataServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                server.answer(self)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # whoever asked has gone: it was told to stop

        def log_message(self, format: str, *args: Any) -> None:
            """Tests read :attr:`MetadataServer.asked` instead."""

    return Handler


@contextmanager
def metadata_server() -> Iterator[MetadataServer]:
    server = MetadataServer()
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()
