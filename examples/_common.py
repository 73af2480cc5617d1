"""What the demos share: real data split over ranks, the comparison with one process, a table and a picture.

Nothing here is needed to train with hvdloss, and nothing here knows a framework: arrays are NumPy's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ONE, EXACT, PLAIN = WAYS = ("one process", "hvdloss", "plain averaging")
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}  # of a step's loss and gradient, relative
DRIFT = 1000  # times that, for the parameters after some hundred steps


# -- options ------------------------------------------------------------------------------------------


def options(name: str, text: str, *, epochs: int, batch: int, seeds: int) -> argparse.ArgumentParser:
    """Return a parser of the options that all demos have; a demo may add its own."""
    parser = argparse.ArgumentParser(
        description=text.splitlines()[0],
        epilog=f"On several ranks: horovodrun -np 2 python examples/{name}.py",
    )
    parser.set_defaults(name=name)
    add = parser.add_argument
    add("--epochs", type=at_least(1), default=epochs, help="passes over the data (%(default)s)")
    add("--batch", type=at_least(1), default=batch, help="samples in a step, over all ranks (%(default)s)")
    add("--seeds", type=at_least(1), default=seeds, help="repeat with this many seeds (%(default)s)")
    add("--shares", type=_shares, help="each rank's part of the data, as 0.8,0.15,0.05")
    add("--dtype", choices=sorted(TOLERANCE), default="float64", help="of all arithmetic (%(default)s)")
    add("--output", type=Path, default=Path("runs") / name, help="folder of the results (%(default)s)")
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


def split(count: int, seed: int, test: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of training and held-out samples, in random order."""
    mixed = np.random.default_rng([seed, count]).permutation(count)
    held_out = round(count * test)
    return mixed[held_out:], mixed[:held_out]


def digits(seed: int) -> tuple[tuple[np.ndarray, ...], np.ndarray, np.ndarray]:
    """Return scikit-learn's digits at 4 x 4 pixels: ``(x, y, weight), training, held_out``.

    8s and 9s count five times. Training samples come roughly by label, from 9 down to 0: shards taken
    from them one after the other hold different digits, as those of different sites do.
    """
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = x.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16) / 16
    training, held_out = split(len(y), seed)
    rank_by = np.random.default_rng(seed).uniform(0, 2, len(y)) - y
    return (x, y, np.where(y >= 8, 5.0, 1.0)), training[np.argsort(rank_by[training])], held_out


def digit_measures(prediction: np.ndarray, loss: float, y: np.ndarray) -> dict[str, float]:
    """Return what the demos on digits measure on held-out samples."""
    right = prediction.argmax(1) == y
    return {"loss (nats)": loss, "recall of 8, 9": right[y >= 8].mean(), "accuracy": right.mean()}


class Shards:
    """Which samples each rank holds, and which of them it brings to each step.

    All of it follows from the arguments, so that one process can take all ranks' samples of a step.

    Args:
        order: indices of the samples; ranks take their shards from it one after the other.
        shares: each rank's part, or None for a last rank with a quarter of what the first one has.
        size: number of ranks.
        batch: samples in a step, over all ranks together (about).
        seed: of the order within a shard, which is another one each epoch.
        ragged: every rank takes batches of the same size until its shard ends: the last one is short, and
            some ranks have none left while others go on. Otherwise a larger shard has larger batches.
    """

    def __init__(
        self, order: Any, shares: list[float] | None, size: int, batch: int, seed: int, ragged: bool = False
    ) -> None:
        shares = shares or list(4.0 ** -(np.arange(size) / max(1, size - 1)))
        if len(shares) != size:
            sys.exit(f"error: --shares has {len(shares)} numbers, but there are {size} ranks")
        self.size, self.seed = size, seed
        cuts = np.rint(np.cumsum(shares)[:-1] / sum(shares) * len(order)).astype(int)
        self.shards = np.split(np.asarray(order), cuts)
        self._own = max(1, batch // size) if ragged else None
        self.steps = -(-max(map(len, self.shards)) // self._own) if self._own else -(-len(order) // batch)

    def batch(self, rank: int, epoch: int, step: int) -> np.ndarray:
        """Return the samples that `rank` brings to a step; may be none."""
        shuffled = np.random.default_rng([self.seed, epoch, rank]).permutation(self.shards[rank])
        if self._own:
            return shuffled[step * self._own : (step + 1) * self._own]
        return np.array_split(shuffled, self.steps)[step]

    def union(self, epoch: int, step: int) -> np.ndarray:
        """Return the samples of all ranks in a step: what one process takes."""
        return np.concatenate([self.batch(rank, epoch, step) for rank in range(self.size)])


# -- training and comparison --------------------------------------------------------------------------


class Job:
    """One demo with one seed: its data, its model, and the ways to train it.

    ``_torch.py`` and ``_tensorflow.py`` fill in what is a framework's; a demo gives `make` (a new model, as
    the seed makes it) and `train`, what one writes to train with hvdloss.

    Args:
        args: of :func:`options`.
        seed: of data, weights and order.
        data: arrays with a row per sample.
        shards: of the training samples.
        held_out: indices of those to measure on.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        seed: int,
        data: tuple[np.ndarray, ...],
        shards: Shards,
        held_out: np.ndarray,
    ) -> None:
        self.args, self.seed, self.shards, self.held_out = args, seed, shards, held_out
        self.data = tuple(a.astype(args.dtype) if a.dtype.kind == "f" else a for a in data)

    def samples(self, index: np.ndarray) -> tuple[Any, ...]:
        """Return some samples as the framework takes them."""
        return tuple(a[index] for a in self.data)

    def batches(self, rank: int | None) -> Iterator[tuple[Any, ...]]:
        """Yield what a rank (None: all of them) brings to each step, epoch after epoch."""
        yield from map(self.samples, self._indices(rank))

    def micro_batches(self, rank: int, micro: int) -> Iterator[list[tuple[Any, ...]]]:
        """Yield the same cut into micro-batches of `micro` samples; the last one may be shorter."""
        for index in self._indices(rank):
            yield [self.samples(part) for part in np.split(index, range(micro, len(index), micro))]

    def most_micro_batches(self, micro: int) -> int:
        """Return the largest number of micro-batches that any rank has in a step."""
        longest = -(-max(map(len, self.shards.shards)) // self.shards.steps)
        return -(-longest // micro)

    def _indices(self, rank: int | None) -> Iterator[np.ndarray]:
        for epoch, step in itertools.product(range(self.args.epochs), range(self.shards.steps)):
            yield self.shards.union(epoch, step) if rank is None else self.shards.batch(rank, epoch, step)

    # A framework's:
    make: Callable[[], Any]
    train: Callable[[Any, Watch], None]
    train_plainly: Callable[[Any, Watch], None]
    train_alone: Callable[[Any, Watch], None]
    parameters: Callable[[Any], Any]  # of a model
    gradients: Callable[[Any], Any]  # of the step before; None where they are not to be had
    flat: Callable[[Any, Any], np.ndarray]  # (model, tensors): as one vector
    make_ordinary: Callable[[], Any]  # a model as one process has it
    put: Callable[[Any, np.ndarray], Any]  # such a model, with these parameters
    loss: Callable[[Any, tuple], tuple[float, np.ndarray]]  # (model, samples): with its gradient
    measure: Callable[[Any], dict[str, float]]  # on held-out samples; the first is a loss


def recorder(hvd: Any, args: argparse.Namespace) -> Any:
    """Return a recorder: ``hvdloss report runs/NAME`` makes a page of what it writes."""
    settings = {k: v for k, v in vars(args).items() if k not in ("name", "output")}
    return hvd.Recorder(args.output / "run.jsonl", name=args.name, settings=settings, exists="replace")


class Watch:
    """Notes what a model that is being trained does; call it after every step, with the step's loss.

    Args:
        job: what is trained.
        model: its model.
        every_step: whether to keep each step's parameters and gradient, or each epoch's parameters.
    """

    def __init__(self, job: Job, model: Any, every_step: bool) -> None:
        self._job, self._model, self._every_step = job, model, every_step
        self.losses: list[float] = []
        self.gradients: list[np.ndarray] = []
        self.parameters = [self._flat(job.parameters(model))]  # before the first step, and after each

    def _flat(self, tensors: Any) -> np.ndarray:
        return np.array(self._job.flat(self._model, tensors), dtype=np.float64)

    def __call__(self, loss: Any, gradients: Any = None) -> None:
        self.losses.append(float(loss))
        if self._every_step or len(self.losses) % self._job.shards.steps == 0:
            self.parameters.append(self._flat(self._job.parameters(self._model)))
        gradients = self._job.gradients(self._model) if gradients is None else gradients
        if self._every_step and gradients is not None:
            self.gradients.append(self._flat(gradients))


def relative(a: Any, b: Any) -> float:
    """Return |a - b| / |b|, of numbers or arrays (Euclidean norm)."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def told_by_all(communicator: Any, value: Any) -> list[Any]:
    """Return every rank's value, in rank order; as JSON, so that no rank runs what another one sent."""
    text = json.dumps(value, default=float).encode()
    return [json.loads(told) for told in communicator.all_gather_bytes(text, "example.told")]


def compare(
    args: argparse.Namespace, make_job: Callable[[int], Job], hvd: Any, communicator: Any, **report: Any
) -> int:
    """Train in three ways from the same start, for each seed, and report.

    Returns:
        the exit status, the same on every rank: 1 if hvdloss's loss, gradient or trained model is not that
        of one process.
    """
    first, began = hvd.rank() == 0, time.perf_counter()
    found: dict[str, Any] = {name: {"test": {}, "curve": []} for name in WAYS}
    for seed in range(args.seeds):
        job = make_job(seed)
        watches = {}
        for name, way in ((EXACT, job.train), (PLAIN, job.train_plainly), (ONE, job.train_alone)):
            if name != ONE or first:
                alone = name == ONE
                model = job.put(job.make_ordinary(), watches[EXACT].parameters[0]) if alone else job.make()
                watches[name] = Watch(job, model, every_step=seed == 0)
                way(model, watches[name])
        if first:
            for name, watch in watches.items():
                _judge(found[name], job, watch, watches[ONE])
            metric, *_ = found[EXACT]["test"]
            values = ", ".join(f"{name} {found[name]['test'][metric][-1]:.4g}" for name in WAYS)
            print(f"  seed {seed}: held-out {metric}: {values}", flush=True)
    status = 0
    if first:
        seconds = time.perf_counter() - began
        status = conclude(args, found, size=hvd.size(), seconds=seconds, **report)
    return int(told_by_all(communicator, status)[0])


def _judge(found: dict[str, Any], job: Job, watch: Watch, one: Watch) -> None:
    """Add to `found` what came of one way of training with one seed; differences are to one process."""
    model = job.make_ordinary()
    epochs = watch.parameters[:: job.shards.steps if job.seed == 0 else 1]
    measures = [job.measure(job.put(model, p)) for p in epochs]
    for name, value in measures[-1].items():
        found["test"].setdefault(name, []).append(float(value))
    found["curve"].append([float(next(iter(m.values()))) for m in measures])
    if watch is one:
        return
    off = relative(watch.parameters[-1], one.parameters[-1])
    found["parameter_error"] = float(np.maximum(off, found.get("parameter_error", 0.0)))  # keeps a NaN
    if job.seed:
        return
    losses, gradients = [], []  # each step's, from the parameters that it started from
    for i, loss in enumerate(watch.losses):
        samples = job.samples(job.shards.union(*divmod(i, job.shards.steps)))
        right = job.loss(job.put(model, watch.parameters[i]), samples)
        losses.append(relative(loss, right[0]))
        gradients += [relative(g, right[1]) for g in watch.gradients[i : i + 1]]
    found["loss_error"], found["gradient_errors"] = float(np.max(losses)), gradients


# -- the report ---------------------------------------------------------------------------------------


def conclude(
    args: argparse.Namespace, found: dict[str, Any], *, size: int, seconds: float, title: str, remark: str
) -> int:
    """Print the table, write picture and numbers, and return the exit status (one rank calls this).

    Args:
        args: of :func:`options`.
        found: by way of training: its measures and curves by seed, and its differences to one process.
        size: number of ranks.
        seconds: that training and measuring took.
        title: what was trained.
        remark: one line on what makes the case hard.
    """
    allowed, exact = TOLERANCE[args.dtype], found[EXACT]
    measured = {
        "loss": (exact["loss_error"], allowed),
        "gradient": (float(np.max(exact["gradient_errors"], initial=0.0)), allowed),
        "trained model": (exact["parameter_error"], DRIFT * allowed),
    }
    wrong = {k: v for k, v in measured.items() if not v[0] <= v[1]}
    args.output.mkdir(parents=True, exist_ok=True)
    picture = args.output / "loss.png"
    data = {
        "name": args.name,
        "title": title,
        "remark": remark,
        "verdict": verdict(found) if size > 1 else "One rank holds all samples: nothing is averaged.",
        "size": size,
        "seeds": args.seeds,
        "dtype": args.dtype,
        "tolerance": allowed,
        "exact": not wrong,
        "seconds": seconds,
        "outcomes": found,
        "picture": str(picture),
    }
    (args.output / "numbers.json").write_text(json.dumps(data, indent=1) + "\n")
    draw(picture, data)
    show(data)
    for what, (value, most) in wrong.items():
        print(
            f"error: the {what} of hvdloss differs from one process's by {value:.1e} (relative), more than "
            f"{most:.0e} for {args.dtype}",
            file=sys.stderr,
            flush=True,
        )
    return 1 if wrong else 0


def verdict(found: dict[str, Any]) -> str:
    """Return one sentence: in how many seeds plain averaging is off in each measure, and by how much."""
    clauses = []
    for name, exact in found[EXACT]["test"].items():
        more = np.array(found[PLAIN]["test"][name]) / np.array(exact) - 1
        word, count = ("higher", (more > 0).sum()) if more.mean() > 0 else ("lower", (more < 0).sum())
        spread = f"{more.min():+.1%}" + (f" to {more.max():+.1%}" if len(more) > 1 else "")
        clauses.append(f"{name} {word} in {count} of {len(more)} seeds ({spread})")
    return f"With plain averaging, held-out {'; '.join(clauses)}."


def show(data: dict[str, Any]) -> None:
    """Print the comparison as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    color = bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty()
    console = Console(width=int(os.environ.get("COLUMNS", 100)), force_terminal=color, highlight=False)
    found = data["outcomes"]
    console.print(f"\n[bold]{data['title']}, on {data['size']} rank(s), {data['seeds']} seed(s)[/]")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("\ntrained by", no_wrap=True)
    for name in [
        *(f"held-out\n{m}" for m in found[EXACT]["test"]),
        "gradient*\nmedian",
        "\nlargest",
        "\nmodel*",
    ]:
        table.add_column(name, justify="right", no_wrap=True)
    for name, one in found.items():
        row = [f"{np.mean(v):.3f} ± {np.std(v):.3f}" if max(v) < 10 else f"{np.mean(v):.1f} ± {np.std(v):.1f}"
               for v in one["test"].values()]  # fmt: skip
        errors = one.get("gradient_errors")
        row += [f"{np.median(errors):.1e}", f"{max(errors):.1e}"] if errors else ["-", "-"]
        row.append(f"{one['parameter_error']:.1e}" if "parameter_error" in one else "-")
        table.add_row(name, *row, style={EXACT: "green", PLAIN: "red"}.get(name, ""))
    console.print(table)
    print("± standard deviation over seeds; * relative difference to one process: of each step's gradient")
    print("  (first seed), of the trained model (largest of all seeds)")
    print(data["remark"])
    print(data["verdict"], flush=True)


_LINES: dict[str, dict[str, Any]] = {  # colours of Okabe and Ito's palette, told apart by line style as well
    ONE: {"color": "#8ccbf0", "linewidth": 5, "solid_capstyle": "round", "zorder": 2},
    EXACT: {"color": "#003f6b", "linewidth": 1.5, "linestyle": (0, (4, 2)), "zorder": 4},
    PLAIN: {"color": "#d55e00", "linewidth": 1.5, "zorder": 3},
}


def draw(path: Path, data: dict[str, Any]) -> None:
    """Draw the held-out loss by epoch, with its spread over seeds, and each step's gradient error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = data["outcomes"]
    steps = bool(found[EXACT]["gradient_errors"])
    figure, axes = plt.subplots(1, 1 + steps, figsize=(4 + 4 * steps, 3), layout="constrained", dpi=80)
    left, *rest = np.atleast_1d(axes)
    figure.suptitle(data["title"], fontsize=10)
    for name, one in found.items():
        curves = np.array(one["curve"])
        left.plot(curves.mean(0), label=name, **_LINES[name])
        if name != ONE:
            color = _LINES[name]["color"]
            left.fill_between(
                range(curves.shape[1]), curves.min(0), curves.max(0), color=color, alpha=0.12, lw=0
            )
    final = np.array([one["curve"] for one in found.values()])[:, :, -max(2, curves.shape[1] * 3 // 4) :]
    left.set_ylim(final.min() - 0.1 * np.ptp(final), final.max() + 0.1 * np.ptp(final))
    left.set_xlabel("epochs")
    left.set_ylabel(f"held-out {next(iter(found[EXACT]['test']))}")
    left.legend(frameon=False)
    for right in rest:
        for name in (EXACT, PLAIN):
            errors = np.maximum(found[name]["gradient_errors"], 1e-17)  # 0 has no place on this axis
            right.semilogy(errors, label=name, **_LINES[name] | {"linestyle": "-", "linewidth": 1})
        right.axhline(data["tolerance"], color="0.5", linewidth=1, linestyle=":")
        right.set_ylim(1e-18, 100)
        right.set_xlabel("steps")
        right.set_ylabel("gradient off by (relative)")
        right.legend(frameon=False, loc="center right")
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    figure.savefig(path)
    plt.close(figure)
