"""One rank of the proof: all-reduce known numbers, and write down what came out.

``prove_worker.py FRAMEWORK FOLDER``: rank r contributes (r + 1) and (r + 1) / 4, and the
results go to FOLDER/rank-r.json for the command that started the job to check.
"""

import json
import os
import sys


def with_torch(result):
    """All-reduce through horovod.torch; on a GPU too, where NCCL was built and one is there."""
    import horovod.torch as hvd
    import torch

    hvd.init()
    mine = hvd.rank() + 1
    for dtype in (torch.float32, torch.float64, torch.int64):
        total = hvd.allreduce(torch.full((5,), mine, dtype=dtype), op=hvd.Sum)
        result["sums"][str(dtype).split(".")[-1]] = total.tolist()
    mean = hvd.allreduce(torch.full((5,), mine / 4, dtype=torch.float64), op=hvd.Average)
    result["average"] = mean.tolist()
    # NCCL wants a GPU of its own for every rank.
    if hvd.nccl_built() and torch.cuda.is_available():
        result["gpus"] = torch.cuda.device_count()
        if torch.cuda.device_count() >= hvd.local_size():
            torch.cuda.set_device(hvd.local_rank())
            on_gpu = hvd.allreduce(torch.full((5,), float(mine), device="cuda"), op=hvd.Sum)
            result["sums"]["float32 on the GPU, NCCL"] = on_gpu.tolist()
    return hvd


def with_tensorflow(result):
    """All-reduce through horovod.tensorflow."""
    import horovod.tensorflow as hvd
    import tensorflow as tf

    hvd.init()
    mine = hvd.rank() + 1
    for dtype in (tf.float32, tf.float64, tf.int64):
        total = hvd.allreduce(tf.cast(tf.fill((5,), mine), dtype), op=hvd.Sum)
        result["sums"][dtype.name] = total.numpy().tolist()
    mean = hvd.allreduce(tf.cast(tf.fill((5,), mine / 4), tf.float64), op=hvd.Average)
    result["average"] = mean.numpy().tolist()
    return hvd


if __name__ == "__main__":
    framework, folder = sys.argv[1:3]
    result = {"sums": {}}
    hvd = (with_torch if framework == "torch" else with_tensorflow)(result)
    result.update(
        rank=hvd.rank(),
        size=hvd.size(),
        gloo=bool(hvd.gloo_enabled()),
        mpi=bool(hvd.mpi_enabled()),
    )
    path = os.path.join(folder, f"rank-{hvd.rank()}.json")
    with open(path + ".part", "w") as file:
        json.dump(result, file)
    os.replace(path + ".part", path)
    hvd.shutdown()
