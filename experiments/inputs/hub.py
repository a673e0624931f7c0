"""Ask the Hugging Face Hub about a name: once, with a short timeout.

The libraries retry for half a minute or more when the hub does not answer, which is normal on a compute node. So code
that needs a hub name asks here first; it fails, or uses the local cache, within seconds.

    hub_files("openai-community/gpt2", "model")             # frozenset({"config.json", "model.safetensors", ...})
    pinned_commit("openai-community/gpt2", None)            # "607a30d783dfa663caf39e06633721c8d4cfcd7e"
    cached_model_folder("openai-community/gpt2", None)      # a folder, or None; never the network
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
    """The hub did not answer, or offline mode forbids asking it; a cached copy may still exist."""


def hub_files(name: str, kind: Literal["model", "dataset"], revision: str | None = None) -> frozenset[str]:
    """Ask the hub for the names of a repository's files, once, without retries.

    Args:
        name: ``name`` or ``owner/name``.
        kind: ``"model"`` or ``"dataset"``.
        revision: Branch, tag or commit; None for the main branch.

    Raises:
        UsageError: No repository can have this name.
        MissingResourceError: The repository or revision does not exist, or reading it is not allowed.
        HubUnreachableError: Connecting or reading took more than ``TIMEOUT_SECONDS``, or offline mode is on.
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
    """Fetch a model's ``config.json`` by the name of the revision; return its commit.

    The cache then remembers the commit of the revision, and ``cached_model_folder`` needs no network to find it.

    Raises:
        MissingResourceError: The file cannot be fetched.
    """
    try:
        return Path(huggingface_hub.hf_hub_download(name, "config.json", revision=revision)).parent.name
    except (HTTPError, OSError) as error:
        raise MissingResourceError(f"config.json of {name!r} cannot be fetched ({first_line(error)})") from error


def cached_model_folder(name: str, revision: str | None) -> Path | None:
    """Return the folder of a hub model's cached snapshot (its name is the commit), or None without a snapshot."""
    try:
        config = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError as error:
        raise UsageError(f"got {name!r}, which cannot be the name of a model on the hub: {error}") from error
    return Path(config).parent if isinstance(config, str) else None


def first_line(error: BaseException) -> str:
    """Return the class of an error and the first line of its message: enough for the libraries used here."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
