"""``vlmexport web``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vlmexport import api
from vlmexport.cli.options import FOLDER, artifact_argument
from vlmexport.cli.session import Session, common_options, serve_until_interrupted
from vlmexport.cli.text import example
from vlmexport.errors import BadInputError

if TYPE_CHECKING:
    from vlmexport.web.site import Site


@click.command(
    epilog=example("vlmexport web demo-web", "vlmexport web demo-web --out site"),
    short_help="Run an export in the browser: a page that answers by itself.",
)
@artifact_argument
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0 takes a free one."
)
@click.option(
    "--out", type=FOLDER, default=None, metavar="SITE", show_default="none",
    help="Write the page and the model into the folder SITE, for any static host, instead of serving them.",
)  # fmt: skip
@click.option("--force", is_flag=True, show_default="off", help="Replace SITE if it exists.")
@click.option(
    "--transformersjs", type=FOLDER, default=None, metavar="FOLDER",
    show_default="the one of a node_modules here or above, or of the cache",
    help="Folder of the npm package @huggingface/transformers.",
)  # fmt: skip
@click.option(
    "--cdn", default=None, metavar="URL", show_default="none: nothing is fetched",
    help="Mirror of npm packages that the page loads transformers.js from (https://cdn.jsdelivr.net/npm).",
)  # fmt: skip
@common_options
def command(
    session: Session,
    artifact: Path,
    port: int,
    out: Path | None,
    force: bool,
    transformersjs: Path | None,
    cdn: str | None,
) -> None:
    """Serve a page on this machine that runs the export in DIR (--layout transformersjs) in the browser.

    The page loads transformers.js and the model from local files, and answers with WebAssembly, or WebGPU where the
    browser has it. Ctrl-C ends the server. With --out the same is written as a folder of static files.
    """
    if force and out is None:
        raise BadInputError("--force has no effect without --out")
    site = api.make_site(artifact, transformersjs=transformersjs, cdn=cdn)
    if out is not None:
        _write(session, site, out, force)
        return
    server = api.make_site_server(site, port=port)
    session.write_json({"address": server.address})
    session.console().print(f"page: {server.address}", markup=False, highlight=False, soft_wrap=True)
    serve_until_interrupted(server)


def _write(session: Session, site: Site, out: Path, force: bool) -> None:
    api.write_site(site, out, force=force)
    session.write_json({"out": str(out)})
    words = f"Wrote {out}: put it on any static host; `python -m http.server -d {out}` shows it here."
    session.console().print(words, markup=False, highlight=False, soft_wrap=True)
