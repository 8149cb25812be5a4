"""Make the server of one export."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from vlmexport.errors import BadInputError
from vlmexport.manifest import Artifact, open_artifact
from vlmexport.serve.compare import Original
from vlmexport.serve.engine import open_engine
from vlmexport.serve.limits import Limits
from vlmexport.serve.server import Server, Service

_ADDRESS_IN_USE = 98


def start_server(
    path: Path,
    address: tuple[str, int],
    *,
    compare: bool,
    model: str | None = None,
    allowed_hosts: tuple[str, ...] = (),
    waiting: int | None = None,
    threads: int = 0,
    trust_remote_code: bool = False,
) -> Server:
    """Open the export in `path` and listen on `address`; see `vlmexport.api.make_server`."""
    artifact = open_artifact(path, check_hashes=False)
    original = Original(artifact, model, trust_remote_code=trust_remote_code) if compare else None
    limits = Limits() if waiting is None else dataclasses.replace(Limits(), waiting=waiting)
    engine = open_engine(artifact, threads)
    service = Service(path.resolve().name, engine, facts(artifact), original, allowed_hosts, limits)
    try:
        return Server(address, service)
    except OSError as error:
        host, port = address
        reason = "something else listens there" if error.errno == _ADDRESS_IN_USE else error.strerror or str(error)
        raise BadInputError(f"cannot listen on {host}:{port}: {reason}; choose another --port or --host") from error


def facts(artifact: Artifact) -> dict[str, str]:
    """What the page says of the export: one line, `words`."""
    manifest = artifact.manifest
    size = sum(file.bytes for file in manifest.files.values()) / 1e6
    report = manifest.results.get("verify")
    gate = "the gate has not judged it" if report is None else f"gate: {report['status']}"
    source = Path(str(manifest.source.get("model", ""))).name
    return {"words": f"{source}, {manifest.layout} for {manifest.target}, {size:.1f} MB; {gate}"}
