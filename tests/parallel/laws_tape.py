"""The laws of tests/laws with TensorFlow's tape, eagerly."""

from __future__ import annotations

import tensorflow as tf
from tf_support import Network, traced

import hvdloss.tensorflow as hvd
from hvdloss.comm.world import set_name_base
from tests.laws.driver import RATE

LAWS = ("exact", "packed")
EXCEPT = {
    "micro_batches_count_by_what_they_hold": "a tape is one pass; optimizers accumulate",
    "sequences_may_be_cut_by_micro_batches": "a tape is one pass",
    "a_skipped_step_changes_nothing": "a tape makes no update that it could leave out",
}


def before_case(number):
    set_name_base(1000 * (number + 1))


def linked(micro_batches, cut):
    """Return the segments of micro-batches, linked if they are cut."""
    segments = [hvd.Segments(*one[:1], None, *one[1:]).arrays(tf.constant) for _, *one in micro_batches]
    if cut is None:
        return segments
    weights = [one.batch.w for one in micro_batches]
    return hvd.link_segments(segments, weights, over=hvd.global_process_set, cut=cut)


class driver:
    in_a_function = False

    def __init__(self):
        self.rank, self.size = hvd.rank(), hvd.size()

    def build(self, parameters, *, reduction="mean", nonfinite="raise", penalty=0.0, passes=1):
        self.net = net = Network.of(parameters)
        self.objective = objective = hvd.Objective("mse", reduction=reduction, nonfinite=nonfinite)

        def step(x, y, w, segments=None):
            with tf.GradientTape() as tape:
                loss = objective(net(x), y, w, segments=segments)
                total = loss
                if penalty:
                    total = loss + penalty * tf.add_n([tf.reduce_sum(p**2) for p in net.parameters])
            tape = hvd.DistributedGradientTape(tape, objective)
            for p, g in zip(net.parameters, tape.gradient(total, net.parameters), strict=True):
                p.assign_sub(RATE * g)
            return loss

        self.call = traced(step) if self.in_a_function else step
        self.call_packed = tf.function(step, reduce_retracing=True) if self.in_a_function else step

    def step(self, micro_batches):
        (batch,) = micro_batches
        return float(self.call(*map(tf.constant, batch)))

    def step_packed(self, micro_batches, cut):
        ((batch, *_),) = micro_batches
        (segments,) = linked(micro_batches, cut)
        return float(self.call_packed(*map(tf.constant, batch), segments))

    def parameters(self):
        return [p.numpy() for p in self.net.parameters]

    def report(self):
        return self.objective.last_step

    def gather(self, array):
        return hvd.allgather(tf.constant(array)[None], name="laws.gather").numpy()
