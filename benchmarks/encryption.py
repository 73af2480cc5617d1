"""What an encrypted data plane costs: two hosts out of namespaces, plain and joined by WireGuard, in turns.

    python -m hvdloss.benchmarks.encryption --rate 1000 --rounds 3 --out runs/encryption.json

Times all-reduces of 1 and 16 MB and a training step by horovodrun over ssh and Gloo (or MPI), one rank per
host. Both hosts share this machine's processors, and so do both ends of the tunnel: where WireGuard is
wireguard-go, in user space, real hosts with a kernel's WireGuard pay less. Root on Linux.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from hvdloss.benchmarks.ssh_hosts import SshHosts
from hvdloss.errors import HvdlossError

SIZES = {"all-reduce 1 MB": 10**6, "all-reduce 16 MB": 16 * 10**6}
STEP = "training step, 4.2 MB of gradient"
REPEATS = {"all-reduce 1 MB": 30, "all-reduce 16 MB": 8, STEP: 15}


def rank_part(out: Path) -> None:
    """Measure; the first rank writes the medians, in ms, of each repeat's slowest rank."""
    import torch

    import hvdloss.torch as hvd

    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(512, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 512), torch.nn.Linear(512, 10)
    )
    objective = hvd.Objective("cross_entropy")
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01), model.named_parameters(), objective
    )
    x, y = torch.randn(32, 512), torch.randint(0, 10, (32,))

    def step() -> None:
        optimizer.zero_grad()
        objective(model(x), y).backward()
        optimizer.step()

    arrays = {name: torch.zeros(size // 4) for name, size in SIZES.items()}
    work = {name: (lambda name=name: hvd.allreduce(arrays[name], name=name)) for name in SIZES}
    medians = {}
    for name, what in {**work, STEP: step}.items():
        times = []
        for repeat in range(REPEATS[name] + 3):
            hvd.allreduce(torch.zeros(1), name="meet")
            began = time.perf_counter()
            what()
            if repeat >= 3:  # the first ones warm up
                times.append(time.perf_counter() - began)
        slowest = hvd.allreduce(torch.tensor(times, dtype=torch.float64), name=f"{name} times", op=hvd.Max)
        medians[name] = 1e3 * statistics.median(slowest.tolist())
    if hvd.rank() == 0:
        out.write_text(json.dumps(medians))


def measure(rate: float | None, controller: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return each round's median in ms, by what was done and by "plain" or "encrypted"."""
    found: dict[str, dict[str, list[float]]] = {
        name: {"plain": [], "encrypted": []} for name in (*SIZES, STEP)
    }
    with tempfile.TemporaryDirectory(prefix="hvdloss-encryption-") as folder:
        for number in range(rounds):
            for kind in ("plain", "encrypted"):
                out = Path(folder, f"{kind}-{number}.json")
                with SshHosts(2, rate, encrypted=kind == "encrypted") as hosts:
                    hosts.horovodrun(
                        [sys.executable, "-m", "hvdloss.benchmarks.encryption", "--rank-part", str(out)],
                        controller=controller,
                        env={"OMP_NUM_THREADS": "1"},
                        timeout=300.0,
                    )
                for name, ms in json.loads(out.read_text()).items():
                    found[name][kind].append(ms)
                print(kind, number, out.read_text(), file=sys.stderr, flush=True)
    return found


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """Return medians over rounds, and the median of each round's ratio with its range."""
    lines = ["| | plain, ms | encrypted, ms | ratio (range over rounds) |", "| --- | --- | --- | --- |"]
    for name, ms in found.items():
        ratios = [b / a for a, b in zip(ms["plain"], ms["encrypted"], strict=True)]
        plain, encrypted = (statistics.median(ms[kind]) for kind in ("plain", "encrypted"))
        span = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        lines.append(f"| {name} | {plain:.3g} | {encrypted:.3g} | {span} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rate", type=float, help="Mbit/s of each host's link; unlimited without")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mpi", action="store_true", help="over MPI; else over Gloo")
    parser.add_argument("--out", type=Path, help="a JSON file for the rounds' medians")
    parser.add_argument("--rank-part", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_part:
        rank_part(args.rank_part)
        return
    try:
        found = measure(args.rate, "mpi" if args.mpi else "gloo", args.rounds)
    except HvdlossError as error:
        raise SystemExit(f"encryption: {error}") from error
    print(table(found))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
