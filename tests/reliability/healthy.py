"""Jobs that are healthy but slow, none of which may be ended; docs/explanation/reliability.md has the table.

    python tests/reliability/healthy.py                     # all kinds, as long as they are in life (an hour)
    python tests/reliability/healthy.py --kind pause --loop torch
    python tests/reliability/healthy.py --soak 120          # minutes of mixed healthy load

To add a kind: a row here, and what it does in `healthy_job.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
JSON_PATH = ROOT / "docs" / "explanation" / "healthy.json"
LOOPS = {"torch": "PyTorch loop", "tape": "TensorFlow tape in a tf.function"}
ENDED = re.compile(r"ends Horovod|(?:RankError|LostRankError|StallError|HorovodInternalError)\b")


@dataclass(frozen=True)
class Healthy:
    """One kind of healthy job.

    Attributes:
        kind: as `healthy_job.py` calls it.
        what: for the table.
        seconds: that it lasts, in life; `short`: in `make test-more`.
        rounds: how many times in one launch.
        ranks: of the job.
        busy: loops that run beside it.
        environment: of the launch.
    """

    kind: str
    what: str
    seconds: float
    short: float = 1.0
    rounds: int = 20
    ranks: int = 2
    busy: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    loops: tuple[str, ...] = ("torch", "tape")


HEALTHY = (
    Healthy("finalizer", "a slow finalizer in the first step", 3.0),
    Healthy("large", "a model of 2.9 GB, one rank at nice 19", 0.0, rounds=1, loops=("torch",)),
    Healthy("compile", "one rank compiles", 60.0, rounds=1),
    Healthy("validation", "validation on rank 0 alone", 720.0, rounds=1, loops=("torch",)),
    Healthy("native", "native code that holds Python's lock", 60.0, rounds=1),
    Healthy("pause", "a pause (SIGSTOP, SIGCONT)", 20.0, rounds=1),
    Healthy("pause", "short pauses", 2.0),
    Healthy("debugger", "a debugger's stop", 20.0, rounds=1),
    Healthy("disk", "a checkpoint to a slow disk", 3.0),
    Healthy("files", "2,000 open files", 1.0),
    Healthy("workers", "workers that fork", 1.0),
    Healthy("clock", "a clock that jumps by an hour", 1.5),
    Healthy(
        "sleep", "8 ranks on 2 cores, beside two busy loops", 2.0, rounds=5, ranks=8, busy=2, loops=("torch",)
    ),
    Healthy("late", "a rank that starts late", 90.0, rounds=1),
    Healthy("agent", "an agent that is killed", 0.0, rounds=3),
)


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """Keep some cores busy in the block."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for one in running:
            one.kill()
            one.wait()


def clock_environment(folder: str) -> dict[str, str]:
    """Return what lets `healthy_job.py` move its clock; empty where libfaketime is not installed."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not found:
        return {}
    file = Path(folder) / "clock"
    file.write_text("+0s\n")
    return {
        "LD_PRELOAD": str(found[0]),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }


def run(one: Healthy, loop: str, *, short: bool = False, rounds: int | None = None) -> dict[str, object]:
    """Run a job; return how it went: what was wrong is in ``problems``."""
    rounds = one.rounds if rounds is None else rounds
    seconds = min(one.seconds, one.short) if short else one.seconds
    with tempfile.TemporaryDirectory() as folder, busy(one.busy):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "HOROVOD_GLOO_TIMEOUT_SECONDS": "300",
            # A tenth of the default: what is not ended within these limits is not within the default's.
            **({"HVDLOSS_WATCH_WARN": "1", "HVDLOSS_WATCH_SILENCE": "4"} if short else {}),
            **one.environment,
        }
        if one.kind == "clock":
            extra = clock_environment(folder)
            if not extra:
                return {"skipped": "libfaketime is not installed (Debian: faketime)"}
            environment |= extra
        if one.kind == "debugger" and shutil.which("gdb") is None:
            return {"skipped": "gdb is not installed"}
        launcher = [str(Path(sys.executable).with_name("horovodrun")), "--gloo", "-np", str(one.ranks)]
        launcher += ["--start-timeout", "300"]
        job = [sys.executable, str(HERE / "healthy_job.py"), loop, one.kind]
        if one.kind == "large":
            environment["MILLIONS"] = "20" if short else "700"
            job = [sys.executable, str(HERE / "healthy_large.py")]
        else:
            job += ["--seconds", str(seconds), "--rounds", str(rounds)]
        began = time.monotonic()
        done = subprocess.run([*launcher, *job], env=environment, capture_output=True, text=True, cwd=ROOT)
    output = done.stdout + done.stderr
    finished = re.findall(r"rank (\d+): finished (.*)", output)
    problems = []
    if done.returncode:
        problems.append(f"exit status {done.returncode}")
    if len({rank for rank, _ in finished}) != one.ranks:
        problems.append(f"only ranks {sorted(rank for rank, _ in finished)} finished")
    if len({values for _, values in finished}) > 1:
        problems.append("ranks ended with different parameters")
    if found := ENDED.search(output):
        problems.append(f"{found[0]} was said")
    warnings = len(re.findall(r"Nothing is ended for it|is no longer watched|has ended\. Training", output))
    return {
        "kind": one.kind,
        "what": one.what,
        "loop": loop,
        "seconds": seconds,
        "rounds": rounds,
        "took": round(time.monotonic() - began, 1),
        "warnings": warnings,
        "problems": problems,
        "output": output[-6000:] if problems else "",
    }


def soak(minutes: float) -> dict[str, object]:
    """Run healthy jobs of all short kinds at random, 8 ranks among them, for some time; count alarms."""
    choice = random.Random(1)
    quick = [one for one in HEALTHY if one.seconds <= 3.0 and one.kind != "large"]
    until, jobs, alarms = time.monotonic() + 60 * minutes, 0, []
    while time.monotonic() < until:
        one = choice.choice(quick)
        result = run(one, choice.choice(one.loops), rounds=5)
        if "skipped" in result:
            continue
        jobs += 1
        if result["problems"]:
            alarms.append(result)
        print(f"{jobs} jobs, {len(alarms)} alarms: {one.what}", flush=True)
    return {"minutes": minutes, "jobs": jobs, "alarms": alarms}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", nargs="+", help="only these")
    parser.add_argument("--loop", nargs="+", choices=list(LOOPS), default=list(LOOPS))
    parser.add_argument("--short", action="store_true", help="as in the tests: seconds instead of minutes")
    parser.add_argument("--soak", type=float, help="minutes of mixed load instead")
    parser.add_argument(
        "--json", type=Path, default=JSON_PATH, help="what is measured is put there (%(default)s)"
    )
    args = parser.parse_args()
    kept = json.loads(args.json.read_text()) if args.json.exists() else {"rows": [], "soak": None}
    failed = False
    if args.soak:
        kept["soak"] = soak(args.soak)
        failed = bool(kept["soak"]["alarms"])
        args.json.write_text(json.dumps(kept, indent=1) + "\n")
    for one in () if args.soak else HEALTHY:
        for loop in one.loops:
            if loop not in args.loop or (args.kind and one.kind not in args.kind):
                continue
            result = run(one, loop, short=args.short)
            if "skipped" in result:
                print(f"{one.what}: SKIPPED, {result['skipped']}", flush=True)
                continue
            failed |= bool(result["problems"])
            print({k: v for k, v in result.items() if k != "output" or v}, flush=True)
            same = (one.what, loop)
            kept["rows"] = [row for row in kept["rows"] if (row["what"], row["loop"]) != same]
            kept["rows"].append(result)
            args.json.write_text(json.dumps(kept, indent=1) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
