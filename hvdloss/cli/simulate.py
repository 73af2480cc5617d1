"""``hvdloss simulate``: what a plan would do on ranks that are not there."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table

from hvdloss.cli.errors import Exit, Interrupted
from hvdloss.cli.process import interruptible
from hvdloss.cli.progress import bar
from hvdloss.comm.messages import parse_json
from hvdloss.errors import ConfigError
from hvdloss.simulation.model import (
    ComputeModel,
    Figures,
    LossModel,
    NetworkModel,
    Outcome,
    TrainingPlan,
    simulate_training,
)
from hvdloss.terms.link import LinkModel
from hvdloss.terms.policies.compression import AdaptiveCompression
from hvdloss.terms.policies.period import RULES, OuterStep, SyncPeriod
from hvdloss.terms.policies.shares import BatchShares
from hvdloss.terms.term import Decision, Policy

if TYPE_CHECKING:
    _Type = click.ParamType[Any]
else:  # only recent versions have a subscript
    _Type = click.ParamType

SHOWN = 6  # decisions of each number of ranks; all are in the JSON

# -- values with units --------------------------------------------------------------------------------

_NUMBER = r"([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)"
_SCALES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_TIMES = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9, "min": 60.0}


class _Unit(_Type):
    """A number with a unit, as a float."""

    def __init__(self, name: str, pattern: str, scale: Callable[..., float], example: str) -> None:
        self.name, self.scale, self.example = name, scale, example
        self._pattern = re.compile(f"{_NUMBER} ?{pattern}")

    def read(self, text: str) -> float | None:
        """Return the number, or None for what is none."""
        found = self._pattern.fullmatch(text.strip())
        return float(found[1]) * self.scale(*found.groups("")[1:]) if found else None

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float | int):
            return float(value)
        found = self.read(value)
        if found is None:
            self.fail(f"{value!r} is not a {self.name}; write it like {self.example}", param, ctx)
        return found


TIME = _Unit("time", "(s|ms|us|µs|ns|min)?", lambda unit: _TIMES[unit], "50us, 1.5ms or 2s")
RATE = _Unit(
    "rate",
    r"([kKMGT]i?)?(bits?|b|B)(?:/s|ps)?",
    lambda prefix, unit: (_SCALES | _BINARY)[prefix] * (1.0 if unit == "B" else 0.125),
    "200Mbit, 10Gbit (bits a second) or 25MB (bytes a second)",
)
COUNT = _Unit("count", "([kKMGT])?", lambda prefix: _SCALES[prefix], "25M or 350000")
NUMBER = _Unit("number", "", lambda: 1.0, "0.5")
INTEGER = _Unit("whole number", "", lambda: 1.0, "3")


class _Parts(_Type):
    """Several values with a colon between; the last ones may be left out."""

    def __init__(self, *parts: tuple[str, _Unit], least: int, example: str) -> None:
        self.name = ":".join(name for name, _ in parts)
        self.parts, self.least, self.example = parts, least, example

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        texts = value.split(":")
        found = [unit.read(text) for (_, unit), text in zip(self.parts, texts, strict=False)]
        wrong = not self.least <= len(texts) <= len(self.parts) or None in found
        out = tuple(one for one in found if one is not None)
        whole = [one for one, (_, unit) in zip(out, self.parts, strict=False) if unit is INTEGER]
        if wrong or any(one != int(one) for one in whole):
            self.fail(f"{value!r} is not {self.name}; write it like {self.example}", param, ctx)
        return out


class _Counts(_Type):
    """Whole numbers above 0 with commas between."""

    name = "number,number,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        texts = [one.strip() for one in value.split(",")]
        if not all(re.fullmatch("[1-9][0-9]*", one) for one in texts):
            self.fail(f"{value!r} is not a number of ranks; write it like 64, or 4,16,64", param, ctx)
        return [int(one) for one in texts]


class _Period(_Type):
    """A whole number of steps, or the name of a rule."""

    name = "steps|rule"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value in RULES[1:]:
            return str(value)
        if not re.fullmatch("[1-9][0-9]*", value):
            self.fail(f"{value!r} is neither a number of steps nor one of {', '.join(RULES[1:])}", param, ctx)
        return int(value)


_file = click.Path(dir_okay=False, path_type=Path)

# -- the command --------------------------------------------------------------------------------------


def _options(*options: Any) -> Callable[[Any], Any]:
    """Return a decorator that adds options in the order in which they stand."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@_options(
    click.option(
        "-np",
        "--ranks",
        type=_Counts(),
        multiple=True,
        default=("4,16,64",),
        help="Repeat, or write several with commas.",
    ),
    click.option("--batch-size", type=click.IntRange(1), help="Samples of a step, over all ranks."),
    click.option("--batch-per-rank", type=click.IntRange(1), help="The same, per rank.  [default: 32]"),
    click.option("--steps", type=click.IntRange(1), default=300),
    click.option("--seed", type=click.IntRange(0), default=0, help="Of all that is random."),
)
@_options(
    click.option("--seconds-per-sample", type=TIME, default="1ms", help="A rank's computation."),
    click.option("--fixed-seconds", type=TIME, default="0s", help="Per step, whatever the batch."),
    click.option("--noise", type=float, default=0.05, help="Scatter of computation: lognormal sigma."),
    click.option(
        "--tail",
        type=_Parts(
            ("probability", NUMBER), ("time", TIME), ("shape", NUMBER), least=2, example="0.001:200ms"
        ),
        help="A rank is delayed in a step with this probability, by at least this time.  [shape 1.5]",
    ),
    click.option(
        "--straggler",
        type=_Parts(("rank", INTEGER), ("factor", NUMBER), least=2, example="3:2.0"),
        multiple=True,
        help="This rank's samples always take this factor longer. Repeat for several.",
    ),
    click.option(
        "--slow-share",
        type=_Parts(("share", NUMBER), ("factor", NUMBER), least=2, example="0.01:3"),
        help="The same for this share of the ranks, drawn by the seed.",
    ),
)
@_options(
    click.option("--parameters", type=COUNT, default="25M", help="Of the model."),
    click.option("--bytes-per-parameter", type=click.FloatRange(0, min_open=True), default=4.0),
    click.option(
        "--messages", type=click.IntRange(1), help="All-reduces of a step.  [default: 25 MiB buckets]"
    ),
    click.option("--bandwidth", type=RATE, default="10Gbit", help="Of each rank's link, in each direction."),
    click.option("--latency", type=TIME, default="50us", help="Per message and hop."),
    click.option(
        "--link",
        type=_file,
        multiple=True,
        help="Take bandwidth and latency from real ranks: what `hvdloss bench allreduce --json` printed. "
        "Repeat for several numbers of ranks.",
    ),
    click.option(
        "--slow-link",
        type=_Parts(("rank", INTEGER), ("rate", RATE), least=2, example="2:50Mbit"),
        multiple=True,
        help="The link after this rank (or host) is slower. Repeat for several.",
    ),
    click.option("--overlap", type=click.FloatRange(0, 1), default=0.0, help="Share of an exchange hidden."),
    click.option("--jitter", type=float, default=0.0, help="Scatter of exchanges: lognormal sigma."),
    click.option(
        "--handling", type=float, default=0.0, help="Seconds per GB of gradients, to copy, scale, divide."
    ),
    click.option("--parameter-handling", type=float, default=0.0, help="The same for parameters."),
    click.option("--algorithm", type=click.Choice(["ring", "halving"]), default="ring"),
    click.option("--local-ranks", type=click.IntRange(1), default=1, help="Ranks per host."),
    click.option("--local-bandwidth", type=RATE, default="80Gbit", help="Inside a host."),
    click.option("--local-latency", type=TIME, default="5us", help="Inside a host, per message and hop."),
)
@_options(
    click.option("--shares/--no-shares", default=True, help="Samples in proportion to measured speed."),
    click.option("--gain", type=float, default=0.05, help="Least saving for new shares."),
    click.option("--delay", type=click.IntRange(0), default=0, help="Steps until new shares hold."),
    click.option(
        "--period", type=_Period(), help=f"Steps between exchanges: a number, or {', '.join(RULES[1:])}."
    ),
    click.option("--initial-period", type=click.IntRange(1), help="Initial period of a rule."),
    click.option("--max-period", type=click.IntRange(1), default=128, help="Longest period of a rule."),
    click.option("--interval", type=TIME, default="5s", help="Simulated time between a rule's decisions."),
    click.option(
        "--start", type=click.IntRange(0), default=0, help="Exchange in every step before this one."
    ),
    click.option(
        "--outer",
        type=_Parts(("lr", NUMBER), ("momentum", NUMBER), least=2, example="0.7:0.9"),
        help="DiLoCo's outer step. The loss model does not know what it is good for.",
    ),
    click.option(
        "--price", type=float, default=0.0, help="Of a second's communication, for --period priced."
    ),
    click.option("--target-loss", type=float, default=0.0, help="For the rules of the period."),
    click.option("--smoothness", type=float, default=0.1, help="Learning rate times smoothness of the loss."),
    click.option("--compress/--no-compress", default=False, help="16-bit exchanges where that pays."),
)
@_options(
    click.option(
        "--loss",
        type=_Parts(
            ("start", NUMBER),
            ("floor", NUMBER),
            ("exponent", NUMBER),
            ("steps", NUMBER),
            least=2,
            example="2.5:0.2:0.5:100",
        ),
        default="2.5:0.2:0.5:100",
        help="floor + (start - floor) (1 + step / steps)^-exponent.",
    ),
    click.option("--loss-noise", type=float, default=0.0, help="Scatter of batches: lognormal sigma."),
    click.option("--drift", type=float, default=1.0, help="How far ranks move apart in local steps."),
)
@_options(
    click.option(
        "--json", "json_file", type=click.Path(dir_okay=False, allow_dash=True), help="Numbers; - prints."
    ),
    click.option(
        "--plot", type=_file, help="Picture (PNG, PDF, SVG) of steps against ranks, with matplotlib."
    ),
    click.option("--log", type=_file, help="Control log of one number of ranks; a new file."),
)
@click.pass_context
def simulate(ctx: click.Context, /, **given: Any) -> None:
    """Try a plan on ranks that are not there: shares, period, compression, number of ranks.

    What decides is the very code that real ranks run; how long they compute, how long sums take and how
    the loss falls is modelled (docs/howto/simulate.md says how). Times are written like 50us, rates like
    200Mbit or 25MB. Shown are the second half of the steps, with the plan and without.

    Exit status: 0 done; 2 a wrong option or file; 3 --plot without matplotlib; 130 interrupted.
    """
    asked = _Asked(given, ctx)
    if given["plot"] and importlib.util.find_spec("matplotlib") is None:
        click.echo("Error: --plot needs matplotlib. Way out: pip install 'hvdloss[bench]'", err=True)
        ctx.exit(Exit.MISSING)
    try:
        plans = asked.plans()
        with interruptible(), _progress(plans) as track:
            results = [_both(plan, given["log"], track) for plan in plans]
        numbers = {"settings": asked.settings(plans[0]), "results": [one.as_dict() for one in results]}
        if given["json_file"] not in (None, "-"):
            _write(Path(given["json_file"]), json.dumps(numbers) + "\n")
        if given["plot"]:
            given["plot"].parent.mkdir(parents=True, exist_ok=True)
            _draw(results, given["plot"])
    except (ConfigError, OSError, ValueError) as error:
        raise click.UsageError(str(error), ctx) from error
    except Interrupted as stop:
        click.echo(f"Stopped by {stop}.", err=True)
        ctx.exit(stop.status)
    if given["json_file"] == "-":
        click.echo(json.dumps(numbers))
        return
    _show(_console(), results)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# -- from options to plans ----------------------------------------------------------------------------


class _Asked:
    """The options of one call, and the plans that they ask for."""

    def __init__(self, given: dict[str, Any], ctx: click.Context) -> None:
        self.given = given
        self.ranks = sorted({count for some in given["ranks"] for count in some})
        for name in ("batch_size", "batch_per_rank"):
            if given["batch_size"] and given["batch_per_rank"]:
                raise click.BadOptionUsage(name, "give --batch-size or --batch-per-rank, not both", ctx)
        for name in ("bandwidth", "latency"):
            if given["link"] and ctx.get_parameter_source(name) is not ParameterSource.DEFAULT:
                raise click.BadOptionUsage(name, f"--{name} is in the file of --link; leave one out", ctx)
        if given["log"] and len(self.ranks) > 1:
            raise click.BadOptionUsage("log", f"--log takes one number of ranks, not {len(self.ranks)}", ctx)
        for name in ("initial_period", "outer"):
            if given[name] is not None and given["period"] is None:
                flag = "--" + name.replace("_", "-")
                raise click.BadOptionUsage(name, f"{flag} belongs to a --period", ctx)
        for option, count in (("straggler", "ranks"), ("slow_link", "hosts")):
            most = max(self.ranks) if count == "ranks" else -(-max(self.ranks) // given["local_ranks"])
            for number, _ in given[option]:
                if number >= most:
                    flag = "--" + option.replace("_", "-")
                    raise click.BadOptionUsage(
                        option, f"{flag} {number:g}: there are at most {most} {count}, counted from 0", ctx
                    )

    def plans(self) -> list[TrainingPlan]:
        """Return one plan per number of ranks."""
        fits = _fits(self.given["link"]) if self.given["link"] else None
        return [self._plan(ranks, fits) for ranks in self.ranks]

    def _plan(self, ranks: int, fits: dict[int, tuple[float, float]] | None) -> TrainingPlan:
        given = self.given
        batch = given["batch_size"] or ranks * (given["batch_per_rank"] or 32)
        return TrainingPlan(
            ranks=ranks,
            batch_size=batch,
            bytes=given["parameters"] * given["bytes_per_parameter"],
            steps=given["steps"],
            policies=self._acts(batch),
            compute=self._compute(ranks),
            network=self._network(ranks, fits),
            loss=LossModel(
                **dict(zip(("start", "floor", "exponent", "scale"), given["loss"], strict=False)),
                noise=given["loss_noise"],
                drift=given["drift"],
            ),
            messages=given["messages"],
            price=given["price"],
            seed=given["seed"],
        )

    def _compute(self, ranks: int) -> ComputeModel:
        given = self.given
        tail = dict(zip(("tail", "tail_seconds", "tail_shape"), given["tail"] or (), strict=False))
        share = dict(zip(("slow_share", "slow_factor"), given["slow_share"] or (), strict=False))
        # With several numbers of ranks, a rank or link that one of them lacks is that one's gain.
        slow = {int(rank): factor for rank, factor in given["straggler"] if rank < ranks}
        return ComputeModel(
            per_sample=given["seconds_per_sample"],
            fixed=given["fixed_seconds"],
            noise=given["noise"],
            slow=slow,
            **tail,
            **share,
        )

    def _network(self, ranks: int, fits: dict[int, tuple[float, float]] | None) -> NetworkModel:
        given = self.given
        hosts = -(-ranks // given["local_ranks"])
        names = ("overlap", "jitter", "algorithm", "local_ranks", "local_bandwidth", "local_latency")
        more: dict[str, Any] = {name: given[name] for name in names}
        more |= {name: given[name] * 1e-9 for name in ("handling", "parameter_handling")}
        more["slow"] = {int(number): rate for number, rate in given["slow_link"] if number < hosts}
        if fits is not None:
            return NetworkModel.from_fits(fits, **more)
        return NetworkModel(latency=given["latency"], bandwidth=given["bandwidth"], **more)

    def _acts(self, batch: int) -> tuple[Policy, ...]:
        given = self.given
        policies: list[Policy] = []
        if given["shares"]:
            policies.append(BatchShares(batch, gain=given["gain"], delay=given["delay"]))
        if given["period"] is not None:
            policies.append(
                SyncPeriod(
                    given["period"],
                    initial_period=given["initial_period"],
                    max_period=given["max_period"],
                    interval=given["interval"],
                    start=given["start"],
                    outer=None if given["outer"] is None else OuterStep(*given["outer"]),
                    target_loss=given["target_loss"],
                    smoothness=given["smoothness"],
                )
            )
        if given["compress"]:
            policies.append(AdaptiveCompression())
        return tuple(policies)

    def settings(self, plan: TrainingPlan) -> dict[str, Any]:
        """Return the options, and the models that were made of them, ready for JSON."""
        options = {
            name: [str(one) for one in value]
            if name == "link"
            else str(value)
            if isinstance(value, Path)
            else value
            for name, value in self.given.items()
        }
        models = {"compute": asdict(plan.compute), "network": asdict(plan.network), "loss": asdict(plan.loss)}
        # JSON has no infinity, which a fitted rate is where larger sums took no longer.
        for name in ("bandwidth", "local_bandwidth"):
            models["network"][name] = min(models["network"][name], 1e15)
        return {**options, "ranks": self.ranks, **models}


def _fits(paths: tuple[Path, ...]) -> dict[int, tuple[float, float]]:
    """Return the fitted (alpha, beta) by number of ranks in files of ``hvdloss bench allreduce --json``.

    Also taken: a single result, ``{"ranks", "alpha_s", "beta_bytes_per_s"}``, and what
    :meth:`hvdloss.terms.link.LinkModel.state_dict` returns.

    Raises:
        ConfigError: a file that is none of these.
    """
    fits: dict[int, tuple[float, float]] = {}
    for path in paths:
        try:
            found = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"--link {str(path)!r}: cannot be read: {error}") from error
        many = found.get("results") if isinstance(found, dict) else None
        for one in many if isinstance(many, list) else [found]:
            try:
                ranks, alpha, beta = _fit_in(one)
            except ConfigError:
                raise
            except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
                raise ConfigError(
                    f"--link {str(path)!r} is not what `hvdloss bench allreduce --json` prints: no "
                    f"results with environment.ranks and fit.horovod.alpha_s and beta_bytes_per_s"
                ) from error
            if ranks > 1:
                fits[ranks] = alpha, beta
    if not fits:
        raise ConfigError(f"--link {', '.join(map(str, paths))}: no link of two ranks or more was measured")
    return fits


def _fit_in(one: dict[str, Any]) -> tuple[int, float, float]:
    if "samples" in one:
        link = LinkModel.from_state_dict(one)
        fit = link.fit()
        if fit is None:
            raise KeyError("times of two sizes")
        return link.ranks, fit.alpha, fit.beta
    ranks = one["environment"]["ranks"] if "environment" in one else one["ranks"]
    fitted = one["fit"]["horovod"] if "fit" in one else one
    return int(ranks), float(fitted["alpha_s"]), float(fitted["beta_bytes_per_s"])


# -- running ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Result:
    """One number of ranks, with the plan and without; no `planned` where the plan is to do nothing."""

    plain: Outcome
    planned: Outcome | None

    @property
    def ranks(self) -> int:
        return self.plain.plan.ranks

    def rows(self) -> Iterator[tuple[str, Outcome]]:
        yield "plain", self.plain
        if self.planned is not None:
            yield "plan", self.planned

    def as_dict(self) -> dict[str, Any]:
        return {
            "ranks": self.ranks,
            "plain": self.plain.as_dict(),
            "plan": None if self.planned is None else self.planned.as_dict(),
        }


def _both(
    plan: TrainingPlan, log: Path | None, track: Callable[[str], Callable[[int, int], None]]
) -> _Result:
    """Simulate a plan, and the same ranks without it."""
    label = f"{plan.ranks} ranks"
    # The plan first, so that its errors are raised at once.
    planned = simulate_training(plan, log=log, progress=track(label)) if plan.policies or log else None
    plain = simulate_training(plan.plain(), progress=track(f"{label}, plain"))
    return _Result(plain, planned if plan.policies else None)


@contextmanager
def _progress(plans: list[TrainingPlan]) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Yield a factory of progress callbacks; shown on a terminal only."""
    with bar() as progress:
        task = progress.add_task("", total=sum(plan.steps * (1 + bool(plan.policies)) for plan in plans))

        def track(label: str) -> Callable[[int, int], None]:
            progress.update(task, description=label)
            return lambda done, of: progress.update(task, advance=1)

        yield track


# -- showing ------------------------------------------------------------------------------------------


def _console() -> Console:
    """Return where tables go; wide enough for them where the width of a line is not known."""
    return Console() if sys.stdout.isatty() or os.environ.get("COLUMNS") else Console(width=140)


def _table(title: str) -> Table:
    """Return a table without lines: it fits 80 columns, and what is piped on is plain."""
    return Table(title=title, title_justify="left", box=None, pad_edge=False, collapse_padding=True)


def _show(console: Console, results: list[_Result]) -> None:
    first = results[0].plain
    steps = first.second_half.steps
    table = _table(f"The last {steps} of {first.plan.steps} simulated steps")
    table.add_column("ranks", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for column in (
        *("step", "samples\n/s", "/ plain", "effi-\nciency", "comput-\ning", "waiting", "moving"),
        *("whole\nrun", "loss"),
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        for name, outcome in result.rows():
            table.add_row(str(result.ranks) if name == "plain" else "", name, *_cells(outcome, result.plain))
    console.print(table)
    console.print(
        "Efficiency: samples a second, as a share of what the ranks would do if none ever waited or "
        "communicated. Whole run and loss: of all steps; the loss is a declared curve.",
        highlight=False,
    )
    for result in results:
        if result.planned is not None:
            _show_decisions(console, result.planned)


def _cells(outcome: Outcome, plain: Outcome) -> list[str]:
    figures: Figures = outcome.second_half
    return [
        _time(figures.step_seconds),
        _rate(figures.samples_per_second),
        ""
        if outcome is plain
        else f"{figures.samples_per_second / plain.second_half.samples_per_second:.2f}",
        *(
            f"{share:.1%}"
            for share in (figures.efficiency, figures.computing, figures.waiting, figures.moving)
        ),
        _time(outcome.seconds),
        f"{outcome.losses[-1]:.3f}",
    ]


def _show_decisions(console: Console, outcome: Outcome) -> None:
    decisions = outcome.decisions
    ranks = outcome.plan.ranks
    console.print()
    if not decisions:
        console.print(f"{ranks} ranks: nothing was decided.", highlight=False)
        return
    more = f", the last {SHOWN} of {len(decisions)}" if len(decisions) > SHOWN else ""
    table = _table(f"Decided on {ranks} ranks{more}")
    table.add_column("step", justify="right")
    for column in ("what", "before", "after", "why"):
        table.add_column(column)
    for one in decisions[-SHOWN:]:
        table.add_row(str(one.step), one.what, _value(one, one.before), _value(one, one.after), one.reason)
    console.print(table, markup=False)


def _value(decision: Decision, value: Any) -> str:
    """Return a decided value in a few characters, however many ranks it is of."""
    if isinstance(value, list) and min(value) == max(value):
        return f"{value[0]} each"
    if isinstance(value, list) and len(value) > 8:
        return f"{min(value)} to {max(value)}, median {np.median(value):g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)


def _rate(number: float) -> str:
    for least, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= least:
            scaled = number / (1e3 if letter == "k" else least)
            return f"{scaled:.3g}{letter}" if scaled < 100 else f"{scaled:.0f}{letter}"
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _time(seconds: float) -> str:
    if seconds < 1.0:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 600 else f"{seconds / 60:.3g} min"


def _draw(results: list[_Result], path: Path) -> None:
    """Draw step time and efficiency against the number of ranks, with the plan and without."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator

    ranks = [result.ranks for result in results]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, colour in (("plain", "tab:orange"), ("plan", "tab:green")):
        found = [dict(result.rows()).get(name) for result in results]
        outcomes = [one for one in found if one is not None]
        if not outcomes:
            continue
        steps = [one.second_half.step_seconds * 1e3 for one in outcomes]
        shares = [one.second_half.efficiency * 100 for one in outcomes]
        left.plot(ranks, steps, "o-", color=colour, label=name)
        right.plot(ranks, shares, "o-", color=colour, label=name)
        if name == "plain":
            computing = [one.second_half.computing * one.second_half.step_seconds * 1e3 for one in outcomes]
            left.plot(ranks, computing, ":", color="0.5", label="computing alone")
    for axis, label in ((left, "ms per step"), (right, "efficiency, %")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ranks, [str(one) for one in ranks])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("ranks")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    top = max(math.ceil(axis_max) for axis_max in (left.get_ylim()[1], 1))
    left.set_ylim(0, top)
    right.set_ylim(0, 105)
    left.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
