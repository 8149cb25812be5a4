"""Entry point: the command group, and how every error becomes one line and an exit code."""

from __future__ import annotations

import importlib
import logging
import sys
import traceback
from collections.abc import Sequence

import click
from click.exceptions import NoArgsIsHelpError

import vlmexport
from vlmexport.cli.failures import describe_failure
from vlmexport.cli.session import Session
from vlmexport.errors import VlmExportError

COMMANDS = (
    "inspect", "plan", "sensitivity", "onnx", "trt", "gguf", "lora", "quantize", "verify", "bench", "run", "demo",
    "serve", "web", "push", "families", "doctor",
)  # fmt: skip

# transformers imports torchao where it is installed, which then warns of CUDA libraries that it does not find.
_CHATTY = ("torchao", "torch.utils._pytree")

EPILOG = """\b
Example:
  vlmexport demo
  vlmexport onnx --model HuggingFaceTB/SmolVLM-256M-Instruct --out smolvlm-int4
  vlmexport run smolvlm-int4 --image photo.png --prompt "What is in the picture?"

\b
Exit codes: 0 ok, 1 internal error, 2 bad input or usage, 3 a gate failed, 4 not possible on this machine.
"""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for: ``vlmexport.cli.NAME`` holds ``command``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of a first session with the tool."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command; None when there is no such command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"vlmexport.cli.{cmd_name}").command
        return command


@click.group(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(vlmexport.__version__, prog_name="vlmexport")
def cli() -> None:
    """Export a vision-language model to quantized graphs that are proved equal to it, part by part."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments` (default: the process's own) and return the exit code."""
    session = Session()
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        outcome = cli.main(
            args=None if arguments is None else list(arguments),
            prog_name="vlmexport",
            standalone_mode=False,
            obj=session,
        )
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 1)
    except NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.UsageError as error:
        hint = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
        return _fail(error.format_message() + hint, 2)
    except click.ClickException as error:
        return _fail(error.format_message(), 2)
    except VlmExportError as error:
        return _fail(str(error), error.exit_code)
    # The border of the process: whatever is left is our bug or the machine's trouble, and becomes one line.
    except Exception as error:
        if session.verbose:
            traceback.print_exc()
        message, exit_code = describe_failure(error)
        return _fail(message, exit_code)
    return outcome if isinstance(outcome, int) else 0


def main() -> None:
    """The ``vlmexport`` console script."""
    sys.exit(run())


def _fail(message: str, exit_code: int) -> int:
    click.echo("error: " + " ".join(message.split()), err=True)
    return exit_code
