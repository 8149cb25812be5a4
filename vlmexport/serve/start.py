"""Make the server of one export."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from vlmexport.manifest import open_artifact
from vlmexport.runtime.text_only import require_text
from vlmexport.serve.compare import Original
from vlmexport.serve.engine import open_engine
from vlmexport.serve.facts import facts
from vlmexport.serve.hosts import listening
from vlmexport.serve.limits import Limits
from vlmexport.serve.server import Server, Service

# Beside those that wait: pages, refusals, clients that still send.
_MORE_CONNECTIONS = 128


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
    require_text(artifact)
    limits = (
        Limits()
        if waiting is None
        else dataclasses.replace(Limits(), waiting=waiting, connections=waiting + _MORE_CONNECTIONS)
    )
    original = Original(artifact, model, limits, trust_remote_code=trust_remote_code) if compare else None
    engine = open_engine(artifact, limits, threads, trust_remote_code=trust_remote_code)
    service = Service(path.resolve().name, engine, facts(artifact), original, allowed_hosts, limits)
    return listening(lambda: Server(address, service), *address, "--port or --host")
