"""Write docs/cli.md from the commands' own help (`make docs`); a test compares the two."""

from __future__ import annotations

from pathlib import Path

import click

from vlmexport.cli.main import COMMANDS, cli

TARGET = Path(__file__).parent.parent / "docs" / "cli.md"
WIDTH = 100
HEAD = """\
# Command line

Written by `make docs` from the commands' own help; do not edit. What `--json` writes: [json.md](json.md).
"""


def reference() -> str:
    """The whole page."""
    root = click.Context(cli, info_name="vlmexport", terminal_width=WIDTH, help_option_names=["-h", "--help"])
    sections = [HEAD, _section(cli, root)]
    for name in COMMANDS:
        command = cli.get_command(root, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=root, terminal_width=WIDTH)
        sections.append(_section(command, context))
        if isinstance(command, click.Group):
            for child_name, child in command.commands.items():
                sections.append(
                    _section(child, click.Context(child, info_name=child_name, parent=context, terminal_width=WIDTH))
                )
    return "\n".join(sections)


def _section(command: click.Command, context: click.Context) -> str:
    text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    return f"## {context.command_path}\n\n```text\n{text}\n```\n"


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
