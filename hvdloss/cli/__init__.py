"""The command line: ``hvdloss install``, ``doctor``, ``check``, ``bench``, ``explain`` and others.

Subcommands are imported when they are asked for, so that ``hvdloss --help`` and
``hvdloss --version`` answer at once and no command pays for another's imports.

Exit statuses are the same for every subcommand: :class:`hvdloss.cli.errors.Exit`.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

from hvdloss._util.private import private_umask
from hvdloss._version import __version__

#: Subcommand -> (module, attribute, one line for ``--help`` so that it need not import them).
_COMMANDS = {
    "bench": ("hvdloss.cli.bench", "bench", "Measure steps and all-reduces beside their peers."),
    "check": ("hvdloss.cli.check", "check", "Tell whether a script trains like one process."),
    "doctor": ("hvdloss.cli.doctor", "doctor", "Say whether training can start, and what to do."),
    "explain": ("hvdloss.cli.explain", "explain", "Say what a trained model relies on, on all ranks."),
    "install": ("hvdloss.cli.install", "install", "Build and install Horovod for this Python."),
    "report": ("hvdloss.cli.report", "report", "Show a run by its record: a page, a picture, live."),
    "simulate": ("hvdloss.cli.simulate", "simulate", "Try a plan on ranks that are not there."),
}


class _LazyGroup(click.Group):
    """A click group that imports a subcommand's module on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name][2]) for name in sorted(_COMMANDS)])


@click.command(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hvdloss")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Exact losses for data-parallel training: install Horovod, check, measure, report."""
    # Files of commands reveal data. `install` writes into the environment, which others may share.
    if ctx.invoked_subcommand != "install":
        ctx.with_resource(private_umask())


def main(args: list[str] | None = None) -> Any:
    """Run the command line; `args` defaults to the process's own."""
    return cli.main(args=args, prog_name="hvdloss")
