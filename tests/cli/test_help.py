"""Help is a promise: every option with its default, every command with an example that parses."""

import shlex

import click
import pytest

from vlmexport.cli.main import COMMANDS, cli

COMMON = {"--verbose", "--quiet", "--json"}


def all_commands() -> dict[str, click.Command]:
    context = click.Context(cli)
    found: dict[str, click.Command] = {}
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        found[name] = command
        if isinstance(command, click.Group):
            found.update({f"{name} {sub}": c for sub, c in command.commands.items()})
    return found


LEAVES = {name: c for name, c in all_commands().items() if not isinstance(c, click.Group)}


def options(command: click.Command) -> list[click.Option]:
    return [p for p in command.params if isinstance(p, click.Option)]


@pytest.mark.parametrize("name", LEAVES)
def test_every_option_has_help_and_shows_its_default(name: str) -> None:
    context = click.Context(LEAVES[name], info_name=name)
    for option in options(LEAVES[name]):
        record = option.get_help_record(context)
        assert record is not None
        assert option.help, option.name
        assert "[default: " in record[1] or "[required]" in record[1], record


@pytest.mark.parametrize("name", LEAVES)
def test_every_command_takes_the_common_options(name: str) -> None:
    assert {o for option in options(LEAVES[name]) for o in option.opts} >= COMMON


@pytest.mark.parametrize("name", all_commands())
def test_every_example_parses(name: str) -> None:
    epilog = all_commands()[name].epilog or ""
    examples = [line.strip() for line in epilog.splitlines() if line.strip().startswith("vlmexport ")]
    assert examples, name
    for example in examples:
        words = shlex.split(example)[1:]
        leaf = " ".join(words[:2]) if words[0] == "plan" else words[0]
        # click caches a command's help option with the names of the first context that asks for it.
        try:
            LEAVES[leaf].make_context(leaf, words[len(leaf.split()) :], help_option_names=["-h", "--help"]).close()
        except click.exceptions.Exit as done:  # `trt --gpu list` prints and ends
            assert done.exit_code == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_the_summary_in_the_list_is_whole(name: str) -> None:
    assert not all_commands()[name].get_short_help_str(limit=90).endswith("...")
