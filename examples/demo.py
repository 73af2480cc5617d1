"""Run the examples under horovodrun, one after the other, and sum up what they show.

Each trains on real data on several ranks of this machine: with hvdloss, with Horovod's plain averaging of
local means, and in one process. Tables, numbers, pictures, and each run's record and page go to runs/. The
exit status is 0 only if hvdloss's gradient was one process's in all of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box, progress
from rich.console import Console
from rich.table import Table

from _common import EXACT, MARK, PLAIN, PROGRESS

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Job:
    """One example, and on how many ranks the demo runs it."""

    script: str
    size: int
    framework: str


JOBS = [
    Job("torch_regression", 4, "torch"),
    Job("torch_digits", 4, "torch"),
    Job("tensorflow_linear", 3, "tensorflow"),
    Job("keras_digits", 2, "tensorflow"),
    Job("torch_split_classifier", 4, "torch"),
    Job("tf_split_classifier", 4, "tensorflow"),
]

# "[0]<stdout>:" over Gloo; "[1,0]<stdout>:" over MPI, there now and then inside a line as well
_PREFIX = re.compile(r"\[(?:\d+,)?(\d+)\]<(?:stdout|stderr)>:")
# What TensorFlow says while it is imported, by horovodrun itself as well, whatever its log level.
_NOISE = re.compile(
    r"All log messages before absl::InitializeLog|^[IW]\d{4} .*\.cc:\d+\]|"
    r"To enable the following instructions:|^\s*warnings\.warn\(|pkg_resources is deprecated"
)


def main() -> int:
    jobs = [job for job in JOBS if (HERE / f"{job.script}.py").exists()]
    names = [job.script for job in jobs]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=names, metavar="EXAMPLE", help=f"of {', '.join(names)}")
    parser.add_argument("--np", type=int, metavar="N", help="ranks, for all of them (default: 2 to 4)")
    parser.add_argument("--mpi", action="store_true", help="over MPI (default: Gloo)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs"), help="folder of the results (%(default)s)"
    )
    args = parser.parse_args()
    if args.np is not None and args.np < 1:
        parser.error(f"--np: {args.np} is below 1")

    launcher = find_launcher()
    if launcher is None:
        print(
            "error: there is no horovodrun beside this Python, nor on PATH: Horovod is not installed.\n"
            "Build and install it with `hvdloss install` (some minutes, once); `hvdloss doctor` says more.",
            file=sys.stderr,
        )
        return 1
    console = Console(highlight=False, soft_wrap=True)
    results = []
    for number, job in enumerate(job for job in jobs if not args.only or job.script in args.only):
        if importlib.util.find_spec(job.framework) is None:
            results.append(Result(job.script, 0, 0.0, None, f"skipped: {job.framework} is not installed"))
            continue
        if number:
            print()
        console.rule(f"{number + 1}. {job.script}.py on {args.np or job.size} ranks", align="left")
        results.append(run(job, args.np or job.size, args, launcher, console))
    summarise(results, console)
    show_reports([args.output / result.script / "run.jsonl" for result in results if result.numbers])
    return 1 if any(r.failure and not r.failure.startswith("skipped") for r in results) else 0


def find_launcher() -> str | None:
    """Return horovodrun of this interpreter's environment, or else of PATH."""
    return shutil.which("horovodrun", path=str(Path(sys.executable).parent)) or shutil.which("horovodrun")


@dataclass
class Result:
    """What came of one example."""

    script: str
    size: int
    seconds: float
    numbers: dict[str, Any] | None
    failure: str = ""


def run(job: Job, size: int, args: argparse.Namespace, launcher: str, console: Console) -> Result:
    """Run one example and show what it prints, rank 0's lines as they are."""
    output = args.output / job.script
    numbers = output / "numbers.json"
    numbers.unlink(missing_ok=True)
    controller = "--mpi" if args.mpi else "--gloo"
    command = [launcher, controller, "-np", str(size), sys.executable]
    command += [str(HERE / f"{job.script}.py"), "--output", str(output)]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "OMP_NUM_THREADS": "1",  # the ranks share the cores
        "COLUMNS": str(min(console.width, 100)),
        PROGRESS: "1",
    }
    if console.is_terminal:
        environment["FORCE_COLOR"] = "1"
    began = time.monotonic()
    dropped: deque[str] = deque(maxlen=20)
    with Bar(console) as bar:
        child = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        try:
            assert child.stdout is not None
            for raw in child.stdout:
                prefix = _PREFIX.match(raw)
                line = _PREFIX.sub("", raw).rstrip()
                if MARK in line:
                    bar.update(line.partition(MARK)[2])
                elif _NOISE.search(line):
                    dropped.append(line)
                else:
                    other = f"[rank {prefix[1]}] " if prefix and prefix[1] != "0" else ""
                    bar.print(other + line)
            status = child.wait()
        except KeyboardInterrupt:
            child.wait()  # horovodrun was interrupted too, and ends its ranks
            raise
    seconds = time.monotonic() - began
    found = json.loads(numbers.read_text()) if numbers.exists() else None
    if status == 0 and found is None:
        return Result(job.script, size, seconds, None, "left no numbers.json")
    if status:
        for line in dropped if found is None else ():
            console.print(line, style="dim", markup=False)
        print(f"error: {job.script}.py ended with status {status}", file=sys.stderr)
    return Result(job.script, size, seconds, found, f"failed (status {status})" if status else "")


class Bar:
    """The job's progress bar on a terminal; a few plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown = 0
        self._bar = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.BarColumn(30),
            progress.TaskProgressColumn(),
            progress.TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(f"{'starting the ranks':<32}", total=None)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, text: str) -> None:
        """Take over a line of _common.Progress: "12/300 what loss 0.5"."""
        count, _, what = text.partition(" ")
        done, _, total = count.partition("/")
        self._bar.update(self._task, completed=int(done), total=int(total), description=f"{what:<32}")
        quarter = 4 * int(done) // int(total)
        if not self._console.is_terminal and quarter > self._shown:
            self._shown = quarter
            self.print(f"  {100 * int(done) // int(total):3d} %  {what}")

    def print(self, line: str) -> None:
        if self._console.is_terminal:
            from rich.text import Text

            self._console.print(Text.from_ansi(line))
        else:
            print(line, flush=True)


def _difference(outcome: dict) -> str:
    """Return an outcome's difference to one process for the table."""
    if outcome.get("gradient_error") is not None:
        return f"{outcome['gradient_error']:.1e}"
    error = outcome.get("parameter_error")
    return "-" if error is None else f"({error:.1e})"


def summarise(results: list[Result], console: Console) -> None:
    """Print one table of all examples and the pictures' places."""
    table = Table(
        title="All examples", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("\nexample", no_wrap=True)
    for name in ("\nranks", "gradient*\nhvdloss", "gradient*\nplain averaging", "\nexact", "\ntime"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in results:
        outcomes = {o["name"]: o for o in (r.numbers or {}).get("outcomes", [])}
        shown = [_difference(outcomes.get(name) or {}) for name in (EXACT, PLAIN)]
        verdict = r.failure or "yes"
        style = "green" if not r.failure else "yellow" if r.failure.startswith("skipped") else "bold red"
        size = str(r.size) if r.size else "-"
        table.add_row(r.script, size, *shown, f"[{style}]{verdict}[/]", f"{r.seconds:.0f} s")
    print()
    console.print(table)
    print(
        "* largest relative difference to one process's gradient, of all steps; where fit shows no gradient,"
    )
    print("  that of the trained parameters, in brackets")
    pictures = [(r.numbers or {}).get("picture") for r in results]
    if any(pictures):
        print("Pictures of the loss curves:")
        for picture in filter(None, pictures):
            print(f"  {picture}")


def show_reports(records: list[Path]) -> None:
    """Make the page of every run that was recorded, and print their places."""
    pages = []
    for record in filter(Path.exists, records):
        command = [sys.executable, "-m", "hvdloss.cli", "report", str(record)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        pages.append(done.stdout.strip() or f"no page of {record}: {done.stderr.strip()}")
    if pages:
        print("Pages of the runs, from their records (`hvdloss report` compares several):")
        for page in pages:
            print(f"  {page}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
