"""Where files live: the one door to local folders and to Cloud Storage.

``open_store`` gives a `Store` (see `numina_finetune.stores`) for either; the functions on single local files are those
of `numina_finetune.files`. Google's library is known here only.
"""

from __future__ import annotations

import base64
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any

from numina_finetune.errors import ConfigError
from numina_finetune.files import (
    crc32c,
    move_unless_there,
    read_json,
    remove_folder,
    sync_file,
    sync_folder,
    write_json,
    write_text,
)
from numina_finetune.stores import (
    Damaged,
    Entry,
    LocalStore,
    NotFound,
    PreconditionFailed,
    StorageError,
    StorageUnavailable,
    Store,
    checked_name,
)

__all__ = [
    "Damaged",
    "Entry",
    "NotFound",
    "PreconditionFailed",
    "StorageError",
    "StorageUnavailable",
    "Store",
    "checked_name",
    "crc32c",
    "move_unless_there",
    "open_store",
    "read_json",
    "remove_folder",
    "sync_file",
    "sync_folder",
    "write_json",
    "write_text",
]

TRANSFER_CHUNK = 1 << 25
"""Bytes of one request of a long upload or download; what a fault in between costs."""
_WRITER = "numina-write"
"""Metadata field that tells one's own write, whose answer was lost, from another's."""
_SESSION_ATTEMPTS = 3


def open_store(url: str | Path, *, chunk_bytes: int = TRANSFER_CHUNK, retry_seconds: float = 120.0) -> Store:
    """The objects below ``gs://bucket/prefix``, or below a local folder (made by the first write).

    Args:
        chunk_bytes: of one request, a multiple of 256 KiB.
        retry_seconds: how long one request is tried again after network and server faults.

    Raises:
        ConfigError: not a place that can be opened.
    """
    scheme, separator, rest = str(url).partition("://")
    if not separator:
        return LocalStore(Path(url).expanduser(), chunk_bytes)
    if scheme != "gs" or not rest.split("/", 1)[0]:
        raise ConfigError(f"{url!r} is no place to store: give gs://bucket/prefix or a local folder")
    return GcsStore(str(url), chunk_bytes, retry_seconds)


class GcsStore(Store):
    """Objects in a Cloud Storage bucket; ``STORAGE_EMULATOR_HOST`` leads to an emulator, without credentials."""

    def __init__(self, url: str, chunk_bytes: int, retry_seconds: float) -> None:
        from google.auth.exceptions import DefaultCredentialsError
        from google.cloud import storage as gcs  # type: ignore[import-untyped]
        from google.cloud.storage.retry import DEFAULT_RETRY  # type: ignore[import-untyped]

        super().__init__(url, chunk_bytes)
        # Else the library asks for the bucket's facts in the background, for traces only, which takes a further role.
        os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
        bucket, _, prefix = url.removeprefix("gs://").partition("/")
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        try:
            # No project: none is needed for objects, and an account need not have one.
            anonymous = os.environ.get("STORAGE_EMULATOR_HOST")
            client = gcs.Client.create_anonymous_client() if anonymous else gcs.Client(project=None)
            self._bucket = client.bucket(bucket)
        except DefaultCredentialsError as error:
            raise ConfigError(
                f"{url}: no Google credentials here: run gcloud auth application-default login, "
                "or give the machine a service account"
            ) from error
        except ValueError as error:
            raise ConfigError(f"{url}: {bucket!r} is no bucket name ({error})") from error
        self._retry = DEFAULT_RETRY.with_delay(initial=0.5, maximum=16.0).with_timeout(retry_seconds)
        self._bucket_seen = False

    def list(self, prefix: str = "") -> Sequence[Entry]:
        with self._errors(prefix):
            blobs = [*self._bucket.list_blobs(prefix=self._prefix + prefix, retry=self._retry)]
        self._bucket_seen = True
        return [self._entry(blob) for blob in blobs]

    def folders(self) -> Sequence[str]:
        with self._errors(""):
            listing = self._bucket.list_blobs(prefix=self._prefix, delimiter="/", retry=self._retry)
            for _ in listing:  # the folders are known once the pages have been gone through
                pass
        self._bucket_seen = True
        return sorted(folder.removeprefix(self._prefix).rstrip("/") for folder in listing.prefixes)

    def stat(self, name: str, *, generation: int | None = None) -> Entry | None:
        blob = self._find(name, generation)
        return self._entry(blob) if blob else None

    def read(
        self, name: str, *, generation: int | None = None, start: int | None = None, end: int | None = None
    ) -> bytes:
        from google.api_core.exceptions import RequestRangeNotSatisfiable

        whole = start is None and end is None
        if not whole and end is not None and end <= (start or 0):
            return b""
        last = None if end is None else end - 1
        try:
            with self._errors(name, generation):
                blob = self._bucket.blob(self._prefix + checked_name(name), generation=generation)
                checksum = "crc32c" if whole else None
                data = blob.download_as_bytes(
                    start=start, end=last, raw_download=True, checksum=checksum, retry=self._retry
                )
        except RequestRangeNotSatisfiable:  # a range that begins beyond the end
            return b""
        return bytes(data)

    def delete(self, name: str, *, if_generation: int | None = None) -> None:
        try:
            with self._errors(name, if_generation):
                blob = self._bucket.blob(self._prefix + checked_name(name))
                blob.delete(if_generation_match=if_generation, retry=self._retry)
        except NotFound:
            pass

    def location(self) -> str | None:
        with self._errors(""):
            self._bucket.reload(retry=self._retry)
        return str(self._bucket.location) if self._bucket.location else None

    def sweep(self) -> None:
        """Nothing: an upload that was not finished is no object, and the service forgets it after a week."""

    def put(
        self,
        name: str,
        open_source: Callable[[], IO[bytes]],
        *,
        size: int,
        checksum: str,
        if_generation: int | None = None,
    ) -> Entry:
        """Send the bytes; the server refuses those that do not have the checksum, so no damaged object appears.

        Every request is repeated after a fault. Without a precondition that is harmless, as the last write wins
        anyway. With one, a repeated request may find the work of the first, whose answer was lost.
        """
        blob = self._bucket.blob(self._prefix + checked_name(name), chunk_size=self._chunk_bytes)
        blob.metadata = {_WRITER: uuid.uuid4().hex}
        blob.crc32c = base64.b64encode(bytes.fromhex(checksum)).decode()
        try:
            self._send(blob, name, open_source, size, if_generation)
        except PreconditionFailed:
            present = self._find(name, None)
            if present is None or (present.metadata or {}).get(_WRITER) != blob.metadata[_WRITER]:
                raise
            blob = present
        entry = self._entry(blob)
        if (entry.size, entry.crc32c) != (size, checksum):
            raise Damaged(f"{self.address(name)}: sent {size} bytes with crc32c {checksum}, stored is {entry}")
        return entry

    def _send(
        self, blob: Any, name: str, open_source: Callable[[], IO[bytes]], size: int, if_generation: int | None
    ) -> None:
        """One upload. A session that the server has lost, or kept less of than was sent, is begun anew."""
        for attempt in range(1, _SESSION_ATTEMPTS + 1):
            try:
                with self._errors(name, if_generation), open_source() as source:
                    # The object's own checksum field is the check: the library's would delete a mismatched object,
                    # whoever had written it.
                    blob.upload_from_file(
                        source, size=size, if_generation_match=if_generation, checksum=None, retry=self._retry
                    )
                return
            except (NotFound, ValueError) as error:
                if attempt == _SESSION_ATTEMPTS:
                    why = error.__cause__ or error
                    raise StorageUnavailable(
                        f"{self.address(name)}: the upload broke {attempt} times: {why}"
                    ) from error

    def _find(self, name: str, generation: int | None) -> Any:
        """The library's object with its facts, or None."""
        with self._errors(name, generation):
            blob = self._bucket.get_blob(self._prefix + checked_name(name), generation=generation, retry=self._retry)
        if blob is None:
            self._require_bucket()
        self._bucket_seen = True
        return blob

    def _entry(self, blob: Any) -> Entry:
        checksum = base64.b64decode(blob.crc32c).hex()
        name = blob.name.removeprefix(self._prefix)
        return Entry(name, int(blob.size), checksum, int(blob.generation), blob.updated)

    def _require_bucket(self) -> None:
        """Tell a missing object from a missing bucket; to look at the bucket itself would take a further role."""
        if self._bucket_seen:
            return
        from google.api_core.exceptions import NotFound as NotThere

        with self._errors(""):
            try:
                next(iter(self._bucket.list_blobs(max_results=1, retry=self._retry)), None)
            except NotThere as error:
                raise ConfigError(
                    f"{self.url}: there is no bucket {self._bucket.name!r}: correct the name, or create it with "
                    f"gcloud storage buckets create gs://{self._bucket.name}"
                ) from error
        self._bucket_seen = True

    @contextmanager
    def _errors(self, name: str, generation: int | None = None) -> Iterator[None]:
        """The library's errors as this module's, naming the object."""
        from google.api_core import exceptions as api
        from google.auth.exceptions import GoogleAuthError
        from google.cloud.storage.exceptions import DataCorruption  # type: ignore[import-untyped]

        try:
            yield
        except api.PreconditionFailed as error:
            raise self._in_the_way(name, generation) from error
        except api.NotFound as error:
            self._require_bucket()
            raise self._absent(name, generation) from error
        except (api.Forbidden, api.Unauthorized) as error:
            raise ConfigError(
                f"{self.address(name)}: this account may not do that ({error.message}): "
                f"give it the role Storage Object User on gs://{self._bucket.name}"
            ) from error
        except DataCorruption as error:
            raise Damaged(f"{self.address(name)}: the bytes do not have the recorded checksum") from error
        except api.RequestRangeNotSatisfiable:
            raise
        except (api.GoogleAPIError, GoogleAuthError) as error:
            if getattr(error, "code", None) == HTTPStatus.GONE:  # an upload session
                raise self._absent(name, generation) from error
            raise StorageUnavailable(f"{self.address(name)}: {error}") from error
