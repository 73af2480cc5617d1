"""Import Horovod for one framework and print what it was built with."""

import json
import sys

MARK = "HVDLOSS-JSON "


def ask(framework):
    """What ``horovod.<framework>`` says of itself."""
    import horovod

    if framework == "torch":
        import horovod.torch as hvd
        import torch as module
    else:
        import horovod.tensorflow as hvd
        import tensorflow as module
    return {
        "horovod": horovod.__version__,
        "framework": module.__version__,
        "gloo": bool(hvd.gloo_built()),
        "mpi": bool(hvd.mpi_built()),
        "nccl": bool(hvd.nccl_built()),
        "cuda": bool(hvd.cuda_built()),
        "distributed": framework == "torch" and module.distributed.is_available(),
    }


if __name__ == "__main__":
    print(MARK + json.dumps(ask(sys.argv[1])), flush=True)
