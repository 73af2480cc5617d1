"""The page of a run: one HTML file that needs nothing else, of untrusted records.

All text goes through the template's escaping; the content security policy allows the page's own style sheet,
by its hash, and nothing else: no script, no request. Light and dark follow the system, or a switch that works
by CSS alone.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvdloss._util.extras import optional_import
from hvdloss._version import __version__
from hvdloss.report.charts import DARK, LIGHT, Chart, charts_of, comparison_chart
from hvdloss.report.reading import Record
from hvdloss.report.summary import Summary, class_table, hardest, is_number, summarize

__all__ = ["Cell", "Run", "Table", "html", "number", "run_of", "seconds", "table_of_runs"]

MOST_ROWS = 200
_HERE = Path(__file__).parent


# -- numbers in words -----------------------------------------------------------------------------------


def number(value: Any, digits: int = 4) -> str:
    """Return a number as people read it; a dash for what is not known."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool | str) or not is_number(value):
        return str(value)[:40]
    if abs(value) < 1e15 and float(value).is_integer():
        return f"{int(value):,}".replace(",", "\u202f")  # a narrow space
    return f"{value:.{digits}g}"


def seconds(value: Any) -> str:
    """Return a duration as people read it."""
    if value is None or not math.isfinite(value):
        return "–"
    if value < 1e-3:
        return f"{1e6 * value:.3g} µs"
    if value < 1:
        return f"{1e3 * value:.3g} ms"
    if value < 120:
        return f"{value:.3g} s"
    if value > 1e9:
        return f"{value:.3g} s"
    hours, rest = divmod(round(value), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


def percent(value: Any) -> str:
    """Return a share in percent."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.3g} %"


def moment(value: float) -> str:
    """Return a time of day, UTC."""
    try:
        when = datetime.datetime.fromtimestamp(value, datetime.timezone.utc)
    except (OverflowError, ValueError, OSError):
        return "–"
    return when.strftime("%Y-%m-%d %H:%M:%S UTC")


def short(value: Any) -> str:
    """Return any plain value in one line."""
    if value is None or value in ([], {}, ""):
        return "–"
    if isinstance(value, list | dict):
        text = json.dumps(value, ensure_ascii=False)
    else:
        text = number(value, 6) if isinstance(value, int | float) else str(value)
    return text if len(text) <= 200 else text[:199] + "…"


# -- tables ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A cell: what is shown, and the number behind it to the last bit, if it is one."""

    text: str
    value: float | None = None
    numeric: bool = False

    @property
    def kind(self) -> str:
        """How it is laid out: a number, a long text, or neither."""
        return "n" if self.numeric else "t" if len(self.text) > 40 else ""

    @property
    def exact(self) -> str | None:
        """The number as the record has it."""
        return None if self.value is None or not math.isfinite(self.value) else repr(self.value)


def _n(value: Any, show: Any = number) -> Cell:
    return Cell(show(value), None if value is None else float(value), True)


@dataclass(frozen=True)
class Table:
    """A table: `columns` are its heads; the first cell of a row names the row."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


def _limited(rows: list[Any], what: str) -> tuple[list[Any], str]:
    """Return the first and last rows where there are many, and a word on the others."""
    if len(rows) <= MOST_ROWS:
        return rows, ""
    head = MOST_ROWS // 4
    left = len(rows) - MOST_ROWS
    return [*rows[:head], *rows[-(MOST_ROWS - head) :]], (
        f"{left} {what} between the first {head} and the last {MOST_ROWS - head} are left out here; the "
        f"record has them."
    )


def ranks_table(summary: Summary) -> Table:
    """Return what each rank did."""
    columns = (
        *("rank", "samples", "of all", "weight", "of all", "loss"),
        *("computing a step", "waiting", "moving", "held up", "D(k)", "not finite"),
    )
    rows, note = _limited(list(summary.rows), "ranks")
    return Table(
        "Each rank: sums over the recorded steps, and mean times of a step",
        columns,
        [
            (
                Cell(f"rank {row.rank}"),
                _n(row.elements),
                _n(row.elements_share, percent),
                _n(row.weight),
                _n(row.weight_share, percent),
                _n(row.loss),
                _n(row.computing, seconds),
                _n(row.waiting, seconds),
                _n(row.moving, seconds),
                _n(row.held_up, percent),
                _n(row.skew),
                _n(row.nonfinite),
            )
            for row in rows
        ],
        note,
    )


def loss_table(record: Record) -> Table:
    """Return the loss at up to twelve recorded steps, evenly apart, the first and the last among them."""
    count = len(record.steps)
    wanted = {round(i * (count - 1) / 11) for i in range(12)} if count > 12 else set(range(count))
    began = float(record.runs[0]["time"])
    return Table(
        "Loss at some of the recorded steps",
        ("step", "samples", "time", "loss", "averaged", "J, with terms"),
        [
            (
                Cell(number(step["step"]), float(step["step"]), True),
                _n(step["samples"]),
                _n(step["time"] - began, seconds),
                _n(step["loss"], lambda v: number(v, 6)),
                _n(step.get("averaged_loss"), lambda v: number(v, 6)),
                _n(step["objective_value"], lambda v: number(v, 6)),
            )
            for step in (record.steps[i] for i in sorted(wanted))
        ],
    )


def classes_table(record: Record) -> Table | None:
    """Return the heat map's numbers."""
    found = class_table(record)
    if found is None:
        return None
    counts, names, line = found
    width = min(40, len(names))
    note = (
        "" if width == len(names) else f"The first {width} of {len(names)} classes; the record has them all."
    )
    if len(counts) > MOST_ROWS:
        note += f" The first {MOST_ROWS} of {len(counts)} ranks."
    return Table(
        f"Weight by rank and class, as the term “{line['term']}” counted it at step {line['step']}",
        ("rank", *names[:width]),
        [
            (Cell(f"rank {rank}"), *(_n(float(count)) for count in row[:width]))
            for rank, row in enumerate(counts[:MOST_ROWS])
        ],
        note.strip(),
    )


def decisions_table(record: Record) -> Table | None:
    """Return what was decided, and why."""
    if not record.decisions:
        return None
    rows, note = _limited(record.decisions, "decisions")
    return Table(
        "Decisions",
        ("after step", "what", "before", "after", "reason"),
        [
            (
                Cell(number(one["step"]), float(one["step"]), True),
                Cell(one["what"]),
                Cell(short(one["before"])),
                Cell(short(one["after"])),
                Cell(one["reason"]),
            )
            for one in rows
        ],
        note,
    )


def faults_table(record: Record) -> Table | None:
    """Return what went wrong."""
    if not record.faults:
        return None
    rows, note = _limited(record.faults, "faults")
    return Table(
        "Faults",
        ("after step", "error", "ranks", "what happened", "when"),
        [
            (
                Cell(number(one["step"]), float(one["step"]), True),
                Cell(one["error"]),
                Cell(", ".join(map(str, one["ranks"][:20])) or "–"),
                Cell(one["text"]),
                Cell(moment(one["time"])),
            )
            for one in rows
        ],
        note,
    )


def settings_tables(record: Record) -> list[Table]:
    """Return settings, terms, the communication plan, and the environment."""
    head = record.runs[-1]
    comm_plan: dict[str, Any] = {}
    if record.comm_plans:
        last = record.comm_plans[-1]
        comm_plan = {
            name: one.get("value") if isinstance(one, dict) else one
            for name, one in last.get("choices", {}).items()
        }
        comm_plan |= last.get("comm_plan") or {}
    tables = [
        ("Settings of the run", head.get("settings", {})),
        ("Objective", head.get("objective", {})),
        *((f"Term “{name}”", term) for name, term in head.get("terms", {}).items()),
        ("Communication plan", comm_plan),
        ("Environment", {"framework": head.get("framework", "–"), **head.get("environment", {})}),
    ]
    return [
        Table(
            title,
            ("name", "value"),
            [(Cell(str(k)[:100]), Cell(short(v))) for k, v in list(of.items())[:MOST_ROWS]],
        )
        for title, of in tables
        if isinstance(of, Mapping) and of
    ]


def epochs_table(record: Record) -> Table | None:
    """Return the metrics of the last epochs that are single numbers."""
    if not record.epochs:
        return None
    names = [
        name
        for name in dict.fromkeys(name for one in record.epochs for name in one["metrics"])
        if any(isinstance(one["metrics"].get(name), int | float) for one in record.epochs)
    ][:12]
    rows, note = _limited(record.epochs, "epochs")
    return Table(
        "Epochs",
        ("epoch", "step", *names),
        [
            (
                Cell(number(one["epoch"]), float(one["epoch"]), True),
                _n(one["step"]),
                *(
                    _n(value)
                    if isinstance(value := one["metrics"].get(name), int | float)
                    else Cell("–", None, True)
                    for name in names
                ),
            )
            for one in rows
        ],
        note,
    )


def table_of_runs(records: Sequence[Record]) -> Table:
    """Return several runs side by side."""
    columns = (
        *("run", "status", "ranks", "steps", "samples", "time", "last loss", "best loss", "at step"),
        *("samples a second", "held up", "decisions", "faults"),
    )
    rows = []
    for record in records:
        one = summarize(record)
        rows.append(
            (
                Cell(one.name[:80]),
                Cell(one.status),
                _n(one.ranks),
                _n(one.steps),
                _n(one.samples),
                _n(one.seconds, seconds),
                _n(one.loss, lambda v: number(v, 6)),
                _n(one.best_loss, lambda v: number(v, 6)),
                _n(one.best_step),
                _n(one.rate),
                _n(one.held_up, percent),
                _n(one.decisions),
                _n(one.faults),
            )
        )
    return Table("The runs side by side", columns, rows)


# -- the page -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    id: str
    title: str
    lead: str = ""
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    open: bool = False  # whether the tables are shown at once
    side_by_side: bool = False


@dataclass(frozen=True)
class Run:
    """What the page shows of one run."""

    id: str
    name: str
    status: str
    remark: str
    facts: Sequence[tuple[str, Cell, str]]
    sections: Sequence[Section] = field(default_factory=tuple)


def _worst(summary: Summary) -> str:
    """Return what is said beside the error of plain averaging."""
    worst = summary.worst_averaging_error
    return "not known" if worst is None else f"of the loss, in the median step; {percent(worst)} at most"


_STATUS = {
    "finished": "The run finished.",
    "failed": "The run ended with an error; see faults.",
    "interrupted": "The run was interrupted.",
    "running": "No end is recorded: the run is still going, or was killed.",
}


def run_of(record: Record, prefix: str = "") -> Run:
    """Return what the page shows of a record."""
    summary = summarize(record)
    charts = charts_of(record, prefix)
    facts = [
        ("last loss", _n(summary.loss, lambda v: number(v, 5)), f"at step {number(summary.steps)}"),
        (
            "best loss",
            _n(summary.best_loss, lambda v: number(v, 5)),
            f"at step {number(summary.best_step)}",
        ),
        ("samples", _n(summary.samples), f"{number(summary.rate)} a second"),
        ("time", _n(summary.seconds, seconds), moment(float(record.runs[0]["time"]))),
        ("ranks", _n(summary.ranks), _hosts(record)),
        ("held up by communication", _n(summary.held_up, percent), "of all ranks' time"),
        ("averaging would be off by", _n(summary.averaging_error, percent), _worst(summary)),
        ("decisions", _n(summary.decisions), "by the terms' policies"),
        ("faults", _n(summary.faults), f"{number(summary.skipped)} step(s) skipped"),
    ]
    decisions, faults, epochs = decisions_table(record), faults_table(record), epochs_table(record)
    classes = classes_table(record)
    hard = hardest(record)
    sections = [
        Section(
            "loss",
            "Loss",
            "Of all ranks' elements together, as the reduction defines it. Averaged: the mean of ranks' own "
            "means, which plain averaging would have reported for the same step.",
            charts.get("loss", ()),
            [table for table in (epochs, loss_table(record)) if table is not None],
        ),
        Section(
            "lanes",
            "What ranks spent time on",
            "The rank that is held up the least waits for nobody: what holds it up is moving bytes, and what "
            "others are held up beyond that is waiting for slower ranks.",
            charts.get("lanes", ()),
            [ranks_table(summary)] if summary.rows else (),
        ),
        Section(
            "shares",
            "Shares of samples and weight",
            "A rank counts by its weight. Averaging local means would count all alike: the dotted line.",
            charts.get("shares", ()),
        ),
        Section(
            "skew",
            "Skew: ranks by class",
            "Percent of each rank's weight, over the term's window. Ranks with like data have like rows.",
            charts.get("skew", ()),
            [classes] if classes is not None else (),
        )
        if classes is not None
        else Section(
            "skew",
            "Skew: ranks by class",
            "No term counted classes: give the objective DataSkew(classes=...).",
        ),
        Section(
            "decisions",
            "Decisions",
            "" if decisions else "Nothing was decided: no term has policies, or they saw no reason to.",
            tables=[decisions] if decisions else (),
            open=True,
        ),
        Section(
            "faults",
            "Faults",
            "" if faults else "Nothing went wrong that the record knows of.",
            tables=[faults] if faults else (),
            open=True,
        ),
        Section(
            "hardest",
            "Hardest",
            ""
            if hard
            else "Nothing was recorded by class: pass a metric with one number per class to "
            "recorder.epoch(), or a LossAttribution's report to recorder.hardest().",
            charts.get("hardest", ()),
            [
                Table(
                    f"{one.what} by {one.measure}",
                    (one.what, one.measure),
                    [(Cell(label), _n(value, lambda v: number(v, 6))) for label, value in one.items],
                )
                for one in hard[:4]
            ],
        ),
        Section("settings", "Settings", tables=settings_tables(record), open=True, side_by_side=True),
    ]
    remarks = [_STATUS.get(summary.status, "")]
    if summary.recorded:
        remarks.append(f"{number(summary.recorded)} steps are in the record.")
    if record.half:
        remarks.append("Its last line is half-written, and was passed over.")
    if len(record.runs) > 1:
        remarks.append(f"It was taken up again {len(record.runs) - 1} time(s).")
    if record.undone:
        undone = sum(max(0, one["until"] - one["step"]) for one in record.undone)
        remarks.append(f"{number(undone)} steps were undone, as it went back to a commit or checkpoint.")
    if any(end.get("left_out") for end in record.ends):
        remarks.append("Some lines were left out, as they came too fast or were too many.")
    sections = [dataclasses.replace(one, id=f"{prefix}{one.id}") for one in sections]
    return Run(f"{prefix}run", summary.name[:120], summary.status, " ".join(remarks), facts, sections)


def _hosts(record: Record) -> str:
    hosts = record.runs[-1].get("environment", {}).get("hosts")
    return f"on {hosts} host(s)" if isinstance(hosts, int) else ""


def html(records: Sequence[Record]) -> str:
    """Return the page of one run or several.

    Raises:
        ConfigError: jinja2 or matplotlib is missing.
    """
    jinja2 = optional_import("jinja2", "report", "a report's page")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = _style()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    several = len(records) > 1
    runs = [run_of(record, f"r{number}-" if several else "") for number, record in enumerate(records)]
    text: str = environment.get_template("page.html.j2").render(
        title=runs[0].name if not several else f"{len(runs)} runs",
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        style=_markup(style),
        runs=runs,
        compared=comparison_chart(records) if several else None,
        side_by_side=table_of_runs(records) if several else None,
        drawn=lambda chart, layout: _markup(chart.svg(layout)),
        version=__version__,
    )
    return text


def _markup(text: str) -> Any:
    """Mark as safe what was made here: the style sheet, and drawings, in which matplotlib escapes."""
    return optional_import("markupsafe", "report", "a report's page").Markup(text)


def _style() -> str:
    """Return the style sheet: colours once for light and once for dark, and a class for each."""

    def colors(palette: Mapping[str, str]) -> str:
        return "".join(f"--{name}:{color};" for name, color in palette.items())

    light, dark = colors(LIGHT) + "color-scheme:light;", colors(DARK) + "color-scheme:dark;"
    classes = "".join(f".f-{name}{{fill:var(--{name})}}.s-{name}{{stroke:var(--{name})}}" for name in LIGHT)
    return (
        f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
        f":root:has(#theme-light:checked){{{light}}}\n:root:has(#theme-dark:checked){{{dark}}}\n"
        f"{classes}\n{(_HERE / 'page.css').read_text(encoding='utf-8')}"
    )
