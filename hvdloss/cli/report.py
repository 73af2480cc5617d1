"""``hvdloss report``: the page of a run, its picture, its numbers, and how it goes while it trains."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import sys
import time
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import click
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hvdloss.cli.errors import Exit, Interrupted
from hvdloss.cli.process import interruptible
from hvdloss.errors import ConfigError
from hvdloss.report import page
from hvdloss.report.reading import Record, Tail, read
from hvdloss.report.summary import Summary, bins, hardest, summarize
from hvdloss.train.files import write_atomically

_BLOCKS = "▁▂▃▄▅▆▇█"


def _found(runs: Sequence[Path]) -> list[Path]:
    """Return the records that arguments name: files, or folders that hold some.

    Raises:
        click.BadParameter: there is nothing of the kind.
    """
    paths = []
    for run in runs:
        if run.is_dir():
            inside = sorted(run.glob("*.jsonl")) or sorted(run.glob("*/*.jsonl"))
            if not inside:
                raise click.BadParameter(
                    f"{run}: no record (*.jsonl) in this folder; hvd.Recorder writes them"
                )
            paths += inside
        elif run.exists():
            paths.append(run)
        else:
            raise click.BadParameter(f"{run}: there is no such file; hvd.Recorder(path) writes records")
    return paths


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The page. [beside the first record, .html]",
)
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), help="Draw one picture instead.")
@click.option("--text", "as_text", is_flag=True, help="Print to the terminal instead.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON instead.")
@click.option("--follow", "--live", "live", is_flag=True, help="Show a run in the terminal while it trains.")
@click.option(
    "--patience",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    show_default=True,
    help="With --follow: seconds without news after which to give up.",
)
@click.option("--open", "opens", is_flag=True, help="Open the page in a browser.")
@click.pass_context
def report(
    ctx: click.Context,
    /,
    runs: tuple[Path, ...],
    out: Path | None,
    png: Path | None,
    as_text: bool,
    as_json: bool,
    live: bool,
    patience: float,
    opens: bool,
) -> None:
    """Show runs by their records: one HTML page that needs no network; several are compared.

    RUN is a file that hvd.Recorder wrote, whole or still growing, or a folder of them.

    Exit status: 0 done; 1 a record is damaged or cannot be read, the page cannot be written, or the run that
    was followed failed or fell silent; 2 wrong options, or no such file; 3 a library is not installed.
    """
    if sum((png is not None, as_text, as_json, live)) > 1:
        raise click.UsageError("choose one of --png, --text, --json and --follow")
    if (opens or out) and (png or as_text or as_json or live):
        raise click.UsageError(
            "--out and --open are for the page; leave out --png, --text, --json and --follow"
        )
    paths = _found(runs)
    try:
        if live:
            if len(paths) != 1:
                raise click.UsageError(f"--follow shows one run, not {len(paths)}")
            with interruptible():
                ctx.exit(int(_follow(paths[0], patience)))
        records = [read(path) for path in paths]
        if as_json:
            numbers = [_numbers(record) for record in records]
            click.echo(json.dumps(numbers[0] if len(numbers) == 1 else numbers, allow_nan=False))
        elif as_text:
            _print(records)
        elif png is not None:
            from hvdloss.report.charts import picture

            _save(png, lambda file: picture(records, file))
        else:
            out = out or paths[0].with_suffix(".html")
            if out in paths:
                raise click.UsageError(f"--out {out} is a record; choose another name")
            text = page.html(records).encode()
            _save(out, lambda file: file.write(text))
            if opens:
                webbrowser.open(out.resolve().as_uri())
    except Interrupted as stop:
        ctx.exit(stop.status)
    except ConfigError as error:
        click.echo(str(error), err=True)
        ctx.exit(int(Exit.MISSING if "pip install" in str(error) else Exit.NOT_READY))
    except OSError as error:
        click.echo(f"cannot write: {error}", err=True)
        ctx.exit(int(Exit.NOT_READY))


def _save(path: Path, write: Callable[[IO[Any]], Any]) -> None:
    """Write a file, whole or not at all, and say where; a folder that is missing is a mistake, and not made.

    Raises:
        OSError: it cannot be written.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    write_atomically(path, write)
    click.echo(str(path))


# -- numbers ------------------------------------------------------------------------------------------


def _numbers(record: Record) -> dict[str, Any]:
    """Return what a record comes to, as plain values."""
    summary = dataclasses.asdict(summarize(record))
    return {
        "path": str(record.path),
        **_plain(summary),
        "decisions": record.decisions,
        "faults": record.faults,
        "hardest": [_plain(dataclasses.asdict(one)) for one in hardest(record)],
        "settings": record.runs[-1].get("settings", {}),
        "environment": record.runs[-1].get("environment", {}),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# -- the terminal -------------------------------------------------------------------------------------


def _console() -> Console:
    wide = sys.stdout.isatty() or os.environ.get("COLUMNS")
    return Console(highlight=False) if wide else Console(width=110, highlight=False)


def _print(records: Sequence[Record]) -> None:
    console = _console()
    if len(records) > 1:
        console.print(_table(page.table_of_runs(records)))
    for record in records:
        console.print(_shown(record))


def sparkline(values: Sequence[float], width: int) -> str:
    """Return a line of blocks whose heights follow the values; a gap is a space.

    >>> sparkline([1, 2, 3], 3)
    '▁▅█'
    """
    means = []
    for one in bins(len(values), width):
        kept = [value for value in values[one] if math.isfinite(value) and abs(value) < 1e100]
        means.append(sum(kept) / len(kept) if kept else math.nan)
    known = [mean for mean in means if math.isfinite(mean)]
    if not known:
        return ""
    low, high = min(known), max(known)
    steps = len(_BLOCKS) - 1
    return "".join(
        " " if not math.isfinite(m) else _BLOCKS[round((m - low) / (high - low) * steps) if high > low else 0]
        for m in means
    )


_COLORS = {"finished": "green", "failed": "bold red", "interrupted": "yellow", "running": "cyan"}


def _shown(record: Record, most: int = 8) -> Group:
    """Return what the terminal shows of a run."""
    summary = summarize(record)
    head = Text.assemble(
        (summary.name[:80], "bold"),
        "  ",
        (summary.status[:40], _COLORS.get(summary.status, "")),
        f"  {summary.ranks} rank(s)",
    )
    facts = Text(
        f"step {page.number(summary.steps)}, {page.number(summary.samples)} samples, "
        f"{page.seconds(summary.seconds)}, {page.number(summary.rate)} samples a second, "
        f"held up by communication {page.percent(summary.held_up)}"
    )
    parts: list[Any] = [head, facts]
    line = sparkline([float(v) for v in record.column("loss")], 60)
    if line:
        loss = f"loss {page.number(summary.first_loss)} → {page.number(summary.loss)}"
        parts.append(Text.assemble(line, "  ", loss, (f"  best {page.number(summary.best_loss)}", "dim")))
    if summary.averaging_error is not None:
        off, worst = page.percent(summary.averaging_error), page.percent(summary.worst_averaging_error)
        parts.append(
            Text(f"plain averaging would be off by {off} of the loss in the median step, {worst} at most")
        )
    if summary.metrics:
        shown = ", ".join(f"{name} {page.number(value)}" for name, value in list(summary.metrics.items())[:8])
        parts.append(Text(f"epoch {summary.epochs}: {shown}"))
    if summary.rows:
        parts.append(_ranks(summary))
    for found, title in ((page.decisions_table(record), "decisions"), (page.faults_table(record), "faults")):
        if found is not None:
            left = len(found.rows) - most
            parts.append(_table(dataclasses.replace(found, rows=found.rows[-most:], note="")))
            if left > 0:
                parts.append(Text(f"and {left} {title} before", style="dim"))
    for one in hardest(record)[:2]:
        items = ", ".join(f"{label} ({page.number(value)})" for label, value in one.items[:6])
        parts.append(Text(f"hardest {one.what} by {one.measure}: {items}"))
    return Group(*parts, Text())


def _ranks(summary: Summary, most: int = 16) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("rank", "samples", "weight", "loss", "computing", "waiting", "moving", "held up", "D(k)"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary.rows[:most]:
        table.add_row(
            str(row.rank),
            page.percent(row.elements_share),
            page.percent(row.weight_share),
            page.number(row.loss),
            *(page.seconds(value) for value in (row.computing, row.waiting, row.moving)),
            page.percent(row.held_up),
            page.number(row.skew),
        )
    if len(summary.rows) > most:
        table.caption = f"and {len(summary.rows) - most} more ranks"
    return table


def _table(of: page.Table) -> Table:
    table = Table(title=Text(of.caption), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column, cell in zip(of.columns, of.rows[0] if of.rows else of.columns, strict=True):
        table.add_column(Text(column), justify="right" if getattr(cell, "numeric", False) else "left")
    for row in of.rows:
        table.add_row(*(Text(cell.text) for cell in row))
    return table


# -- while it trains ----------------------------------------------------------------------------------


def _follow(path: Path, patience: float) -> Exit:
    """Show a run until it ends; return how it went. Without a terminal, wait, and print once at the end."""
    console = _console()
    tail = Tail(path)
    news = time.monotonic()
    with (
        Live(console=console, auto_refresh=False, transient=True)
        if console.is_terminal
        else _Silent() as shown
    ):
        while True:
            if tail.record.runs:
                shown.update(_shown(tail.record, 4), refresh=True)
                if tail.record.status != "running":
                    break
            time.sleep(0.5)
            if tail.more():
                news = time.monotonic()
            elif time.monotonic() - news > patience:
                break
    record = tail.record
    if not record.runs:
        raise ConfigError(f"path={str(path)!r}: nothing was written for {patience:g} s")
    console.print(_shown(record))
    if record.status == "running":
        raise ConfigError(
            f"path={str(path)!r}: nothing new for {patience:g} s; the run was killed, or stands still"
        )
    return Exit.NOT_READY if record.status == "failed" else Exit.OK


class _Silent:
    """What a live display is where there is no terminal."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def update(self, shown: Any, *, refresh: bool = False) -> None:
        """Show nothing."""
