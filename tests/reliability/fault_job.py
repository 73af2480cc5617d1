"""What every rank runs: it builds, trains, and inflicts faults on itself as it is told to.

Started by `fault_launch.py`, or by hand under horovodrun. A plan (JSON) lists what to inflict; after faults
that a job survives the next one follows in the same processes, and ranks meet through the file system, which
works whatever state Horovod is in. Everything is recorded with ``time.time()``, one clock for all ranks of a
machine.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import select
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from faults import BY_NAME, FIT, FUNCTION, STUCK, TORCH, Fault

ROWS = 8  # of a rank's batch; ranks have different numbers
LONG = 4000  # steps of a job that ends otherwise
PAUSE = 0.01  # seconds in every step of such a job: a real step computes
AFTER = 2  # good steps after a fault that was survived

# Steps after the fault's, in jobs that are neither.
SHORT = {
    **dict.fromkeys(("raise-caught", "end-early", "fewer-steps", "fewer-steps-plain"), 5),
    **dict.fromkeys(("raise-uneven", "raise-callback", "raise-validation"), 1),
}

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]  # images, one-hot digits, weights


class InflictedError(Exception):
    """What user code raises here."""


@dataclass(frozen=True)
class Item:
    """One infliction: of which fault, the how-many-eth time, on which rank, in which step."""

    fault: str
    repeat: int
    victim: int
    step: int


class Digits:
    """scikit-learn's digits, cut into batches of different sizes on each rank."""

    def __init__(self, rank: int) -> None:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        self.x = (x / 16).astype(np.float32)
        self.y = np.eye(10, dtype=np.float32)[y]
        self.rng = np.random.default_rng(rank)
        self.rows = ROWS + 3 * rank

    def batch(self) -> Batch:
        index = self.rng.integers(0, len(self.x), self.rows)
        return self.x[index], self.y[index], self.rng.uniform(0.5, 2.0, self.rows).astype(np.float32)


def spoiled(fault: str, batch: Batch) -> Batch:
    """Return a batch as it is with a fault."""
    x, y, w = (part.copy() for part in batch)
    if fault == "nan-loss":
        y[1, 3] = np.nan
    elif fault == "infinite-loss":
        y[1, 3] = np.inf
    elif fault == "negative-weight":
        w[0] = -1
    elif fault == "nan-weight":
        w[0] = np.nan
    elif fault == "infinite-weight":
        w[0] = np.inf
    elif fault == "no-weight":
        w[:] = 0
    elif fault == "weight-shape":
        w = np.ones(len(w) + 1, np.float32)
    return x, y, w


class Hooks:
    """What a loop calls around its steps; overridden by what inflicts."""

    def begin(self, step: int) -> None:
        """Before the step's forward pass."""

    def middle(self, step: int) -> None:
        """Between the loss and its backward pass."""

    def between(self, step: int) -> None:
        """Between the backward pass and the update."""

    def done(self, step: int) -> None:
        """After the update."""

    def epoch(self) -> None:
        """At the end of an epoch, in `fit`."""


class Log:
    """The records of this rank."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.number = -1
        self.file = (folder / f"rank-{rank}.jsonl").open("a")

    def write(self, event: str, **more: Any) -> None:
        record = {"event": event, "number": self.number, "rank": self.rank, "time": time.time(), **more}
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()


def checksum(arrays: Iterable[np.ndarray]) -> int:
    out = 0
    for array in arrays:
        out = zlib.crc32(np.ascontiguousarray(array).tobytes(), out)
    return out


class Inflict(Hooks):
    """Inflicts one item on this rank, if it is the one, and keeps what is to be compared."""

    def __init__(self, log: Log, loop: Any, item: Item, mine: bool) -> None:
        self.log, self.loop, self.item, self.mine = log, loop, item, mine
        self.fault: Fault = BY_NAME[item.fault]
        self.kept: int | None = None  # of the parameters after the last whole step
        self.expected = 0  # the number of the step at fault
        self.steps = 0
        self.long = not self.survives()

    def survives(self) -> bool:
        return self.loop.name in self.fault.caught

    def keep(self) -> None:
        self.kept = checksum(self.loop.parameters())

    def inflicted(self) -> None:
        self.log.write("inflicted", step=self.item.step)

    def begin(self, step: int) -> None:
        if self.long:
            time.sleep(PAUSE)
        if step != self.item.step:
            return
        self.keep()
        self.expected = self.loop.reported() + 1
        if not self.mine:
            return
        name = self.fault.name
        if self.fault.how == "signal":
            self.log.write("ready", step=step)
            return
        if name in ("raise-between", "raise-caught", "sigkill", "raise-uneven", "raise-callback"):
            return  # later in the step
        if name in ("raise-validation", "raise-loader", "end-early", "fewer-steps", "fewer-steps-plain"):
            return  # not in a step
        self.inflicted()
        self.act(name)

    def act(self, name: str) -> None:
        if name in ("nan-gradient", "infinite-gradient"):
            self.loop.trip(0.0 if name == "nan-gradient" else 1.0)
        elif name == "sys-exit":
            sys.exit(0)
        elif name == "os-exit":
            os._exit(0)
        elif name == "sigsegv":
            faulthandler.disable()
            os.kill(os.getpid(), signal.SIGSEGV)
        elif name == "sleep":
            time.sleep(STUCK)
        elif name == "busy":
            until = time.monotonic() + STUCK
            while time.monotonic() < until:
                sum(range(1000))
        elif name == "native":
            ctypes.PyDLL(None).sleep(int(STUCK))  # with the interpreter's lock

    def middle(self, step: int) -> None:
        if self.mine and step == self.item.step and self.fault.name == "raise-caught":
            self.inflicted()
            raise InflictedError("user code, caught")
        if self.mine and step == self.item.step and self.fault.name == "sigkill":
            self.inflicted()
            os.kill(os.getpid(), signal.SIGKILL)

    def between(self, step: int) -> None:
        if self.mine and step == self.item.step and self.fault.name == "raise-between":
            self.inflicted()
            raise InflictedError("user code between backward and step")

    def done(self, step: int) -> None:
        self.steps += 1
        self.keep()

    def epoch(self) -> None:
        if self.mine and self.fault.name == "raise-callback":
            self.inflicted()
            raise InflictedError("user code at the end of an epoch")

    # -- what is trained on ------------------------------------------------------------------------

    def batches(self, digits: Digits) -> Iterator[Batch]:
        """Yield this rank's batches."""
        fault, item = self.fault, self.item
        if fault.name in SHORT:
            count = item.step + SHORT[fault.name]
        else:
            count = item.step if self.survives() else LONG  # which the fault ends
        for step in range(1, count + 1):
            batch = digits.batch()
            here = step == item.step
            if here and self.mine and fault.name in ("end-early", "fewer-steps", "fewer-steps-plain"):
                self.inflicted()
                return
            if here and self.mine and fault.name in ("raise-loader", "raise-uneven"):
                if self.loop.name != FIT:  # which reads ahead: it is noted where it fails
                    self.inflicted()
                raise InflictedError("user code in the data loader")
            spoil = here and (self.mine or fault.everywhere)
            yield spoiled(fault.name, batch) if spoil else batch


def meet(log: Log, number: int, size: int, seconds: float = 120.0) -> None:
    """Wait until all ranks have come so far, through the file system."""
    (log.folder / f"met.{number}.{log.rank}").touch()
    deadline = time.monotonic() + seconds
    while sum((log.folder / f"met.{number}.{rank}").exists() for rank in range(size)) < size:
        if time.monotonic() > deadline:
            log.write("alone")
            os._exit(4)
        time.sleep(0.002)


def tell(log: Log, event: str, error: BaseException, hooks: Inflict) -> None:
    """Record what a rank knows."""
    now = time.time()
    kinds = [kind.__name__ for kind in type(error).__mro__]
    log.write(
        event,
        at=now,
        kinds=kinds,
        text=str(error)[:3000],
        expected=hooks.expected,
        unchanged=hooks.kept is None or checksum(hooks.loop.parameters()) == hooks.kept,
        steps=hooks.steps,
    )


def survive(log: Log, loop: Any, digits: Digits, item: Item, mine: bool) -> None:
    """Inflict what the job survives, see what it says, and go on.

    Where building takes seconds (a function is traced), repeats of a fault share the model.
    """
    hooks = Inflict(log, loop, item, mine)
    fault = hooks.fault
    try:
        if fault.how == "build" or item.repeat == 0 or not loop.keeps or loop.model is None:
            loop.build(item.fault if mine and fault.how == "build" else "")
        if fault.at_first:
            hooks.inflicted()
        loop.train(hooks.batches(digits), hooks, item)
    except Exception as error:
        tell(log, "knew", error, hooks)
    else:
        log.write("unnoticed", steps=hooks.steps)
    loop.trip(None)
    if fault.how == "build":
        return
    meet(log, 10_000 + log.number, loop.hvd.size())
    try:  # on the same optimizer
        rest = iter([digits.batch() for _ in range(AFTER)])
        loop.train(rest, Hooks(), None)
        log.write("went on", checksum=checksum(loop.parameters()))
    except Exception as error:
        log.write("did not go on", text=f"{type(error).__name__}: {error}"[:3000])


def perish(log: Log, loop: Any, digits: Digits, item: Item, mine: bool) -> None:
    """Inflict what ends the job, and let it end.

    As the guide says, Horovod's own operations are inside `same_fate`, and a `tf.function`; other loops of
    ours need none.
    """
    hooks = Inflict(log, loop, item, mine)
    name = item.fault
    try:
        if name == "raise-early" and mine:
            hooks.inflicted()
            raise InflictedError("user code right after hvd.init()")
        with loop.hvd.same_fate():  # Horovod's own operations say only that something is wrong somewhere
            loop.build("", broadcast=True)
        hooks.keep()
        if name == "raise-unstepped" and mine:
            hooks.inflicted()
            raise InflictedError("user code before the first step")
        with loop.hvd.same_fate() if loop.name == FUNCTION else contextlib.nullcontext():
            loop.train(hooks.batches(digits), hooks, item)
        if name.startswith("fewer-steps"):
            with loop.hvd.same_fate():
                loop.evaluate(plain=name != "fewer-steps")
        log.write("ended", steps=hooks.steps)
    except BaseException as error:
        # As any script would end; the record is all that is done here.
        if not isinstance(error, SystemExit):
            tell(log, "knew", error, hooks)
        raise


def module_of(loop: str) -> Any:
    """Import the framework and the loop."""
    name = {TORCH: "fault_torch", FIT: "fault_keras"}.get(loop, "fault_tensorflow")
    return importlib.import_module(name)


def serve(loop: str) -> Path:
    """Import the framework once, and fork ranks as they are asked for on standard input, a line of JSON each.

    Returns in every rank, with the environment it was to have: the rank's folder. From there on it is as if
    it had been started by itself. What is told on standard output: the processes, and how they end.
    """
    module_of(loop)
    importlib.import_module("sklearn.datasets")
    left: set[int] = set()
    pending = b""
    print(json.dumps({"ready": True}), flush=True)
    while True:
        readable, _, _ = select.select([0], [], [], 0.01 if left else 1.0)
        if readable:
            data = os.read(0, 1 << 16)
            if not data:
                os._exit(0)
            pending += data
        while b"\n" in pending:
            line, pending = pending.split(b"\n", 1)
            asked = json.loads(line)
            pid = os.fork()
            if not pid:
                os.environ.update(asked["environment"])
                out = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                nothing = os.open(os.devnull, os.O_RDONLY)
                for old, new in ((nothing, 0), (out, 1), (out, 2)):
                    os.dup2(old, new)
                return Path(asked["folder"])
            left.add(pid)
            print(json.dumps({"pid": pid, "name": asked["name"]}), flush=True)
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.remove(pid)
                print(json.dumps({"pid": pid, "status": os.waitstatus_to_exitcode(status)}), flush=True)


def follow(outer: str | None) -> None:
    """End this process if whoever started the launch is gone, maybe without having had time to end it."""
    while outer is not None and Path(f"/proc/{outer}").exists():
        time.sleep(0.5)
    if outer is not None:
        os._exit(5)


def main() -> None:
    parser = argparse.ArgumentParser(description="Be one rank of a job on which faults are inflicted.")
    parser.add_argument("loop")
    parser.add_argument("folder", type=Path, nargs="?", help="not given: fork ranks as standard input says")
    args = parser.parse_args()
    folder = args.folder or serve(args.loop)
    make: Callable[[str], Any] = module_of(args.loop).make
    threading.Thread(target=follow, args=(os.environ.get("HVDLOSS_TEST_PROCESS"),), daemon=True).start()
    loop = make(args.loop)
    hvd = loop.hvd
    hvd.init()
    rank, size = hvd.rank(), hvd.size()
    log = Log(folder, rank)
    stacks = (folder / f"stacks-{rank}.txt").open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    log.write("started", pid=os.getpid())
    digits = Digits(rank)
    plan = [Item(**item) for item in json.loads((folder / "plan.json").read_text())]
    for number, item in enumerate(plan):
        log.number = number
        meet(log, number, size)
        log.write("began", fault=item.fault)
        caught = loop.name in BY_NAME[item.fault].caught
        (survive if caught else perish)(log, loop, digits, item, rank == item.victim)
        if not caught:
            return
    log.number = len(plan)
    meet(log, 20_000, size)
    log.write("finished")
    hvd.shutdown()


if __name__ == "__main__":
    main()
