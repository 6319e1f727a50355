"""Names on the hub and in folders, and what their absence means."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import errors as hub_errors
from huggingface_hub import try_to_load_from_cache
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, extract_commit_hash

from numina_finetune.config import ALIASES
from numina_finetune.errors import ConfigError
from numina_finetune.files import read_json, user_cache
from numina_finetune.models.builtin import BUILTIN
from numina_finetune.models.staged import open_staged

logger = logging.getLogger(__name__)

_CONFIRMED_ABSENT = (
    hub_errors.RepositoryNotFoundError,
    hub_errors.RevisionNotFoundError,
    hub_errors.RemoteEntryNotFoundError,
    hub_errors.HFValidationError,
)


def is_staged(name: str) -> bool:
    """Whether the name is that of a model in a bucket."""
    return name.startswith("gs://")


def alias_of(name: str) -> str:
    """The hub's own name for what the user typed, without a word."""
    return ALIASES.get(name, name)


def resolve_name(name: str) -> str:
    """The hub's own name for what the user typed; of a model staged in a bucket, the folder here with all but its
    weights.
    """
    if is_staged(name):
        return str(open_staged(name).download(user_cache() / "models"))
    resolved = alias_of(name)
    if resolved != name:
        logger.warning("%s is taken to mean %s", name, resolved)
    return resolved


def from_hub(auto: Any, name: str, option: str, *, trust: bool, **arguments: Any) -> Any:
    """``auto.from_pretrained``, with a confirmed absence as a ConfigError and a network fault left as it is.

    Args:
        option: that names it.
        trust: whether code that comes with it may be run.
    """
    return _asked_for(lambda: auto.from_pretrained(name, trust_remote_code=trust, **arguments), name, option)


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit that a model of the hub stands at; None of one that is built in, in a folder or in a bucket.

    Where the hub is not asked (``HF_HUB_OFFLINE``), it is that of this machine's copy.

    Raises:
        ConfigError: there is no such model, or no such revision of it.
    """
    if name in BUILTIN or is_staged(name) or Path(name).is_dir():
        return None
    name = alias_of(name)
    found = _asked_for(lambda: cached_file(name, CONFIG_NAME, revision=revision), name, "--model-name")
    commit: str | None = extract_commit_hash(found, None)
    return commit


def _asked_for(load: Callable[[], Any], name: str, option: str) -> Any:
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ConfigError(f"{option} {name} is a path, and there is no such folder: give a folder or a hub name")
    try:
        return load()
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"{option} {name} brings Python code of its own, and needs it: read that code, and add "
                "--trust-remote-code to have it run"
            ) from error
        if _is_confirmed_absence(error):
            raise ConfigError(f"{option} {name} was not found on the hub (or is private): check the name") from error
        if Path(name).is_dir():
            raise ConfigError(f"{option} {name} cannot be loaded from that folder: {error}") from error
        raise


def weights_at_hand(name: str, revision: str | None) -> bool:
    """Whether a model's safetensors need no download: they are in a folder, or whole in this machine's cache."""
    if Path(name).is_dir():
        return True

    def cached(file: str) -> str | None:
        found = try_to_load_from_cache(alias_of(name), file, revision=revision)
        return found if isinstance(found, str) else None

    if cached(SAFE_WEIGHTS_NAME):
        return True
    index = cached(SAFE_WEIGHTS_INDEX_NAME)
    return index is not None and all(map(cached, set(read_json(Path(index))["weight_map"].values())))


def _is_confirmed_absence(error: BaseException) -> bool:
    """Whether the hub answered that there is no such thing, anywhere in the chain of causes."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, _CONFIRMED_ABSENT):
        cause = cause.__cause__ or cause.__context__
    return cause is not None
