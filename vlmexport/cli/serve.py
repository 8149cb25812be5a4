"""``vlmexport serve``."""

from __future__ import annotations

from pathlib import Path

import click

from vlmexport import api
from vlmexport.cli.options import artifact_argument, reference_option, trust_option
from vlmexport.cli.session import Session, common_options, serve_until_interrupted
from vlmexport.cli.text import example


@click.command(
    epilog=example("vlmexport serve demo-int4", "vlmexport serve gg --port 9000 --no-compare"),
    short_help="Try an export: a local page, and an OpenAI-compatible server.",
)
@artifact_argument
@click.option("--host", default="127.0.0.1", show_default=True, metavar="NAME", help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0 takes a free one."
)
@click.option(
    "--compare/--no-compare", default=None, show_default="on, unless other machines can reach the server",
    help="Let the page ask the original in PyTorch, too (loaded when it is first asked).",
)  # fmt: skip
@reference_option
@click.option(
    "--allow-host", "allowed", multiple=True, metavar="HOST", show_default="none",
    help="Host that pictures may be fetched from by https (repeatable); others come as data URLs.",
)  # fmt: skip
@click.option(
    "--waiting",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Requests that may wait for their turn.",
)
@click.option("--threads", type=click.IntRange(min=0), default=0, show_default="all", help="Threads of the runtime.")
@trust_option
@common_options
def command(
    session: Session,
    artifact: Path,
    host: str,
    port: int,
    compare: bool | None,
    model: str | None,
    allowed: tuple[str, ...],
    waiting: int,
    threads: int,
    trust_remote_code: bool,
) -> None:
    """Serve the export in DIR on this machine, for trying it: a page for people, /v1/chat/completions for programs.

    One answer is made at a time, others wait for their turn. It is no server for production; the line that it prints
    starts one. Ctrl-C ends it.
    """
    from vlmexport.serve.hosts import LOCAL_NAMES

    with session.progress() as progress, progress.stage("open the export"):
        server = api.make_server(
            artifact,
            host=host,
            port=port,
            compare=host in LOCAL_NAMES if compare is None else compare,
            model=model,
            allowed_hosts=allowed,
            waiting=waiting,
            threads=threads,
            trust_remote_code=trust_remote_code,
        )
    address = f"http://{host if ':' not in host else f'[{host}]'}:{server.server_port}"
    session.write_json({"address": address, "openai_base_url": f"{address}/v1", "model": server.service.name})
    console = session.console()
    for line in [f"page:   {address}/", f"OpenAI: {address}/v1 (any key)", *api.production_lines(artifact)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not server.local:
        console.print("[yellow]note:[/] other machines can reach this server; it has no password", soft_wrap=True)
    serve_until_interrupted(server)
