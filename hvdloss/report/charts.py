"""The charts of a run, by matplotlib: as SVG that follows the page's colours, and as one PNG picture.

Static SVG, since a page of untrusted numbers then needs no script at all: its content security policy allows
none, it opens from disk without a network, prints, and weighs tens of kilobytes where a charting library in
JavaScript weighs megabytes. Text stays text. Colours become classes, so light and dark are the page's choice;
each chart is drawn for a wide page and for a phone.
"""

from __future__ import annotations

import functools
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from hvdloss._util.extras import optional_import
from hvdloss.report.reading import Record
from hvdloss.report.summary import Hardest, bins, class_table, hardest, parts_of_time, summarize

__all__ = ["WIDTHS", "Chart", "charts_of", "comparison_chart", "picture", "unit_of_time"]

Array = npt.NDArray[np.float64]
WIDTHS = {"wide": 860, "narrow": 328}  # units of the drawings, which are pixels where there is room
MOST_LANES = 12
MOST_CLASSES = 40
MOST_POINTS = 600


# -- colours ------------------------------------------------------------------------------------------

#: What is drawn with a colour; in the page a class of this name.
NAMES = (
    *("text", "muted", "grid", "paper", "computing", "waiting", "moving", "heat", "fault", "decision"),
    *(f"run{i}" for i in range(8)),
)
#: In an SVG's making each is a colour that nothing else has.
_SENTINEL = {name: f"#fe01{i:02x}" for i, name in enumerate(NAMES)}
_CLASS_OF = {color: name for name, color in _SENTINEL.items()}
#: For the PNG, and in the page's style sheet as light.
LIGHT = {
    "text": "#1b1f24",
    "muted": "#57606a",
    "grid": "#d8dee4",
    "paper": "#ffffff",
    "computing": "#3b7dd8",
    "waiting": "#d9730d",
    "moving": "#8957e5",
    "heat": "#84b6ff",
    "fault": "#c62828",
    "decision": "#6e7781",
    "run0": "#1f6feb",
    "run1": "#c4560a",
    "run2": "#1a7f37",
    "run3": "#a3268f",
    "run4": "#0a7a8c",
    "run5": "#8a6100",
    "run6": "#b42318",
    "run7": "#57606a",
}
DARK = {
    "text": "#e6edf3",
    "muted": "#9aa4af",
    "grid": "#30363d",
    "paper": "#0d1117",
    "computing": "#4f93f0",
    "waiting": "#e58a2e",
    "moving": "#a985f5",
    "heat": "#1f4f9e",
    "fault": "#ff7b72",
    "decision": "#8b949e",
    "run0": "#58a6ff",
    "run1": "#f0883e",
    "run2": "#3fb950",
    "run3": "#e275ad",
    "run4": "#39c5cf",
    "run5": "#d29922",
    "run6": "#ff7b72",
    "run7": "#9aa4af",
}


# -- numbers in words ---------------------------------------------------------------------------------


def amount(value: float, _: Any = None) -> str:
    """Return a number for an axis, without mathematics in its text: 1200000 is 1.2M."""
    if not math.isfinite(value):
        return ""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor and abs(value) < factor * 1e3:
            return f"{value / factor:.4g}{letter}"
    return f"{value:.4g}"


def unit_of_time(seconds: float) -> tuple[float, str]:
    """Return the best unit for this many seconds: its length and its name."""
    for length, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * length:
            return length, name
    return 1.0, "s"


def _drawable(values: Array) -> Array:
    """Return what can be drawn: numbers too large for any drawing are gaps."""
    return np.where(np.abs(values) < 1e100, values, np.nan)


def _smooth(values: Array, span: int) -> Array:
    """Return the mean of the `span` values around each, without gaps; fewer at the ends."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(len(values))
    half = np.minimum(span // 2, np.minimum(at, len(values) - 1 - at))  # the same on both sides
    total, count = sums[at + half + 1] - sums[at - half], counts[at + half + 1] - counts[at - half]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


# -- figures ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chart:
    """A chart: `draw` makes the figure for a width, `label` says what is in it to those who cannot see."""

    name: str
    label: str
    draw: Callable[[Canvas], Any]

    def svg(self, layout: str) -> str:
        """Return it as an SVG element for a page."""
        with _style(_SENTINEL):
            canvas = Canvas(_SENTINEL, layout == "narrow")
            figure = self.draw(canvas)
            out = io.BytesIO()
            figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        return _for_page(out.getvalue(), f"{self.name}-{layout}", self.label, canvas.titles)


class Canvas:
    """What figures are drawn on: a palette, a width, and tooltips by the drawn thing's id."""

    def __init__(self, palette: dict[str, str], narrow: bool) -> None:
        self.palette, self.narrow = palette, narrow
        self.width = WIDTHS["narrow" if narrow else "wide"]
        self.titles: dict[str, str] = {}

    def figure(self, height: float) -> Any:
        """Return an empty figure of this height, in pixels."""
        from matplotlib.figure import Figure

        return Figure(figsize=(self.width / 72, height / 72), dpi=72, layout="constrained")

    def color(self, name: str) -> str:
        """Return a colour by its name."""
        return self.palette[name]

    def title(self, artist: Any, text: str) -> None:
        """Add a tooltip to a drawn element."""
        gid = f"t{len(self.titles)}"
        artist.set_gid(gid)
        self.titles[gid] = text


@contextmanager
def _style(palette: dict[str, str]) -> Iterator[None]:
    matplotlib = optional_import("matplotlib", "report", "a report's charts")
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "hvdloss",
        "text.parse_math": False,  # what others wrote is text, not mathematics
        "text.usetex": False,
        "font.size": 12,
        "axes.titlesize": 13,
        "axes.titlelocation": "left",
        "axes.labelsize": 12,
        "xtick.labelsize": 11.5,
        "ytick.labelsize": 11.5,
        "legend.fontsize": 11.5,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "axes.edgecolor": palette["muted"],
        "axes.labelcolor": palette["text"],
        "text.color": palette["text"],
        "xtick.color": palette["muted"],
        "ytick.color": palette["muted"],
        "xtick.labelcolor": palette["text"],
        "ytick.labelcolor": palette["text"],
        "grid.color": palette["grid"],
        "grid.linewidth": 0.8,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # letters that its font lacks; the page's may have them
        yield


# -- the loss -----------------------------------------------------------------------------------------


def _plot_loss(canvas: Canvas, axis: Any, records: Sequence[Record], against: str) -> None:
    from matplotlib.ticker import FuncFormatter

    spans = [float(r.seconds[-1]) if len(r.steps) else 0.0 for r in records]
    length, unit = unit_of_time(max([s for s in spans if s < 1e100], default=0.0))
    lowest, highest = math.inf, 0.0
    for number, record in enumerate(records):
        if not record.steps:
            continue
        color = canvas.color(f"run{number % 8}")
        x = record.column("samples") if against == "samples" else record.seconds / length
        every = -(-len(record.steps) // MOST_POINTS)
        x, loss = _drawable(x), _drawable(record.column("loss"))
        span = max(1, len(loss) // 25)
        shown = _smooth(loss, span)
        kept = np.unique([*range(0, len(loss), every), len(loss) - 1])
        marker = "o" if len(loss) < 2 else ""
        if span > 1:
            axis.plot(x[kept], loss[kept], color=color, lw=0.8, alpha=0.35)
        label = (
            f"{record.name[:24]}" if len(records) > 1 else "loss" + (" (running mean)" if span > 1 else "")
        )
        axis.plot(x[kept], shown[kept], color=color, lw=1.8, marker=marker, label=label)
        finite = loss[np.isfinite(loss)]
        if len(finite):
            lowest, highest = min(lowest, float(finite.min())), max(highest, float(finite.max()))
        if len(records) > 1:
            continue
        for column, name, dashes, label in (
            ("objective_value", "run1", "--", "J, with terms"),
            ("averaged_loss", "run2", ":", "plain averaging would say"),
        ):
            value = _drawable(record.column(column))
            if np.nanmax(np.abs(value - loss), initial=0.0) > 1e-3 * max(1e-12, highest):
                drawn = _smooth(value, span)[kept]
                axis.plot(x[kept], drawn, color=canvas.color(name), lw=1.4, ls=dashes, label=label)
        times, began = record.column("time"), float(record.runs[0]["time"])
        for kind, lines, color_name in (
            ("decision", record.decisions, "decision"),
            ("fault", record.faults, "fault"),
        ):
            steps = record.column("step")
            at = [
                (float(one["time"]) - began) / length
                if against == "time"  # not when a step that was undone was done again
                else float(x[min(len(x) - 1, int(np.searchsorted(steps, one["step"])))])
                if one["step"]
                else float(x[min(len(x) - 1, int(np.searchsorted(times, one["time"])))])
                for one in lines[:300]
            ]
            at = [one for one in at if math.isfinite(one)]
            if at:
                axis.plot(
                    at,
                    np.full(len(at), 0.02 if kind == "decision" else 0.06),
                    ls="",
                    marker="|" if kind == "decision" else "x",
                    ms=8,
                    mew=1.6,
                    color=canvas.color(color_name),
                    transform=axis.get_xaxis_transform(),
                    label=f"{kind}s",
                )
    if lowest > 0 and highest > 30 * lowest:
        axis.set_yscale("log")
        axis.yaxis.set_minor_formatter(lambda *_: "")
    axis.yaxis.set_major_formatter(FuncFormatter(amount))
    axis.xaxis.set_major_formatter(FuncFormatter(amount))
    axis.set_xlabel("samples" if against == "samples" else f"time, {unit}")
    axis.locator_params(axis="x", nbins=4 if canvas.narrow else 5)


def _draw_loss(canvas: Canvas, records: Sequence[Record]) -> Any:
    figure = canvas.figure(540 if canvas.narrow else 300)
    axes = figure.subplots(2, 1) if canvas.narrow else figure.subplots(1, 2, sharey=True)
    for axis, against in zip(axes, ("samples", "time"), strict=True):
        _plot_loss(canvas, axis, records, against)
    axes[0].set_ylabel("loss")
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=1 if canvas.narrow else 4)
    return figure


# -- lanes --------------------------------------------------------------------------------------------

_PARTS = ("computing", "waiting", "moving")
_PART_LABELS = ("computing", "waiting for other ranks", "moving bytes")


def chosen_ranks(record: Record, most: int = MOST_LANES) -> list[int]:
    """Return which ranks are drawn, where there are many: those held up most and least."""
    rows = summarize(record).rows
    if len(rows) <= most:
        return [row.rank for row in rows]
    order = sorted(rows, key=lambda row: -row.held_up)
    return sorted(row.rank for row in [*order[: most // 2], *order[-(most - most // 2) :]])


def _draw_lanes(canvas: Canvas, record: Record) -> Any:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ranks = chosen_ranks(record)
    parts = [_drawable(part) * 1e3 for part in parts_of_time(record)]
    steps = record.column("step")
    slices = bins(len(steps), 60 if canvas.narrow else 140)
    lane = 58
    figure = canvas.figure((110 if canvas.narrow else 74) + lane * len(ranks))
    axes = figure.subplots(len(ranks), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    edges = [*(float(steps[one.start]) for one in slices), float(steps[-1]) + (1 if len(slices) == 1 else 0)]
    tall: list[float] = []
    for axis, rank in zip(axes, ranks, strict=True):
        below = np.zeros(len(slices))
        for part, name, label in zip(parts, _PARTS, _PART_LABELS, strict=True):
            means = np.array([_mean_of(part[one, rank]) for one in slices])
            axis.stairs(
                below + means,
                edges,
                baseline=below,
                fill=True,
                color=canvas.color(name),
                lw=0,
                label=label if rank == ranks[0] else None,
            )
            below = below + means
        tall += below.tolist()
        axis.set_ylabel(f"rank {rank}", rotation=0, ha="right", va="center", labelpad=10)
        axis.yaxis.set_major_locator(MaxNLocator(2))
        axis.yaxis.set_major_formatter(FuncFormatter(amount))
    # A first step, or a pause, takes a hundred times as long: the others shall be seen.
    top, most = float(max(tall)), 2 * float(np.percentile(tall, 95))
    if top > 0:
        axes[0].set_ylim(0, 1.08 * (most if 0 < most < top else top))
    cut = "; tall ones are cut off" if 0 < most < top else ""
    axes[-1].set_xlabel(
        ("step (heights: ms)" if canvas.narrow else "step; each lane's height is milliseconds a step") + cut
    )
    axes[-1].xaxis.set_major_formatter(FuncFormatter(amount))
    axes[-1].locator_params(axis="x", nbins=5)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=1 if canvas.narrow else 3)
    return figure


def _mean_of(values: Array) -> float:
    kept = values[np.isfinite(values)]
    return float(kept.mean()) if len(kept) else 0.0


# -- shares, skew, the hardest --------------------------------------------------------------------------


def _plot_shares(canvas: Canvas, axis: Any, record: Record, most: int) -> None:
    summary = summarize(record)
    rows = list(summary.rows)
    if len(rows) > most:
        rows = sorted(sorted(rows, key=lambda row: -row.weight_share)[:most], key=lambda row: row.rank)
    at = np.arange(len(rows))
    for offset, name, color in ((-0.2, "samples", "run0"), (0.2, "weight", "run1")):
        values = [100 * (row.elements_share if name == "samples" else row.weight_share) for row in rows]
        drawn = axis.barh(at + offset, values, 0.38, color=canvas.color(color), label=f"share of {name}")
        for bar, row, value in zip(drawn, rows, values, strict=True):
            canvas.title(bar, f"rank {row.rank}: {value:.4g} % of the {name}")
    axis.set_yticks(at, [f"rank {row.rank}" for row in rows])
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    if summary.ranks:
        even = 100 / summary.ranks
        axis.axvline(even, color=canvas.color("muted"), lw=1, ls=":", label=f"even: {even:.3g} %")
    axis.set_xlabel("% of all ranks'")


def _draw_shares(canvas: Canvas, record: Record) -> Any:
    rows = min(24, len(summarize(record).rows))
    figure = canvas.figure((110 if canvas.narrow else 86) + 34 * rows)
    axis = figure.subplots()
    _plot_shares(canvas, axis, record, 24)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=1 if canvas.narrow else 3)
    return figure


def _plot_heat(canvas: Canvas, axis: Any, record: Record, most_ranks: int = 32) -> None:
    from matplotlib.patches import Rectangle

    found = class_table(record)
    assert found is not None
    counts, names, _ = found
    columns = np.argsort(-_drawable(counts).sum(axis=0), kind="stable")[:MOST_CLASSES]
    columns = np.sort(columns)
    counts, ranks = counts[:most_ranks, columns], min(most_ranks, len(counts))
    totals = found[0][:most_ranks].sum(axis=1)
    shares = np.divide(counts, totals[:, None], out=np.zeros_like(counts), where=totals[:, None] > 0)
    shares = np.clip(np.nan_to_num(shares), 0, 1)
    top = float(shares.max()) or 1.0
    numbers = len(columns) <= (6 if canvas.narrow else 14) and ranks <= 16
    for rank in range(ranks):
        for column, share in enumerate(shares[rank]):
            cell = Rectangle((column, rank), 1, 1, facecolor=canvas.color("heat"), alpha=float(share / top))
            axis.add_patch(cell)
            canvas.title(
                cell, f"rank {rank}, class {names[columns[column]][:60]}: {100 * share:.3g} % of the rank"
            )
            if numbers and share >= 0.005:
                axis.text(
                    column + 0.5, rank + 0.5, f"{100 * share:.0f}", ha="center", va="center", fontsize=11
                )
    axis.set_xlim(0, len(columns))
    axis.set_ylim(ranks, 0)
    axis.set_yticks(np.arange(ranks) + 0.5, [f"rank {rank}" for rank in range(ranks)])
    every = -(-len(columns) // (10 if canvas.narrow else 20))
    shown = [names[column][:14] for column in columns]
    long = max((len(name) for name in shown), default=0) > (3 if canvas.narrow else 6)
    axis.set_xticks(
        np.arange(0, len(columns), every) + 0.5,
        shown[::every],
        rotation=45 if long else 0,
        ha="right" if long else "center",
    )
    axis.grid(False)
    axis.tick_params(length=0)
    axis.set_xlabel("class" if not canvas.narrow else "class; the stronger, the more")


def _draw_heat(canvas: Canvas, record: Record) -> Any:
    found = class_table(record)
    assert found is not None
    figure = canvas.figure(86 + 30 * min(32, len(found[0])))
    _plot_heat(canvas, figure.subplots(), record)
    return figure


def _plot_hardest(canvas: Canvas, axis: Any, found: Hardest) -> None:
    at = np.arange(len(found.items))
    values = [max(-1e100, min(1e100, value)) for _, value in found.items]
    drawn = axis.barh(at, values, 0.6, color=canvas.color("fault"))
    for bar, (label, value) in zip(drawn, found.items, strict=True):
        canvas.title(bar, f"{found.what} {label[:60]}: {value:.6g}")
    axis.set_yticks(at, [label[:18] for label, _ in found.items])
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.set_xlabel(found.measure[:60] + (" (low is hard)" if found.lowest else ""))


def _draw_hardest(canvas: Canvas, found: Hardest) -> Any:
    figure = canvas.figure(64 + 24 * len(found.items))
    _plot_hardest(canvas, figure.subplots(), found)
    return figure


# -- which charts there are -----------------------------------------------------------------------------


def charts_of(record: Record, prefix: str = "") -> dict[str, list[Chart]]:
    """Return the charts of a run by section; empty for what the record lacks."""
    if not record.steps:
        return {}
    summary = summarize(record)
    loss = "unknown" if summary.loss is None else f"{summary.loss:.4g}"
    first = "unknown" if summary.first_loss is None else f"{summary.first_loss:.4g}"
    out = {
        "loss": [
            Chart(
                f"{prefix}loss",
                f"Loss of all ranks against samples and against time; from {first} to {loss}.",
                lambda canvas: _draw_loss(canvas, [record]),
            )
        ],
        "lanes": [
            Chart(
                f"{prefix}lanes",
                "One lane for each rank: milliseconds a step spent computing, waiting for other ranks, and "
                "moving bytes. The table below has the means.",
                lambda canvas: _draw_lanes(canvas, record),
            )
        ],
        "shares": [
            Chart(
                f"{prefix}shares",
                "Each rank's share of samples and of weight. The table below has the numbers.",
                lambda canvas: _draw_shares(canvas, record),
            )
        ],
    }
    if class_table(record) is not None:
        out["skew"] = [
            Chart(
                f"{prefix}skew",
                "Heat map of ranks by class: which part of each rank's weight lies in which class. The table "
                "below has the numbers.",
                lambda canvas: _draw_heat(canvas, record),
            )
        ]
    found = hardest(record)
    if found:
        out["hardest"] = [
            Chart(
                f"{prefix}hardest{number}",
                f"The hardest: {one.what} by {one.measure}; worst is {one.items[0][0]} with "
                f"{one.items[0][1]:.4g}.",
                functools.partial(_draw_hardest, found=one),
            )
            for number, one in enumerate(found[:4])
        ]
    return out


def comparison_chart(records: Sequence[Record]) -> Chart:
    """Return the losses of several runs in one chart."""
    names = ", ".join(record.name[:40] for record in records)
    return Chart(
        "compared",
        f"Losses of {len(records)} runs against samples and against time: {names}.",
        lambda canvas: _draw_loss(canvas, records),
    )


def picture(records: Sequence[Record], path: Any) -> None:
    """Write one PNG picture of a run: loss, time, shares, skew, the hardest; of several runs their losses.

    Raises:
        ConfigError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    with _style(LIGHT):
        canvas = Canvas(LIGHT, narrow=False)
        record = records[0]
        found = hardest(record)
        panels: list[tuple[str, Callable[[Any], None]]] = [
            ("Loss against samples", lambda axis: _plot_loss(canvas, axis, records, "samples")),
            ("Loss against time", lambda axis: _plot_loss(canvas, axis, records, "time")),
        ]
        if len(records) == 1 and record.steps:
            panels += [
                ("Time of a step", lambda axis: _plot_times(canvas, axis, record)),
                ("Shares", lambda axis: _plot_shares(canvas, axis, record, 16)),
            ]
            if class_table(record) is not None:
                panels.append(
                    ("Classes by rank, % of the rank", lambda axis: _plot_heat(canvas, axis, record, 16))
                )
            if found:
                panels.append(("Hardest", lambda axis: _plot_hardest(canvas, axis, found[0])))
        rows = -(-len(panels) // 2)
        from matplotlib.figure import Figure

        figure = Figure(figsize=(14, 4.2 * rows), layout="constrained", facecolor=LIGHT["paper"])
        axes = figure.subplots(rows, 2, squeeze=False).ravel()
        for axis, (title, draw) in zip(axes, panels, strict=False):
            draw(axis)
            axis.set_title(title)
            if axis.get_legend_handles_labels()[0]:
                # Above, where it hides nothing.
                axis.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, borderaxespad=0.1)
        for axis in axes[len(panels) :]:
            axis.axis("off")
        summary = summarize(record)
        title = ", ".join(one.name[:40] for one in records)
        if len(records) == 1:
            title += f"  ({summary.ranks} ranks, {summary.steps} steps, {summary.status})"
        figure.suptitle(title, x=0.01, ha="left", fontsize=16)
        figure.savefig(path, dpi=110, format="png")


def _plot_times(canvas: Canvas, axis: Any, record: Record) -> None:
    rows = {row.rank: row for row in summarize(record).rows}
    ranks = chosen_ranks(record)
    at, left = np.arange(len(ranks)), np.zeros(len(ranks))
    for name, label in zip(_PARTS, _PART_LABELS, strict=True):
        values = np.array([1e3 * getattr(rows[rank], name) for rank in ranks])
        axis.barh(at, values, 0.7, left=left, color=canvas.color(name), label=label)
        left = left + values
    axis.set_yticks(at, [f"rank {rank}" for rank in ranks])
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.set_xlabel("milliseconds a step")


# -- SVG for a page -------------------------------------------------------------------------------------

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_URL = re.compile(r"url\(#([^)]+)\)")
_PIXELS = re.compile(r"([\d.]+)px")
_KEPT = re.compile(r"^(?:stroke|fill|opacity|text-anchor|font-size|dominant-baseline|clip)")


def _for_page(svg: bytes, name: str, label: str, titles: dict[str, str]) -> str:
    """Return matplotlib's SVG as an element for a page: no styles, own ids, colours as classes."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(svg)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.set("role", "img")
    root.set("aria-label", label)
    root.set("class", "chart")
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}style", f"{{{_SVG}}}metadata"):
                parent.remove(child)
    for element in root.iter():
        _without_style(element)
        own = element.get("id")
        if own in titles:
            title = ElementTree.Element(f"{{{_SVG}}}title")
            title.text = titles[own]
            element.insert(0, title)
        if own:
            element.set("id", f"{name}-{own}")
        target = element.attrib.pop(f"{{{_XLINK}}}href", None)
        if target is not None:  # always of this drawing
            element.set("href", f"#{name}-{target.lstrip('#')}")
        for key, value in list(element.attrib.items()):
            if "url(#" in value:
                element.set(key, _URL.sub(rf"url(#{name}-\1)", value))
    return ElementTree.tostring(root, encoding="unicode")


def _without_style(element: Any) -> None:
    """Turn an element's style into attributes, and colours into classes."""
    style = element.attrib.pop("style", "")
    pairs = [part.partition(":")[::2] for part in style.split(";") if ":" in part]
    pairs += [(key, element.attrib.pop(key)) for key in ("fill", "stroke") if key in element.attrib]
    classes = []
    for key, value in ((k.strip(), v.strip()) for k, v in pairs):
        if key in ("fill", "stroke") and value.lower() in _CLASS_OF:
            classes.append(f"{key[0]}-{_CLASS_OF[value.lower()]}")
        elif key in ("font", "font-size"):
            if size := _PIXELS.search(value):
                element.set("font-size", size[1])
        elif _KEPT.match(key):
            element.set(key, value)
    if element.tag == f"{{{_SVG}}}text" and not any(one.startswith("f-") for one in classes):
        classes.append("f-text")  # black is what matplotlib leaves out
    if classes:
        element.set("class", " ".join(classes))
