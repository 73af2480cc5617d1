"""Import one framework (``torch`` or ``tensorflow``) and print what a build has to match."""

import json
import sys

MARK = "HVDLOSS-JSON "


def ask_torch():
    """Version, CUDA release, C++ ABI and GPU architectures of PyTorch."""
    import torch

    gpus, arches = [], []
    if torch.version.cuda is not None:
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                major, minor = torch.cuda.get_device_capability(index)
                gpus.append({"name": torch.cuda.get_device_name(index), "capability": major * 10 + minor})
        flags = torch._C._cuda_getArchFlags() or ""
        arches = [flag[3:] for flag in flags.split() if flag.startswith("sm_")]
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "rocm": getattr(torch.version, "hip", None),
        "cxx11_abi": bool(torch.compiled_with_cxx11_abi()),
        "gpus": gpus,
        "gpu_arches": arches,
        "distributed": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
    }


def ask_tensorflow():
    """Version, CUDA release and C++ ABI of TensorFlow."""
    import tensorflow as tf

    info = tf.sysconfig.get_build_info()
    flags = tf.sysconfig.get_compile_flags()
    try:
        import keras

        keras_version = keras.__version__
    except ImportError:
        keras_version = None
    return {
        "version": tf.__version__,
        "cuda": info.get("cuda_version") if info.get("is_cuda_build") else None,
        "rocm": "yes" if info.get("is_rocm_build") else None,
        "cxx11_abi": "-D_GLIBCXX_USE_CXX11_ABI=1" in flags,
        "keras": keras_version,
    }


if __name__ == "__main__":
    ask = {"torch": ask_torch, "tensorflow": ask_tensorflow}[sys.argv[1]]
    print(MARK + json.dumps(ask()), flush=True)
