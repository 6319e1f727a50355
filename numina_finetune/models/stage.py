"""``numina-finetune stage``: a model's files put into a store once, so that no machine asks the hub again.

Below ``{output-dir}/{name}/`` lie the model's files, and::

    SOURCE.json     written first: where the model is from, to the commit, and which files it has
    CLAIM.json      while a process copies; it is rewritten from time to time, and one that stands still is taken over
    STAGED.json     written last, see `numina_finetune.models.staged`

A file that is there already is not copied again: an object appears whole or not at all, and always from the commit that
``SOURCE.json`` names.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import google_crc32c
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from numina_finetune.checkpoint.parallel import in_order
from numina_finetune.claims import Claim
from numina_finetune.errors import ConfigError, ExitCode
from numina_finetune.models.builtin import BUILTIN
from numina_finetune.models.hub import resolve_name
from numina_finetune.models.staged import (
    BLOCK,
    STAGED,
    Facts,
    Files,
    Record,
    block_checksums,
    is_weights,
    missing_files,
    read_record,
)
from numina_finetune.storage import (
    TRANSFER_CHUNK,
    Damaged,
    Entry,
    PreconditionFailed,
    StorageError,
    Store,
    crc32c,
    open_store,
)

logger = logging.getLogger(__name__)

SOURCE = "SOURCE.json"
CLAIM = "CLAIM.json"
_OWN = frozenset({STAGED, SOURCE, CLAIM})
_TAKEN = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "README.md", "LICENSE*")
"""Files of a model, at its top: weights, configurations, tokenizers, and what its licence asks to be kept with them."""
_LEFT = ("consolidated*", "trainer_state.json")
"""Of these, the weights once more in another layout, and what a training left."""
_COPIES = 2
"""Files on their way into the store at a time; so much disk is needed where they come from the hub."""
_HASHED = 4 * BLOCK


@dataclass(frozen=True)
class Staged:
    """A model in a store."""

    url: str
    """What to give to ``--model-name``."""
    files: Files
    new: bool
    """False where nothing was left to do."""


def run_stage(name: str, revision: str | None, output_dir: str) -> ExitCode:
    """Stage the model, and say by what name to train it."""
    staged = stage_model(name, revision, output_dir)
    size = sum(facts.size for facts in staged.files.values()) / 1e9
    what = "staged" if staged.new else "nothing to do, staged already:"
    print(f"{what} {len(staged.files)} files, {size:.2f} GB; train it with\n  --model-name {staged.url}")
    return ExitCode.DONE


def stage_model(
    name: str, revision: str | None, output_dir: str, *, poll_seconds: float = 2.0, claim_seconds: float = 120.0
) -> Staged:
    """Copy a model's files into ``output_dir``, unless they are there; one process does, others wait for it.

    Args:
        name: hub name or local folder.
        poll_seconds: between two looks at another process's copying.
        claim_seconds: after so long without a sign of life another process counts as dead.

    Raises:
        ConfigError: no such model, not one that can be trained, or another one is in the place.
        StorageError: network or server faults that lasted.
    """
    origin, slug = _origin(name, revision)
    store = open_store(f"{output_dir.rstrip('/') or '/'}/{slug}")
    _refuse_taken(store, origin)
    claim = Claim(store, CLAIM, claim_seconds)
    new = claim.take_unless(lambda: _whole(store) is not None, poll_seconds)
    if new:
        with claim.kept_alive():
            _stage(store, origin)
    record = _whole(store)
    if record is None:
        raise StorageError(f"{store.url} was staged, and files are gone from there again")
    return Staged(store.url, record.files, new)


def record_of_folder(folder: Path) -> Record:
    """What ``STAGED.json`` says of a model that is stored from a local folder, file by file as it is there."""
    record = _Folder(folder).record()
    files = {
        name: replace(facts, blocks=block_checksums(_chunks(folder / name))) if is_weights(name) else facts
        for name, facts in record.files.items()
    }
    return replace(record, files=files)


def _refuse_taken(store: Store, origin: _Origin) -> None:
    names = set(store.names())  # before the records, which are written before and after the files
    staged, began = read_record(store, STAGED), read_record(store, SOURCE)
    if staged and staged.origin != origin.name:
        what = staged.origin.get("hub", "the content of another folder, or of this one before it changed")
        raise ConfigError(f"{store.url} holds {what}: give another --output-dir, or delete it if nothing uses it")
    if names - _OWN and not staged and not began:
        raise ConfigError(f"{store.url} holds files that were not staged: give another --output-dir")


def _whole(store: Store) -> Record | None:
    """What is staged, if all of it is there."""
    record = read_record(store, STAGED)
    return record if record and not missing_files(store, record.files) else None


# --- where from -------------------------------------------------------------------------------------------------------


class _Origin(Protocol):
    """Where a model is staged from."""

    name: Mapping[str, Any]
    """What tells it from other models."""

    def record(self) -> Record:
        """Its files as they are now."""

    def get(self, file: str, commit: str | None, scratch: Path) -> Path:
        """The file on this disk; below ``scratch`` where it is a copy."""


def _origin(name: str, revision: str | None) -> tuple[_Origin, str]:
    """Where the model is, and the name of its place in the store."""
    name = resolve_name(name)
    if name in BUILTIN:
        raise ConfigError(f"--model-name {name} is built in: there is nothing to stage")
    if name.startswith("gs://"):
        raise ConfigError(f"--model-name {name} is in a bucket already: give a hub name or a local folder")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision:
            raise ConfigError(f"--model-revision {revision}: {name} is a folder, which has one: leave the option out")
        return _Folder(folder), folder.resolve().name
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"--model-name {name} is a path, and there is no such folder: give a folder or a hub name")
    return _Hub(name, revision), "@".join(part.replace("/", "--") for part in (name, revision) if part)


class _Folder:
    """A model in a local folder: its content is what tells it from others."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        paths = [path for path in sorted(folder.iterdir()) if path.is_file() and _is_taken(path.name)]
        self._files = {path.name: Facts(path.stat().st_size, crc32c(path)) for path in paths}
        self.name: Mapping[str, Any] = {"folder": {name: facts.crc32c for name, facts in self._files.items()}}
        _refuse_incomplete(str(folder), self._files)

    def record(self) -> Record:
        return Record(self.name, None, self._files)

    def get(self, file: str, commit: str | None, scratch: Path) -> Path:
        return self._folder / file


class _Hub:
    """A model on the hub; asked for only where something is to be copied."""

    def __init__(self, name: str, revision: str | None) -> None:
        self.name: Mapping[str, Any] = {"hub": name, "revision": revision}
        self._name, self._revision = name, revision

    def record(self) -> Record:
        try:
            info = HfApi().model_info(self._name, revision=self._revision, files_metadata=True)
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
            at = f" at revision {self._revision}" if self._revision else ""
            raise ConfigError(
                f"--model-name {self._name} was not found on the hub{at} (or is private, or its terms were not "
                "accepted): check the name, and log in with `hf auth login`"
            ) from error
        files = {
            sibling.rfilename: Facts(sibling.size or 0, sha256=sibling.lfs.sha256 if sibling.lfs else None)
            for sibling in info.siblings or []
            if _is_taken(sibling.rfilename)
        }
        _refuse_incomplete(self._name, files)
        return Record(self.name, info.sha, files)

    def get(self, file: str, commit: str | None, scratch: Path) -> Path:
        try:
            return Path(hf_hub_download(self._name, file, revision=commit, local_dir=scratch))
        except (RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise ConfigError(
                f"{file} of --model-name {self._name} at commit {commit} is no longer on the hub: give another "
                "--model-revision"
            ) from error


def _is_taken(name: str) -> bool:
    def among(patterns: tuple[str, ...]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    return "/" not in name and name not in _OWN and among(_TAKEN) and not among(_LEFT)


def _refuse_incomplete(where: str, files: Files) -> None:
    faults = []
    if "config.json" not in files:
        faults.append(f"--model-name {where} has no config.json: give a model in Hugging Face's layout")
    if not any(name.endswith(".safetensors") for name in files):
        faults.append(f"--model-name {where} has no weights in .safetensors files: convert them first")
    if faults:
        raise ConfigError(faults)


# --- into the store ---------------------------------------------------------------------------------------------------


def _stage(store: Store, origin: _Origin) -> None:
    """Copy what is not there yet, then say what is there."""
    source = _pin(store, origin)
    with TemporaryDirectory(prefix="numina-stage-") as folder:
        scratch, blocks = Path(folder), dict[str, str]()

        def copy(file: str) -> str:
            path = origin.get(file, source.commit, scratch)
            if is_weights(file):
                blocks[file] = block_checksums(_chunks(path))
            _store(store, file, source.files[file], path)
            if path.is_relative_to(scratch):
                path.unlink()
            return file

        # The small ones first: what is wrong with a model should show before hours of copying.
        order = sorted(missing_files(store, source.files), key=lambda file: source.files[file].size)
        for number, file in enumerate(in_order(copy, order, threads=_COPIES, ahead=_COPIES), 1):
            logger.info("%s: %d of %d, %.2f GB", file, number, len(order), source.files[file].size / 1e9)
    present = {entry.name: entry for entry in store.list()}
    for name, facts in source.files.items():
        if is_weights(name) and name not in blocks:  # copied by an earlier try, which may have come to its record
            blocks[name] = facts.blocks or block_checksums(_stored_chunks(store, present[name]))
    files = {
        name: replace(facts, crc32c=present[name].crc32c, blocks=blocks.get(name))
        for name, facts in source.files.items()
    }
    _refuse_lacking_shards(store, files)
    before = store.stat(STAGED)
    try:
        record = replace(source, files=files).to_json()
        store.write_json(STAGED, record, if_generation=before.generation if before else 0)
    except PreconditionFailed:  # by a process that took this one for dead; it copied the same files
        logger.info("%s was staged by another process", store.url)


def _pin(store: Store, origin: _Origin) -> Record:
    """The files to be staged: those with which the staging in this place began, whatever the hub has by now."""
    began = read_record(store, STAGED) or read_record(store, SOURCE)
    if began and began.origin == origin.name:
        return began
    source = origin.record()
    if began:  # another model, or another content, that was never staged whole
        for name in [*began.files, SOURCE]:
            store.delete(name)
    store.write_json(SOURCE, source.to_json(), if_generation=0)
    return source


def _store(store: Store, name: str, facts: Facts, path: Path) -> None:
    if facts.sha256 and (found := _sha256(path)) != facts.sha256:
        raise Damaged(f"{name} came with sha256 {found}, the hub records {facts.sha256}")
    present = store.stat(name)
    try:
        store.upload(path, name, if_generation=present.generation if present else 0)
    except PreconditionFailed:  # by a process that took this one for dead
        if missing_files(store, {name: facts}):
            raise


def _refuse_lacking_shards(store: Store, files: Files) -> None:
    for name in [name for name in files if name.endswith(".safetensors.index.json")]:
        lacking = sorted(set(json.loads(store.read(name))["weight_map"].values()) - set(files))
        if lacking:
            raise ConfigError(f"the model lacks {', '.join(lacking)}, which its {name} names: give a whole model")


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_HASHED):
            yield chunk


def _stored_chunks(store: Store, entry: Entry) -> Iterator[bytes]:
    """An object's bytes; Damaged is raised after the last where they do not have its checksum."""
    found = google_crc32c.Checksum()
    for start in range(0, entry.size, TRANSFER_CHUNK):
        end = min(start + TRANSFER_CHUNK, entry.size)
        chunk = store.read(entry.name, generation=entry.generation, start=start, end=end)
        found.update(chunk)
        yield chunk
    if bytes(found.digest()).hex() != entry.crc32c:
        raise Damaged(f"{store.address(entry.name)} did not come as it is stored")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    return digest.hexdigest()
