"""Is a name on the Hugging Face Hub: asked once, with a short timeout.

The libraries retry for half a minute and more when the hub does not answer, which is the normal state of a compute
node. So whoever needs a hub name asks here first and fails, or turns to the local cache, within seconds.

    hub_files("openai-community/gpt2", "model")             # frozenset({"config.json", "model.safetensors", ...})
    pinned_commit("openai-community/gpt2", None)            # "607a30d783dfa663caf39e06633721c8d4cfcd7e"
    cached_model_folder("openai-community/gpt2", None)      # a folder, or None; never the network

Public names: ``HubUnreachableError``, ``hub_files``, ``pinned_commit``, ``cached_model_folder``, ``first_line``,
``TIMEOUT_SECONDS``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import huggingface_hub
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from experiments.errors import MissingResourceError, UsageError

TIMEOUT_SECONDS = 5.0


class HubUnreachableError(MissingResourceError):
    """The hub did not answer, or offline mode forbids to ask; a cached copy may still serve."""


def hub_files(name: str, kind: Literal["model", "dataset"], revision: str | None = None) -> frozenset[str]:
    """Ask the hub for the names of a repository's files, once, without retries.

    Args:
        name: ``name`` or ``owner/name``.
        kind: ``"model"`` or ``"dataset"``.
        revision: Branch, tag or commit; None for the main branch.

    Raises:
        UsageError: The name cannot be the name of a repository.
        MissingResourceError: There is no such repository or revision, or it may not be read.
        HubUnreachableError: No answer within ``TIMEOUT_SECONDS`` each to connect and to read, or offline mode.
    """
    api = huggingface_hub.HfApi()
    try:
        ask = api.model_info if kind == "model" else api.dataset_info
        information = ask(name, revision=revision, timeout=TIMEOUT_SECONDS)
    except HFValidationError as error:
        raise UsageError(f"got {name!r}, which cannot be the name of a {kind} on the hub: {error}") from error
    except GatedRepoError as error:
        raise MissingResourceError(f"{kind} {name!r} is gated on the hub; log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise MissingResourceError(f"the hub has no public {kind} {name!r}") from error
    except RevisionNotFoundError as error:
        raise MissingResourceError(f"{kind} {name!r} has no revision {revision!r} on the hub") from error
    except HfHubHTTPError as error:
        raise HubUnreachableError(f"the hub refused to answer ({first_line(error)})") from error
    except (HTTPError, OSError) as error:
        # which of the two depends on the HTTP library under huggingface_hub; offline mode is an OSError
        raise HubUnreachableError(f"the hub cannot be reached ({first_line(error)})") from error
    return frozenset(sibling.rfilename for sibling in information.siblings or ())


def pinned_commit(name: str, revision: str | None) -> str:
    """Fetch a model's ``config.json`` by the name of the revision and return the commit it came from.

    The cache remembers then which commit the revision names, which ``cached_model_folder`` needs without the network.

    Raises:
        MissingResourceError: The file cannot be fetched.
    """
    try:
        return Path(huggingface_hub.hf_hub_download(name, "config.json", revision=revision)).parent.name
    except (HTTPError, OSError) as error:
        raise MissingResourceError(f"config.json of {name!r} cannot be fetched ({first_line(error)})") from error


def cached_model_folder(name: str, revision: str | None) -> Path | None:
    """Return the folder of the cached snapshot of a hub model, named by its commit, or None if there is none."""
    try:
        config = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError as error:
        raise UsageError(f"got {name!r}, which cannot be the name of a model on the hub: {error}") from error
    return Path(config).parent if isinstance(config, str) else None


def first_line(error: BaseException) -> str:
    """Return the class of an error and the first line of its message, which for the libraries used here is enough."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
