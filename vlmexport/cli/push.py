"""``vlmexport push``, and ``--push-to-hub`` of the commands that export."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from vlmexport import api
from vlmexport.cli.options import artifact_argument
from vlmexport.cli.session import Session, common_options
from vlmexport.cli.text import example
from vlmexport.errors import BadInputError
from vlmexport.hub import HubTarget

_PRIVATE = click.option("--private", is_flag=True, show_default="off", help="Make a new repository private.")


def push_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--push-to-hub`` to an exporting command: its folder ``out`` goes to the hub when nothing is red.

    The token and the repository's name are checked before any work.
    """

    @functools.wraps(function)
    def command(session: Session, **values: Any) -> Any:
        repo, private = values.pop("push_to_hub"), values.pop("private")
        if repo is None:
            if private:
                raise BadInputError("--private is for --push-to-hub REPO")
            return function(session, **values)
        if not values["verify"]:
            raise BadInputError("--push-to-hub needs the gate; without it, `vlmexport push DIR REPO --unverified`")
        target = HubTarget(repo, private)
        api.check_hub(target)
        outcome = function(session, **values)
        api.check_pushable(values["out"])
        _push(session, values["out"], target)
        return outcome

    option = click.option(
        "--push-to-hub", default=None, metavar="REPO", show_default="none",
        help="Put the finished export on the Hugging Face hub (owner/name), unless a check failed.",
    )  # fmt: skip
    return option(_PRIVATE(command))


def _push(session: Session, folder: Path, target: HubTarget) -> None:
    with session.progress() as progress, progress.stage("push to the hub"):
        address = api.push_to_hub(folder, target)
    session.console().print(f"Pushed to {address}", markup=False, soft_wrap=True)


@click.command(
    epilog=example("vlmexport push demo-int4 me/demo-int4"), short_help="Put a finished export on the Hugging Face hub."
)
@artifact_argument
@click.argument("repo", metavar="REPO")
@_PRIVATE
@click.option(
    "--unverified", is_flag=True, show_default="off", help="Push an export that the gate has not judged, or found red."
)
@common_options
def command(session: Session, artifact: Path, repo: str, private: bool, unverified: bool) -> None:
    """Upload the export in DIR to REPO (owner/name) on the Hugging Face hub, with its model card.

    The files must be those that were exported. Without --unverified only an export whose gate is green goes.
    """
    target = HubTarget(repo, private)
    api.check_pushable(artifact, unverified=unverified)
    api.check_hub(target)
    _push(session, artifact, target)
