"""The simulator against real ranks: what it predicts from a calibration, and what the ranks then do.

    python -m hvdloss.benchmarks.simulation --json out.json --picture out.png

starts 2, 3 and 4 ranks under horovodrun (Gloo). In every round the ranks time sums of several sizes, and
train for some steps with three batch sizes, with local steps, and with rank 0 slowed down by work of its
own for each sample; what :class:`hvdloss.CommunicationCost` tells of these is what the simulator gets.
Then they train anew: with equal shares; with rank 0 slowed down; the same with
:class:`hvdloss.terms.policies.BatchShares`; and with an exchange in every eighth step
(:class:`hvdloss.terms.policies.SyncPeriod`). Reported are ratios of predicted to measured step times, and the
shares that were found, with medians and ranges over the rounds.

Two kinds of work: "cpu" computes with PyTorch, one thread a rank; where there are more ranks than cores,
ranks that wait leave their core to others, which no model of single ranks knows. "device" sleeps for each
sample, as a processor does whose accelerator computes, and sends gradients as large.

With ``--rate 400`` each rank is on a host of its own (:mod:`hvdloss.benchmarks.hosts`; needs root) behind
a link of so many megabits per second, and predictions are also made from that number alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from hvdloss.benchmarks.common import environment, horovodrun, progress, write_json
from hvdloss.benchmarks.hosts import Hosts
from hvdloss.comm.messages import decode_all
from hvdloss.losses.ledger import COLUMN
from hvdloss.simulation.model import ComputeModel, NetworkModel, TrainingPlan, simulate_training
from hvdloss.terms.link import LinkModel
from hvdloss.terms.policies import BatchShares, SharedBatches, SyncPeriod
from hvdloss.terms.term import CommStats, Policy

PER_RANK = 24  # samples of a rank in a step, with equal shares
WIDTHS = (768, 1536, 1536, 768)  # of the model: 4.7 M parameters
DEVICE_S = 1e-3  # per sample, in "device"
SLOWER = 2.0  # rank 0 then takes about so many times as long for a sample
CALIBRATED = (PER_RANK // 2, PER_RANK, 2 * PER_RANK)
SUMS = ((8, 12), (2**12, 10), (2**16, 10), (2**20, 8), (2**22, 6), (2**24, 4), (2**25, 3))  # bytes, repeats
EVERY = 4  # exchanges between two looks at the shares
PERIOD = 8
STEPS = 41  # the first is done together whatever the period, so that five stretches follow
MEASURED = 16  # the last ones of them
SHORT = 14  # steps of a training that calibrates
#: What the ranks do, and whether rank 0 is slow in it.
PHASES = {"equal": False, "slow": True, "shares": True, "period": False}


#: What exchanges are predicted from: those of the short trainings on as many ranks; sums and the short
#: trainings on two ranks, for more of them; sums of several sizes on as many ranks; the rate of the links.
WAYS = {"own": "own exchanges", "two": "two ranks' exchanges", "sums": "sums alone", "rate": "the rate alone"}


def acts_of(phase: str, batch: int) -> tuple[Policy, ...]:
    """Return what is done about what is measured, on real and on simulated ranks alike."""
    if phase == "shares":
        return (BatchShares(batch, every=EVERY),)
    return (SyncPeriod(PERIOD),) if phase == "period" else ()


# -- on the ranks -------------------------------------------------------------------------------------


def inner(work: str, rounds: int, path: str) -> None:
    """Measure, on every rank; rank 0 writes the numbers."""
    import torch
    from torch import nn

    import hvdloss
    import hvdloss.torch as hvd
    from hvdloss.torch.ops import communicator_of

    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rank, size = hvd.rank(), hvd.size()
    x, y = torch.randn(4 * PER_RANK * size, WIDTHS[0]), torch.randn(4 * PER_RANK * size, WIDTHS[-1])
    square = torch.randn(256, 256)

    def network() -> nn.Module:
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(WIDTHS):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    scratch = network()

    def extra_work(samples: int) -> None:
        for _ in range(samples * extra):
            square @ square

    def compute(model: nn.Module, loss_of: Callable[..., torch.Tensor], samples: int, slow: bool) -> None:
        """Forward and backward over so many samples, or the time that a device would take for them."""
        if work == "cpu":
            loss_of(model(x[:samples]), y[:samples]).backward()
            if slow:
                extra_work(samples)
            return
        time.sleep(samples * DEVICE_S * (SLOWER if slow else 1.0))
        loss_of(model(x[:1]), y[:1]).backward()

    def link() -> dict[str, Any]:
        """Return the link, as ``LinkModel.state_dict()``: of each sum the smallest time over ranks."""
        times = []
        for bytes, repeats in SUMS:
            flat = torch.zeros(max(1, bytes // 4))
            for number in range(repeats + 1):
                began = time.perf_counter()
                hvd.allreduce_(flat, op=hvd.Sum, name=f"link.{bytes}")
                if number:
                    times.append((time.perf_counter() - began, 4 * flat.numel()))
        model, ranks = LinkModel(size), communicator_of(hvd.global_process_set)
        for rows in zip(
            *decode_all(ranks.all_gather_bytes(json.dumps(times).encode(), "link.times"), "times"),
            strict=True,
        ):
            model.add(min(seconds for seconds, _ in rows), rows[0][1])
        return model.state_dict()

    def train(
        policies: tuple[Policy, ...], steps: int = SHORT, per_rank: int = PER_RANK, slow: bool = False
    ) -> dict[str, Any]:
        """Train for so many steps; return step times, what the term told of them, and the last shares."""
        cost = hvdloss.CommunicationCost(policies=policies)
        objective = hvd.Objective("mse", terms=(cost,))
        model = network()
        # Without overlap: on a processor, sums that overlap the backward pass take time from it.
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=1e-4), model.named_parameters(), objective, overlap=False
        )
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        shares = objective.controller.policy(BatchShares)
        sizes: Iterable[int] = [per_rank] * steps
        if shares is not None:
            sizes = map(len, SharedBatches(steps * per_rank * size, shares))
        told: list[tuple[list[float], float]] = []

        def tell(step: int, table: Any, travel: CommStats) -> None:
            told.append((table[:, COLUMN["computation"]].tolist(), table[:, COLUMN["communication"]].min()))

        objective.controller.on_step.append(tell)
        ends = [time.perf_counter()]
        for samples in sizes:
            optimizer.zero_grad()

            def weighted(prediction: torch.Tensor, target: torch.Tensor, samples: int = samples) -> Any:
                # A device's one row stands for all its samples.
                return objective(prediction, target, torch.full((len(target), 1), samples / len(target)))

            compute(model, weighted, samples, slow and rank == 0)
            optimizer.step()
            ends.append(time.perf_counter())
        return {
            "seconds": np.diff(ends).tolist(),
            "told": [(computing, float(moving)) for computing, moving in told],
            "sizes": None if shares is None else shares.sizes.tolist(),
            "messages": optimizer._hvdloss.message_counts()["messages"],
            "bytes": sum(4 * p.numel() for p in model.parameters()),
        }

    # As much extra work for each sample as makes it take SLOWER times as long, measured on one rank.
    extra = 1
    began = time.perf_counter()
    extra_work(100)
    one = (time.perf_counter() - began) / 100
    began = time.perf_counter()
    for _ in range(5):
        compute(scratch, nn.functional.mse_loss, 4 * PER_RANK, False)
    per_sample = (time.perf_counter() - began) / (5 * 4 * PER_RANK)
    extra = int(hvd.broadcast(torch.tensor(max(1, round((SLOWER - 1) * per_sample / one))), 0, name="extra"))

    found = []
    for number in range(rounds):
        found.append(
            {
                "link": link(),
                "computing": {n: train((), per_rank=n) for n in CALIBRATED},
                "slow_computing": train((), slow=True),
                "exchanging": train((SyncPeriod(2),)),
                "phases": {
                    phase: train(acts_of(phase, PER_RANK * size), steps=STEPS, slow=slow)
                    for phase, slow in PHASES.items()
                },
            }
        )
        progress(hvd, f"{size} ranks, {work}", number + 1, rounds)
    if rank == 0:
        write_json(path, {"environment": environment(hvd), "work": work, "ranks": size, "rounds": found})


# -- from measurements to predictions -----------------------------------------------------------------


def _told(one: dict[str, Any]) -> tuple[Any, float]:
    """Return a short training's computing times ``(exchanges, ranks)``, and the median seconds of moving.

    Without the first steps, which plan, allocate and connect.
    """
    computing, moving = zip(*one["told"][4:], strict=True)
    return np.array(computing), statistics.median(moving)


def compute_model(one: dict[str, Any], slow: bool) -> ComputeModel:
    """Return the model of a round's computing times: a line through the medians, and their scatter."""
    samples = np.array([int(n) for n in one["computing"]], dtype=float)
    times = [_told(run)[0] for run in one["computing"].values()]
    medians = np.array([float(np.median(rows)) for rows in times])
    # Relative errors; a line through zero where it would begin below.
    columns = np.stack([1 / medians, samples / medians], axis=1)
    (fixed, per_sample), *_ = np.linalg.lstsq(columns, np.ones(len(medians)), rcond=None)
    if fixed < 0:
        fixed, per_sample = 0.0, float(np.median(medians / samples))
    scatter = np.concatenate([np.log(rows / np.median(rows)).ravel() for rows in times])
    noise = 1.4826 * float(np.median(np.abs(scatter)))
    factors = {}
    if slow:
        seconds = float(np.median(_told(one["slow_computing"])[0][:, 0]))
        factors[0] = max(1.0, (seconds - fixed) / (PER_RANK * per_sample))
    return ComputeModel(float(per_sample), float(fixed), noise=noise, slow=factors)


def network_model(ranks: int, one: dict[str, Any], way: str) -> NetworkModel:
    """Return a model of a round's exchanges, measured on so many ranks, in one of :data:`WAYS`."""
    link = LinkModel.from_state_dict(one["link"])
    if way == "sums":
        return NetworkModel.from_link(link)
    steps = one["computing"][str(PER_RANK)]
    bytes, gradients, parameters = steps["bytes"], _told(steps)[1], _told(one["exchanging"])[1]
    if way == "own":
        return NetworkModel(
            latency=0.0,
            bandwidth=2 * (ranks - 1) / ranks * bytes / gradients,
            parameter_handling=max(0.0, parameters - gradients) / bytes,
        )
    return NetworkModel.from_link(
        link,
        handling=max(0.0, gradients - link.predict(bytes, steps["messages"]).seconds) / bytes,
        parameter_handling=max(0.0, parameters - link.predict(bytes, 2).seconds) / bytes,
    )


def predicted(ranks: int, one: dict[str, Any], phase: str, network: NetworkModel) -> dict[str, Any]:
    """Return the simulated step time of a phase, and the shares."""
    measured = one["phases"][phase]
    batch = PER_RANK * ranks
    outcome = simulate_training(
        TrainingPlan(
            ranks,
            batch,
            measured["bytes"],
            steps=401,
            policies=acts_of(phase, batch),
            compute=compute_model(one, PHASES[phase]),
            network=network,
            messages=measured["messages"],
        )
    )
    return {
        "seconds": statistics.median(_per_exchange(outcome.step_seconds[201:].tolist(), phase)),
        "sizes": outcome.sizes.tolist(),
    }


def _per_exchange(seconds: list[float], phase: str) -> list[float]:
    """Return the mean step times of stretches: single steps, or as many as lie between two exchanges."""
    tau = PERIOD if phase == "period" else 1
    return [statistics.fmean(seconds[i : i + tau]) for i in range(0, len(seconds) - tau + 1, tau)]


def compared(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per kind of work, number of ranks and phase: times, ratios, shares by round.

    Ratios are of predicted to measured step times, in each of :data:`WAYS`.
    """
    rows = []
    for job in jobs:
        ranks, work = job["ranks"], job["work"]
        pairs = [other["rounds"] for other in jobs if other["ranks"] == 2 and other["work"] == work]
        for phase in PHASES:
            row: dict[str, Any] = {"work": work, "ranks": ranks, "phase": phase, "seconds": [], "sizes": []}
            row["ratios"] = {way: [] for way in WAYS}
            for number, one in enumerate(job["rounds"]):
                phased = one["phases"][phase]
                # Stretches begin after the first step, which is done together.
                seconds = statistics.median(_per_exchange(phased["seconds"][STEPS - MEASURED :], phase))
                row["seconds"].append(seconds)
                networks = {way: network_model(ranks, one, way) for way in ("own", "sums")}
                if job["rate_mbit"]:  # of 1514 bytes that count, 1448 are payload
                    networks["rate"] = NetworkModel(bandwidth=job["rate_mbit"] * 1e6 / 8 * 1448 / 1514)
                if pairs and ranks > 2:
                    networks["two"] = network_model(2, pairs[0][number % len(pairs[0])], "two")
                for way, network in networks.items():
                    own = predicted(ranks, one, phase, network)
                    row["ratios"][way].append(own["seconds"] / seconds)
                    if way == "own" and phase == "shares":
                        row["sizes"].append((own["sizes"], phased["sizes"]))
            rows.append(row)
    return rows


# -- outside ------------------------------------------------------------------------------------------


def started(ranks: int, work: str, rounds: int, rate: float | None) -> dict[str, Any]:
    """Start the ranks, on this machine or on hosts behind links of a rate; return what they measured."""
    module, arguments = "hvdloss.benchmarks.simulation", ["--work", work, "--rounds", str(rounds)]
    if rate is None:
        return {**horovodrun(module, ranks, arguments), "rate_mbit": None}
    with tempfile.TemporaryDirectory(prefix="hvdloss-") as folder, Hosts(ranks, rate) as hosts:
        path = Path(folder) / "numbers.json"
        command = [sys.executable, "-m", module, "--inner", "--json", str(path), *arguments]
        hosts.run(command, timeout=3600.0)
        return {**json.loads(path.read_text()), "rate_mbit": rate}


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("work", "ranks", "what"):
        table.add_column(column)
    for column in ("measured ms", "predicted / measured", "range", "by two ranks", "by sums", "by rate"):
        table.add_column(column, justify="right")
    table.add_column("samples: predicted, measured")
    for row in rows:
        ratios = row["ratios"]
        table.add_row(
            row["work"],
            str(row["ranks"]),
            row["phase"],
            f"{statistics.median(row['seconds']) * 1e3:.1f}",
            f"{statistics.median(ratios['own']):.2f}",
            f"{min(ratios['own']):.2f} - {max(ratios['own']):.2f}",
            *(
                f"{statistics.median(ratios[way]):.2f}" if ratios[way] else ""
                for way in ("two", "sums", "rate")
            ),
            _median_sizes(row["sizes"]),
        )
    Console(width=140).print(table)
    for way, what in WAYS.items():
        off = [abs(math.log(statistics.median(row["ratios"][way]))) for row in rows if row["ratios"][way]]
        within = sum(one <= math.log(1.2) for one in off)
        if off:
            print(f"{what}: {within} of {len(off)} medians within 20 %")


def _median_sizes(sizes: list[Any]) -> str:
    if not sizes:
        return ""
    return ", ".join(
        str([round(float(one)) for one in np.median([pair[which] for pair in sizes], axis=0)])
        for which in (0, 1)
    )


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Draw predicted against measured step times of all rounds, with what 20 % are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(5.6, 5), layout="constrained")
    colours = {2: "tab:green", 3: "tab:blue", 4: "tab:orange"}
    marks = dict(zip(PHASES, "osv^", strict=True))
    measured = [1e3 * seconds for row in rows for seconds in row["seconds"]]
    ends = np.array([0.8 * min(measured), 1.25 * max(measured)])
    axis.plot(ends, ends, color="0.4", lw=1)
    axis.fill_between(ends, ends / 1.2, ends * 1.2, color="0.9", label="20 %")
    for row in rows:
        seconds = 1e3 * np.array(row["seconds"])
        full = row["work"] == "device"
        colour = colours.get(row["ranks"], "tab:red")
        axis.plot(
            seconds,
            seconds * np.array(row["ratios"]["own"]),
            marks[row["phase"]],
            ms=5,
            color=colour,
            mfc=colour if full else "none",
            label=f"{row['ranks']} ranks, {row['work']}" if row["phase"] == "equal" else None,
        )
    axis.set(xscale="log", yscale="log", xlabel="measured, ms per step", ylabel="simulated, ms per step")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--work", nargs="+", choices=["cpu", "device"], default=["device", "cpu"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rate", type=float, help="Mbit/s of each rank's link")
    parser.add_argument("--json", help="write all numbers to this file")
    parser.add_argument("--picture", help="draw predicted against measured times into this file")
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inner:
        inner(args.work[0], args.rounds, args.json)
        return
    jobs = [started(ranks, work, args.rounds, args.rate) for work in args.work for ranks in args.ranks]
    rows = compared(jobs)
    write_json(args.json, {"jobs": jobs, "compared": rows})
    show(rows)
    if args.picture:
        draw(rows, args.picture)


if __name__ == "__main__":
    main()
