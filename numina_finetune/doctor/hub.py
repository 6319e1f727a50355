"""Whether the hub can be reached, who this machine is to it, and whether it gives the model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, errors, get_token, try_to_load_from_cache

from numina_finetune.config import RunConfig
from numina_finetune.doctor.findings import Finding, fault, note, ok
from numina_finetune.models.builtin import BUILTIN
from numina_finetune.models.hub import alias_of, is_staged

PATIENCE = 10.0
"""Seconds for an answer."""


def check_hub(config: RunConfig) -> Iterator[Finding]:
    """The token, and the model by its name where that is one of the hub's."""
    name = alias_of(config.model_name)
    local = not name or name in BUILTIN or is_staged(name) or Path(name).is_dir()
    if constants.HF_HUB_OFFLINE:
        yield from _offline(name, local)
        return
    token = get_token()
    try:
        if token:
            yield ok("hub", f"signed in as {HfApi().whoami(token=token)['name']}")
        else:
            yield note(
                "hub", "no token: public models and datasets only", "hf auth login, or HF_TOKEN in the environment"
            )
        if not local:
            found = HfApi().model_info(name, revision=config.model_revision, timeout=PATIENCE)
            yield ok("model", f"{name} is on the hub at {(found.sha or 'an unknown commit')[:12]}")
    except errors.GatedRepoError:
        yield fault("model", f"{name} is gated, and this account has no access", f"ask for it on the page of {name}")
    except errors.RepositoryNotFoundError:
        yield fault(
            "model",
            f"--model-name {name} is not on the hub, or is private",
            "check the name, or sign in: hf auth login",
        )
    except errors.RevisionNotFoundError:
        yield fault("model", f"{name} has no revision {config.model_revision}", "check --model-revision")
    except errors.HfHubHTTPError as error:
        yield fault("hub", f"it refuses the token ({error.response.status_code})", "sign in again: hf auth login")
    except (OSError, httpx2.HTTPError) as error:
        remedy = "see the network and HTTPS_PROXY; models from folders and buckets need no hub"
        found_here = not local and _cached(name)
        told = f"it cannot be reached ({type(error).__name__})"
        yield note("hub", told, remedy) if local or found_here else fault("hub", told, remedy)
        if found_here:
            yield ok("model", f"{name} is in the cache of this machine")


def _offline(name: str, local: bool) -> Iterator[Finding]:
    if local or _cached(name):
        yield ok("hub", "not asked (HF_HUB_OFFLINE)")
    else:
        yield fault(
            "hub",
            f"HF_HUB_OFFLINE is set, and {name} is not in {constants.HF_HUB_CACHE}",
            "unset it, or download first",
        )


def _cached(name: str) -> bool:
    return isinstance(try_to_load_from_cache(name, "config.json"), str | os.PathLike)
