"""Whether the run can write where it is to write, and whether that is near."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

from numina_finetune.doctor.findings import Finding, fault, note, ok
from numina_finetune.errors import ConfigError
from numina_finetune.metadata import NoAnswer, Service
from numina_finetune.storage import NotFound, StorageError, open_store

RETRY_SECONDS = 10.0


def check_place(url: str, zone: str | None) -> Iterator[Finding]:
    """Write an object, read it back and delete it; compare the bucket's region with the machine's.

    Args:
        zone: the machine's; None where it is not known.
    """
    payload, name = os.urandom(1024), f".doctor-{uuid.uuid4().hex}"
    try:
        store = open_store(url, retry_seconds=RETRY_SECONDS)
        store.write(name, payload)
        same = store.read(name) == payload
        store.delete(name)
    except ConfigError as error:
        what, _, remedy = str(error).rpartition(": ")
        yield fault("output", what or remedy, remedy)
        return
    except (StorageError, NotFound, OSError) as error:
        yield fault(
            "output", f"{url}: {error}", "see that the place is reachable and writable from here, and try again"
        )
        return
    if not same:
        yield fault(
            "output", f"{url} gave back other bytes than were written", "use another place, and report this one"
        )
        return
    yield ok("output", f"{url}: written, read back and deleted")
    yield from _distance(url, _location(url), zone)


def zone_of_machine(metadata_url: str) -> str | None:
    """The Compute Engine zone of this machine, such as ``us-east5-b``; None elsewhere."""
    if metadata_url == "none":
        return None
    try:
        return Service(metadata_url).get("instance/zone").text.rpartition("/")[2] or None
    except NoAnswer:
        return None


def _location(url: str) -> str | None:
    try:
        return open_store(url, retry_seconds=RETRY_SECONDS).location()
    except (ConfigError, StorageError):  # asking takes a role that writing does not need
        return None


def _distance(url: str, location: str | None, zone: str | None) -> Iterator[Finding]:
    if not url.startswith("gs://"):
        return
    if location is None:
        yield note("region", f"where the bucket of {url} lies cannot be asked", "give this account storage.buckets.get")
    elif zone is None:
        yield note("region", f"the bucket lies in {location}; this machine's zone is not known", "give it with --zone")
    elif zone.startswith(f"{location.lower()}-"):
        yield ok("region", f"bucket and machine are both in {location.lower()}")
    else:
        yield note(
            "region",
            f"the bucket lies in {location}, this machine in {zone}: checkpoints take longer, and traffic is paid for",
            f"use a bucket in {zone.rpartition('-')[0]}",
        )
