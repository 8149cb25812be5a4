"""The typed functions behind ``push``, ``serve`` and ``web``; `vlmexport.api` has them, too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmexport.errors import BadInputError

if TYPE_CHECKING:
    from vlmexport.hub import HubTarget
    from vlmexport.serve.server import Server
    from vlmexport.web.server import SiteServer
    from vlmexport.web.site import Site


def check_hub(target: HubTarget) -> str:
    """Say before any work whether `target` can be pushed to; the account's name. See `vlmexport.hub.check_target`."""
    from vlmexport.hub import check_target

    return check_target(target)


def push_to_hub(path: Path, target: HubTarget) -> str:
    """Upload the export in `path` to the hub; the commit's address. See `vlmexport.hub.push_folder`."""
    from vlmexport.hub import push_folder

    return push_folder(path, target)


def check_pushable(path: Path, *, unverified: bool = False) -> None:
    """Raise `BadInputError` unless `path` is an export with the files that it was made with.

    Without `unverified` its gate must have run and be green; a quantized checkpoint counts as an export.
    """
    from vlmexport.hub import recorded_status

    status = recorded_status(path)
    if status == "passed" or unverified:
        return
    told = {None: "has not been judged (`--no-verify`)", "failed": "is red"}.get(status, f"says {status!r}")
    raise BadInputError(f"{path}: the gate {told}; export again with the gate, or push with --unverified")


def make_server(
    path: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    compare: bool = True,
    model: str | None = None,
    allowed_hosts: Sequence[str] = (),
    waiting: int | None = None,
    threads: int = 0,
    trust_remote_code: bool = False,
) -> Server:
    """The server of ``vlmexport serve`` for the export in `path`, listening; call its ``serve_forever``.

    `compare` offers the original (`model`, or what it was made from) beside it. Raises `ArtifactError` for a folder
    that is no export, `BadInputError` for an address that cannot be listened on.
    """
    from vlmexport.serve.start import start_server

    return start_server(
        path,
        (host, port),
        compare=compare,
        model=model,
        allowed_hosts=tuple(allowed_hosts),
        waiting=waiting,
        threads=threads,
        trust_remote_code=trust_remote_code,
    )


def production_lines(path: Path) -> list[str]:
    """What to serve the export in `path` with for production."""
    from vlmexport.manifest import open_artifact
    from vlmexport.serve.production import production_lines as lines

    return lines(open_artifact(path, check_hashes=False))


def make_site(path: Path, *, transformersjs: Path | None = None, cdn: str | None = None) -> Site:
    """The page that runs the export in `path` in a browser, with all its files.

    `transformersjs` is the folder of the npm package (None: looked for in ``node_modules``), `cdn` a mirror of npm
    packages to load it from instead. Raises `BadInputError` for an export of another layout, `NotPossibleHereError`
    when transformers.js is not on this machine.
    """
    from vlmexport.web.library import find_library, mirror
    from vlmexport.web.site import make_site as make
    from vlmexport.web.site import open_web_export

    if cdn is not None and transformersjs is not None:
        raise BadInputError("--cdn and --transformersjs exclude each other")
    artifact = open_web_export(path)
    return make(artifact, find_library(transformersjs) if cdn is None else mirror(cdn))


def write_site(site: Site, out: Path, *, force: bool = False) -> None:
    """Write `site` into the folder `out` for any static host; `BadInputError` when it exists and `force` is False."""
    from vlmexport.web.site import write_site as write

    write(site, out, force=force)


def make_site_server(site: Site, *, port: int = 8000) -> SiteServer:
    """A server of `site` on 127.0.0.1, listening; call its ``serve_forever``. `port` 0 takes a free one."""
    from vlmexport.web.server import start_server

    return start_server(site, port)
