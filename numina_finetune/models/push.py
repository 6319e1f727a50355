"""An exported model or adapter onto the hub, once it is whole in its own folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, errors, get_token
from huggingface_hub.utils._validators import validate_repo_id
from safetensors import safe_open

from numina_finetune.config import RunConfig
from numina_finetune.errors import ConfigError, PushFailed
from numina_finetune.models.export import finite

logger = logging.getLogger(__name__)

_REFUSALS = (401, 403)


@dataclass(frozen=True)
class PushOptions:
    """Whether, and where, an export goes onto the hub."""

    wanted: bool = False
    model_id: str | None = None
    """``user/name``, or ``name`` for the token's own user; None: the run's name."""
    private: bool = False
    """Whether a new repository is; one that exists stays what it is."""

    @staticmethod
    def of(config: RunConfig) -> PushOptions:
        """Those of a run."""
        return PushOptions(config.push_to_hub, config.hub_model_id, config.hub_private)

    def faults(self, run_id: str) -> list[str]:
        """What would stand in the way, as far as it can be seen beforehand; a hub that is silent now may answer then.

        Args:
            run_id: names the model where ``model_id`` does not.
        """
        if not self.wanted:
            return [
                f"{flag} is about a push to the hub, which is not asked for: add --push-to-hub"
                for flag, given in (("--hub-model-id", self.model_id is not None), ("--hub-private", self.private))
                if given
            ]
        faults, model_id = [], self.model_id or run_id
        if fault := _malformed(model_id):
            faults.append(f"--hub-model-id {model_id!r} cannot name a model: write it as name or user/name ({fault})")
        if constants.HF_HUB_OFFLINE:
            faults.append("--push-to-hub with HF_HUB_OFFLINE set: unset it, or leave the option out")
        elif not (token := get_token()):
            faults.append("--push-to-hub needs a token: sign in with `hf auth login`, or set HF_TOKEN")
        elif _is_refused(token):
            faults.append("--push-to-hub: the hub refuses this machine's token: sign in again with `hf auth login`")
        return faults


def push(folder: Path, model_id: str, *, private: bool, again: str) -> str:
    """Upload a model's folder, into a repository that is made where there is none.

    Args:
        model_id, private: as of :class:`PushOptions`.
        again: how the push can be made again, should it fail.

    Returns:
        The model's address.

    Raises:
        ConfigError: the hub refuses it.
        CheckpointError: the model has weights that are not finite.
        PushFailed: it could not be reached, or had a fault; the folder stays, and the push can be made again.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                finite(name, file.get_tensor(name))
    api = HfApi()
    try:
        made = api.create_repo(model_id, private=private or None, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=made.repo_id, commit_message="Upload a fine-tuned model")
    except errors.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in _REFUSALS:
            raise ConfigError(f"--push-to-hub: {model_id} may not be written to ({_line(error)}); {again}") from error
        raise PushFailed(f"the push to {model_id} failed ({_line(error)}); {again}") from error
    except (OSError, ValueError, RuntimeError, httpx2.HTTPError) as error:  # whatever it is, the export stays
        raise PushFailed(f"the push to {model_id} failed ({_line(error)}); {again}") from error
    logger.info("pushed %s to %s", folder, made)
    return str(made)


def _malformed(model_id: str) -> str | None:
    try:
        validate_repo_id(model_id)
    except errors.HFValidationError as error:
        return _line(error)
    return None


def _is_refused(token: str) -> bool:
    """Whether the hub says that the token is none."""
    try:
        HfApi().whoami(token=token)
    except errors.HfHubHTTPError as error:
        return error.response is not None and error.response.status_code in _REFUSALS
    except (OSError, ValueError, httpx2.HTTPError):
        logger.warning("the hub does not answer: whether it takes the token is seen at the push")
    return False


def _line(error: Exception) -> str:
    """What went wrong, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
