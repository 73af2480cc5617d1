"""The inner side: what runs in every rank. It imports the modules of its cases, and runs them in order."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib
import importlib.util
import json
import os
import sys
import tempfile
import threading
import time
import traceback
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hvdloss import watch

from .cases import case_names
from .launch import GOOD, MODULES, START

# A rank that is still in a case after so long has hung; a shared machine may stall a case that takes seconds.
CASE_SECONDS = float(os.environ.get("HVDLOSS_CASE_SECONDS", "180"))
GRACE_SECONDS = float(os.environ.get("HVDLOSS_GRACE_SECONDS", "10"))  # for the others, once one has failed
FAILED, HUNG = 1, 3  # exit statuses


class Rank:
    """Runs the cases of this rank, and knows how the others fare."""

    def __init__(self, folder: Path, rank: int, size: int, *, aloud: bool = False) -> None:
        self.folder, self.rank, self.size, self.aloud = folder, rank, size, aloud
        self.log = (folder / f"rank-{rank}.jsonl").open("a")
        self.current: tuple[int, str] | None = None
        self.began = 0.0
        self.hung = False
        # Whoever started the launch may be killed without having had time to end it.
        self.outer = os.environ.get("HVDLOSS_TEST_PROCESS") if Path("/proc/self").exists() else None
        threading.Thread(target=self._watch, daemon=True).start()

    def write(self, **record: Any) -> None:
        """Keep a record where the outer side finds it."""
        self.log.write(json.dumps({"rank": self.rank, **record}) + "\n")
        self.log.flush()
        if self.aloud:
            print(*(f"{key}: {value}" for key, value in record.items()), sep="\n", flush=True)

    def run(self, number: int, name: str, case: Callable[[], Any]) -> None:
        """Run one case, record what came of it, and wait for the other ranks.

        Where it passed on all of them, they are in step and the next case may run. Where not, this process
        ends: a rank may wait for messages that never come, numbers of messages may differ, the watch may have
        told all ranks of an error. The outer side starts new ranks for the cases that are left.
        """
        self.began, used = time.monotonic(), time.process_time()
        self.current = (number, name)
        status, text, numbers = "passed", "", None
        try:
            numbers = case()
            watch.check()  # what it told other ranks, and caught
        except unittest.SkipTest as skip:
            status, text = "skipped", str(skip)
        except BaseException as error:
            status, text = "failed", _traceback(error)
        if self.hung:  # told already, and it is only the end of the other ranks that let it go on
            time.sleep(60.0)  # the watching thread ends this process
        seconds = time.monotonic() - self.began
        self.current = None
        record = {"status": status, "text": text, "numbers": numbers, "seconds": seconds}
        record["processor"] = time.process_time() - used
        self.write(case=name, **record)
        gc.collect()  # optimizers of this case are gone before the next begins
        gc.freeze()  # what is still here (traced functions) stays: looking through it again took a second
        self._mark(number, status)
        self._meet(number)
        try:
            watch.check()  # what all were told of after it had ended here
        except Exception as error:
            self.write(case=name, **{**record, "status": "failed", "text": _traceback(error)})
            self._mark(number, "failed")
        if any(path.suffix[1:] not in GOOD for path in self._states(number)):
            self._leave(FAILED)

    def _mark(self, number: int, status: str) -> None:
        (self.folder / f"{number}.{self.rank}.{status}").touch()

    def _states(self, number: int) -> list[Path]:
        return list(self.folder.glob(f"{number}.*.*"))

    def _meet(self, number: int) -> None:
        """Wait, through the file system, which works whatever state Horovod is in."""
        deadline = time.monotonic() + CASE_SECONDS + 30
        while len({path.name.split(".")[1] for path in self._states(number)}) < self.size:
            if time.monotonic() > deadline:
                print(f"rank {self.rank}: the other ranks did not finish case {number}", flush=True)
                os._exit(HUNG)
            time.sleep(0.005)

    def _leave(self, status: int) -> None:
        """End this process at once: what it would do at its end may wait for other ranks."""
        sys.stdout.flush()
        time.sleep(1.0)  # for the others to come here before the launcher ends them
        os._exit(status)

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
            failed = any(path.suffix == ".failed" for path in self._states(number))
            failed_since = (failed_since or now) if failed else None
            late = now - self.began > CASE_SECONDS
            if late or (failed_since and now - failed_since > GRACE_SECONDS):
                why = f"after {now - self.began:.0f} s" + ("" if late else "; another rank had failed")
                with tempfile.TemporaryFile("w+") as stacks:
                    faulthandler.dump_traceback(stacks, all_threads=True)
                    stacks.seek(0)
                    text = stacks.read()
                self.hung = True
                self.write(case=name, status="hung", text=f"{why}\n{text}", numbers=None)
                self._mark(number, "hung")
                print(f"rank {self.rank}: case {name} hung {why}\n{text}", flush=True)
                time.sleep(1.0)  # for the others to write theirs
                self._leave(HUNG)


def _traceback(error: BaseException) -> str:
    """Return an error with its traceback, without the frame of `Rank.run`, which tells nothing."""
    trace = error.__traceback__
    return "".join(traceback.format_exception(type(error), error, trace and trace.tb_next))


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


def function_of(module: Any, name: str) -> Callable[[], Any]:
    """Return a case: one of the module itself, or a law of tests/laws with the module's driver."""
    if hasattr(module, f"case_{name}"):
        return getattr(module, f"case_{name}")
    laws = (importlib.import_module(f"tests.laws.{one}") for one in getattr(module, "LAWS", ()))
    law = next(getattr(one, f"law_{name}") for one in laws if hasattr(one, f"law_{name}"))
    return lambda: law(module.driver())


def main() -> None:
    """Be one rank: import the modules, run the cases in order."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.ranks", description="Run cases on this rank, started by horovodrun."
    )
    parser.add_argument("specs", nargs="+", help="module:case, or a module for all its cases")
    parser.add_argument("--out", type=Path, help="where records go; not given, results are printed")
    args = parser.parse_args()
    began, ticking = time.time(), time.monotonic()
    faulthandler.enable()
    # As for any program started from its folder: cases import their helpers from beside them.
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
    me = Rank(folder, hvd.rank(), hvd.size(), aloud=not args.out)
    me.write(case=START, began=began, seconds=time.monotonic() - ticking)
    for number, (stem, name) in enumerate(cases):
        module = modules[stem]

        def run(number: int = number, module: Any = module, name: str = name) -> Any:
            if hasattr(module, "before_case"):
                module.before_case(number)
            return function_of(module, name)()

        me.run(number, f"{stem}:{name}", run)
    hvd.shutdown()
