"""Write docs/cli.md from the commands' help and the README's table of families (`make docs`); tests compare them."""

from __future__ import annotations

from pathlib import Path

import click

from vlmexport.cli.main import COMMANDS, cli
from vlmexport.support import support_markdown, support_table

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "cli.md"
README = ROOT / "README.md"
START, END = "<!-- families -->\n", "<!-- /families -->"
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


def readme() -> str:
    """The README with the table of families as it is now."""
    before, rest = README.read_text(encoding="utf-8").split(START, 1)
    return f"{before}{START}{support_markdown(support_table())}{END}{rest.split(END, 1)[1]}"


def _section(command: click.Command, context: click.Context) -> str:
    text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    return f"## {context.command_path}\n\n```text\n{text}\n```\n"


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")
