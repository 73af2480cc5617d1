"""Tests under real ranks: `horovodrun` starts them once, many small cases run in lock-step inside.

**Adding a case.** Put a function ``case_<what>()`` into a module ``tests/parallel/<name>.py``. Every rank
imports the module and runs its cases one after the other, in the order of their definition. A case

- finds Horovod initialised (the module binds the library as ``hvd``, and the runner calls ``hvd.init()``);
- asserts what must hold on its rank; what is raised on any rank fails the case, with its traceback;
- must make the same collectives on all ranks, as any Horovod program;
- may return a dict of numbers (errors, counts), which the test run prints at its end, and may raise
  ``unittest.SkipTest``;
- should be quick: a rank that is still in a case after `CASE_SECONDS`, or `GRACE_SECONDS` after another
  rank failed in it, prints its stacks and ends the launch.

Modules in ``tests/parallel`` may import each other by plain name. A module may define
``before_case(number)``, called on every rank before each case.

**Running cases from pytest.** A test file says which module runs under which launches::

    from ranks import Case, parallel_cases

    @parallel_cases("torch_exact", [("gloo", 2), ("gloo", 3), ("mpi", 2)])
    def test_exact(case: Case, request):
        case.check(request)

Each case of each launch is then a test of its own, ``test_exact[gloo-2-uneven]``; the first one that
runs performs the launch, for those of its cases that the session selected. ``pytest -k "uneven and
gloo-2"`` thus starts two ranks and runs one case. Modules given the same ``group="..."`` share launches,
since every start takes seconds. If ranks hang or die in a case, that case fails and the launch is
repeated for the cases after it.

**Where the time goes.** A run ends with what each launch took (until ranks began, their imports, all cases)
and the slowest cases, by the processor time of all ranks: seconds by the clock say little on a busy machine.
``HVDLOSS_SLOWEST=100`` names more of them, and ``HVDLOSS_CASE_SECONDS=600`` gives each more time there.

By hand: ``horovodrun --gloo -np 2 python tests/ranks.py torch_exact`` (or ``torch_exact:uneven ...``).
"""

from __future__ import annotations

import argparse
import ast
import faulthandler
import functools
import gc
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvdloss import watch

HERE = Path(__file__).resolve().parent
MODULES = HERE / "parallel"
CASE_SECONDS = float(os.environ.get("HVDLOSS_CASE_SECONDS", "90"))
GRACE_SECONDS = float(os.environ.get("HVDLOSS_GRACE_SECONDS", "10"))  # for the others, once one has failed
START_SECONDS = 120.0  # horovodrun imports every framework it was built for; a busy machine takes long
REPEATS = 3  # launches after one that hung or died
START = "(start)"  # in the place of a case: when a rank began, and what its imports took
SLOWEST = int(os.environ.get("HVDLOSS_SLOWEST", "25"))  # cases that the summary names

# -- the outer side: pytest ---------------------------------------------------------------------------


class _More(tuple[str, int]):
    """A launch that `make test` leaves out."""


def more(*launches: tuple[str, int]) -> list[tuple[str, int]]:
    """Return launches that `make test` leaves out for the sake of time, and `make test-more` runs."""
    return [_More(launch) for launch in launches]


@functools.cache
def case_names(module: str) -> list[str]:
    """Return the names of a module's cases, without importing its framework."""
    tree = ast.parse((MODULES / f"{module}.py").read_text())
    return [
        node.name.removeprefix("case_")
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("case_")
    ]


@dataclass
class Outcome:
    """What became of one case in one launch: each rank's record, and the launch's output if it matters."""

    ranks: dict[int, dict[str, Any]] = field(default_factory=dict)
    problem: str = ""
    output: str = ""


@dataclass(frozen=True)
class Case:
    """One case under one launch; `check` passes, fails or skips as the case did."""

    module: str
    controller: str
    np: int
    name: str
    seconds: float
    group: str

    @property
    def launch(self) -> tuple[str, str, int]:
        """What one start of horovodrun serves."""
        return (self.group, self.controller, self.np)

    @property
    def spec(self) -> str:
        """The case as ranks are told it."""
        return f"{self.module}:{self.name}"

    def check(self, request: Any) -> None:
        """Run the launch, if no case before has, and report this case's outcome."""
        import pytest

        reason = missing_controller(self.controller)
        if reason:
            pytest.skip(reason)
        cache: dict[Any, dict[str, Outcome]] = _sessions.setdefault(id(request.session), {})
        if self.launch not in cache:
            others = [
                item.callspec.params.get("case")
                for item in request.session.items
                if hasattr(item, "callspec")
            ]
            selected = [
                other for other in others if isinstance(other, Case) and other.launch == self.launch
            ] or [self]
            seconds = {other.module: other.seconds for other in selected}
            costs: list[dict[str, Any]] = []
            cache[self.launch] = run_launch(
                [other.spec for other in selected],
                self.controller,
                self.np,
                seconds=sum(seconds.values()),
                costs=costs,
            )
            _summary(request.config).launched(self.launch, len(selected), costs, cache[self.launch])
        outcome = cache[self.launch][self.spec]
        records = [outcome.ranks[rank] for rank in sorted(outcome.ranks)]
        numbers = _numbers(records)
        for key, value in numbers.items():
            request.node.user_properties.append((key, value))
        _summary(request.config).add(self, numbers)
        skips = [r["text"] for r in records if r["status"] == "skipped"]
        bad = [r for r in records if r["status"] not in ("passed", "skipped")]
        if bad or outcome.problem:
            texts = _distinct([(r["rank"], r["status"], r["text"]) for r in bad])
            tail = f"\n--- output of the launch ---\n{outcome.output}" if outcome.output else ""
            pytest.fail("\n".join([f"{self.id}: {outcome.problem}", *texts]) + tail, pytrace=False)
        if skips:
            pytest.skip(skips[0])

    @property
    def id(self) -> str:
        """The name in pytest's output."""
        return f"{self.controller}-{self.np}-{self.name}"


_sessions: dict[int, dict[Any, dict[str, Outcome]]] = {}


def parallel_cases(
    module: str,
    launches: Iterable[tuple[str, int]],
    *,
    cases: Iterable[str] | None = None,
    slow: Iterable[str] = (),
    seconds: float = 400.0,
    group: str = "",
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Parametrize a test's argument ``case`` over `launches` (controller, ranks) and a module's cases.

    Args:
        module: the file ``tests/parallel/<module>.py``.
        launches: pairs such as ``("gloo", 2)``, ``("mpi", 3)``.
        cases: names without ``case_``, to run only these; None for all.
        slow: those of them that `make test` leaves out for the sake of time, and `make test-more` runs.
        seconds: the longest that the module's cases may take in one launch.
        group: modules of one group share launches; empty for the module by itself.
    """
    import pytest

    known = case_names(module)
    chosen = known if cases is None else list(cases)
    slow = set(slow)
    unknown = sorted((set(chosen) | slow) - set(known))
    if unknown or not chosen:
        raise ValueError(f"tests/parallel/{module}.py has no case {', '.join(unknown) or 'at all'}")
    all_cases = [
        pytest.param(
            case := Case(module, *launch, name, seconds, group or module),
            id=case.id,
            marks=[pytest.mark.more] if isinstance(launch, _More) or name in slow else [],
        )
        for launch in launches
        for name in chosen
    ]

    def mark(test: Callable[..., None]) -> Callable[..., None]:
        # A test may wait for the start and every case of its launch, repeated.
        test = pytest.mark.timeout((seconds + START_SECONDS) * (REPEATS + 1))(test)
        return pytest.mark.parametrize("case", all_cases)(test)

    return mark


@functools.cache
def missing_controller(controller: str) -> str:
    """Return why launches with `controller` cannot run here, or an empty string."""
    if importlib.util.find_spec("horovod") is None:
        return "Horovod is not installed; run `hvdloss install`"
    if controller == "mpi" and shutil.which("mpirun") is None:
        return "mpirun is not installed (Debian: openmpi-bin), so MPI launches are SKIPPED"
    probe = f"import horovod.{{}} as hvd; print(hvd.{controller}_built())"
    for framework in ("torch", "tensorflow"):
        if importlib.util.find_spec(framework) is None:
            continue
        out = subprocess.run(
            [sys.executable, "-c", probe.format(framework)],
            capture_output=True,
            text=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        )
        if out.returncode == 0:
            built = out.stdout.split()[-1] in ("True", "1")
            return "" if built else f"Horovod was built without {controller}, so its launches are SKIPPED"
    return "Horovod loads with no framework here; run `hvdloss doctor`"


def environment() -> dict[str, str]:
    """Return the environment of ranks: one thread each, and signs of a stall early."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {
        **os.environ,
        **threads,
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONUNBUFFERED": "1",
        "HVDLOSS_TEST_PROCESS": str(os.getpid()),
        "HOROVOD_STALL_CHECK_TIME_SECONDS": "5",
        "HOROVOD_DYNAMIC_PROCESS_SETS": "1",  # cases make their own
        # More ranks than cores: let waiting ranks give their core away.
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }


def run_launch(
    specs: Sequence[str],
    controller: str,
    np: int,
    *,
    seconds: float,
    costs: list[dict[str, Any]] | None = None,
) -> dict[str, Outcome]:
    """Run cases ("module:name") under real ranks and return the outcome of each.

    A launch that ends early is repeated for the cases that it did not reach. What each start of horovodrun
    cost is appended to `costs`: seconds in all, until ranks began, and of their imports; processor seconds.
    """
    outcomes: dict[str, Outcome] = {}
    for _ in range(REPEATS + 1):
        left = [spec for spec in specs if spec not in outcomes]
        if not left:
            break
        with tempfile.TemporaryDirectory(prefix="hvdloss-ranks-") as folder:
            began, used = time.time(), _processor_seconds()
            problem, output = _start(left, controller, np, Path(folder), seconds)
            records = _read(Path(folder), np)
            starts = [r.pop(START) for r in records.values() if START in r]
            if costs is not None:
                costs.append(
                    {
                        "seconds": time.time() - began,
                        "processor": _processor_seconds() - used,
                        "start": max((s["began"] for s in starts), default=began) - began,
                        "imports": max((s["seconds"] for s in starts), default=0.0),
                    }
                )
        for spec in left:
            of_case = {rank: r[spec] for rank, r in records.items() if spec in r}
            outcomes[spec] = outcome = Outcome(of_case)
            if len(of_case) < np:
                lost = ", ".join(str(rank) for rank in range(np) if rank not in of_case)
                outcome.problem = f"did not finish on rank(s) {lost}; {problem or 'the ranks ended'}"
            elif any(r["status"] == "hung" for r in of_case.values()):
                outcome.problem = "ranks hung"
            if outcome.problem:
                outcome.output = output
                break  # what comes after gets a fresh launch
    for spec in specs:
        outcomes.setdefault(spec, Outcome(problem=f"not run: {REPEATS + 1} launches ended before it"))
    return outcomes


def _processor_seconds() -> float:
    """Return what this process's children that have ended, and theirs, have computed."""
    used = os.times()
    return used.children_user + used.children_system


def _start(specs: Sequence[str], controller: str, np: int, folder: Path, seconds: float) -> tuple[str, str]:
    """Run horovodrun once; return what went wrong with the launch itself, and the end of its output."""
    beside = Path(sys.executable).parent / "horovodrun"  # of this environment, activated or not
    horovodrun = str(beside) if beside.exists() else "horovodrun"
    command = [
        horovodrun,
        *(f"--{controller}", "-np", str(np), "--start-timeout", str(int(START_SECONDS))),
        *(sys.executable, str(HERE / "ranks.py"), "--out", str(folder), *specs),
    ]
    log = folder / "output.txt"
    problem = ""
    with log.open("wb") as sink:
        launcher = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment(),
            cwd=HERE.parent,
            start_new_session=True,
        )
        try:
            code = launcher.wait(seconds + START_SECONDS)
            if code:
                problem = f"horovodrun ended with status {code}"
        except subprocess.TimeoutExpired:
            problem = f"the launch took more than {seconds:.0f} s"
        finally:
            # Ranks live in sessions of their own; they end by themselves when they see this file.
            (folder / "stop").touch()
            _end(launcher)
    text = log.read_text(errors="replace")
    return problem, text[-12000:]


def _end(launcher: subprocess.Popen[bytes]) -> None:
    """End horovodrun and what it started."""
    if launcher.poll() is None:
        time.sleep(2.0)  # for the ranks to see the file
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(launcher.pid, number)
                launcher.wait(5.0)
                break
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
    launcher.wait()


def _read(folder: Path, np: int) -> dict[int, dict[str, dict[str, Any]]]:
    """Return what ranks wrote, by rank and case."""
    records: dict[int, dict[str, dict[str, Any]]] = {}
    for rank in range(np):
        path = folder / f"rank-{rank}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        records[rank] = {}
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # cut off when the rank was ended
                continue
            records[rank][record["case"]] = record
    return records


def _distinct(texts: Sequence[tuple[int, str, str]]) -> list[str]:
    """Return the texts with their ranks, equal ones once."""
    merged: dict[tuple[str, str], list[int]] = {}
    for rank, status, text in texts:
        merged.setdefault((status, text), []).append(rank)
    return [
        f"rank {', '.join(map(str, ranks))} {status}:\n{text}" for (status, text), ranks in merged.items()
    ]


def _numbers(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the largest value of each number over ranks."""
    out: dict[str, float] = {}
    for record in records:
        for key, value in (record.get("numbers") or {}).items():
            if isinstance(value, int | float):
                out[key] = max(out.get(key, -math.inf), value)
    return out


class _Summary:
    """Prints, at the end of a test run, the numbers that cases returned, and where the time went."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], dict[str, list[float]]] = {}
        self.launches: list[str] = []
        self.cases: list[tuple[float, float, str]] = []

    def launched(
        self,
        launch: tuple[str, str, int],
        cases: int,
        costs: Sequence[dict[str, Any]],
        outcomes: dict[str, Outcome],
    ) -> None:
        """Keep what a launch, and each of its cases, took."""
        group, controller, np = launch
        seconds, processor, start, imports = (
            sum(cost[key] for cost in costs) for key in ("seconds", "processor", "start", "imports")
        )
        inside = 0.0
        for spec, outcome in outcomes.items():
            took = max((r.get("seconds", 0.0) for r in outcome.ranks.values()), default=0.0)
            used = sum(r.get("processor", 0.0) for r in outcome.ranks.values())
            inside += took
            self.cases.append((used, took, f"{controller}-{np} {spec}"))
        again = f"; started {len(costs)} times" if len(costs) > 1 else ""
        self.launches.append(
            f"{group:20} {controller + '-' + str(np):8}{seconds:7.1f} s ({processor:.1f} s of processor): "
            f"start {start:.1f}, imports {imports:.1f}, {cases} cases {inside:.1f}{again}"
        )

    def add(self, case: Case, numbers: dict[str, float]) -> None:
        row = self.rows.setdefault((case.module, f"{case.controller}-{case.np}"), {})
        for key, value in numbers.items():
            row.setdefault(key, []).append(value)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.launches:
            terminalreporter.section("launches, and their slowest cases")
            for line in self.launches:
                terminalreporter.write_line(line)
            for used, took, name in sorted(self.cases, reverse=True)[:SLOWEST]:
                terminalreporter.write_line(f"{took:7.1f} s ({used:.1f} s of processor)  {name}")
        if not any(self.rows.values()):
            return
        terminalreporter.section("numbers from the ranks (smallest .. largest over cases)")
        for (module, launch), row in self.rows.items():
            for key, values in row.items():
                span = f"{min(values):.3g} .. {max(values):.3g}"
                terminalreporter.write_line(f"{module:24} {launch:8} {key:32} {span}  ({len(values)} cases)")


def _summary(config: Any) -> _Summary:
    """Return the session's summary, registered with pytest on first use."""
    plugin = config.pluginmanager.get_plugin("hvdloss-ranks")
    if plugin is None:
        plugin = _Summary()
        config.pluginmanager.register(plugin, "hvdloss-ranks")
    return plugin


# -- the inner side: one rank -------------------------------------------------------------------------


class _Rank:
    """Runs the cases of this rank, and knows how the others fare."""

    def __init__(self, folder: Path, rank: int, size: int) -> None:
        self.folder, self.rank, self.size = folder, rank, size
        self.log = (folder / f"rank-{rank}.jsonl").open("a")
        self.current: tuple[int, str] | None = None
        self.began = 0.0
        # Whoever started the launch may be killed without having had time to end it.
        self.outer = os.environ.get("HVDLOSS_TEST_PROCESS") if Path("/proc/self").exists() else None
        threading.Thread(target=self._watch, daemon=True).start()

    def write(self, **record: Any) -> None:
        """Keep a record where the outer side finds it."""
        self.log.write(json.dumps({"rank": self.rank, **record}) + "\n")
        self.log.flush()

    def run(self, number: int, name: str, case: Callable[[], Any]) -> dict[str, Any]:
        """Run one case, record what came of it, and wait for the other ranks."""
        self.began, used = time.monotonic(), time.process_time()
        self.current = (number, name)
        status, text, numbers = "passed", "", None
        try:
            numbers = case()
        except unittest.SkipTest as skip:
            status, text = "skipped", str(skip)
        except BaseException as error:
            status = "failed"
            # The runner's own frame tells nothing.
            text = "".join(traceback.format_exception(type(error), error, error.__traceback__.tb_next))
        seconds = time.monotonic() - self.began
        self.current = None
        record = {"status": status, "text": text, "numbers": numbers, "seconds": seconds}
        record["processor"] = time.process_time() - used
        self.write(case=name, **record)
        gc.collect()  # optimizers of this case are gone before the next begins
        gc.freeze()  # what is still here (traced functions) stays: looking through it again took a second
        (self.folder / f"{number}.{self.rank}.{status}").touch()
        self._meet(number)
        return record

    def _states(self, number: int) -> list[Path]:
        return list(self.folder.glob(f"{number}.*.*"))

    def _meet(self, number: int) -> None:
        """Wait, through the file system, which works whatever state Horovod is in."""
        deadline = time.monotonic() + CASE_SECONDS + 30
        while len(self._states(number)) < self.size:
            if time.monotonic() > deadline:
                print(f"rank {self.rank}: the other ranks did not finish case {number}", flush=True)
                os._exit(4)
            time.sleep(0.005)

    def _watch(self) -> None:
        """End this process when its case takes too long, or when the launch was given up."""
        failed_since: float | None = None
        while True:
            time.sleep(0.25)
            gone = self.outer is not None and not Path(f"/proc/{self.outer}").exists()
            if gone or (self.folder / "stop").exists() or not self.folder.exists():
                os._exit(5)
            now, current = time.monotonic(), self.current
            if current is None:
                failed_since = None
                continue
            number, name = current
            failed = [p for p in self._states(number) if p.name.endswith(".failed")]
            failed_since = (failed_since or now) if failed else None
            late = now - self.began > CASE_SECONDS
            if late or (failed_since and now - failed_since > GRACE_SECONDS):
                why = f"after {now - self.began:.0f} s" + ("" if late else "; another rank had failed")
                with tempfile.TemporaryFile("w+") as stacks:
                    faulthandler.dump_traceback(stacks, all_threads=True)
                    stacks.seek(0)
                    text = stacks.read()
                self.write(case=name, status="hung", text=f"{why}\n{text}", numbers=None)
                (self.folder / f"{number}.{self.rank}.hung").touch()
                print(f"rank {self.rank}: case {name} hung {why}\n{text}", flush=True)
                time.sleep(2.0)  # for the others to write theirs before the launcher ends them
                os._exit(3)


def _module(path: Path) -> Any:
    """Import a module of cases by its file."""
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        if not module.hvd.is_initialized():
            module.hvd.init()
    return sys.modules[path.stem]


def main() -> None:
    """Be one rank: import the modules, run the cases in order."""
    parser = argparse.ArgumentParser(description="Run cases on this rank, started by horovodrun.")
    parser.add_argument("specs", nargs="+", help="module:case, or a module for all its cases")
    parser.add_argument("--out", type=Path, help="where records go; not given, results are printed")
    args = parser.parse_args()
    began, ticking = time.time(), time.monotonic()
    faulthandler.enable()
    # Modules import their helpers by plain name; `tests` itself is no place to import from.
    sys.path[0] = str(MODULES)
    cases = []
    for spec in args.specs:
        stem, _, name = Path(spec).name.removesuffix(".py").partition(":")
        cases += [(stem, one) for one in ([name] if name else case_names(stem))]
    gc.disable()  # what frameworks define stays, half a million objects: not to be looked through each time
    modules = {stem: _module(MODULES / f"{stem}.py") for stem, _ in cases}
    gc.freeze()
    gc.enable()
    hvd = next(iter(modules.values())).hvd
    folder = args.out or Path(hvd.broadcast_object(tempfile.mkdtemp(prefix="hvdloss-ranks-"), root_rank=0))
    me = _Rank(folder, hvd.rank(), hvd.size())
    me.write(case=START, began=began, seconds=time.monotonic() - ticking)
    for number, (stem, name) in enumerate(cases):
        module = modules[stem]

        def run(number: int = number, module: Any = module, name: str = name) -> Any:
            watch.check()  # what the watch found between cases is no case's fault, but must be seen
            if hasattr(module, "before_case"):
                module.before_case(number)
            return getattr(module, f"case_{name}")()

        record = me.run(number, f"{stem}:{name}", run)
        if not args.out:
            print(f"rank {me.rank}: {name} {record}", flush=True)
    hvd.shutdown()


if __name__ == "__main__":
    main()
