"""TensorFlow's Horovod, in a process that comes to import PyTorch's as well."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytest.importorskip("tensorflow")
pytest.importorskip("torch")

TRAINS = """
import hvdloss.tensorflow as hvd

hvd.init()
import hvdloss.torch  # for its losses, say: it never trains

assert not hvdloss.torch.is_initialized()
assert (hvd.global_process_set.rank(), hvd.global_process_set.size()) == (0, 1)
print("as before")
"""


@pytest.mark.skipif(importlib.util.find_spec("horovod") is None, reason="needs Horovod")
def test_process_sets_stay_with_the_framework_that_is_initialised():
    """Horovod's own import of the other framework makes them say that nothing is initialised."""
    where = {**os.environ, "HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo"}
    out = subprocess.run(
        [sys.executable, "-c", TRAINS], capture_output=True, text=True, env=where, timeout=300
    )
    assert out.stdout.split("\n")[-2:] == ["as before", ""], out.stderr[-3000:]
