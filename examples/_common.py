"""What the examples share: real data split unevenly, options, a progress bar, a table and a picture.

Nothing here is needed to train with hvdloss, and nothing here knows a framework: arrays are NumPy's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ONE, EXACT, PLAIN = "one process", "hvdloss", "plain averaging"
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
PROGRESS = "HVDLOSS_EXAMPLE_PROGRESS"  # set by demo.py, which draws the bar; see Progress
MARK = "\x1eprogress "


# -- ranks ----


def told_by_all(communicator: Any, value: Any) -> list[Any]:
    """Return every rank's value, in rank order; as JSON, so that no rank runs what another one sent."""
    text = json.dumps(value, default=float).encode()
    return [json.loads(told) for told in communicator.all_gather_bytes(text, "example.told")]


# -- options ------------------------------------------------------------------------------------------


def options(name: str, text: str, *, epochs: int, batch: int) -> argparse.ArgumentParser:
    """Return a parser of the options that all examples have; an example may add its own."""
    parser = argparse.ArgumentParser(
        description=text,
        epilog=f"On several ranks: horovodrun --gloo -np 4 python examples/{name}.py",
    )
    parser.set_defaults(name=name)
    add = parser.add_argument
    add("--epochs", type=at_least(1), default=epochs, help="passes over the data (%(default)s)")
    add("--batch", type=at_least(1), default=batch, help="samples a step, of all ranks (%(default)s)")
    add("--seed", type=at_least(0), default=0, help="of weights and order (%(default)s)")
    add(
        "--shares",
        type=_shares,
        help="each rank's part of the data, as 0.55,0.25,0.15,0.05 (default: the last rank has an eighth "
        "of the first one's)",
    )
    add("--dtype", choices=sorted(TOLERANCE), default="float64", help="of all arithmetic (%(default)s)")
    add("--output", type=Path, default=Path("runs") / name, help="folder of the results (%(default)s)")
    add("--quiet", action="store_true", help="print only what is wrong")
    add("--json", action="store_true", help="print the numbers as JSON instead of tables")
    return parser


def at_least(least: int) -> Callable[[str], int]:
    """Return a parser of integers that are not below `least`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    return integer


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 0.5,0.3,0.2") from None
    if not all(0 <= s < float("inf") for s in shares) or not sum(shares) > 0:
        raise argparse.ArgumentTypeError(f"{text!r}: shares are numbers of at least 0, and not all 0")
    return [s / sum(shares) for s in shares]


# -- data ---------------------------------------------------------------------------------------------


class Shards:
    """Which samples each rank holds, and which of them it brings to each step.

    Every rank goes through its own shard once an epoch, in as many steps as the others: a rank with a
    larger shard has larger batches. All of it follows from the arguments, so that any process can tell
    what any rank does, and one process can take all ranks' samples of a step at once.

    Args:
        order: indices of the samples; ranks take their shards from it one after the other.
        shares: each rank's part, or None for a last rank with an eighth of what the first one has.
        size: number of ranks.
        batch: samples a step, of all ranks together (about).
        seed: of the order within a shard, which is another one each epoch.
    """

    def __init__(
        self, order: Sequence[int] | np.ndarray, shares: list[float] | None, size: int, batch: int, seed: int
    ) -> None:
        if shares is None:
            falling = 8.0 ** -(np.arange(size) / max(1, size - 1))
            shares = list(falling / falling.sum())
        if len(shares) != size:
            sys.exit(f"error: --shares has {len(shares)} numbers, but there are {size} ranks")
        self.size, self.seed, self.shares = size, seed, shares
        cuts = np.rint(np.cumsum(shares)[:-1] * len(order)).astype(int)
        self.shards = np.split(np.asarray(order), cuts)
        self.steps = -(-len(order) // batch)  # an epoch

    def batch(self, rank: int, epoch: int, step: int) -> np.ndarray:
        """Return the samples that `rank` brings to a step; may be none."""
        shuffled = np.random.default_rng([self.seed, epoch, rank]).permutation(self.shards[rank])
        return np.array_split(shuffled, self.steps)[step]

    def union(self, epoch: int, step: int) -> np.ndarray:
        """Return the samples of all ranks in a step: what one process takes."""
        return np.concatenate([self.batch(rank, epoch, step) for rank in range(self.size)])


def split(count: int, seed: int, test: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of training and held-out samples, in random order."""
    mixed = np.random.default_rng([seed, count]).permutation(count)
    held_out = round(count * test)
    return mixed[held_out:], mixed[:held_out]


# -- progress -----------------------------------------------------------------------------------------


def on_terminal() -> bool:
    """Return whether a person watches this process's output directly.

    Under a launcher it is gathered and prefixed first, though mpirun lends its ranks a pseudo-terminal.
    """
    launched = {"HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"} & os.environ.keys()
    return sys.stdout.isatty() and not launched


class Progress:
    """One bar for the whole job, on the one rank that shows it.

    On a terminal a live bar; otherwise (under horovodrun output is a pipe) a few plain lines. demo.py
    asks for marked lines and draws the bar itself.

    >>> with Progress(total=20, show=True) as progress:
    ...     progress.advance("hvdloss", 0.25)
    """

    def __init__(self, total: int, *, show: bool, lines: int = 10) -> None:
        self.total, self.done, self.show = total, 0, show
        self._marked = bool(os.environ.get(PROGRESS))
        self._live = show and on_terminal()
        self._every = -(-total // (100 if self._marked else lines))
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self._live:
            from rich import progress as p

            self._bar = p.Progress(
                p.TextColumn("{task.description}"), p.BarColumn(None), p.TaskProgressColumn(),
                p.TimeElapsedColumn(), transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=self.total)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.show and self._marked:
            print(f"{MARK}{self.done}/{self.total} comparing", flush=True)

    def advance(self, what: str, loss: float) -> None:
        """Note one step of `what` that had this loss."""
        self.done += 1
        if not self.show:
            return
        line = f"{what:<16} loss {loss:.4f}"
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=line)
        elif self.done % self._every == 0 or self.done == self.total:
            if self._marked:
                print(f"{MARK}{self.done}/{self.total} {line}", flush=True)
            else:
                print(f"  {100 * self.done // self.total:3d} %  {line}", flush=True)


# -- records ------------------------------------------------------------------------------------------


def recorder(hvd: Any, args: argparse.Namespace, **options: Any) -> Any:
    """Return a recorder of an example's run: ``hvdloss report runs/NAME`` makes a page of what it writes."""
    settings = {k: v for k, v in vars(args).items() if k not in ("name", "output", "quiet", "json")}
    path = args.output / "run.jsonl"
    return hvd.Recorder(path, name=args.name, settings=settings, exists="replace", **options)


# -- what a run leaves --------------------------------------------------------------------------------


def relative(a: Any, b: Any) -> float:
    """Return |a - b| / |b|, of numbers or arrays (Euclidean norm)."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


class Watch:
    """Looks on while a model trains; call it after every step, with what the step reports.

    Args:
        name: of the way of training: ONE, EXACT or PLAIN.
        parameters: gives the model's parameters as one flat array.
        gradient: gives the gradient that the step used, likewise.
        progress: is advanced.
        keep: whether to keep arrays (one rank does), or only times.
    """

    def __init__(
        self,
        name: str,
        parameters: Callable[[], np.ndarray],
        gradient: Callable[[], np.ndarray],
        progress: Progress,
        keep: bool = True,
    ) -> None:
        self.name, self.keep = name, keep
        self._parameters, self._gradient, self._progress = parameters, gradient, progress
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.waits: list[list[float]] = []  # each rank's, held up by communication, in the step before
        self.gradients: list[np.ndarray] = []
        self.parameters: list[np.ndarray] = []  # before the first step, and after each
        if keep:
            self.parameters.append(np.array(parameters(), dtype=np.float64))
        self._began = time.perf_counter()

    def __call__(self, loss: Any) -> None:
        """Note a step by its loss or its StepReport; the time that this takes is not counted."""
        self.seconds.append(time.perf_counter() - self._began)
        if hasattr(loss, "ranks"):
            self.waits.append([one.communication for one in loss.ranks])
            loss = loss.loss
        self.losses.append(float(loss))
        if self.keep:
            self.gradients.append(np.array(self._gradient(), dtype=np.float64))
            self.parameters.append(np.array(self._parameters(), dtype=np.float64))
        self._progress.advance(self.name, self.losses[-1])
        self._began = time.perf_counter()


@dataclass
class Outcome:
    """What came of one way of training; errors are relative differences to one process."""

    name: str
    curve: list[float]  # loss of all training samples: before training, then after each epoch
    gradient_errors: list[float] = field(default_factory=list)  # each step
    loss_error: float | None = None  # the largest of all steps
    gradient_error: float | None = None  # the largest of all steps
    parameter_error: float | None = None  # after training
    test: dict[str, float] = field(default_factory=dict)  # on held-out samples, by name


@dataclass
class RankRow:
    """One rank's part of the job."""

    rank: int
    samples: int
    weight: float
    step_ms: float  # median
    waiting_ms: float | None = None  # median time of a step that communication held the rank up
    micro_batches: int = 1  # the most in a step


def outcome(
    watch: Watch,
    one: Watch,
    shards: Shards,
    oracle: Callable[[np.ndarray, np.ndarray], tuple[float, np.ndarray]],
    training_loss: Callable[[np.ndarray], float],
    test: Callable[[np.ndarray], dict[str, float]],
) -> Outcome:
    """Hold every step of `watch` against one process that takes the same step.

    Args:
        watch: what was seen of the ranks' training.
        one: of one process's own training, for the parameters after it.
        shards: which samples were in which step.
        oracle: ``(parameters, samples) -> (loss, gradient)`` in one process.
        training_loss: of all training samples, at some parameters.
        test: measures on held-out samples, at some parameters.
    """
    losses, gradients = [], []
    for i, (loss, gradient) in enumerate(zip(watch.losses, watch.gradients, strict=True)):
        right = oracle(watch.parameters[i], shards.union(*divmod(i, shards.steps)))
        losses.append(relative(loss, right[0]))
        gradients.append(relative(gradient, right[1]))
    return Outcome(
        watch.name,
        curve=[training_loss(p) for p in watch.parameters[:: shards.steps]],
        gradient_errors=gradients,
        loss_error=max(losses),
        gradient_error=max(gradients),
        parameter_error=relative(watch.parameters[-1], one.parameters[-1]),
        test=test(watch.parameters[-1]),
    )


# -- the report ---------------------------------------------------------------------------------------


def conclude(
    args: argparse.Namespace,
    title: str,
    outcomes: list[Outcome],
    ranks: list[RankRow],
    *,
    remark: str = "",
    loss_unit: str = "",
) -> int:
    """Print the tables, write picture and numbers, and return the exit status (one rank calls this).

    The status is 1, with a message, if hvdloss's gradient or loss is not that of one process.

    Args:
        args: parsed :func:`options`.
        title: what was trained.
        outcomes: of ONE, EXACT and PLAIN; PLAIN may be missing. Others are shown as well.
        ranks: one row per rank.
        remark: one line on what makes the case hard.
        loss_unit: for the loss axis, as "nats".
    """
    tolerance = TOLERANCE[args.dtype]
    args.output.mkdir(parents=True, exist_ok=True)
    picture, numbers = args.output / "loss.png", args.output / "numbers.json"
    draw(picture, title, outcomes, loss_unit, tolerance)
    exact = next(o for o in outcomes if o.name == EXACT)
    measured = {"loss": exact.loss_error, "gradient": exact.gradient_error}
    wrong = {k: v for k, v in measured.items() if v is not None and not v <= tolerance}
    data = {
        "name": args.name,
        "title": title,
        "remark": remark,
        "size": len(ranks),
        "dtype": args.dtype,
        "epochs": args.epochs,
        "tolerance": tolerance,
        "exact": not wrong,
        "outcomes": [asdict(o) for o in outcomes],
        "ranks": [asdict(r) for r in ranks],
        "picture": str(picture),
    }
    text = json.dumps(data, indent=1)
    numbers.write_text(text + "\n")
    if args.json:
        print(text, flush=True)
    elif not args.quiet:
        show(title, outcomes, ranks, remark)
    for what, value in wrong.items():
        print(
            f"error: the {what} of hvdloss differs from one process's by {value:.1e} (relative), more than "
            f"{tolerance:.0e} for {args.dtype}",
            file=sys.stderr,
            flush=True,
        )
    return 1 if wrong else 0


def show(title: str, outcomes: list[Outcome], ranks: list[RankRow], remark: str) -> None:
    """Print the comparison and the ranks as two tables."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    terminal = on_terminal()
    width = None if terminal else int(os.environ.get("COLUMNS", 100))
    color = terminal or bool(os.environ.get("FORCE_COLOR"))
    console = Console(width=width, force_terminal=color, highlight=False)
    metrics = list(dict.fromkeys(name for o in outcomes for name in o.test))

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("\ntrained by", no_wrap=True)
    for first, second in (("loss*", ""), ("gradient*", ""), ("parameters", "at the end")):
        table.add_column(f"{first}\n{second}" if second else f"\n{first}", justify="right", no_wrap=True)
    for name in metrics:
        table.add_column(f"held-out\n{name}", justify="right", no_wrap=True)
    for one in outcomes:
        style = {EXACT: "green", PLAIN: "red"}.get(one.name, "")
        errors = [one.loss_error, one.gradient_error, one.parameter_error]
        shown = ["-" if e is None else f"{e:.1e}" for e in errors]
        shown += [f"{one.test[m]:#.4g}" if m in one.test else "-" for m in metrics]
        table.add_row(one.name, *shown, style=style)
    print()
    console.print(table)
    print("Relative differences to one process; * largest of all steps, each from the same parameters")

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    accumulates = any(r.micro_batches > 1 for r in ranks)
    waits = any(r.waiting_ms is not None for r in ranks)
    columns = ["rank", "samples", "weight", *["micro-\nbatches"] * accumulates, "median\nstep"]
    for name in [*columns, *["of it\nwaiting"] * waits]:
        table.add_column(name if "\n" in name else f"\n{name}", justify="right", no_wrap=True)
    samples, weight = sum(r.samples for r in ranks), sum(r.weight for r in ranks)
    for r in ranks:
        row = [
            str(r.rank),
            f"{r.samples} ({r.samples / samples:.1%})",
            f"{r.weight:.1f} ({r.weight / weight:.1%})",
        ]
        row += [str(r.micro_batches)] * accumulates + [f"{r.step_ms:.1f} ms"]
        row += ["-" if r.waiting_ms is None else f"{r.waiting_ms:.1f} ms"] * waits
        table.add_row(*row)
    console.print(table)
    if len(ranks) == 1:
        print("One rank holds all samples: hvdloss is one process, and nothing is averaged.")
    elif remark:
        print(remark)


_SKY, _BLUE, _VERMILLION, _GREEN = "#8ccbf0", "#003f6b", "#d55e00", "#009e73"
_LINES: dict[str, dict[str, Any]] = {  # colours of Okabe and Ito's palette, told apart by line style as well
    ONE: {"color": _SKY, "linewidth": 6, "solid_capstyle": "round", "zorder": 2},
    EXACT: {"color": _BLUE, "linewidth": 1.6, "linestyle": (0, (4, 2)), "zorder": 4},
    PLAIN: {"color": _VERMILLION, "linewidth": 1.8, "linestyle": "-", "zorder": 3},
}
_OTHER: dict[str, Any] = {"color": _GREEN, "linewidth": 1.8, "linestyle": (0, (1, 1.5)), "zorder": 3}


def draw(path: Path, title: str, outcomes: list[Outcome], loss_unit: str, tolerance: float) -> None:
    """Draw the loss curves and, where known, each step's gradient error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = any(o.gradient_errors for o in outcomes)
    figure, axes = plt.subplots(
        1, 1 + steps, figsize=(6 + 5 * steps, 4.4), layout="constrained", dpi=130, squeeze=False
    )
    figure.suptitle(title, fontsize=12)
    left = axes[0, 0]
    for one in outcomes:
        left.plot(range(len(one.curve)), one.curve, label=one.name, **_LINES.get(one.name, _OTHER))
    left.set_xlabel("epochs")
    left.set_ylabel("\n".join(["loss of all training samples", *[f"({loss_unit})"] * bool(loss_unit)]))
    left.legend(frameon=False)
    if steps:
        right = axes[0, 1]
        for one in outcomes:
            if one.gradient_errors:
                errors = np.maximum(one.gradient_errors, 1e-17)  # 0 has no place on a logarithmic axis
                style = _LINES.get(one.name, _OTHER) | {"linestyle": "-", "linewidth": 1.2}
                right.plot(np.arange(1, len(errors) + 1), errors, label=one.name, **style)
        right.axhline(tolerance, color="0.5", linewidth=1, linestyle=":")
        right.annotate(
            f"allowed: {tolerance:.0e}", (0.99, tolerance), xycoords=("axes fraction", "data"),
            xytext=(0, 4), textcoords="offset points", ha="right", color="0.35", fontsize=9,
        )  # fmt: skip
        right.set_yscale("log")
        right.set_ylim(1e-18, 10)
        right.set_xlabel("steps")
        right.set_ylabel("gradient's relative difference to one process")
        right.legend(frameon=False, loc="center right")
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    figure.savefig(path)
    plt.close(figure)
