"""``hvdloss check``: whether a script's loss and gradient are those of one process, and if not, why."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from hvdloss._util.private import make_folder
from hvdloss.check.evidence import read
from hvdloss.check.text import as_dict, report
from hvdloss.check.verdict import Verdict, judge, overall
from hvdloss.cli import machine
from hvdloss.cli.errors import Exit, Interrupted
from hvdloss.cli.process import Log, interruptible
from hvdloss.cli.progress import launched, waiting

_STATUS = {Verdict.EXACT: 0, Verdict.OFF: 1, Verdict.UNKNOWN: 2}
_LAUNCHERS = ("torchrun", "horovodrun")


def _imports(script: Path) -> set[str]:
    """Return the top-level names that a script imports, as far as its text shows."""
    text = script.read_text(encoding="utf-8", errors="replace")
    return set(re.findall(r"^\s*(?:from|import)\s+(\w+(?:\.torch\.distributed|\.distributed)?)", text, re.M))


def _launcher(imported: set[str]) -> str:
    """Return by what a script is launched, by what it imports.

    >>> _launcher({"torch", "horovod"}), _launcher({"torch", "hvdloss"}), _launcher({"torch"})
    ('horovodrun', 'torchrun', 'torchrun')
    """
    return "horovodrun" if "horovod" in imported else "torchrun"


def _command(launcher: str, ranks: int) -> list[str]:
    """Return the command that starts Python on so many ranks of this host."""
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    program = machine.script_path("horovodrun")
    if program is None:
        click.echo("horovodrun is neither beside this Python nor on PATH. Way out: hvdloss install", err=True)
        raise SystemExit(Exit.MISSING)
    return [program, "-np", str(ranks), sys.executable]


def _environment(ranks: int) -> dict[str, str]:
    """Return the environment of ranks: loss functions inside compiled code would not be seen."""
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    return {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONUNBUFFERED": "1", "TORCHDYNAMO_DISABLE": "1"}


def _failure(lines: Sequence[str]) -> str:
    """Return the first traceback of the ranks' output, or the end of it if there is none.

    >>> print(_failure(["[rank0]: Traceback (most recent call last):", "[rank0]:   File ...", "[rank1]: x",
    ...     "[rank0]: ValueError: no", "launcher: failed"]))
    Traceback (most recent call last):
      File ...
    ValueError: no
    """
    start = next((i for i, line in enumerate(lines) if "Traceback (most recent call last)" in line), None)
    if start is None:
        return "\n".join([line for line in lines if line.strip()][-20:])
    rank = lines[start].partition("Traceback")[0]
    shown: list[str] = []
    for line in lines[start:]:
        if line.startswith(rank):
            shown.append(line[len(rank) :])
            if len(shown) > 1 and not shown[-1].startswith(" "):
                break
    return "\n".join([shown[0], *shown[1:][-12:]])


@click.command(
    context_settings={
        "help_option_names": ["-h", "--help"],
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,  # what follows the script is the script's
    }
)
@click.argument("script", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("-np", "--ranks", type=click.IntRange(1), default=2, show_default=True, help="Ranks to start.")
@click.option("--steps", type=click.IntRange(1), default=3, show_default=True, help="Steps to look at.")
@click.option(
    "--launcher",
    type=click.Choice(_LAUNCHERS),
    help="[horovodrun if the script imports horovod, or torchrun]",
)
@click.option(
    "--timeout", type=click.FloatRange(1), default=600, show_default=True, help="Seconds for all of it."
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON instead of text.")
@click.pass_context
def check(
    ctx: click.Context,
    /,
    script: Path,
    arguments: Sequence[str],
    ranks: int,
    steps: int,
    launcher: str | None,
    timeout: float,
    as_json: bool,
) -> None:
    """Tell whether a PyTorch script trains like one process that sees all samples.

    Runs SCRIPT, unchanged, with its ARGUMENTS on -np ranks of this host until it has taken --steps steps, and
    compares each step's gradient with that of the mean over the samples of all ranks. Options of this command
    come before SCRIPT. See docs/howto/check.md for what is run and what cannot be told.

    Exit status: 0 exact; 1 not exact; 2 could not tell, or the command line is wrong; 3 something is not
    installed; 7 the script failed.
    """
    if launched():
        raise click.UsageError("a launcher started this process; hvdloss check starts the ranks itself (-np)")
    imported = _imports(script)
    if imported & {"keras", "tensorflow"} and "torch" not in imported:
        click.echo(
            "COULD NOT TELL: only PyTorch is covered, not Keras and TensorFlow. What averaging "
            "makes of their steps, a record says: docs/howto/report.md",
            err=True,
        )
        ctx.exit(_STATUS[Verdict.UNKNOWN])
    if importlib.util.find_spec("torch") is None:
        click.echo("PyTorch is not installed. Way out: pip install torch", err=True)
        ctx.exit(Exit.MISSING)
    command = _command(launcher or _launcher(imported), ranks)
    with tempfile.TemporaryDirectory(prefix="hvdloss-check-") as kept:
        folder = make_folder(Path(kept) / "steps")
        run = ["-m", "hvdloss.torch.check", str(folder), str(steps), str(script), *arguments]
        log = Log(Path(kept) / "log")
        try:
            with interruptible(), waiting(f"{script.name} on {ranks} ranks"):
                ended = log.run([*command, *run], env=_environment(ranks), timeout=timeout)
        except Interrupted as stop:
            click.echo(f"Stopped by {stop}.", err=True)
            ctx.exit(stop.status)
        finally:
            log.close()
        seen = read(folder, ranks)
    if ended.status and len(seen) < steps:
        why = f"did not end in {timeout:.0f} s" if ended.timed_out else f"ended with status {ended.status}"
        click.echo(f"{_failure(ended.tail)}\n{script} {why}, after {len(seen)} steps.", err=True)
        ctx.exit(Exit.RANKS)
    findings = [judge(one) for one in seen]
    found: dict[str, Any] = {"script": str(script), **as_dict(findings, seen)}
    click.echo(json.dumps(found, indent=1) if as_json else report(findings, seen, script.name))
    ctx.exit(_STATUS[overall(findings)])
