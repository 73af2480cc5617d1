"""Trains for long on many ranks while ranks are killed, and holds what came of it against one process.

    python tests/reliability/soak.py                       # 8 ranks, 20 minutes: `make soak`
    python tests/reliability/soak.py --minutes 720         # a night
    python tests/reliability/soak.py --minutes 1.5 --kill-every 15

An elastic job under horovodrun on real data (scikit-learn's digits with weights, in a Parquet file that falls
unevenly on ranks), with gradient accumulation. A rank is killed with SIGKILL at random times, chosen at
random. Afterwards:

- every sample of every epoch was used exactly once, relative to the commits from which the job went on;
- the ranks never differed in any bit, checked every few steps;
- the parameters are those of one process that took the same steps, all of them;
- memory of every rank is flat: by its robust slope (Theil and Sen) after warming up it grows by no more than
  12 MiB an hour, or 3 MiB in a window so short that this would be less. The last third of the time is left
  in peace, so that ranks grow old enough to tell.

Exit status 1 if any of it does not hold.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from tests.ranks import environment  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
JOB = Path(__file__).resolve().parent / "soak_job.py"
ROW_GROUP = 13  # rows that go to one rank together, so that ranks have different numbers
WARM_UP = 150.0  # seconds of a rank's life that say nothing about leaks: pools fill, then it is flat
SHORTEST = 60.0  # seconds of samples after it, without which a slope says nothing
PEACE = 0.35  # of the time, at the end, without kills: so that ranks grow old enough to judge their memory
#: MiB that a rank may grow per hour, and in all in a window so short that steps of the allocator count.
FLAT, STEP = 12.0, 3.0
SAME = 1e-9  # relative difference of parameters from one process


@dataclass
class Soak:
    """What came of a soak; `problems` is empty if all is well."""

    ranks: int
    minutes: float
    kills: int = 0
    generations: int = 0
    smallest: int = 0
    steps: int = 0
    undone: int = 0
    epochs: int = 0
    samples: int = 0
    lost: int = 0
    repeated: int = 0
    checks: int = 0
    difference: float | None = None
    recovery_seconds: list[float] = field(default_factory=list)
    memory: list[dict[str, float]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def write_data(path: Path) -> int:
    """Write the digits with ids and weights; return how many there are."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    ids = np.arange(len(y))
    columns = {"id": ids, "y": y.astype(np.int64), "w": 0.5 + (ids % 7) / 4}
    columns |= {f"x{i}": x[:, i].astype(np.float32) for i in range(64)}
    pq.write_table(pa.table(columns), path, row_group_size=ROW_GROUP)
    return len(y)


class Logs:
    """What all ranks wrote, read as it grows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[Path, int] = {}
        self.records: list[dict[str, Any]] = []

    def read(self) -> None:
        for path in self.folder.glob("log-*.jsonl"):
            with path.open("rb") as file:
                file.seek(self.places.get(path, 0))
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self.places[path] = self.places.get(path, 0) + len(line)
                    self.records.append(json.loads(line))


def run(ranks: int, minutes: float, kill_every: float, folder: Path, seed: int, say: Any = print) -> Soak:
    """Run the job, killing ranks; return what came of it."""
    rows = write_data(folder / "digits.parquet")
    discover = folder / "discover.sh"  # two names of this machine: Horovod gives up on a host as a whole
    half = ranks // 2
    discover.write_text(f"#!/bin/sh\necho localhost:{ranks - half}\necho 127.0.0.1:{half}\n")
    discover.chmod(0o755)
    until = time.time() + 60 * minutes
    command = [
        str(Path(sys.executable).with_name("horovodrun")),
        *("--gloo", "-np", str(ranks), "--min-np", "2", "--max-np", str(ranks)),
        *("--host-discovery-script", str(discover), "--network-interfaces", "lo"),
        # Longer than Horovod takes to end what is left on a host it gave up (5 s, then SIGKILL): the end of
        # an old process would count as that of the new one in its place.
        *("--blacklist-cooldown-range", "8", "12", "--start-timeout", "300", "--elastic-timeout", "300"),
        *(sys.executable, str(JOB), str(folder), str(until)),
    ]
    logs, out = Logs(folder), Soak(ranks, minutes)
    killed: list[float] = []
    with (folder / "output.txt").open("wb") as sink:
        job = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=_as_users_have_it(),
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            _kill_at_random(job, logs, killed, ranks, until - PEACE * 60 * minutes, kill_every, seed, say)
            try:
                job.wait(max(0.0, until - time.time()) + 300.0)
            except subprocess.TimeoutExpired:
                out.problems.append("the job had not ended 300 s after its time; output.txt has the stacks")
                logs.read()
                for pid in {record["pid"] for record in logs.records}:
                    if _alive(pid):
                        os.kill(pid, signal.SIGUSR1)
                time.sleep(2.0)
        finally:
            logs.read()
            _end(job, logs)
    if job.returncode:
        out.problems.append(f"horovodrun ended with status {job.returncode}; see output.txt")
    out.kills = len(killed)
    judge(out, logs.records, killed, rows, folder)
    return out


def _as_users_have_it() -> dict[str, str]:
    """Return the ranks' environment, but for what tests set for the sake of other cases."""
    env = environment()
    # Horovod drops what it cached of a message that waits for longer than this, which with far more ranks
    # than cores would be often.
    env["HOROVOD_STALL_CHECK_TIME_SECONDS"] = "60"
    # Nobody makes process sets here, and with this every cycle of Horovod's asks all ranks for theirs.
    env.pop("HOROVOD_DYNAMIC_PROCESS_SETS")
    return env


def _alive(pid: int) -> bool:
    try:
        return JOB.name in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def _end(job: subprocess.Popen[bytes], logs: Logs) -> None:
    """End what is left of the job."""
    if job.poll() is None:
        job.terminate()
        try:
            job.wait(20.0)
        except subprocess.TimeoutExpired:
            job.kill()
            job.wait()
    for pid in {record["pid"] for record in logs.records}:
        if _alive(pid):
            os.kill(pid, signal.SIGKILL)


def _kill_at_random(
    job: subprocess.Popen[bytes],
    logs: Logs,
    killed: list[float],
    ranks: int,
    until: float,
    every: float,
    seed: int,
    say: Any,
) -> None:
    """Kill a rank now and then, when all are there and have made steps, until it is time."""
    rng = random.Random(seed)
    wait = rng.uniform(0.5, 1.5) * every
    since: float | None = None  # when all ranks were there
    while time.time() < until and job.poll() is None:
        time.sleep(0.5)
        logs.read()
        starts = [r for r in logs.records if "size" in r]
        if not starts:
            continue
        newest = max(r["generation"] for r in starts)
        members = [r for r in starts if r["generation"] == newest]
        stepped = {r["pid"] for r in logs.records if "step" in r and r["generation"] == newest}
        whole = len(members) == ranks and all(r["pid"] in stepped and _alive(r["pid"]) for r in members)
        since = (since or time.time()) if whole else None
        if since is None or time.time() - since < wait:
            continue
        victim = rng.choice(members)
        os.kill(victim["pid"], signal.SIGKILL)
        killed.append(time.time())
        say(f"killed rank {victim['rank']} of {ranks} in generation {len({r['generation'] for r in starts})}")
        wait, since = rng.uniform(0.5, 1.5) * every, None


# -- what came of it ----------------------------------------------------------------------------------


def valid_steps(records: list[dict[str, Any]]) -> tuple[dict[int, list[dict[str, Any]]], int]:
    """Return the lines of every step as it counts in the end, and how many steps were undone.

    A generation goes on from the last commit: what earlier ones did from there on was undone.
    """
    starts = {r["generation"]: r["start"] for r in records if "size" in r}
    order = sorted(starts)
    steps: dict[int, list[dict[str, Any]]] = collections.defaultdict(list)
    undone = set()
    for record in records:
        if "step" not in record:
            continue
        later = [g for g in order if g > record["generation"] and starts[g] <= record["step"]]
        if later:
            undone.add((record["generation"], record["step"]))
        else:
            steps[record["step"]].append(record)
    return dict(sorted(steps.items())), len(undone)


def judge(out: Soak, records: list[dict[str, Any]], killed: list[float], rows: int, folder: Path) -> None:
    """Fill in what came of it."""
    starts = [r for r in records if "size" in r]
    out.generations = len({r["generation"] for r in starts})
    out.smallest = min((r["size"] for r in starts), default=0)
    out.checks = len({r["checked"] for r in records if "checked" in r})
    steps, out.undone = valid_steps(records)
    out.steps = len(steps)
    finished = [r for r in records if "finished" in r]
    if not finished:
        out.problems.append("no rank finished")
    out.epochs = max((r["epochs"] for r in finished), default=0)
    if finished and sorted(steps) != list(range(finished[0]["finished"])):
        out.problems.append("steps are missing in the logs")
    used = collections.Counter((r["epoch"], i) for lines in steps.values() for r in lines for i in r["ids"])
    out.samples = sum(used.values())
    out.lost = sum(not used[epoch, i] for epoch in range(out.epochs) for i in range(rows))
    out.repeated = sum(count - 1 for count in used.values() if count > 1)
    if out.lost or out.repeated:
        out.problems.append(f"{out.lost} samples were lost, {out.repeated} used more than once")
    if not out.checks:
        out.problems.append("ranks were never compared")
    for at in killed:
        after = [r["time"] for r in records if "step" in r and r["generation"] > at * 1e9]
        if after:
            out.recovery_seconds.append(round(min(after) - at, 1))
    _judge_memory(out, records)
    if (folder / "model.pt").exists() and not out.lost:
        out.difference = _replayed(steps, folder)
        if out.difference > SAME:
            out.problems.append(f"parameters differ from one process's by {out.difference:.2g}")


def _judge_memory(out: Soak, records: list[dict[str, Any]]) -> None:
    from scipy.stats import theilslopes

    samples: dict[int, list[tuple[float, float]]] = collections.defaultdict(list)
    for record in records:
        if "resident" in record:
            samples[record["pid"]].append((record["time"], record["resident"] / 2**20))
    for pid, points in samples.items():
        late = [(t, m) for t, m in points if t - points[0][0] > WARM_UP]
        if not late or late[-1][0] - late[0][0] < SHORTEST:
            continue
        times, sizes = zip(*late[:: max(1, len(late) // 500)], strict=True)
        slope = float(theilslopes(sizes, times)[0]) * 3600
        hours = (times[-1] - times[0]) / 3600
        out.memory.append(
            {"minutes": round(60 * hours, 1), "MiB": round(sizes[-1], 1), "MiB an hour": round(slope, 2)}
        )
        if slope * hours > max(FLAT * hours, STEP):
            out.problems.append(
                f"memory of process {pid} grows by {slope:.1f} MiB an hour, seen for {60 * hours:.0f} minutes"
            )
    if out.minutes >= 5 and not out.memory:
        out.problems.append("no rank lived long enough to judge its memory")


def _replayed(steps: dict[int, list[dict[str, Any]]], folder: Path) -> float:
    """Return the largest relative difference of parameters from one process that takes the same steps."""
    import pyarrow.parquet as pq
    import torch
    from soak_job import inputs, make_model, make_optimizer

    table = pq.read_table(folder / "digits.parquet").to_pydict()
    columns = {name: torch.tensor(column) for name, column in table.items()}
    x, y, w = inputs(columns), columns["y"], columns["w"].double()
    model = make_model()
    optimizer = make_optimizer(model)
    for lines in steps.values():
        ids = [i for record in lines for i in record["ids"]]
        optimizer.zero_grad()
        losses = torch.nn.functional.cross_entropy(model(x[ids]), y[ids], reduction="none")
        ((w[ids] * losses).sum() / w[ids].sum()).backward()
        optimizer.step()
    trained = torch.load(folder / "model.pt")
    return max(
        float((trained[name] - value).norm() / value.norm()) for name, value in model.state_dict().items()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Train for long while ranks are killed.")
    add = parser.add_argument
    add("--ranks", type=int, default=8, help="(%(default)s)")
    add("--minutes", type=float, default=20.0, help="(%(default)s)")
    add("--kill-every", type=float, default=60.0, help="seconds between kills, on average (%(default)s)")
    add("--seed", type=int, default=0, help="of who is killed, and when (%(default)s)")
    add("--out", type=Path, default=ROOT / "runs" / "soak", help="folder of the result (%(default)s)")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="hvdloss-soak-") as folder:
        result = run(
            args.ranks,
            args.minutes,
            args.kill_every,
            Path(folder),
            args.seed,
            say=lambda line: print(f"{time.time() - began:6.0f} s  {line}", flush=True),
        )
        for path in [Path(folder) / "output.txt", *Path(folder).glob("log-*.jsonl")]:
            shutil.copy(path, args.out / path.name)
    text = json.dumps(asdict(result), indent=1) + "\n"
    (args.out / "soak.json").write_text(text)
    print(text if not result.problems else text + "\nNOT WELL: " + "\n".join(result.problems))
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
