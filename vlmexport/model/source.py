"""What a user may call a model: ``demo``, a folder, or a hub id; each becomes a local folder."""

from __future__ import annotations

import re
from pathlib import Path

from vlmexport.errors import BadInputError, NotPossibleHereError

DEMO = "demo"
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?:@(?P<revision>[\w./-]+))?")
# Data only. Pickle files are never fetched, Python files only when their code may run.
_DATA_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
_CODE_PATTERNS = ["*.py"]


def resolve_source(source: str, *, trust_remote_code: bool = False) -> Path:
    """The local folder of `source`; a hub id is downloaded into the Hugging Face cache.

    Raises `BadInputError` when there is no such folder or model, `NotPossibleHereError` when the hub cannot be reached.
    """
    if source == DEMO:
        from vlmexport.demo import model_dir

        return Path(model_dir())
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise BadInputError(f"{source} is a file; give the model's folder")
    match = _HUB_ID.fullmatch(source)
    if match is None or path.parent.is_dir():
        raise BadInputError(f"no such folder: {source} (a hub id looks like name/model, the bundled model is `{DEMO}`)")
    return _download(match["repo"], match["revision"], trust_remote_code=trust_remote_code)


def hub_id(source: str) -> str | None:
    """The hub's id of what a user typed, without its revision; None for a folder and for the bundled model."""
    path = Path(source).expanduser()
    match = _HUB_ID.fullmatch(source)
    return None if match is None or path.exists() or path.parent.is_dir() else match["repo"]


def _download(repo: str, revision: str | None, *, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = _DATA_PATTERNS + (_CODE_PATTERNS if trust_remote_code else [])
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise BadInputError(f"{repo} is gated on the hub: accept its terms there and run `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise BadInputError(f"{repo} has no revision {revision!r} on the hub") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BadInputError(f"no such folder, and no such model on the hub: {repo}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        raise NotPossibleHereError(
            f"no such folder: {repo}; as a hub id it is not in the cache, and the hub cannot be reached"
        ) from error
