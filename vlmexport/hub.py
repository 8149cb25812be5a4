"""Put a finished export on the Hugging Face hub, by `huggingface_hub` and nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmexport.errors import ArtifactError, BadInputError, NotPossibleHereError, VlmExportError

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class HubTarget:
    """Where an export goes: a repository id (``owner/name``), and whether a new one is private."""

    repo: str
    private: bool = False


def check_target(target: HubTarget, api: HfApi | None = None) -> str:
    """Say before any work whether `target` can be pushed to; the name of the account that pushes.

    Raises `BadInputError` for an id that the hub does not take or without a token, `NotPossibleHereError` where the hub
    cannot be reached.
    """
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError  # type: ignore[attr-defined]
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(target.repo)
    except HFValidationError as error:
        raise BadInputError(f"--push-to-hub {target.repo!r} is no repository id; give owner/name") from error
    if target.repo.count("/") != 1:
        raise BadInputError(f"--push-to-hub {target.repo!r} has no owner; give owner/name")
    try:
        account = _api(api).whoami()
    except LocalTokenNotFoundError as error:
        raise BadInputError("--push-to-hub needs a token of the hub: `hf auth login`, or HF_TOKEN") from error
    except (HTTPError, OSError) as error:
        raise _explained(error, target) from error
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise BadInputError("the token of the hub may only read; make one that may write")
    owner, names = target.repo.split("/")[0], [account["name"], *(org["name"] for org in account.get("orgs", ()))]
    if owner not in names:
        raise BadInputError(f"--push-to-hub {target.repo}: you are {account['name']}, and {owner} is none of {names}")
    return str(account["name"])


def push_folder(folder: Path, target: HubTarget, api: HfApi | None = None) -> str:
    """Upload the files of the export in `folder` as one commit, making the repository where there is none; its address.

    Only what the manifest lists goes, with the manifest, in which every path of this machine is its last name alone.
    Files of an earlier export that the repository's own manifest lists and this one has not are deleted; no others.
    Raises as `check_target`; nothing on this machine changes.
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    hub = _api(api)
    added = _operations(folder)
    try:
        hub.create_repo(target.repo, private=target.private, exist_ok=True)
        gone = _left_over(hub, target.repo, manifest_name(folder), {operation.path_in_repo for operation in added})
        commit = hub.create_commit(
            repo_id=target.repo,
            operations=[*added, *gone],
            commit_message=f"Export by vlmexport: {folder.name}",
        )
    except (HTTPError, OSError) as error:
        raise _explained(error, target) from error
    return str(getattr(commit, "commit_url", "") or f"https://huggingface.co/{target.repo}")


def _operations(folder: Path) -> list[Any]:
    """The files to add; every name is below `folder`."""
    from huggingface_hub import CommitOperationAdd

    from vlmexport.local_paths import without_local_paths
    from vlmexport.manifest import safe_join
    from vlmexport.model.source import hub_id

    name = manifest_name(folder)
    data = json.loads((folder / name).read_text(encoding="utf-8"))
    files = {file: safe_join(folder, file) for file in data["files"]}
    source, report = data.get("source", {}), data.get("results", {}).get("verify") or {}
    for owner, key in ((source, "model"), (report.get("runtime", {}), "reference"), (source.get("lora") or {}, "path")):
        if key in owner and hub_id(str(owner[key])) is None:
            owner[key] = Path(str(owner[key])).name
    added = [CommitOperationAdd(path_in_repo=file, path_or_fileobj=path) for file, path in files.items()]
    body = (json.dumps(without_local_paths(data), indent=1, sort_keys=True) + "\n").encode()
    return [*added, CommitOperationAdd(path_in_repo=name, path_or_fileobj=body)]


def _left_over(hub: Any, repo: str, name: str, new: set[str]) -> list[Any]:
    """Deletions of the files in `repo` that its manifest `name` lists, if it is ours, and that are not among `new`.

    A checkpoint beside an export has a manifest of another name: it stays.
    """
    from huggingface_hub import CommitOperationDelete

    there = set(hub.list_repo_files(repo))
    if name not in there:
        return []
    try:
        data = json.loads(Path(hub.hf_hub_download(repo, name)).read_text(encoding="utf-8"))
    except ValueError:  # somebody else's file of that name
        return []
    ours = isinstance(data, dict) and "vlmexport" in data.get("created_by", {}) and isinstance(data.get("files"), dict)
    old = set(data["files"]) if ours else set()
    return [CommitOperationDelete(path_in_repo=file) for file in sorted((old & there) - new)]


def manifest_name(folder: Path) -> str:
    """The file that says what the export or the checkpoint in `folder` is."""
    from vlmexport.checkpoint_manifest import CHECKPOINT_MANIFEST_NAME
    from vlmexport.manifest import MANIFEST_NAME

    return CHECKPOINT_MANIFEST_NAME if (folder / CHECKPOINT_MANIFEST_NAME).is_file() else MANIFEST_NAME


def recorded_status(folder: Path) -> str | None:
    """What the gate said when the export (or the quantized checkpoint) in `folder` was made; None where it did not run.

    Raises `ArtifactError` for a folder that is neither, or whose files were changed since.
    """
    from vlmexport.checkpoint_manifest import CHECKPOINT_MANIFEST_NAME, open_checkpoint
    from vlmexport.manifest import file_sha256, open_artifact, safe_join

    if (folder / CHECKPOINT_MANIFEST_NAME).is_file():
        checkpoint = open_checkpoint(folder)
        for name, record in checkpoint.files.items():
            file = safe_join(folder, name)
            if not file.is_file() or file_sha256(file) != record.sha256:
                raise ArtifactError(f"{folder}: {name} is missing or was changed after it was written")
        report = checkpoint.results.get("verify")
    else:
        report = open_artifact(folder).manifest.results.get("verify")
    return None if report is None else str(report["status"])


def _api(api: HfApi | None) -> Any:
    if api is not None:
        return api
    from huggingface_hub import HfApi

    return HfApi()


def _explained(error: Exception, target: HubTarget) -> VlmExportError:
    """The hub's or the network's own message as one line of ours."""
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return BadInputError(f"the hub refuses {target.repo} ({status}): {first}; does the token have write access?")
    if status is not None:
        return NotPossibleHereError(f"the hub did not take {target.repo} ({status}): {first}")
    return NotPossibleHereError(f"the hub cannot be reached: {first}")
