"""Show what hvdloss changes: train on real data over several ranks, and compare with one process.

Each demo trains three times from the same start: with hvdloss, with plain averaging of the ranks' means, and
in one process that sees all samples. Results, pictures and records go to runs/. The exit status is 0 only if
hvdloss gave the result of one process in all of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from _common import EXACT, PLAIN

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Demo:
    """One example, and how the demo runs it."""

    script: str
    what: str  # goes wrong, or is shown
    size: int = 2
    needs: str = "torch"
    torchrun: bool = False
    extra: bool = False  # run only if it is named


DEMOS = [
    Demo("torch_tokens", "lines of different lengths, padded, in micro-batches", torchrun=True),
    Demo("torch_digits", "class weights, where one rank holds the rare classes"),
    Demo("tensorflow_linear", "uneven shards, the severe cases in the small one", needs="tensorflow"),
    Demo("keras_digits", "one rank runs out of samples before the other", needs="tensorflow"),
    Demo("torch_split_classifier", "a last layer split by class, two by two ranks", 4),
    Demo("tf_split_classifier", "the same in TensorFlow", 4, needs="tensorflow", extra=True),
]

INTRO = """\
Ranks that train together average their gradients, each that of a local mean. The result is the mean over
all samples only if every rank holds the same amount: (a/n + b/m)/2 is not (a+b)/(n+m). With uneven shards,
masked tokens, class weights or a ragged end, training silently optimises another loss. hvdloss makes it the
loss one process would see. Each demo trains three times, from the same start: with hvdloss, with plain
averaging, and in one process. Together they take about a minute and a half once all is installed.
"""

NEXT = """\
Pictures, numbers and records are in {output}/. Three things to try next:
  1. A page of a run, with which rank waits for which:
       {bin}hvdloss report {output}/torch_digits
  2. Other ranks, other shares of the data:
       {bin}torchrun --nproc-per-node 3 examples/torch_tokens.py --seeds 1 --shares 0.6,0.3,0.1
  3. Your own script, in a few changed lines: docs/howto/from-ddp.md, from-horovod.md, from-keras.md
"""

# "[0]<stdout>:" over Gloo; "[1,0]<stdout>:" over MPI, there now and then inside a line as well
_PREFIX = re.compile(r"\[(?:\d+,)?(\d+)\]<(?:stdout|stderr)>:")
# What TensorFlow says whatever its log level.
_NOISE = re.compile(
    r"All log messages before absl::InitializeLog|^[IW]\d{4} .*\.cc:\d+\]|"
    r"To enable the following instructions:|^\s*warnings\.warn\(|pkg_resources is deprecated"
)


@dataclass
class Result:
    """What came of one demo."""

    script: str
    seconds: float = 0.0
    numbers: dict[str, Any] = field(default_factory=dict)
    failure: str = ""


def main() -> int:
    names = [demo.script for demo in DEMOS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=names, metavar="DEMO", help=f"of {', '.join(names)}")
    parser.add_argument("--np", type=int, metavar="N", help="ranks, for all of them (default: 2 or 4)")
    parser.add_argument("--mpi", action="store_true", help="over MPI (default: Gloo)")
    parser.add_argument(
        "--setup", metavar="COMMAND", help="run this meanwhile, and wait for it before Horovod is needed"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs"), help="folder of the results (%(default)s)"
    )
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="copy the demos' pictures there (examples/images)"
    )
    args = parser.parse_args()
    if args.np is not None and args.np < 1:
        parser.error(f"--np: {args.np} is below 1")

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    print(INTRO, flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    setup = Setup(args.setup, args.output / "setup.log") if args.setup else None
    results: list[Result] = []
    wanted = [d for d in DEMOS if (d.script in args.only if args.only else not d.extra)]
    for number, demo in enumerate(wanted):
        torchrun = demo.torchrun and not args.mpi
        if setup and not torchrun and not setup.finish():
            return 1
        launcher = find("torchrun" if torchrun else "horovodrun")
        if launcher is None:
            print(
                "error: there is no horovodrun beside this Python, nor on PATH: Horovod is not installed.\n"
                "Build it with `hvdloss install` (some minutes, once); `hvdloss doctor` says more.",
                file=sys.stderr,
            )
            return 1
        importlib.invalidate_caches()
        if importlib.util.find_spec(demo.needs) is None:
            results.append(Result(demo.script, failure=f"skipped: {demo.needs} is not installed"))
            continue
        print()
        console.rule(f"{number + 1}. {demo.script}.py: {demo.what}", align="left")
        results.append(run(demo, args, launcher))
    if setup and not setup.finish():
        return 1
    if args.pictures:
        from PIL import Image

        for r in results:
            if r.numbers:
                image = Image.open(r.numbers["picture"]).convert("RGB").quantize(32)  # a third of the size
                image.save(args.pictures / f"{r.script}.png", optimize=True)
    summarise(results, console)
    folder = "" if shutil.which("hvdloss") else os.path.relpath(Path(sys.executable).parent) + os.sep
    print(NEXT.format(output=args.output, bin=folder), end="")
    return 1 if any(r.failure and not r.failure.startswith("skipped") for r in results) else 0


class Setup:
    """A command that installs what the later demos need, while the first one runs."""

    def __init__(self, command: str, log: Path) -> None:
        self._log = log
        with log.open("w") as out:
            self._child = subprocess.Popen(shlex.split(command), stdout=out, stderr=out)
        try:
            self._child.wait(timeout=2)
        except subprocess.TimeoutExpired:
            print(f"Horovod and TensorFlow are being installed meanwhile; see {log}.\n", flush=True)

    def finish(self) -> bool:
        """Wait for the command, say now and then how far it is, and return whether it succeeded."""
        while True:
            try:
                if self._child.wait(timeout=20) == 0:
                    return True
                print(f"error: the installation failed; see {self._log}, which ends:", file=sys.stderr)
                print(*self._lines()[-10:], sep="\n", file=sys.stderr)
                return False
            except subprocess.TimeoutExpired:
                print("installing:", *self._lines()[-1:], flush=True)

    def _lines(self) -> list[str]:
        return self._log.read_text(errors="replace").splitlines()


def find(launcher: str) -> str | None:
    """Return a program of this interpreter's environment, or else of PATH."""
    return shutil.which(launcher, path=str(Path(sys.executable).parent)) or shutil.which(launcher)


def run(demo: Demo, args: argparse.Namespace, launcher: str) -> Result:
    """Run one demo and show what it prints, rank 0's lines as they are."""
    output, size = args.output / demo.script, str(args.np or demo.size)
    numbers = output / "numbers.json"
    numbers.unlink(missing_ok=True)
    if launcher.endswith("torchrun"):
        command = [launcher, "--nproc-per-node", size]
    else:
        command = [launcher, "--mpi" if args.mpi else "--gloo", "-np", size, sys.executable]
    command += [str(HERE / f"{demo.script}.py"), "--output", str(output)]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "OMP_NUM_THREADS": "1",  # the ranks share the cores
        "COLUMNS": "100",
        **({"FORCE_COLOR": "1"} if sys.stdout.isatty() else {}),
    }
    began = time.monotonic()
    noise = []
    child = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert child.stdout is not None
    for raw in child.stdout:
        rank, line = _PREFIX.match(raw), _PREFIX.sub("", raw).rstrip()
        if _NOISE.search(line):
            noise.append(line)
        else:
            print(f"[rank {rank[1]}] {line}" if rank and rank[1] != "0" else line, flush=True)
    status = child.wait()
    result = Result(demo.script, time.monotonic() - began)
    result.numbers = json.loads(numbers.read_text()) if numbers.exists() else {}
    if status:
        print(*noise[-20:] if not result.numbers else [], sep="\n")
        print(f"error: {demo.script}.py ended with status {status}", file=sys.stderr)
        result.failure = f"failed (status {status})"
    elif not result.numbers:
        result.failure = "left no numbers.json"
    return result


def summarise(results: list[Result], console: Console) -> None:
    """Print one table of all demos."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("\ndemo", no_wrap=True)
    table.add_column("\nheld-out", no_wrap=True)
    for name in ("\nhvdloss", "plain\naveraging", "\nworse in", "gradient\noff by"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("hvdloss\nexact", no_wrap=True)
    table.add_column("\ntime", justify="right", no_wrap=True)
    for r in results:
        row = ["-"] * 5
        if r.numbers:
            exact, plain = (r.numbers["outcomes"][name] for name in (EXACT, PLAIN))
            metric, values = next(iter(exact["test"].items()))
            others = plain["test"][metric]
            worse = sum(b > a for a, b in zip(values, others, strict=True))
            row = [metric, f"{np.mean(values):.4g}", f"{np.mean(others):.4g}", f"{worse} of {len(values)}"]
            row.append(f"{np.median(plain['gradient_errors']):.0%}")
        style = "green" if not r.failure else "yellow" if r.failure.startswith("skipped") else "bold red"
        table.add_row(
            r.script,
            *row,
            f"[{style}]{r.failure.split()[0].strip(':') if r.failure else 'yes'}[/]",
            f"{r.seconds:.0f} s",
        )
    print()
    console.rule("All demos", align="left")
    console.print(table)
    for r in results:
        if r.failure:
            print(f"{r.script}: {r.failure}")
    print()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
