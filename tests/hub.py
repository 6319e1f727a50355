"""A small stand-in for the Hugging Face hub: what its real client asks when it downloads and uploads models."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

USER, TOKEN = "me", "hf_abcdefghijklmnopqrstuvwxyz"
Files = dict[str, bytes]

_FILE = re.compile(r"/(?P<id>[\w.-]+/[\w.-]+)/resolve/(?P<revision>[^/]+)/(?P<file>[^?]+)")
_API = re.compile(r"/api/models/(?P<id>[\w.-]+/[\w.-]+)(?:/revision/(?P<revision>[^/?]+))?(?:\?.*)?")


class Hub:
    """Models to download, and what has been uploaded.

    Attributes:
        faulty: whether no repository can be made just now.
        uploaded: files by repository.
    """

    def __init__(self) -> None:
        self.faulty = False
        self.uploaded: dict[str, Files] = {}
        self.private: dict[str, bool] = {}
        self._commits: dict[str, dict[str, Files]] = {}
        self._heads: dict[str, str] = {}
        self._objects: dict[str, bytes] = {}
        self.url = ""

    def commit(self, model: str, folder: Path) -> str:
        """Make a folder's files what the branch ``main`` of a model holds; the commit's name."""
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        name = hashlib.sha1(b"".join(files.values())).hexdigest()
        self._commits.setdefault(model, {})[name] = files
        self._heads[model] = name
        return name

    def lead_here(self, patch: pytest.MonkeyPatch, cache: Path) -> None:
        """Have this process's client ask this hub, signed in, with a cache of its own."""
        for name, value in (
            ("ENDPOINT", self.url),
            ("HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}"),
            ("HF_HUB_CACHE", str(cache)),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_DISABLE_XET", True),
        ):
            patch.setattr(constants, name, value)
        patch.setenv("HF_TOKEN", TOKEN)

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content."""
        if match := _FILE.fullmatch(path):
            return self._file(**match.groupdict())
        if path == "/api/whoami-v2":
            return self._json({"name": USER, "type": "user"}) if token == TOKEN else (401, {}, b"{}")
        if match := _API.fullmatch(path):
            head = self._heads.get(match["id"])
            return self._json({"id": match["id"], "sha": head, "siblings": []}) if head else (404, {}, b"{}")
        if method in ("POST", "PUT"):
            return self._write(path, body)
        return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"

    def _file(self, id: str, revision: str, file: str) -> tuple[int, dict[str, str], bytes]:
        commits = self._commits.get(id)
        if commits is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        name = self._heads[id] if revision == "main" else revision
        if name not in commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        content = commits[name].get(file)
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": name}, b""
        return 200, {"X-Repo-Commit": name, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content

    def _write(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if path == "/api/repos/create":
            if self.faulty:
                return 500, {}, b"{}"
            asked = json.loads(body)
            model = f"{asked.get('organization') or USER}/{asked['name']}"
            self.private[model] = asked.get("visibility") == "private"
            return self._json({"url": f"{self.url}/{model}", "name": model})
        if "/preupload/" in path:
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            return self._json({"files": modes})
        if path.endswith("/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        if path.startswith("/lfs/"):
            self._objects[path.rpartition("/")[2]] = body
            return self._json({})
        if "/commit/" not in path:  # the check of a model card
            return self._json({"errors": [], "warnings": []})
        model = path.removeprefix("/api/models/").partition("/commit/")[0]
        files = self.uploaded.setdefault(model, {})
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self._objects[value["oid"]]
        return self._json(
            {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/{model}/commit/{'0' * 40}"}
        )

    @staticmethod
    def _json(value: Any) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


@contextmanager
def hub_here() -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, headers, content = hub.answer(self.command, self.path, body, token)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = _respond  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
