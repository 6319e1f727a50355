"""A Cloud Storage to test against: the emulator, behind a proxy that keeps the promises which the emulator does not.

The emulator ignores generations, so preconditions are enforced here, check and write under one lock. Here too:
resumable uploads that survive a repeated chunk, the service's error bodies, and faults on demand. Client libraries in
this process and in those started with its environment find the proxy by ``STORAGE_EMULATOR_HOST``.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

from gcp_storage_emulator.server import create_server

BUCKET = "numina-test"
_OBJECT = re.compile(r"^(?:/download)?/storage/v1/b/(?P<bucket>[^/]+)/o/(?P<name>[^/]+)$")
_UPLOAD = re.compile(r"^/upload/storage/v1/b/(?P<bucket>[^/]+)/o$")
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_CHUNK_UNIT = 1 << 18


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    bucket: str = ""
    name: str = ""
    """The object, wherever the request says it: in the path, the body, or the upload session."""

    @property
    def query(self) -> dict[str, str]:
        return {key: values[-1] for key, values in parse_qs(urlsplit(self.target).query).items()}

    def __str__(self) -> str:
        return f"{self.method} {self.name} {unquote(self.target)} {self.headers.get('content-range', '')}".rstrip()


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass
class Fault:
    """What happens to the next ``times`` requests whose text matches ``pattern``."""

    kind: int | str
    """A status to answer instead; or ``lose_answer`` (done, but the connection breaks), ``drop`` (it breaks before),
    ``delay``, ``corrupt`` (a bit of the answer), ``corrupt_sent`` (a bit of what was sent), or ``keep_less`` (of an
    upload's chunk than was sent)."""
    pattern: str
    times: int
    seconds: float = 0.0


@dataclass
class Session:
    """A resumable upload."""

    bucket: str
    name: str
    received: int = 0
    done: Answer | None = None


def error(status: int, reason: str, message: str) -> Answer:
    details = {"message": message, "domain": "global", "reason": reason}
    body = json.dumps({"error": {"code": status, "message": message, "errors": [details]}}).encode()
    return Answer(status, {"Content-Type": "application/json; charset=UTF-8"}, body)


class Gcs:
    """The running service.

    Attributes:
        url: ``gs://`` of a bucket that exists.
        environment: what a child process needs to find it.
        requests: all that came, as text ("POST name target", and the range of an upload's chunk), faults included.
    """

    def __init__(self, emulator_port: int) -> None:
        self.url = f"gs://{BUCKET}"
        self.requests: list[str] = []
        self._emulator_port = emulator_port
        self._faults: list[Fault] = []
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._proxy.daemon_threads = True
        self._proxy.gcs = self  # type: ignore[attr-defined]
        self.environment = {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{self._proxy.server_port}"}
        self.create_bucket(BUCKET)

    def fault(self, kind: int | str, pattern: str = "", *, times: int = 1, seconds: float = 0.0) -> Fault:
        """Have something go wrong; ``times`` of the result counts down to what has not happened yet."""
        fault = Fault(kind, pattern, times, seconds)
        self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Forget faults and the requests so far."""
        self._faults.clear()
        self.requests.clear()

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, request)) for request in list(self.requests))

    def create_bucket(self, name: str) -> None:
        body = json.dumps({"name": name}).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        self._forward(Request("POST", "/storage/v1/b?project=test", headers, body))

    def serve(self) -> None:
        self._proxy.serve_forever(poll_interval=0.05)

    def stop(self) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()

    def handle(self, request: Request) -> Answer | None:
        """The answer, or None where the connection is to break."""
        request = self._identified(request)
        with self._lock:
            self.requests.append(str(request))
            fault = self._next_fault(str(request))
        kind = fault.kind if fault else ""
        if kind == "delay" and fault:
            time.sleep(fault.seconds)
        if isinstance(kind, int):
            return error(kind, "injected", f"injected fault {kind}")
        if kind == "drop":
            return None
        if kind == "corrupt_sent":
            request = replace(request, body=_damaged(request.body))
        with self._lock:
            answer = self._refusal(request) or self._perform(request, keep_less=kind == "keep_less")
        if kind == "corrupt":
            answer = replace(answer, body=_damaged(answer.body))
        return None if kind == "lose_answer" else answer

    def _next_fault(self, text: str) -> Fault | None:
        for fault in self._faults:
            if fault.times > 0 and re.search(fault.pattern, text):
                fault.times -= 1
                return fault
        return None

    def _identified(self, request: Request) -> Request:
        path = urlsplit(request.target).path
        if found := _OBJECT.match(path):
            return replace(request, bucket=unquote(found["bucket"]), name=unquote(found["name"]))
        if found := _UPLOAD.match(path):
            session = self._sessions.get(request.query.get("upload_id", ""))
            name = session.name if session else request.query.get("name") or _name_in_body(request)
            return replace(request, bucket=unquote(found["bucket"]), name=name)
        return request

    def _facts(self, request: Request) -> dict[str, str] | None:
        """The present object's resource."""
        target = f"/storage/v1/b/{quote(request.bucket)}/o/{quote(request.name, safe='')}"
        answer = self._forward(Request("GET", target, {}, b""))
        facts: dict[str, str] | None = json.loads(answer.body) if answer.status == 200 else None
        return facts

    def _refusal(self, request: Request) -> Answer | None:
        """What the emulator would not refuse, and the service does."""
        if not request.name:
            return None
        session = self._sessions.get(request.query.get("upload_id", ""))
        if session and session.done:
            return None
        facts = self._facts(request)
        generation = int(facts["generation"]) if facts else 0
        uploading = request.method in ("POST", "PUT")
        if not facts and not uploading:
            return None
        if request.query.get("generation") not in (None, str(generation)):
            return error(404, "notFound", f"No such object: {request.bucket}/{request.name}")
        if request.query.get("ifGenerationMatch") not in (None, str(generation)):
            return error(412, "conditionNotMet", "At least one of the pre-conditions you specified did not hold.")
        begins = re.fullmatch(r"bytes=(\d+)-\d*", request.headers.get("range", ""))
        if facts and begins and request.method == "GET" and int(begins[1]) >= int(facts["size"]):
            return error(416, "requestedRangeNotSatisfiable", "The requested range cannot be satisfied.")
        return None

    def _perform(self, request: Request, *, keep_less: bool) -> Answer:
        session = self._sessions.get(request.query.get("upload_id", ""))
        if session:
            return self._continue(session, request, keep_less=keep_less)
        answer = self._forward(request)
        if "Location" in answer.headers:
            upload_id = parse_qs(urlsplit(answer.headers["Location"]).query)["upload_id"][0]
            self._sessions[upload_id] = Session(request.bucket, request.name)
        if answer.status == 404 and not answer.body:
            missing = "object" if self._bucket_exists(request) else "bucket"
            message = f"No such object: {request.bucket}/{request.name}"
            answer = error(404, "notFound", message if missing == "object" else "The specified bucket does not exist.")
        elif request.query.get("alt") == "media" and answer.status in (200, 206):
            facts = self._facts(request) or {}
            pinned = {"X-Goog-Generation": facts["generation"], "X-Goog-Stored-Content-Length": facts["size"]}
            answer = replace(answer, headers={**answer.headers, **pinned})
        return answer

    def _continue(self, session: Session, request: Request, *, keep_less: bool) -> Answer:
        """A chunk of a resumable upload: bytes that were kept already are passed over, a finished upload stays so."""
        if session.done:
            return session.done
        found = _RANGE.fullmatch(request.headers.get("content-range", ""))
        if found:
            start, end = int(found[1]), int(found[2]) + 1
            body = request.body[max(session.received - start, 0) :]
            start = max(start, session.received)
            if keep_less:
                end = start + (end - start) // 2 // _CHUNK_UNIT * _CHUNK_UNIT
                body = body[: end - start]
            if not body:
                received = {"Range": f"bytes=0-{session.received - 1}"} if session.received else {}
                return Answer(308, received)
            headers = {**request.headers, "content-range": f"bytes {start}-{end - 1}/{found[3]}"}
            request = replace(request, body=body, headers={**headers, "content-length": str(len(body))})
        answer = self._forward(request)
        if answer.status == 308 and found:
            session.received = end
        elif answer.status == 200:
            session.done = answer
        return answer

    def _bucket_exists(self, request: Request) -> bool:
        found = re.match(r"^(?:/\w+)?/storage/v1/b/([^/]+)", urlsplit(request.target).path)
        return bool(found) and self._forward(Request("GET", f"/storage/v1/b/{found[1]}", {}, b"")).status == 200

    def _forward(self, request: Request) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self._emulator_port, timeout=60)
        try:
            connection.request(request.method, request.target, body=request.body or None, headers=request.headers)
            response = connection.getresponse()
            dropped = ("content-length", "connection", "server", "date")
            headers = {key: value for key, value in response.getheaders() if key.lower() not in dropped}
            return Answer(response.status, headers, response.read())
        finally:
            connection.close()


def _damaged(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def _name_in_body(request: Request) -> str:
    kind = request.headers.get("content-type", "")
    if kind.startswith("multipart/"):
        message = BytesParser().parsebytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + request.body)
        part = message.get_payload(0)
        return str(json.loads(part.get_payload(decode=True))["name"])  # type: ignore[union-attr, arg-type]
    return str(json.loads(request.body or b"{}").get("name", ""))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        # Else head and body of an answer wait for each other's acknowledgement.
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {key.lower(): value for key, value in self.headers.items()}
        answer = self.server.gcs.handle(Request(self.command, self.path, headers, body))  # type: ignore[attr-defined]
        if answer is None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _any  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: `Gcs.requests` is the log."""


@contextmanager
def gcs() -> Iterator[Gcs]:
    """Run the service; for the time, client libraries in this process find it too."""
    emulator = create_server("127.0.0.1", 0, in_memory=True)
    emulator.start()
    before = os.environ.get("STORAGE_EMULATOR_HOST")
    try:
        service = Gcs(emulator._api._httpd.server_port)
        thread = threading.Thread(target=service.serve, daemon=True)
        thread.start()
        os.environ.update(service.environment)
        yield service
        service.stop()
        thread.join()
    finally:
        os.environ.pop("STORAGE_EMULATOR_HOST")
        if before is not None:
            os.environ["STORAGE_EMULATOR_HOST"] = before
        emulator.stop()
