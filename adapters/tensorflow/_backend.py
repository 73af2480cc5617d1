"""``hvd``: Horovod's TensorFlow module, or its one-process stand-in where Horovod is not installed."""

from __future__ import annotations

import importlib.util
from typing import Any

from hvdloss.comm.communicator import preserve_process_sets
from hvdloss.comm.tuning import remove_invalid_settings

remove_invalid_settings()
hvd: Any
if importlib.util.find_spec("horovod") is None:
    from hvdloss.tensorflow import _single as hvd
else:
    with preserve_process_sets():
        import horovod.tensorflow as hvd

    if not hasattr(hvd, "init"):  # Horovod prints why, and leaves its names out
        raise ImportError(
            "Horovod is installed but its TensorFlow extension does not load; "
            "run `hvdloss doctor` to see why and `hvdloss install --force` to build it again"
        )
