"""Google Cloud's metadata service: what a virtual machine is told about itself.

Source: https://cloud.google.com/compute/docs/metadata/querying-metadata.
"""

from __future__ import annotations

import http.client
import logging
import socket
import threading
from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit

logger = logging.getLogger(__name__)

PATIENCE = 2.0
"""Seconds a connection and an answer that is due may take; the service is on the machine's own link."""


class NoAnswer(OSError):
    """The service did not answer, or not as itself."""


class Refused(NoAnswer):
    """The service answered, but not with a value."""


@dataclass(frozen=True)
class Value:
    text: str
    etag: str


class Service:
    """Reads single values, one connection each, without proxies and redirects."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port, self._path = parts.hostname or "", parts.port or 80, parts.path.rstrip("/")
        self._closed = threading.Event()
        self._connection: http.client.HTTPConnection | None = None

    def get(self, key: str, *, held: float = 0.0, **query: str | int) -> Value:
        """The value of ``key``.

        Args:
            held: seconds for which the service may hold back its answer, as the query asks it to.

        Raises:
            Refused: it answered, but has no value now.
            NoAnswer: nothing answered in time, or something else than a metadata service.
        """
        connection = http.client.HTTPConnection(self._host, self._port, timeout=held + PATIENCE)
        try:
            connection.connect()
            self._connection = connection
            if self._closed.is_set():
                raise NoAnswer("closed")
            path = f"{self._path}/{key}" + (f"?{urlencode(query)}" if query else "")
            connection.request("GET", path, headers={"Metadata-Flavor": "Google"})
            response = connection.getresponse()
            body = response.read(1 << 16)
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # the last: names that cannot be names
            raise NoAnswer(f"{key}: {error!r}") from error
        finally:
            connection.close()
        if response.headers.get("Metadata-Flavor") != "Google":
            raise NoAnswer(f"{key}: what answers at {self._host} is no metadata service")
        if response.status != 200:
            raise Refused(f"{key}: status {response.status}")
        return Value(body.decode(errors="replace").strip(), response.headers.get("ETag", ""))

    def close(self) -> None:
        """End a wait for an answer, and let none begin."""
        self._closed.set()
        connection = self._connection
        held = connection.sock if connection is not None else None
        if held is not None:
            try:
                held.shutdown(socket.SHUT_RDWR)
            except OSError:
                logger.debug("the answer came in the meantime")
