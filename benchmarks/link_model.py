"""Does the fitted link predict how long training steps take, for sizes and rates it was not fitted on?

    python -m hvdloss.benchmarks.link_model --out runs/link-model

Two hosts (:mod:`hvdloss.benchmarks.hosts`), one Horovod rank each. At one rate the link is fitted from a
few blocking sums (:func:`hvdloss.terms.link.calibrate`). Then MLPs are trained at this rate and others, and
every step time is predicted from that fit, from computing alone, and from what a step sends:

    overlap off   compute + t(bytes, messages)
    overlap on    buckets leave when their gradients are ready, one after the other over the link

with t from the fit, its beta scaled by the ratio of the rates. "compute" is the same training step without
any exchange, measured in turns with the others: it is the machine's, not the link's. With overlap every
gradient is taken to be ready at its layers' share of the backward pass, and that to be two thirds of
compute; the JSON has the bounds max(compute, t) and compute + t as well.

Needs root on Linux, `ip` and `tc`; says so and exits with status 3 where that is not there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from hvdloss.benchmarks.common import environment, timed_rounds, write_json
from hvdloss.benchmarks.hosts import Hosts, HostsError, available
from hvdloss.terms.link import LinkModel, calibrate

UNAVAILABLE = 3  # exit status
BAND = 0.2  # what counts as predicted
FORWARD = 1 / 3  # of compute: a backward pass has two matrix products for each of the forward pass
CALIBRATIONS, BUDGET_S = 3, 1.5
WARM_UP = 3  # steps: the first makes the plan, the second has its messages' names cached
#: By name: widths of the MLP's layers; a rank's batch, such that computing takes tens of milliseconds; and
#: how many rounds in units of ``--rounds``, since short steps scatter more and cost less.
SIZES: dict[str, tuple[list[int], int, int]] = {
    "0.3 M": ([256, 384, 384, 256], 512, 3),
    "1 M": ([512, 640, 640, 512], 256, 2),
    "3 M": ([1024, 1024, 1024, 1024], 128, 1),
    "8 M": ([1024, 2048, 2048, 1024], 64, 1),
}
MODES = ("off", "on")  # overlap


# -- inside the ranks ---------------------------------------------------------------------------------


def rank_part(args: argparse.Namespace) -> None:
    """Calibrate, train, and have rank 0 write what was measured at this rate."""
    import torch

    import hvdloss.torch as hvd
    from hvdloss.torch.ops import communicator_of

    hvd.init()
    torch.set_num_threads(1)
    communicator = communicator_of(hvd.global_process_set)
    model = LinkModel(hvd.size())
    for _ in range(CALIBRATIONS):
        calibrate(communicator, model, budget_s=BUDGET_S)
    out: dict[str, Any] = {"environment": environment(hvd), "link": model.state_dict(), "sizes": {}}
    for name in args.sizes:
        out["sizes"][name] = measure(hvd, name, args.rounds)
    if hvd.rank() == 0:
        write_json(args.json, out)


def measure(hvd: Any, name: str, rounds: int) -> dict[str, Any]:
    """Return the seconds of steps of one MLP, by round, and what a step sends."""
    import torch
    from torch import nn

    from hvdloss.benchmarks.step import counting

    widths, batch, times = SIZES[name]
    steps = {}
    parameters = 0
    for mode in ("compute", *MODES):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.ReLU()]
        net = nn.Sequential(*layers[:-1])
        x, y = torch.randn(batch, widths[0]), torch.randn(batch, widths[-1])
        parameters = sum(p.numel() for p in net.parameters())
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=1e-3)
        loss_of: Any = nn.functional.mse_loss
        if mode != "compute":
            loss_of = hvd.Objective("mse")
            named = net.named_parameters()
            optimizer = hvd.DistributedOptimizer(optimizer, named, loss_of, overlap=mode == "on")
        steps[mode] = step_of(net, optimizer, loss_of, x, y)
    sent = {}
    for mode, step in steps.items():
        for _ in range(WARM_UP):
            step()
        if mode != "compute":
            with counting() as seen:
                step()
            sent[mode] = dict(seen)
    seconds = timed_rounds(hvd, steps, times * rounds, 1, f"{name} parameters")
    return {
        "parameters": parameters,
        "batch": batch,
        "sent": sent,
        "buckets": buckets(optimizer),
        "seconds": seconds,
    }


def step_of(net: Any, optimizer: Any, loss_of: Any, x: Any, y: Any) -> Any:
    def step() -> None:
        optimizer.zero_grad()
        loss_of(net(x), y).backward()
        optimizer.step()

    return step


def buckets(optimizer: Any) -> list[dict[str, float]]:
    """Return each message of a step with overlap: its bytes, and when it can leave.

    ``ready`` is the part of the backward pass that is over by then, taken to be the part of the
    parameters whose gradients are there. The bucket that carries the ledgers leaves last.
    """
    exact = optimizer._hvdloss
    total = sum(p.numel() for p in exact.parameters.all())
    done = 0
    found = []
    for bucket in exact.reducer.buckets:
        own = sum(p.numel() for p in bucket.parameters)
        done += own
        last = bucket is exact.reducer.ledger_bucket
        flat = getattr(bucket, "flat", None)
        size = own * 4 if flat is None else flat.numel() * flat.element_size()
        found.append({"bytes": size, "ready": 1.0 if last else done / total})
    return sorted(found, key=lambda one: one["ready"])


# -- around them --------------------------------------------------------------------------------------


def predict(found: dict[str, Any], mode: str, model: LinkModel, scale: float) -> dict[str, float]:
    """Return what the model says of a step: seconds, their standard error, and bounds.

    Args:
        found: what :func:`measure` returned, of which only compute and what is sent are looked at.
        mode: "off" or "on".
        model: fitted at one rate.
        scale: the rate in units of that one.
    """
    fit = model.fit()
    assert fit is not None
    compute = statistics.median(found["seconds"]["compute"])
    sent = found["sent"][mode]

    def seconds(size: float, messages: int) -> float:
        return model.predict(size, messages, beta=fit.beta * scale).seconds

    whole = seconds(sent["bytes"], sent["messages"])
    as_fitted = model.predict(sent["bytes"], sent["messages"])
    predicted = compute + whole
    if mode == "on":
        free = 0.0
        for one in found["buckets"]:
            ready = compute * (FORWARD + (1 - FORWARD) * one["ready"])
            free = max(free, ready) + seconds(one["bytes"], 1)
        predicted = free
    return {
        "compute_s": compute,
        "communication_s": whole,
        "predicted_s": predicted,
        "std_s": as_fitted.std / as_fitted.seconds * whole,
        "at_least_s": max(compute, whole) if mode == "on" else predicted,
        "at_most_s": compute + whole,
    }


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure at every rate and return all numbers."""
    found: dict[float, dict[str, Any]] = {}
    rates = list(dict.fromkeys([args.fit_rate, *args.rates]))
    with Hosts(2, args.fit_rate) as hosts:
        for rate in rates:
            hosts.set_rate(rate)
            print(f"-- {rate:g} Mbit/s", flush=True)
            file = folder / f"{rate:g}.json"
            inner = ["--rank-part", "--json", str(file), "--rounds", str(args.rounds), "--sizes", *args.sizes]
            command = [sys.executable, "-m", "hvdloss.benchmarks.link_model", *inner]
            hosts.run(command, timeout=args.timeout, echo=args.verbose)
            found[rate] = json.loads(file.read_text())
    model = LinkModel.from_state_dict(found[args.fit_rate]["link"])
    points = []
    for rate in sorted(args.rates):
        for name, one in found[rate]["sizes"].items():
            for mode in MODES:
                said = predict(one, mode, model, rate / args.fit_rate)
                measured = statistics.median(one["seconds"][mode])
                points.append(
                    {
                        "rate_mbit": rate,
                        "size": name,
                        "parameters": one["parameters"],
                        "overlap": mode,
                        **one["sent"][mode],
                        **said,
                        "measured_s": measured,
                        "rounds_s": one["seconds"][mode],
                        "error": said["predicted_s"] / measured - 1,
                    }
                )
    fits = {f"{rate:g}": vars(LinkModel.from_state_dict(found[rate]["link"]).fit()) for rate in rates}
    return {
        "environment": {**found[args.fit_rate]["environment"], "hosts": 2},
        "fit_rate_mbit": args.fit_rate,
        "fits": fits,
        "points": points,
        "within": sum(abs(p["error"]) <= BAND for p in points),
        "of": len(points),
        "worst_error": max((p["error"] for p in points), key=abs),
        "median_absolute_error": statistics.median(abs(p["error"]) for p in points),
    }


def show(result: dict[str, Any]) -> None:
    """Print the numbers as a table."""
    for rate, fit in result["fits"].items():
        used = "predicts all" if float(rate) == result["fit_rate_mbit"] else "for comparison only"
        print(
            f"fitted at {rate} Mbit/s, {used}: alpha {fit['alpha'] * 1e3:.2f} +- "
            f"{fit['alpha_std'] * 1e3:.2f} ms, beta {fit['beta'] / 1e6:.2f} +- {fit['beta_std'] / 1e6:.2f} "
            f"MB/s, {fit['samples']} sums"
        )
    print(
        f"{'Mbit/s':>7} {'size':>6} {'overlap':>7} {'MB':>6} {'messages':>8} {'compute':>8} {'sums':>8} "
        f"{'predicted':>9} {'measured':>8} {'error':>6}   (ms)"
    )
    for p in result["points"]:
        print(
            f"{p['rate_mbit']:7g} {p['size']:>6} {p['overlap']:>7} {p['bytes'] / 1e6:6.1f} {p['messages']:8} "
            f"{p['compute_s'] * 1e3:8.1f} {p['communication_s'] * 1e3:8.1f} {p['predicted_s'] * 1e3:9.1f} "
            f"{p['measured_s'] * 1e3:8.1f} {p['error']:+6.0%} {'' if abs(p['error']) <= BAND else ' MISSED'}"
        )
    print(
        f"{result['within']} of {result['of']} within {BAND:.0%}; median error "
        f"{result['median_absolute_error']:.1%}, worst {result['worst_error']:+.1%}"
    )


def draw(result: dict[str, Any], path: str) -> None:
    """Draw predicted against measured, with the band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 6.0), layout="constrained")
    points = result["points"]
    ends = [p[key] for p in points for key in ("predicted_s", "measured_s")]
    line = [0.8 * min(ends), 1.25 * max(ends)]
    low, high = ([(1 + sign * BAND) * end for end in line] for sign in (-1, 1))
    axes.fill_between(line, low, high, color="0.9", label=f"within {BAND:.0%}")
    axes.plot(line, line, color="0.6", linewidth=1)
    rates = sorted({p["rate_mbit"] for p in points})
    for number, rate in enumerate(rates):
        color = plt.get_cmap("viridis")(number / max(1, len(rates) - 0.5))
        for mode, face in (("off", "none"), ("on", color)):
            chosen = [p for p in points if (p["rate_mbit"], p["overlap"]) == (rate, mode)]
            axes.scatter(
                [p["measured_s"] for p in chosen],
                [p["predicted_s"] for p in chosen],
                facecolors=[face] * len(chosen),
                edgecolors=[color] * len(chosen),
                label=f"{rate:g} Mbit/s, overlap {mode}",
            )
    axes.set(
        xscale="log",
        yscale="log",
        xlim=line,
        ylim=line,
        aspect="equal",
        xlabel="measured seconds per step (median)",
        ylabel="predicted seconds per step",
        title=f"Steps of MLPs on two hosts; link fitted at {result['fit_rate_mbit']:g} Mbit/s",
    )
    axes.legend(fontsize="small")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--fit-rate", type=float, default=200.0, help="Mbit/s at which the link is fitted")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[100.0, 200.0, 400.0, 800.0], help="predicted"
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds per rate")
    parser.add_argument("--out", default="runs/link-model", help="folder for the numbers and the picture")
    parser.add_argument("--json", help="the numbers' file, if elsewhere")
    parser.add_argument("--picture", help="the picture's file, if elsewhere")
    parser.add_argument("--verbose", action="store_true", help="show what the ranks print")
    parser.add_argument("--rank-part", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_part:
        rank_part(args)
        return
    reason = available()
    if reason:
        print(f"link_model: NOT MEASURED, no hosts can be made here: {reason}", file=sys.stderr)
        raise SystemExit(UNAVAILABLE)
    try:
        with tempfile.TemporaryDirectory(prefix="hvdloss-link-") as folder:
            result = run(args, Path(folder))
    except HostsError as error:
        raise SystemExit(f"link_model: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    write_json(args.json or f"{args.out}/link-model.json", result)
    draw(result, args.picture or f"{args.out}/link-model.png")
    show(result)


if __name__ == "__main__":
    main()
