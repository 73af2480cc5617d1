"""``hvdloss bench``: start the benchmarks under horovodrun, and show what they measured."""

from __future__ import annotations

import importlib
import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from hvdloss.cli import machine
from hvdloss.cli.errors import Exit, InstallError, Interrupted
from hvdloss.cli.process import Log, interruptible
from hvdloss.cli.progress import bar

TORCH_WORKLOADS = ("small", "transformer", "mlp", "conv")
TENSORFLOW_WORKLOADS = ("tf-small", "tf-mlp")
PEERS = ("compute", "horovod", "ddp", "plain", "hvdloss")
_PROGRESS = re.compile(r"hvdloss-bench (\d+)/(\d+) (.*)")

#: What is aimed at: (what, workloads, controller, peer, by peer, at most).
GOALS: tuple[tuple[str, tuple[str, ...], str, str, str, float], ...] = (
    ("hvdloss / Horovod's optimizer", ("small",), "gloo", "hvdloss", "horovod", 0.65),
    ("hvdloss / Horovod's optimizer", ("transformer", "mlp"), "gloo", "hvdloss", "horovod", 0.80),
    ("hvdloss / DDP over Gloo", TORCH_WORKLOADS, "gloo", "hvdloss", "ddp", 1.00),
    ("hvdloss over MPI / DDP over Gloo", ("mlp",), "mpi", "hvdloss", "ddp", 0.80),
    ("exact / without objective", TORCH_WORKLOADS, "gloo", "hvdloss", "plain", 1.01),
    ("hvdloss tape / Horovod's tape", TENSORFLOW_WORKLOADS, "gloo", "hvdloss", "horovod", 0.85),
)


def ratio_interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Return median(a) / median(b) with its 95 % bootstrap interval over paired rounds.

    Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), percentile interval.
    """
    rng = np.random.default_rng(0)
    pairs = np.stack([a, b], axis=1)
    draws = pairs[rng.integers(0, len(pairs), (2000, len(pairs)))]
    ratios = np.median(draws[..., 0], axis=1) / np.median(draws[..., 1], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return statistics.median(a) / statistics.median(b), float(low), float(high)


# -- running ------------------------------------------------------------------------------------------


class _Jobs:
    """Starts one horovodrun after another, with a progress bar."""

    def __init__(self, log: Log, progress: Progress) -> None:
        self.log, self.progress = log, progress
        self.status = 0
        self.task = progress.add_task("", total=None)

    def run(self, title: str, module: str, ranks: int, controller: str, arguments: Iterable[str]) -> Any:
        """Run a benchmark on its ranks; return what rank 0 wrote.

        Raises:
            InstallError: Horovod is not there, or a rank failed.
        """
        launcher = machine.script_path("horovodrun")
        if launcher is None:
            raise InstallError("horovodrun is neither beside this Python nor on PATH.", "hvdloss install")
        self.progress.update(self.task, description=title, total=None, completed=0)
        with tempfile.TemporaryDirectory(prefix="hvdloss-bench-") as folder:
            path = Path(folder) / "numbers.json"
            command = [launcher, f"--{controller}", "-np", str(ranks), sys.executable, "-m", module]
            command += [*arguments, "--json", str(path)]
            env = dict(os.environ, TF_CPP_MIN_LOG_LEVEL="3", OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
            for name in ("HOROVOD_RANK", "HOROVOD_SIZE", "OMPI_COMM_WORLD_RANK"):
                env.pop(name, None)
            ended = self.log.run(command, env=env, listener=lambda line: self._heard(title, line))
            if ended.status != 0 or not path.exists():
                words = [line for line in ended.tail if line.strip() and not _PROGRESS.search(line)]
                raise InstallError(
                    f"{ranks} ranks of {module} over {controller} ended with status {ended.status}.",
                    "hvdloss doctor",
                    status=Exit.RANKS,
                    detail="\n".join(words[-8:]),
                    log=str(self.log.path),
                )
            return json.loads(path.read_text())

    def _heard(self, title: str, line: str) -> None:
        if found := _PROGRESS.search(line):
            done, of, label = int(found[1]), int(found[2]), found[3]
            self.progress.update(self.task, description=f"{title}: {label}", completed=done, total=of)


@contextmanager
def _started(folder: Path) -> Iterator[_Jobs]:
    """Yield a runner of jobs; turn errors into a message and the runner's status.

    What was measured before is still there to be shown.
    """
    console = Console(stderr=True)
    folder.mkdir(parents=True, exist_ok=True)
    log = Log(folder / "bench.log")
    try:
        with bar() as progress:
            jobs = _Jobs(log, progress)
            with interruptible():
                yield jobs
    except Interrupted as stop:
        console.print(f"Stopped by {stop}.")
        jobs.status = stop.status
    except InstallError as error:
        console.print(str(error), style="bold red", markup=False)
        if error.detail:
            console.print(error.detail, markup=False, highlight=False)
        if error.log:
            console.print(f"All that was printed: {error.log}", markup=False, soft_wrap=True)
        jobs.status = int(error.status)
    finally:
        log.close()


def _controllers(asked: str) -> list[str]:
    return ["gloo", "mpi"] if asked == "both" else [asked]


_ranks = click.option("-np", "--ranks", type=click.IntRange(1), multiple=True, help="Repeat for several. [2]")
_controller = click.option(
    "--controller", type=click.Choice(["gloo", "mpi", "both"]), default="gloo", show_default=True
)
_out = click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder for the numbers (JSON), the picture (PNG, with matplotlib) and the log.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON instead of tables.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def bench() -> None:
    """Measure steps and all-reduces beside their peers, and what bookkeeping costs with many ranks.

    Peers run side by side in one job, in rotation; reported are medians, quartiles, and ratios with a
    95 % bootstrap interval. Compare ratios, not times: a machine's noise moves all peers alike.

    Exit status: 0 done; 3 no horovodrun; 7 ranks failed.
    """


# -- step ---------------------------------------------------------------------------------------------


@bench.command()
@_ranks
@_controller
@click.option(
    "--workload",
    type=click.Choice([*TORCH_WORKLOADS, *TENSORFLOW_WORKLOADS]),
    multiple=True,
    help="Repeat for several. [all whose framework is installed]",
)
@click.option("--peer", type=click.Choice(PEERS), multiple=True, help="Repeat for several. [all]")
@click.option("--rounds", type=click.IntRange(2), default=9, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=5, show_default=True, help="Per peer and round.")
@click.option("--memory/--no-memory", default=True, help="Also the peak memory of each peer, alone.")
@_out
@_json
@click.pass_context
def step(
    ctx: click.Context,
    ranks: tuple[int, ...],
    controller: str,
    workload: tuple[str, ...],
    peer: tuple[str, ...],
    rounds: int,
    steps: int,
    memory: bool,
    out: Path,
    as_json: bool,
) -> None:
    """Time training steps: hvdloss, Horovod's optimizer, PyTorch DDP, and no reduction at all."""
    peers = list(peer or PEERS)
    results: list[dict[str, Any]] = []
    with _started(out) as jobs:
        for where in _controllers(controller):
            for count in ranks or (2,):
                results.append({"environment": {}, "workloads": {}})
                _step_job(jobs, where, count, workload, peers, rounds, steps, results[-1])
                if memory and where == "gloo":
                    _add_memory(jobs, where, count, results[-1])
    results = [found for found in results if found["workloads"]]
    numbers = {"results": results, "goals": list(_goals(results))}
    (out / "bench-step.json").write_text(json.dumps(numbers, indent=1) + "\n")
    if as_json:
        click.echo(json.dumps(numbers))
    elif results:
        console = _console()
        for found in results:
            _show_steps(console, found)
        _show_goals(console, list(_goals(results)))
        _draw(console, results, out / "bench-step.png")
    ctx.exit(jobs.status)


def _installed(framework: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(framework) is not None


def _step_job(
    jobs: _Jobs,
    controller: str,
    ranks: int,
    workload: tuple[str, ...],
    peers: list[str],
    rounds: int,
    steps: int,
    found: dict[str, Any],
) -> None:
    """Measure all workloads with this many ranks; put environment and workloads into `found`."""
    title = f"{ranks} ranks, {controller}"
    common = ["--rounds", str(rounds), "--steps", str(steps)]
    for framework, module, known in (
        ("torch", "step", TORCH_WORKLOADS),
        ("tensorflow", "tensorflow_step", TENSORFLOW_WORKLOADS),
    ):
        chosen = [name for name in known if name in (workload or known)]
        theirs = [p for p in peers if framework == "torch" or p not in ("ddp", "plain")]
        if not chosen or not theirs or not _installed(framework):
            continue
        arguments = ["--workload", *chosen, "--peers", *theirs, *common]
        one = jobs.run(title, f"hvdloss.benchmarks.{module}", ranks, controller, arguments)
        frameworks = [found["environment"].get("framework"), one["environment"]["framework"]]
        found["environment"] = {
            **one["environment"],
            "framework": ", ".join(name for name in frameworks if name),
        }
        found["workloads"].update(one["workloads"])


def _add_memory(jobs: _Jobs, controller: str, ranks: int, found: dict[str, Any]) -> None:
    """Add each peer's peak memory, measured in processes of its own."""
    for name in TORCH_WORKLOADS:
        if name not in found["workloads"]:
            continue
        peaks = found["workloads"][name]["memory"] = {}
        for peer in found["workloads"][name]["seconds"]:
            arguments = ["--memory", "--workload", name, "--peers", peer]
            title = f"{ranks} ranks, {controller}: memory of {peer}, {name}"
            one = jobs.run(title, "hvdloss.benchmarks.step", ranks, controller, arguments)
            peaks[peer] = one["memory"]


def _console() -> Console:
    """Return where tables go; wide enough for them where the width of a line is not known."""
    return Console() if sys.stdout.isatty() or os.environ.get("COLUMNS") else Console(width=120)


def _title(environment: dict[str, Any]) -> str:
    names = {"gloo": "Gloo", "mpi": "MPI"}
    return f"{environment['ranks']} ranks over {names[environment['controller']]}"


def _show_steps(console: Console, found: dict[str, Any]) -> None:
    for name, one in found["workloads"].items():
        table = Table(title=f"{name}: {one['title']}\n{_title(found['environment'])}", title_justify="left")
        seconds = one["seconds"]
        others = [peer for peer in ("horovod", "ddp") if peer in seconds]
        table.add_column("peer")
        for column in ("ms per step", "quartiles", *(f"/ {peer}" for peer in others), "messages", "MB"):
            table.add_column(column, justify="right")
        if "memory" in one:
            table.add_column("peak MB", justify="right")
        for peer, times in seconds.items():
            low, _, high = statistics.quantiles(times, n=4)
            cells = [f"{statistics.median(times) * 1e3:.1f}", f"{low * 1e3:.1f} - {high * 1e3:.1f}"]
            for other in others:
                ratio, lower, upper = ratio_interval(times, seconds[other])
                cells.append("" if peer == other else f"{ratio:.2f} ({lower:.2f} - {upper:.2f})")
            sent = one["messages"][peer]
            cells += [str(sent["messages"]), f"{sent['bytes'] / 1e6:.2f}"]
            if "memory" in one:
                cells.append(f"{one['memory'][peer] / 1e6:.0f}" if peer in one["memory"] else "")
            table.add_row(peer, *cells, style="bold" if peer == "hvdloss" else "")
        console.print(table)


def _goals(results: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield every goal for two ranks that was measured, with what came out."""
    for what, workloads, controller, peer, other, most in GOALS:
        for found in results:
            where = found["environment"]
            if not where or where["controller"] != controller or where["ranks"] != 2:
                continue
            for name in workloads:
                seconds = found["workloads"].get(name, {}).get("seconds", {})
                if peer in seconds and other in seconds:
                    ratio, low, high = ratio_interval(seconds[peer], seconds[other])
                    yield {
                        "what": what,
                        "workload": name,
                        "goal": most,
                        "ratio": ratio,
                        "interval": [low, high],
                        "met": ratio <= most,
                    }


def _show_goals(console: Console, goals: list[dict[str, Any]]) -> None:
    if not goals:
        return
    table = Table(title="Goals, two ranks", title_justify="left")
    for column in ("ratio of step times", "workload", "measured", "goal", ""):
        table.add_column(column, justify="right" if column in ("measured", "goal") else "left")
    for goal in goals:
        low, high = goal["interval"]
        table.add_row(
            goal["what"],
            goal["workload"],
            f"{goal['ratio']:.2f} ({low:.2f} - {high:.2f})",
            f"{goal['goal']:.2f}",
            "[green]met[/]" if goal["met"] else "[yellow]missed[/]",
        )
    console.print(table)


def _draw(console: Console, results: list[dict[str, Any]], path: Path) -> None:
    """Draw step times, in units of the computation alone, if matplotlib is there."""
    try:
        import matplotlib
    except ImportError:
        console.print("No picture: pip install 'hvdloss[bench]'", markup=False)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(results), 1, figsize=(9, 3.2 * len(results)), squeeze=False, layout="constrained"
    )
    colours = dict(zip(PEERS, ("0.75", "tab:orange", "tab:blue", "tab:olive", "tab:green"), strict=True))
    for axis, found in zip(axes[:, 0], results, strict=True):
        names = list(found["workloads"])
        for place, name in enumerate(names):
            seconds = found["workloads"][name]["seconds"]
            base = statistics.median(seconds.get("compute") or next(iter(seconds.values())))
            for number, (peer, times) in enumerate(seconds.items()):
                low, middle, high = statistics.quantiles(times, n=4)
                axis.bar(
                    place + (number - (len(seconds) - 1) / 2) * 0.16,
                    middle / base,
                    0.15,
                    yerr=[[(middle - low) / base], [(high - middle) / base]],
                    color=colours[peer],
                    label=peer,
                    error_kw={"lw": 0.8},
                )
        axis.set_xticks(range(len(names)), names)
        axis.set_ylabel("step time / compute alone")
        axis.set_title(_title(found["environment"]), loc="left", fontsize=10)
        handles = dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
        above = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 5, "frameon": False}
        axis.legend(handles.values(), handles.keys(), fontsize=8, **above)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    console.print(f"Picture: {path}", markup=False, soft_wrap=True)


# -- allreduce ----------------------------------------------------------------------------------------


@bench.command()
@_ranks
@_controller
@click.option("--rounds", type=click.IntRange(2), default=9, show_default=True)
@click.option("--largest", type=click.IntRange(1), default=64, show_default=True, help="MiB.")
@_out
@_json
@click.pass_context
def allreduce(
    ctx: click.Context,
    ranks: tuple[int, ...],
    controller: str,
    rounds: int,
    largest: int,
    out: Path,
    as_json: bool,
) -> None:
    """Time sums over ranks by size: Horovod, torch.distributed, and copying memory."""
    results: list[dict[str, Any]] = []
    arguments = ["--rounds", str(rounds), "--largest", str(largest)]
    with _started(out) as jobs:
        for where in _controllers(controller):
            for count in ranks or (2,):
                title = f"{count} ranks, {where}"
                results.append(jobs.run(title, "hvdloss.benchmarks.allreduce", count, where, arguments))
    (out / "bench-allreduce.json").write_text(json.dumps({"results": results}, indent=1) + "\n")
    if as_json:
        click.echo(json.dumps({"results": results}))
    else:
        for found in results:
            _show_allreduce(_console(), found)
    ctx.exit(jobs.status)


def _show_allreduce(console: Console, found: dict[str, Any]) -> None:
    seconds: dict[str, list[list[float]]] = found["seconds"]
    table = Table(title=f"float32 sums, {_title(found['environment'])}", title_justify="left")
    table.add_column("payload", justify="right")
    for name in seconds:
        table.add_column(f"{name}, ms", justify="right")
        table.add_column("GB/s", justify="right")
    for place, size in enumerate(found["sizes"]):
        label = f"{size / 2**20:.0f} MiB" if size >= 2**20 else f"{size / 2**10:.3g} KiB"
        cells = []
        for rows in seconds.values():
            t = statistics.median(rows[place])
            cells += [f"{t * 1e3:.3g}", f"{size / t / 1e9:.3g}"]
        table.add_row(label, *cells)
    console.print(table)
    for name, fitted in found["fit"].items():
        alpha, beta = fitted["alpha_s"], fitted["beta_bytes_per_s"]
        console.print(
            f"{name}: t = {alpha * 1e6:.0f} us + bytes / {beta / 1e9:.2f} GB/s", highlight=False, markup=False
        )


# -- scale --------------------------------------------------------------------------------------------

_WHAT = {
    "step": "a step",
    "read": "a step of which somebody reads all ranks",
    "agreement": "the consistency check of the first step",
}


@bench.command()
@click.option(
    "-np",
    "--ranks",
    type=click.IntRange(1, 2**20),
    multiple=True,
    help="Repeat for several. [2 to 10,000]",
)
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@_out
@_json
def scale(ranks: tuple[int, ...], rounds: int, out: Path, as_json: bool) -> None:
    """Time a step's bookkeeping on one rank, among simulated ones: no ranks are started."""
    simulated = importlib.import_module("hvdloss.benchmarks.scale")
    results = [simulated.measure(size, rounds=rounds) for size in ranks or simulated.RANKS]
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench-scale.json").write_text(json.dumps({"results": results}, indent=1) + "\n")
    if as_json:
        click.echo(json.dumps({"results": results}))
        return
    console = _console()
    table = Table(title="Bookkeeping of one rank, medians", title_justify="left")
    table.add_column("ranks", justify="right")
    table.add_column("ledgers")
    for what in _WHAT:
        for unit in ("ms", "bytes", "messages"):
            table.add_column(f"{what}, {unit}", justify="right")
    for one in results:
        cells = [
            cell
            for what in _WHAT
            for cell in (
                f"{one[what]['seconds'] * 1e3:.2f}",
                f"{one[what]['bytes']:,}",
                str(one[what]["messages"]),
            )
        ]
        table.add_row(f"{one['ranks']:,}", one["way"], *cells)
    console.print(table)
    _draw_scale(console, results, out / "bench-scale.png")


def _draw_scale(console: Console, results: list[dict[str, Any]], path: Path) -> None:
    """Draw time and bytes by the number of ranks, if matplotlib is there."""
    try:
        import matplotlib
    except ImportError:
        console.print("No picture: pip install 'hvdloss[bench]'", markup=False)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    ranks = [one["ranks"] for one in results]
    for what, label in _WHAT.items():
        axes[0].plot(ranks, [one[what]["seconds"] * 1e3 for one in results], marker=".", label=label)
        axes[1].plot(ranks, [one[what]["bytes"] for one in results], marker=".", label=label)
    for axis, title in zip(axes, ("processor time of one rank, ms", "bytes of one rank"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="ranks")
        axis.set_title(title, loc="left", fontsize=10)
    axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    console.print(f"Picture: {path}", markup=False, soft_wrap=True)
