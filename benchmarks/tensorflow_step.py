"""Step time of the exact tape beside Horovod's, in TensorFlow, in one run, interleaved.

    horovodrun -np 2 python -m hvdloss.benchmarks.tensorflow_step --json out.json

Peers: "compute" (no reduction), "horovod" (horovod.tensorflow.DistributedGradientTape), "hvdloss"
(exact). Each step is one tf.function; one thread per rank within an operation, SGD, float32.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import horovod.tensorflow as horovod
import tensorflow as tf

import hvdloss.tensorflow as hvd
from hvdloss.benchmarks.common import environment, measured, write_json

PEERS = ("compute", "horovod", "hvdloss")


def dense(sizes: list[int], batch: int) -> tuple[list[tf.Variable], Callable[[tf.Tensor], tf.Tensor], int]:
    """Return variables and forward pass of a stack of dense layers with ReLU between."""
    generator = tf.random.Generator.from_seed(0)
    variables = []
    for a, b in itertools.pairwise(sizes):
        variables += [tf.Variable(generator.normal((a, b), stddev=(2 / a) ** 0.5)), tf.Variable(tf.zeros(b))]

    def forward(x: tf.Tensor) -> tf.Tensor:
        for i in range(0, len(variables), 2):
            x = x @ variables[i] + variables[i + 1]
            x = tf.nn.relu(x) if i + 2 < len(variables) else x
        return x

    return variables, forward, batch


WORKLOADS: dict[str, tuple[str, list[int], int]] = {
    "tf-small": ("TensorFlow: 60 x dense 64 with ReLU, batch 32", [64] * 61, 32),
    "tf-mlp": (
        "TensorFlow: 1024-4096-4096-2048-1024 with ReLU, 30 M parameters, batch 8",
        [1024, 4096, 4096, 2048, 1024],
        8,
    ),
}


def make_step(peer: str, workload: str) -> tuple[Callable[[], Any], Any]:
    """Return a function that makes one training step of this peer, and its traced graph."""
    _, sizes, batch = WORKLOADS[workload]
    variables, forward, batch = dense(sizes, batch)
    x, y = tf.random.normal((batch, sizes[0])), tf.random.normal((batch, sizes[-1]))
    objective = hvd.Objective("mse") if peer == "hvdloss" else None

    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            if objective is not None:
                loss = objective(forward(x), y)
            else:
                loss = tf.reduce_mean(tf.math.squared_difference(forward(x), y))
        if peer == "horovod":
            tape = horovod.DistributedGradientTape(tape)
        elif objective is not None:
            tape = hvd.DistributedGradientTape(tape, objective)
        for g, v in zip(tape.gradient(loss, variables), variables, strict=True):
            v.assign_sub(1e-3 * g)
        return loss

    graph = step.get_concrete_function(x, y).graph
    return lambda: step(x, y).numpy(), graph


def messages(graph: Any) -> dict[str, int]:
    """Return how many messages of how many bytes a step of this graph hands to Horovod."""
    inputs = list(_reduced(graph))
    return {
        "messages": len(inputs),
        "bytes": sum((t.shape.num_elements() or 0) * t.dtype.size for ts in inputs for t in ts),
    }


def _reduced(graph: Any) -> Iterator[list[Any]]:
    """Yield the tensors of each of Horovod's exchanges in a graph and in the functions it calls."""
    for op in graph.get_operations():
        if op.type.startswith("Horovod") and not op.type.endswith(("Size", "Rank", "Included")):
            yield [t for t in op.inputs if t.dtype.is_floating]
        elif op.type.endswith("PartitionedCall"):
            yield from _reduced(graph._get_function(op.get_attr("f").name).graph)
        elif op.type in ("If", "StatelessIf"):  # Horovod asks at run time whether there are other ranks
            branches = [op.get_attr(name).name for name in ("then_branch", "else_branch")]
            yield from max((list(_reduced(graph._get_function(name).graph)) for name in branches), key=len)


def measure(peers: list[str], workload: str, rounds: int, steps: int) -> dict[str, Any]:
    """Return seconds per step of each peer, by round, and its messages."""
    made = {peer: make_step(peer, workload) for peer in peers}
    return measured(
        hvd,
        WORKLOADS[workload][0],
        {peer: step for peer, (step, _) in made.items()},
        lambda peer: messages(made[peer][1]),
        rounds,
        steps,
        workload,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5, help="per peer and round")
    parser.add_argument("--json", help="write all numbers to this file")
    args = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(2)
    hvd.init()
    out = {
        "environment": {**environment(hvd), "framework": f"tensorflow {tf.__version__}"},
        "workloads": {name: measure(args.peers, name, args.rounds, args.steps) for name in args.workload},
    }
    if hvd.rank() == 0:
        write_json(args.json, out)


if __name__ == "__main__":
    main()
