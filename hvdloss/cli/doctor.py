"""``hvdloss doctor``: can training start here, and if not, what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import runpy
import shutil
import socket
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hvdloss._version import __version__
from hvdloss.cli import machine
from hvdloss.cli.errors import Exit, InstallError, Interrupted
from hvdloss.cli.install import recipe
from hvdloss.cli.install.probe import FRAMEWORKS
from hvdloss.cli.install.prove import run_job
from hvdloss.cli.process import Log, interruptible
from hvdloss.cli.progress import waiting
from hvdloss.comm.tuning import choose, cycle_time
from hvdloss.errors import ConfigError
from hvdloss.watch import limits_from_environment

_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "problem": ("✗", "red"), "info": ("·", "dim")}
_INSTALL = "hvdloss install"


@dataclass
class Finding:
    """One line of the report: `level` is ok, info, warning (training can start) or problem."""

    name: str
    level: str
    found: str
    way_out: str = ""


@dataclass
class Report:
    """Everything the doctor found."""

    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, level: str, found: str, way_out: str = "") -> None:
        """Add one line."""
        self.findings.append(Finding(name, level, found, way_out))

    @property
    def ok(self) -> bool:
        """Whether training can start: no finding is a problem."""
        return not any(finding.level == "problem" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """The report for ``--json``."""
        return {
            "ok": self.ok,
            "hvdloss": __version__,
            **self.facts,
            "findings": [asdict(finding) for finding in self.findings],
        }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--run/--no-run", default=True, help="Also run two ranks, if nothing speaks against it.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_context
def doctor(ctx: click.Context, run: bool, as_json: bool) -> None:
    """Report whether training can start here, and what to do about each problem.

    Looks at Python, the frameworks, Horovod and what it was built with and against, the
    engines, launchers, cores and GPUs; then has two ranks all-reduce under horovodrun, if there is one.
    Changes nothing.

    Exit status: 0 training can start; 1 it cannot.
    """
    try:
        with interruptible():
            with waiting("asking the frameworks and Horovod"):
                report = examine()
            if run and report.ok and report.facts["horovod"]["version"] is not None:
                with waiting("running two ranks"):
                    try_ranks(report)
    except Interrupted as stop:
        click.echo(f"Stopped by {stop}.", err=True)
        ctx.exit(stop.status)
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
    else:
        show(report, Console())
    ctx.exit(Exit.OK if report.ok else Exit.NOT_READY)


def examine() -> Report:
    """Look at everything. Frameworks and Horovod are imported in processes of their own."""
    report = Report()
    with ThreadPoolExecutor(len(FRAMEWORKS)) as pool:
        answers = dict(zip(FRAMEWORKS, pool.map(_ask, FRAMEWORKS), strict=True))
    _python(report)
    _frameworks(report, answers)
    distributed = any(
        answer.facts is not None and answer.facts.get("distributed")
        for answer in answers.get("torch", {}).values()
    )
    built = _horovod(report, answers, distributed)
    _engines(report, distributed)
    _launchers(report, built)
    _hardware(report)
    _name(report)
    _home(report)
    _choices(report)
    _watch(report)
    return report


def _watch(report: Report) -> None:
    """Whether ranks would watch each other, and for how long they wait."""
    try:
        limits = limits_from_environment()
    except ConfigError as error:
        report.add("watch", "problem", str(error), "unset the variable, or correct it")
        return
    report.facts["watch"] = None if limits is None else asdict(limits)
    if limits is None:
        report.add("watch", "info", "off (HVDLOSS_WATCH): failures of a rank are known only from Horovod")
        return
    report.add(
        "watch",
        "info",
        f"a rank that does not come is warned about after {limits.warn:g} s, an error after "
        f"{limits.stall:g} s; one that is stopped, or whose host cannot be reached, is lost after "
        f"{limits.silence:g} s (0: never)",
    )


def _choices(report: Report) -> None:
    """Report the communication settings and what decided them, and a controller that suits one machine."""
    try:
        tuning = choose()
    except ConfigError as error:
        report.add("choices", "problem", str(error), "unset the variable, or correct it")
        return
    report.facts["choices"] = tuning.as_dict()
    deciders = {choice["by"] for choice in tuning.as_dict().values()} - {"rule"}
    text = (
        f"buckets of {tuning.bucket_cap_mb.value:g} MiB, the first of {tuning.first_bucket_mb.value:g}; from "
        f"{tuning.unbucketed_mb.value:g} MiB on gradients are not bucketed; "
        f"{'while' if tuning.overlap.value else 'after'} the backward pass"
    )
    by = f" ({', '.join(sorted(deciders))})" if deciders else ""
    report.add("choices", "info", text + by)
    cycle = cycle_time()
    report.facts["choices"]["cycle_time_ms"] = asdict(cycle)
    by = "" if cycle.by == "rule" else f" ({cycle.by})"
    report.add("cycle time", "info", f"{cycle.value:g} ms{by}")
    built = report.facts["horovod"]["built"]
    if built["gloo"] and built["mpi"] and report.facts["launchers"]["mpirun"]:
        report.add("controller", "info", "on one machine --mpi is faster for large models than --gloo")


def _name(report: Report) -> None:
    """Gloo looks up this machine's own name; where that fails, every rank aborts."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        way_out = f"add the line '127.0.1.1 {name}' to /etc/hosts"
        report.add("host name", "problem", f"{name!r} does not resolve ({error.strerror})", way_out)


def _home(report: Report) -> None:
    """horovodrun notes in the home folder what it found out about hosts, and ends where it may not."""
    folder = Path(os.path.expanduser("~"), ".horovod")
    there = next(place for place in (folder, *folder.parents) if os.path.exists(place))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        report.add(
            "home",
            "problem",
            f"horovodrun writes to {folder}, and nothing can be written there",
            "set HOME to a folder that can be written, or start jobs with horovodrun --disable-cache",
        )


def try_ranks(report: Report) -> None:
    """Start the smallest real job: two ranks of one framework through one controller."""
    built, against = report.facts["horovod"]["built"], report.facts["horovod"]["built_against"]
    framework = next(name for name in FRAMEWORKS if name in against and report.facts["frameworks"][name])
    controller = "gloo" if built["gloo"] else "mpi"
    with tempfile.TemporaryDirectory(prefix="hvdloss-doctor-") as folder:
        log = Log(Path(folder) / "log")
        try:
            proof = run_job(framework, controller, 2, log)
            report.add("two ranks", "ok", f"an all-reduce gave the right numbers ({proof})")
        except InstallError as error:
            found = "\n".join([error.problem, *error.detail.splitlines()])
            report.add("two ranks", "problem", found, f"{_INSTALL} --force")
        finally:
            log.close()


def _ask(framework: str) -> dict[str, machine.Answer]:
    """The framework and Horovod's module for it; Horovod is asked first, as it has both."""
    if importlib.util.find_spec(framework) is None:
        return {}
    answers = {}
    if importlib.util.find_spec("horovod") is not None:
        answers["horovod"] = machine.inquire("inquire_horovod.py", framework)
    if "horovod" not in answers or answers["horovod"].facts is None:
        answers["framework"] = machine.inquire("inquire_framework.py", framework)
    return answers


def _python(report: Report) -> None:
    report.facts["python"] = {
        "version": platform.python_version(),
        "implementation": platform.python_implementation(),
        "executable": sys.executable,
    }
    name = f"{platform.python_implementation()} {platform.python_version()}"
    report.add("Python", "ok", f"{name}, {sys.executable}")
    report.add("hvdloss", "ok", __version__)


def _frameworks(report: Report, answers: dict[str, dict[str, machine.Answer]]) -> None:
    """The frameworks: at least one has to import."""
    versions: dict[str, str | None] = {}
    usable = False
    for name in FRAMEWORKS:
        asked = answers[name]
        if not asked:
            versions[name] = None
            continue
        facts = asked["horovod"].facts if "horovod" in asked else None
        if facts is not None:
            versions[name] = facts["framework"]
            usable = True
            report.add(name, "ok", facts["framework"])
            continue
        answer = asked["framework"]
        if answer.facts is None:
            versions[name] = None
            report.add(
                name, "problem", f"installed, but importing it fails: {answer.trouble}", f"reinstall {name}"
            )
        else:
            versions[name] = answer.facts["version"]
            usable = True
            report.add(name, "ok", answer.facts["version"])
    if not usable and not any(finding.name in FRAMEWORKS for finding in report.findings):
        report.add(
            "framework",
            "problem",
            "neither PyTorch nor TensorFlow is installed",
            "pip install torch, or pip install tensorflow-cpu; then " + _INSTALL,
        )
    try:
        versions["keras"] = importlib.metadata.version("keras")
    except importlib.metadata.PackageNotFoundError:
        versions["keras"] = None
    report.facts["frameworks"] = versions


def _engines(report: Report, distributed: bool) -> None:
    """What can move tensors between ranks here, and how ranks are started then."""
    horovod = not any(f.name.startswith("Horovod") and f.level == "problem" for f in report.findings)
    engines = ["horovod"] * (horovod and report.facts["horovod"]["version"] is not None)
    engines += ["torch.distributed"] * distributed
    report.facts["engines"] = engines
    starts = {"horovod": "Horovod (horovodrun)", "torch.distributed": "torch.distributed (torchrun, PyTorch)"}
    if engines:
        report.add("engines", "info", ", ".join(starts[one] for one in engines))


def _horovod(
    report: Report, answers: dict[str, dict[str, machine.Answer]], distributed: bool = False
) -> dict[str, bool]:
    """Horovod, what it was built with, and whether that still is what is installed."""
    built = {"gloo": False, "mpi": False, "nccl": False}
    facts: dict[str, Any] = {"version": None, "built": built, "built_against": {}, "recipe": None}
    report.facts["horovod"] = facts
    spec = importlib.util.find_spec("horovod")
    if spec is None or spec.origin is None:
        if distributed:
            way_out = f"{_INSTALL}, for horovodrun and for TensorFlow; PyTorch trains under torchrun without"
            report.add("Horovod", "warning", "not installed", way_out)
        else:
            report.add("Horovod", "problem", "not installed", _INSTALL)
        return built
    folder = Path(spec.origin).parent
    against = _built_against(folder)
    facts["built_against"] = against
    facts["recipe"] = _record(folder).get("RECIPE")
    _patches(report, facts["recipe"])
    working = []
    for name in FRAMEWORKS:
        answer = answers[name].get("horovod")
        if answer is None:
            continue
        if answer.facts is not None:
            facts["version"] = answer.facts["horovod"]
            for operation in built:
                built[operation] = built[operation] or bool(answer.facts[operation])
            _match(report, name, against.get(name), answer.facts["framework"])
            working.append(name)
        elif (alone := answers[name]["framework"].facts) is None:
            continue  # the framework itself is broken, and that is reported already
        elif against.get(name) is None:
            report.add(
                f"Horovod for {name}",
                "warning",
                "not built: this Horovod came without it",
                f"{_INSTALL}, if you train with {name}",
            )
        else:
            here = alone["version"]
            reason = (
                f"built against {name} {against[name]}, but {here} is installed"
                if here != against[name]
                else answer.trouble
            )
            report.add(f"Horovod for {name}", "problem", f"does not load: {reason}", _INSTALL)
    if facts["version"] is None:
        try:
            facts["version"] = importlib.metadata.version("horovod")
        except importlib.metadata.PackageNotFoundError:
            facts["version"] = "?"
    for name in against:
        if not answers.get(name):
            report.add(f"Horovod for {name}", "info", f"built against {name} {against[name]}, which is gone")
    with_ = [label for label in ("gloo", "mpi", "nccl") if built[label]]
    if working:
        names = {"gloo": "Gloo", "mpi": "MPI", "nccl": "NCCL"}
        text = f"{facts['version']} with " + (", ".join(names[w] for w in with_) or "no operations")
        report.add("Horovod", "ok", f"{text}, for {' and '.join(working)}")
    elif any(answers.values()) and not any(f.name.startswith("Horovod") for f in report.findings):
        report.add("Horovod", "problem", "it loads for no installed framework", _INSTALL)
    elif any(answers.values()) and not any(
        f.name.startswith("Horovod") and f.level == "problem" for f in report.findings
    ):
        report.add("Horovod", "problem", "built for none of the installed frameworks", _INSTALL)
    return built


def _patches(report: Report, built_by: str | None) -> None:
    """Whether Horovod was built with the patches that this hvdloss has."""
    if built_by is None:
        report.add("patches", "info", f"none: this Horovod is not of `{_INSTALL}`")
    elif built_by != recipe.RECIPE:
        found = f"Horovod was built with others (recipe {built_by}) than this hvdloss has ({recipe.RECIPE})"
        report.add("patches", "warning", found, _INSTALL)


def _match(report: Report, name: str, against: str | None, here: str) -> None:
    """Whether Horovod was built against the framework that is installed now."""
    if against is None or against == here:
        return
    report.add(
        f"Horovod for {name}",
        "problem",
        f"built against {name} {against}, but {here} is installed: it may crash or misread tensors",
        _INSTALL,
    )


def _built_against(folder: Path) -> dict[str, str]:
    """Framework versions from the record that Horovod's own build leaves."""
    try:
        data = json.loads((folder / "metadata.json").read_text())
    except (OSError, ValueError):
        return {}
    names = {"pytorch": "torch", "tensorflow": "tensorflow"}
    return {names[key]: value for key, value in data.items() if key in names}


def _record(folder: Path) -> dict[str, Any]:
    """What `hvdloss install` wrote into the wheel, or nothing for another Horovod."""
    path = folder / "hvdloss_build.py"
    return runpy.run_path(str(path)) if path.exists() else {}


def _launchers(report: Report, built: dict[str, bool]) -> None:
    """horovodrun and what it needs: mpirun for MPI, ssh for more than this machine."""
    horovodrun = machine.script_path("horovodrun")
    mpirun, ssh = shutil.which("mpirun"), shutil.which("ssh")
    report.facts["launchers"] = {"horovodrun": horovodrun, "mpirun": mpirun, "ssh": ssh}
    installed = report.facts["horovod"]["version"] is not None
    if horovodrun:
        beside = Path(horovodrun).parent == Path(sys.executable).parent
        foreign = installed and not beside and not _same_python(horovodrun)
        if foreign:
            report.add(
                "horovodrun",
                "problem",
                f"{horovodrun} belongs to another Python",
                f"{_INSTALL}, and put {Path(sys.executable).parent} first on PATH",
            )
        else:
            report.add("horovodrun", "ok", horovodrun)
    elif installed:
        report.add("horovodrun", "problem", "neither beside this Python nor on PATH", f"{_INSTALL} --force")
    flavour = None
    if mpirun:
        flavour = machine.mpi_flavour(machine.run_quietly([mpirun, "--version"])[1])
    if built["mpi"]:
        if flavour:
            report.add("mpirun", "ok", f"{flavour}, {mpirun}")
        else:
            found = f"{mpirun}, which names no known MPI" if mpirun else "not found"
            way_out = "apt-get install openmpi-bin, or start jobs with horovodrun --gloo"
            report.add("mpirun", "warning" if built["gloo"] else "problem", found, way_out)
    elif flavour:
        report.add("mpirun", "info", f"{flavour}, {mpirun} (Horovod was built without MPI)")
    if ssh:
        report.add("ssh", "ok", ssh)
    else:
        report.add(
            "ssh",
            "warning",
            "not found: needed for jobs on several machines",
            "apt-get install openssh-client",
        )


def _same_python(script: str) -> bool:
    """Whether a console script starts this interpreter."""
    try:
        with open(script, "rb") as file:
            first = file.readline(4096).decode(errors="replace")
    except OSError:
        return False
    interpreter = first[2:].strip().split(" ")[0] if first.startswith("#!") else ""
    return bool(interpreter) and Path(interpreter).parent == Path(sys.executable).parent


def _hardware(report: Report) -> None:
    cores, memory, gpus = machine.usable_cores(), machine.available_memory(), machine.gpus()
    report.facts["machine"] = {
        "platform": platform.platform(),
        "cores": cores,
        "memory_available": memory,
        "gpus": gpus,
        "hostname": platform.node(),
    }
    size = f", {memory / 2**30:.1f} GB of memory free" if memory else ""
    report.add("cores", "ok", f"{cores} usable of {os.cpu_count()}{size}")
    report.add("GPUs", "info", ", ".join(gpus) if gpus else "none")
    nccl = report.facts["horovod"]["built"]["nccl"]
    if gpus and not nccl and report.facts["horovod"]["version"]:
        report.add(
            "NCCL",
            "warning",
            "a GPU is there, but this Horovod reduces CPU tensors only",
            f"{_INSTALL} --nccl, with a CUDA build of torch",
        )


def show(report: Report, console: Console) -> None:
    """Print the report as a table and a verdict."""
    table = Table(show_header=False, show_edge=False, box=None, padding=(0, 1))
    for _ in range(3):
        table.add_column(overflow="fold")
    for finding in report.findings:
        mark, style = _MARKS[finding.level]
        table.add_row(Text(mark, style=style), Text(finding.name), Text(finding.found))
    console.print(table)
    console.print()
    troubles = [f for f in report.findings if f.way_out]
    if report.ok:
        console.print(Text("Training can start.", style="bold green"))
    else:
        console.print(Text("Training cannot start.", style="bold red"))
    for finding in troubles:
        mark, style = _MARKS[finding.level]
        line = Text(f"{mark} ", style=style)
        line.append(f"{finding.name}: {finding.found}\n    way out: {finding.way_out}", style="default")
        console.print(line, soft_wrap=True)
