"""``hvdloss install``: build Horovod for this Python and its frameworks, install it, prove it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hvdloss.cli.errors import Exit, InstallError, Interrupted
from hvdloss.cli.install import pip, recipe
from hvdloss.cli.install.build import build_wheel
from hvdloss.cli.install.cache import (
    BUILD_BYTES,
    INSTALL_BYTES,
    Cache,
    CachedWheel,
    cache_folder,
    check_source,
    require_space,
)
from hvdloss.cli.install.plan import Plan, make_plan
from hvdloss.cli.install.probe import FRAMEWORKS, Probe, look, require_python, require_tools
from hvdloss.cli.install.progress import Reporter
from hvdloss.cli.install.prove import Proof, prove
from hvdloss.cli.process import Log, interruptible, uninterrupted

__all__ = ["install"]


def _frameworks(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> tuple[str, ...]:
    names = [name.strip() for value in values for name in value.split(",") if name.strip()]
    for name in names:
        if name not in FRAMEWORKS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(FRAMEWORKS)}")
    return tuple(dict.fromkeys(names))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--frameworks",
    multiple=True,
    callback=_frameworks,
    metavar="NAMES",
    help="torch, tensorflow, or both with a comma. Default: all that are installed.",
)
@click.option("--mpi/--no-mpi", default=None, help="Build for MPI. Default: if an MPI is there.")
@click.option("--gloo/--no-gloo", default=True, help="Build for Gloo. Default: yes.")
@click.option("--nccl", is_flag=True, help="Build GPU operations with NCCL (PyTorch only).")
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(1),
    metavar="N",
    help="Compiler processes at a time. Default: one a core, as memory allows.",
)
@click.option("--force", is_flag=True, help="Build again, even if a wheel is cached.")
@click.option("--dry-run", is_flag=True, help="Say what was found and would be built; stop there.")
@click.option(
    "--source",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help=f"Take {recipe.SDIST} from disk (its hash is checked all the same).",
)
@click.option("--prove/--no-prove", "proving", default=True, help="Run two ranks to prove it.")
@click.option("--cache-dir", metavar="DIR", help="Where wheels and logs are kept. Default: ~/.cache/hvdloss.")
@click.option(
    "--wheel-dir",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Also copy the wheel there.",
)
@click.option(
    "--wait",
    type=click.FloatRange(0),
    default=1800.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for another install to finish.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def install(ctx: click.Context, /, **options: Any) -> None:
    """Build Horovod for this Python and its frameworks, install it, and prove it.

    Horovod's newest release does not compile against current frameworks as it is; this
    command fetches its source (hash-checked), adjusts it, builds a wheel, keeps it in a
    cache, installs it with pip, and runs two ranks through every controller that was built.

    \b
    Exit status: 0 done; 2 wrong command line; 3 something is missing (nothing was
    changed); 4 the source could not be had; 5 the build failed (nothing was
    installed); 6 installing or proving failed; 130 interrupted; 143 terminated.
    """
    as_json = options.pop("as_json")
    # With --json stdout is for the result alone.
    console = Console(stderr=as_json, soft_wrap=not sys.stdout.isatty())
    reporter = Reporter(console)
    result: dict[str, Any] = {}
    status = int(Exit.OK)
    try:
        with interruptible():
            _install(reporter, result, **options)
    except InstallError as error:
        status = error.status
        result["error"] = {"problem": error.problem, "way_out": error.way_out}
        if error.detail:
            result["error"]["detail"] = error.detail.splitlines()
        if error.log:
            result["log"] = error.log
        _show_error(Console(stderr=True, soft_wrap=True), error)
    except Interrupted as stop:
        status = stop.status
        result["error"] = {"problem": f"stopped by {stop}", "way_out": "run the command again"}
        Console(stderr=True, soft_wrap=True).print(
            f"Stopped by {stop} after {reporter.elapsed:.0f} s."
            " No half-built wheel is kept; run the command again to go on.",
            markup=False,
            highlight=False,
        )
    if as_json:
        result.update(status=status, ok=status == 0, stages=reporter.seconds)
        result["seconds"] = round(reporter.elapsed, 2)
        click.echo(json.dumps(result, indent=2))
    ctx.exit(status)


def _install(
    reporter: Reporter,
    result: dict[str, Any],
    *,
    frameworks: tuple[str, ...],
    mpi: bool | None,
    gloo: bool,
    nccl: bool,
    jobs: int | None,
    force: bool,
    dry_run: bool,
    source: Path | None,
    proving: bool,
    cache_dir: str | None,
    wheel_dir: Path | None,
    wait: float,
) -> None:
    """Everything between the options and the exit status; `result` is filled as facts come in."""
    # 1. Look, decide, and refuse whatever cannot work, with nothing changed yet.
    with reporter.shown():
        reporter.stage("probe", "importing the frameworks to see what is there")
        require_python()
        pip.pip_command()
        probe = look(frameworks or FRAMEWORKS, want_gpu=nccl)
        reporter.done()
    cache = Cache(cache_folder(cache_dir))
    try:
        require_tools(probe)
        plan = make_plan(probe, frameworks=frameworks, gloo=gloo, mpi=mpi, nccl=nccl, jobs=jobs)
    except InstallError:
        reporter.console.print(found_table(probe, None, None))
        raise
    found, damage = (None, "") if force else _peek(cache, plan.key)
    reporter.console.print(found_table(probe, plan, found))
    for note in (*plan.notes, *([damage] if damage else [])):
        reporter.console.print(f"note: {note}", markup=False, highlight=False)
    result.update(key=plan.key, facts=plan.facts, cached=found is not None)
    if source is not None:
        check_source(source, recipe.SHA256)
    if not found:
        require_space(cache.folder, BUILD_BYTES, "to build")
    require_space(Path(sys.prefix), INSTALL_BYTES, "to install")
    if dry_run:
        return

    # 2. Build (or take) the wheel, install it, prove it; one install at a time.
    cache.create()
    log = Log(cache.new_log())
    result["log"] = str(log.path)
    try:
        with reporter.shown():
            reporter.stage("source", "looking in the cache")
            with cache.locked(wait, reporter.detail):
                wheel, fresh = _obtain(reporter, plan, probe, cache, source, log, force)
                if wheel_dir is not None:
                    wheel_dir.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(wheel.path, wheel_dir)
                reporter.stage("install", wheel.path.name)
                pip.require_runtime(log)
                with uninterrupted():
                    pip.install_wheel(wheel.path, log)
            result.update(wheel=str(wheel.path), sha256=wheel.sha256, built=fresh)
            proofs: list[Proof] = []
            if proving:
                reporter.stage("prove")
                # A new wheel is tried in every combination, a known one in the fewest jobs
                # that use every framework and every controller.
                proofs = prove(
                    plan.framework_names,
                    plan.controllers,
                    nccl=plan.nccl is not None,
                    every=fresh,
                    log=log,
                    reporter=reporter,
                )
                result["proofs"] = [str(proof) for proof in proofs]
            reporter.done()
    finally:
        log.close()
    _show_result(reporter, plan, wheel, proofs, fresh, log.path)


def _peek(cache: Cache, key: str) -> tuple[CachedWheel | None, str]:
    """The cached wheel, for the table and a dry run; the build looks again under the lock."""
    return cache.find(key) if cache.wheels.exists() else (None, "")


def _obtain(
    reporter: Reporter,
    plan: Plan,
    probe: Probe,
    cache: Cache,
    source: Path | None,
    log: Log,
    force: bool,
) -> tuple[CachedWheel, bool]:
    """The wheel, and whether it was built just now."""
    log.write(f"plan: {json.dumps(plan.facts, sort_keys=True)}")
    # Look again: another install may have built it while this one waited for the lock.
    found, _ = (None, "") if force else cache.find(plan.key)
    if found:
        reporter.detail("cached wheel " + found.sha256[:12])
        return found, False
    tools = pip.provide_tools(cache, log, cmake=probe.cmake is None)
    archive = source
    if archive is None:
        reporter.detail(f"{recipe.SDIST}")
        archive = pip.fetch_source(cache, log, tools)
    return build_wheel(plan, probe, cache, archive, tools, log, reporter), True


def found_table(probe: Probe, plan: Plan | None, wheel: CachedWheel | None) -> Table:
    """What was found, and what each of it means for the build."""
    table = Table(title="Horovod " + recipe.VERSION, title_justify="left", show_edge=False)
    for column in ("", "found", "in the build"):
        table.add_column(column, overflow="fold")

    def row(name: str, found: str, use: str, good: bool = True) -> None:
        style = "" if good else "yellow"
        table.add_row(Text(name), Text(found), Text(use, style=style))

    row("Python", probe.python, sys.executable)
    row("machine", f"{probe.platform}, {probe.cores} cores", f"{plan.jobs} jobs" if plan else "")
    for name in FRAMEWORKS:
        framework = probe.frameworks.get(name)
        if framework is None:
            if name in probe.trouble:
                row(name, probe.trouble[name], "no", good=False)
            continue
        used = plan is not None and name in plan.framework_names
        suffix = f" (CUDA {framework.cuda})" if framework.cuda else ""
        row(name, framework.version + suffix, "yes" if used else "no", good=used)
    compiler = probe.compiler
    row(
        "C++ compiler",
        f"{compiler.version}, {compiler.path}" if compiler else probe.trouble.get("compiler", "none"),
        "yes" if compiler else "missing",
        good=compiler is not None,
    )
    cmake = probe.cmake
    row(
        "CMake",
        f"{cmake.version}, {cmake.path}" if cmake else probe.trouble.get("cmake", "none"),
        "yes" if cmake else "a private copy from PyPI",
    )
    row("ccache", probe.ccache or "none", "yes" if probe.ccache else "no (not needed)")
    row("Gloo", "in Horovod's source", "yes" if plan is None or plan.gloo else "no")
    mpi = probe.mpi
    row(
        "MPI",
        mpi.flavour if mpi else probe.trouble.get("mpi", "none"),
        "yes" if plan and plan.mpi else "no",
        good=bool(plan and plan.mpi),
    )
    if probe.cuda or probe.nccl or "cuda" in probe.trouble:
        cuda, nccl = probe.cuda, probe.nccl
        arches = ", ".join(plan.gpu_arches) if plan and plan.gpu_arches else "all of nvcc's"
        row(
            "CUDA toolkit",
            f"{cuda.version}, {cuda.home}" if cuda else probe.trouble.get("cuda", "none"),
            f"yes, for {arches}" if plan and plan.cuda else "no",
            good=cuda is not None,
        )
        row(
            "NCCL",
            f"{nccl.version}, {nccl.origin}" if nccl else probe.trouble.get("nccl", "none"),
            "yes" if plan and plan.nccl else "no",
            good=nccl is not None,
        )
    if plan is not None:
        state = f"cached, built {wheel.record.get('built')}" if wheel else "not cached"
        row("wheel", state, "install it" if wheel else "build it: some minutes")
    return table


def _show_error(console: Console, error: InstallError) -> None:
    text = Text()
    text.append("error: ", style="bold red")
    text.append(error.problem)
    for line in error.detail.splitlines():
        text.append(f"\n  {line}", style="dim")
    if error.way_out:
        text.append("\nway out: ", style="bold")
        text.append(error.way_out)
    if error.log:
        text.append("\nfull log: ", style="bold")
        text.append(error.log)
    console.print(text)


def _show_result(
    reporter: Reporter,
    plan: Plan,
    wheel: CachedWheel,
    proofs: list[Proof],
    fresh: bool,
    log: Path,
) -> None:
    how = "Built and installed" if fresh else "Installed from the cache"
    size = wheel.path.stat().st_size / 2**20
    lines = [f"{how} in {reporter.elapsed:.0f} s: Horovod {recipe.VERSION} for {plan.describe()}."]
    lines += [f"  proven: {proof}" for proof in proofs]
    if plan.nccl and not any(proof.on_gpu for proof in proofs):
        lines.append("  not proven: NCCL (no GPU was used here)")
    lines += [f"  wheel:  {wheel.path} ({size:.1f} MB)", f"  log:    {log}"]
    for line in lines:
        reporter.console.print(line, markup=False, highlight=False, soft_wrap=True)
