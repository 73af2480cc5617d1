"""A rank of a healthy job in which something takes long, once in every round. It must finish.

    horovodrun --gloo -np 2 python tests/reliability/healthy_job.py torch finalizer --seconds 3 --rounds 20

Each round makes an optimizer of its own, takes three steps on scikit-learn's digits, and does the slow thing
on rank 1 (validation: on rank 0) before the second step, or where the kind says. The last line of each rank
is its parameters' checksum.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

X, Y = load_digits(return_X_y=True)
X = (X / 16).astype(np.float32)


class Torch:
    """Three steps of PyTorch."""

    def __init__(self) -> None:
        import torch

        import hvdloss.torch as hvd

        torch.set_num_threads(1)
        self.hvd, self.torch = hvd, torch
        hvd.init()
        self.model: Any = None

    def begin(self) -> None:
        torch, hvd = self.torch, self.hvd
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
        self.objective = hvd.Objective("cross_entropy")
        self.optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=0.1), self.model.named_parameters(), self.objective
        )

    def step(self, rows: slice) -> None:
        x, y = self.torch.from_numpy(X[rows]), self.torch.from_numpy(Y[rows])
        self.optimizer.zero_grad()
        self.objective(self.model(x), y).backward()
        self.optimizer.step()

    def compile(self, until: float) -> None:
        torch = self.torch
        depth = 20
        while time.monotonic() < until:  # tracing, as torch.compile does before it generates code
            deep = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(depth)])
            torch.compile(deep, backend="aot_eager")(torch.ones(2, 8))
            torch._dynamo.reset()

    def values(self) -> np.ndarray:
        return np.concatenate([p.detach().numpy().ravel() for p in self.model.parameters()])


class Tape:
    """Three steps of a TensorFlow tape in a ``tf.function``."""

    def __init__(self) -> None:
        import tensorflow as tf

        import hvdloss.tensorflow as hvd

        self.hvd, self.tf = hvd, tf
        hvd.init()
        self.weights: Any = None

    def begin(self) -> None:
        tf, hvd = self.tf, self.hvd
        self.weights = w = tf.Variable(tf.zeros([64, 10]))
        objective = hvd.Objective("cross_entropy")
        optimizer = tf.keras.optimizers.SGD(0.1)

        @tf.function(reduce_retracing=True)
        def step(x: Any, y: Any) -> None:
            with hvd.DistributedGradientTape(tf.GradientTape(), objective) as tape:
                loss = objective(x @ w, y)
            optimizer.apply_gradients(zip(tape.gradient(loss, [w]), [w], strict=True))

        self._step = step

    def step(self, rows: slice) -> None:
        self._step(self.tf.constant(X[rows]), self.tf.constant(Y[rows]))

    def compile(self, until: float) -> None:
        while time.monotonic() < until:

            @self.tf.function
            def deep(x: Any) -> Any:
                for _ in range(200):
                    x = self.tf.tanh(x) + 1
                return x

            deep(self.tf.ones(3))

    def values(self) -> np.ndarray:
        return self.weights.numpy().ravel()


class Slow:
    """An object whose finalizer takes long, as that of a DataLoader with workers may."""

    def __init__(self, seconds: float) -> None:
        self.me, self.seconds = self, seconds  # only the garbage collector ends it

    def __del__(self) -> None:
        time.sleep(self.seconds)


def outside(code: str, *words: object) -> subprocess.Popen[bytes]:
    """Run Python code beside this process, which it is told of."""
    return subprocess.Popen([sys.executable, "-c", code, str(os.getpid()), *map(str, words)])


STOP = """
import os, signal, sys, time
time.sleep(0.05)
os.kill(int(sys.argv[1]), signal.SIGSTOP)
time.sleep(float(sys.argv[2]))
os.kill(int(sys.argv[1]), signal.SIGCONT)
"""
READ_SLOWLY = """
import os, sys, time
for _ in range(20):
    time.sleep(float(sys.argv[2]) / 20)
    os.read(0, 1 << 16)
while os.read(0, 1 << 20):
    pass
"""


def pause(seconds: float) -> None:
    beside = outside(STOP, seconds)
    beside.wait()


def native(seconds: float) -> None:
    ctypes.PyDLL(None).usleep(int(1e6 * seconds))


def slow_disk(seconds: float) -> None:
    read, write = os.pipe()
    reader = subprocess.Popen(
        [sys.executable, "-c", READ_SLOWLY, "0", str(seconds)], stdin=read, close_fds=True
    )
    os.close(read)
    with open(write, "wb", buffering=0) as file:  # blocks in the kernel, as a full disk queue does
        for _ in range(20):
            file.write(bytes(1 << 16))
    reader.wait()


def debugger(seconds: float) -> None:
    gdb = ["gdb", "-q", "-batch", "-p", str(os.getpid()), "-ex", f"shell sleep {seconds}", "-ex", "detach"]
    done = subprocess.run(gdb, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, "gdb could not attach"


def open_files(seconds: float) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    held = [os.dup(0) for _ in range(2000)]
    assert max(held) > 1024
    time.sleep(seconds)
    for fd in held:
        os.close(fd)


def workers(seconds: float) -> None:
    """Children by fork, which hold what this process holds, and outlive the step."""
    children = []
    for _ in range(4):
        if not (child := os.fork()):
            time.sleep(2 * seconds)
            os._exit(0)
        children.append(child)
    time.sleep(seconds)
    threading.Thread(target=lambda: [os.waitpid(child, 0) for child in children]).start()


def kill_agent(_: float) -> None:
    from hvdloss.watch import service

    for agent in service._agents:  # only the rank that began it knows it
        if agent.poll() is None:
            agent.send_signal(signal.SIGKILL)
            agent.wait()


def clock(seconds: float) -> None:
    """The clock of this process jumps by an hour, there and back (libfaketime reads this file)."""
    name = os.environ["FAKETIME_TIMESTAMP_FILE"]
    for offset in ("+3600s", "-3600s", "+0s"):
        with open(name, "w") as file:
            file.write(offset + "\n")
        time.sleep(seconds / 3)


#: What is done, and where: before the second step of each round on rank 1, if nothing else is said.
KINDS: dict[str, Callable[[float], None]] = {
    "pause": pause,
    "native": native,
    "disk": slow_disk,
    "debugger": debugger,
    "files": open_files,
    "workers": workers,
    "agent": kill_agent,
    "clock": clock,
    "validation": time.sleep,
    "sleep": time.sleep,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("loop", choices=["torch", "tape"])
    parser.add_argument("kind")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    rank = int(os.environ.get("HOROVOD_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or 0)
    if args.kind == "late" and rank == 1:
        time.sleep(args.seconds)
    job: Any = (Torch if args.loop == "torch" else Tape)()
    hvd = job.hvd
    slow = hvd.rank() == (0 if args.kind in ("validation", "agent") else 1)
    for number in range(args.rounds):
        gc.collect()
        job.begin()
        for step in range(3):
            if step == 0 and slow and args.kind == "finalizer":
                Slow(args.seconds)  # garbage: the collector comes by somewhere in this step
            if step == 1 and slow:
                if args.kind == "compile":
                    job.compile(time.monotonic() + args.seconds)
                elif args.kind in KINDS:
                    KINDS[args.kind](args.seconds)
            size = hvd.size()
            job.step(slice(hvd.rank() + 7 * number, 200 + 100 * step, size))
        print(f"rank {rank}: round {number + 1} done", flush=True)
    values = job.values().astype(np.float64)
    print(f"rank {rank}: finished {values.sum():.12g} {np.abs(values).sum():.12g}", flush=True)


main()
