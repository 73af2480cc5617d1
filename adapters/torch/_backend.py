"""``hvd``: the engine that moves tensors between ranks, with the names of Horovod's PyTorch module.

Horovod itself, ``torch.distributed`` (:mod:`hvdloss.torch.engines.distributed`), or one process; chosen by
how this process was launched (:func:`hvdloss.comm.launch.choose_engine`).
"""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Any

import torch.distributed
from hvdloss.comm.communicator import preserve_process_sets
from hvdloss.comm.launch import choose_engine
from hvdloss.comm.tuning import remove_invalid_settings

remove_invalid_settings()
hvd: Any
engine, _why = choose_engine(
    os.environ,
    horovod=importlib.util.find_spec("horovod") is not None,
    torch_distributed=torch.distributed.is_available(),
    default_group=torch.distributed.is_available() and torch.distributed.is_initialized(),
)
logging.getLogger("hvdloss").info("hvdloss.torch: the engine is %s: %s", engine, _why)
if engine == "one process":
    from hvdloss.torch import _single as hvd
elif engine == "torch.distributed":
    from hvdloss.torch.engines import distributed as hvd
else:
    with preserve_process_sets():
        import horovod.torch as hvd

    if not hasattr(hvd, "init"):  # Horovod prints why, and leaves its names out
        raise ImportError(
            "Horovod is installed but its PyTorch extension does not load; "
            "run `hvdloss doctor` to see why and `hvdloss install --force` to build it again"
        )
