"""What the watch costs a step: the same steps with and without it, in one run, interleaved.

    python -m hvdloss.benchmarks.watch_cost            # 2 ranks over Gloo

One thread per rank, SGD, float32. Between two blocks of steps the watch is ended, or begun, on all ranks;
that is not timed. Without `--inner` it starts the ranks itself and prints the medians and their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from hvdloss.benchmarks.common import WARM_UP, environment, horovodrun, meet, progress, write_json

WATCHED, ALONE = "watched", "not watched"


def inner(args: argparse.Namespace) -> None:
    """Be one rank."""
    import torch

    import hvdloss.torch as hvd
    from hvdloss import watch
    from hvdloss.benchmarks.step import make_step
    from hvdloss.torch.ops import communicator_of

    torch.set_num_threads(1)
    hvd.init()
    results: dict[str, Any] = {}
    for workload in args.workload:
        step, _ = make_step("hvdloss", workload)
        for _ in range(WARM_UP):
            step()
        seconds: dict[str, list[float]] = {WATCHED: [], ALONE: []}
        for number in range(args.rounds):
            for name in (WATCHED, ALONE) if number % 2 else (ALONE, WATCHED):
                meet(hvd)
                watch.stop()
                meet(hvd)
                if name == WATCHED and not watch.start(communicator_of(hvd.global_process_set), hvd.shutdown):
                    raise SystemExit("the watch did not begin; is HVDLOSS_WATCH=0?")
                step()
                meet(hvd)
                began = perf_counter()
                for _ in range(args.steps):
                    step()
                meet(hvd)
                seconds[name].append((perf_counter() - began) / args.steps)
            progress(hvd, workload, number + 1, args.rounds)
        results[workload] = seconds
    if hvd.rank() == 0:
        write_json(args.json, {"environment": environment(hvd), "seconds": results})
    hvd.shutdown()


def main() -> None:
    """Start the ranks, and say what came of it."""
    parser = argparse.ArgumentParser(description="Measure what the watch costs a step.")
    add = parser.add_argument
    add("--ranks", type=int, default=2, help="(%(default)s)")
    add("--rounds", type=int, default=20, help="blocks of each kind (%(default)s)")
    add("--steps", type=int, default=20, help="of a block (%(default)s)")
    add("--workload", nargs="+", default=["small", "mlp"], help="of benchmarks/workloads.py (%(default)s)")
    add("--json", type=Path, help="where the numbers go")
    add("--inner", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inner:
        inner(args)
        return
    given = ["--rounds", str(args.rounds), "--steps", str(args.steps), "--workload", *args.workload]
    told = horovodrun("hvdloss.benchmarks.watch_cost", args.ranks, given)
    for workload, seconds in told["seconds"].items():
        ratios = [a / b for a, b in zip(seconds[WATCHED], seconds[ALONE], strict=True)]
        with_it, without = (1e3 * statistics.median(seconds[name]) for name in (WATCHED, ALONE))
        low, _, high = statistics.quantiles(ratios, n=4)
        print(
            f"{workload}: {with_it:.3f} ms watched, {without:.3f} ms not; ratio of blocks side by side "
            f"{statistics.median(ratios):.4f} (middle half {low:.4f} to {high:.4f})"
        )
    if args.json:
        args.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
