"""What every script calls first, in TensorFlow and Keras: ranks are made equal, or what differs is named."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tf_support import raised, same_on_all_ranks

import hvdloss.keras
import hvdloss.tensorflow as hvd
from hvdloss.comm.world import set_name_base
from hvdloss.errors import AgreementError, ConfigError, UsageError
from tests.ranks import needs

NEEDS = needs("gloo-2", more="gloo-1 gloo-3 mpi-2")


def before_case(number: int) -> None:
    """Give every case its own names on the wire, whatever an earlier one left behind."""
    set_name_base(1000 * (number + 1))


def last() -> int:
    return hvd.size() - 1


DTYPES = (
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16"),
    *("bfloat16", "float32", "float64", "complex64", "complex128", "float8_e4m3fn"),
)


def case_variables_of_every_dtype():
    for root in (0, last()):
        right = {
            name: np.arange(96, dtype=np.uint8)
            .clip(0, 1 if name == "bool" else 96)
            .view(tf.as_dtype(name).as_numpy_dtype)
            for name in DTYPES
        }
        variables = []
        for value in right.values():
            there = value if hvd.rank() == root else np.zeros_like(value)
            variables.append(tf.Variable(there.reshape(2, -1)))
        variables += [tf.Variable(float(hvd.rank())), tf.Variable(tf.zeros((0, 3)))]
        layer = keras.layers.Dense(3)
        layer.build((None, 2))
        hvd.broadcast_variables([*variables, *layer.weights], root_rank=root)
        for variable, value in zip(variables, right.values(), strict=False):
            assert variable.numpy().tobytes() == value.tobytes(), variable
        assert float(variables[-2]) == root
        same_on_all_ranks([v.numpy() for v in layer.weights])
    return {"dtypes": len(DTYPES)}


def case_variables_that_differ_are_named():
    v = tf.Variable([float(hvd.rank())], name="v")
    odd = hvd.rank() == last()
    alone = hvd.size() == 1
    for other, word in (
        (tf.Variable(tf.zeros(2 + odd), name="w"), "w"),
        (tf.Variable(tf.zeros(2, tf.float64 if odd else tf.float32), name="w"), "float64"),
    ):
        error = raised(lambda other=other: hvd.broadcast_variables([v, other], 0))
        assert alone or (isinstance(error, AgreementError) and word in str(error)), error
    error = raised(lambda: hvd.broadcast_variables([v], int(odd)))
    assert alone or (isinstance(error, AgreementError) and "root_rank" in str(error)), error
    text = tf.Variable("a", name="words")
    error = raised(lambda: hvd.broadcast_variables([v, text], 0))
    assert alone or (isinstance(error, ConfigError) and "words" in str(error)), error
    assert isinstance(raised(lambda: hvd.broadcast_variables([v], hvd.size())), ConfigError)
    assert v.numpy().tolist() == [hvd.rank()]  # nothing has changed


def case_in_a_function_it_is_horovods():
    v = tf.Variable([float(hvd.rank())])

    @tf.function
    def begin() -> None:
        hvd.broadcast_variables([v], root_rank=last())

    begin()
    assert v.numpy().tolist() == [last()]


def case_objects_of_other_types_on_ranks():
    own: Any = {"a": [1, 2]} if hvd.rank() == 0 else None
    for module in (hvd, hvdloss.keras):
        for root, right in ((0, {"a": [1, 2]}), (last(), None if last() else {"a": [1, 2]})):
            assert module.broadcast_object(own, root_rank=root) == right
    everyone = [1, "two", [3.0], None][: hvd.size()]
    assert hvd.allgather_object(everyone[hvd.rank()]) == everyone


def case_within_a_process_set():
    odd = hvd.add_process_set([last()])
    try:
        v = tf.Variable(1.0)
        if odd.included():
            hvd.broadcast_variables([v], last(), process_set=odd)
            assert hvd.broadcast_object(None, last(), process_set=odd) is None
        else:
            assert isinstance(
                raised(lambda: hvd.broadcast_variables([v], last(), process_set=odd)), UsageError
            )
    finally:
        hvd.remove_process_set(odd)


def case_begins_in_a_graph_of_tensorflow_1():
    v1 = tf.compat.v1
    hvd.shutdown()
    with tf.Graph().as_default():
        hvd.init()
        assert not hvd._executing_eagerly()
        variable = v1.get_variable("v", initializer=float(hvd.rank()), use_resource=True)
        total = hvd.allreduce(variable, op=hvd.Sum, name="graph")
        given = hvd.broadcast_global_variables(last())
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            assert session.run(total) == sum(range(hvd.size()))
            session.run(given)
            assert session.run(variable) == last()
    assert tf.executing_eagerly()
