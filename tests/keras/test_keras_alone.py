"""Keras in one process, and what is refused before anything happens."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("tensorflow")

ENVIRONMENT = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**ENVIRONMENT, **environment}
    )


def test_the_torch_backend_is_refused_in_one_clear_line():
    done = run("import hvdloss.keras", KERAS_BACKEND="torch")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "ConfigError: hvdloss.keras needs Keras on the TensorFlow backend" in last
    assert "hvdloss.torch" in last


WITHOUT_HOROVOD = """
import importlib.util, sys
plain = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] == "horovod" else plain(name, *a)
import keras, numpy as np, tensorflow as tf
import hvdloss.tensorflow as hvd, hvdloss.keras as khvd
assert "horovod" not in sys.modules
khvd.init()
assert (khvd.rank(), khvd.size()) == (0, 1)
objective = hvd.Objective("mse")
w = tf.Variable([1.0, 2.0])
with tf.GradientTape() as tape:
    loss = objective(w, [0.0, 0.0], [1.0, 3.0])
g = hvd.DistributedGradientTape(tape, objective).gradient(loss, w)
assert np.allclose(g, [0.5, 3.0]), g
assert objective.last_step.loss == 3.25
with tf.GradientTape() as tape:
    loss = tf.reduce_sum(w**2)
assert np.allclose(hvd.DistributedGradientTape(tape).gradient(loss, [w])[0], [2.0, 4.0])
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
model.compile(khvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), loss="mse")
calls = [khvd.callbacks.BroadcastGlobalVariablesCallback(0), khvd.callbacks.MetricAverageCallback()]
model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0, callbacks=calls)
khvd.check_synchronized(model)
"""


def test_without_horovod_it_is_one_process():
    done = run(WITHOUT_HOROVOD)
    assert done.returncode == 0, done.stderr


def test_every_public_name_of_horovod_is_there():
    code = (
        "import horovod.tensorflow as a, hvdloss.tensorflow as b, types\n"
        "import horovod.keras as c, hvdloss.keras as d, horovod.tensorflow.keras as e\n"
        "import hvdloss.tensorflow.keras as f\n"
        "skip = {'K', 'inspect', 'is_version_greater_equal_than', 'keras', 'tf', 'os', 'warnings'}\n"
        "skip |= {'version'}\n"
        "missing = [(o.__name__, n) for t, o in ((a, b), (c, d), (e, f)) for n in vars(t)\n"
        "           if n[0] != '_' and n not in skip and not hasattr(o, n)\n"
        "           and not isinstance(vars(t)[n], types.ModuleType)]\n"
        "missing += [n for n in vars(e.elastic) if n[0] != '_' and n not in skip and "
        "not hasattr(d.elastic, n)]\n"
        "missing += [n for n in vars(c.callbacks) if n[0] != '_' and n not in skip and "
        "not hasattr(d.callbacks, n)]\n"
        "assert not missing, missing\n"
    )
    pytest.importorskip("horovod")
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_the_optimizer_keeps_its_class_and_state():
    code = """
import keras, hvdloss.keras as hvd
hvd.init()
adam = keras.optimizers.Adam(0.01)
config = adam.get_config()
assert hvd.DistributedOptimizer(adam) is adam
assert isinstance(adam, keras.optimizers.Adam) and adam.get_config() == config
assert keras.saving.serialize_keras_object(adam)["module"] == "keras.optimizers"
try:
    hvd.DistributedOptimizer(adam)
except hvd.DistributedOptimizer.__globals__["ConfigError"] as error:
    assert "already" in str(error)
else:
    raise AssertionError
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
