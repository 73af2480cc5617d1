"""What is built: Horovod's newest release, and the edits current frameworks need.

Horovod 0.28.1 (2023) is source only and compiles against neither a current PyTorch nor a
current TensorFlow. The edits here make it, and make it fast to build and to start; those of
`hardening` keep strangers out, those of `recovery` let ranks get over the loss of another. Each
one must find the text it replaces: an edit that finds nothing is an error that names the file,
never a silently different build.

Change `RECIPE` with every change of an edit: wheels built by another recipe are not reused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hvdloss.cli.errors import Exit, InstallError
from hvdloss.cli.install.edit import Edit
from hvdloss.cli.install.hardening import HARDENING
from hvdloss.cli.install.recovery import RECOVERY

VERSION = "0.28.1"
SDIST = f"horovod-{VERSION}.tar.gz"
SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
RECIPE = 7

#: Needed in the build's own search path. Not newer: Horovod's setup.py predates what
#: setuptools removed in 80. Not older: 70.1 is the first that builds wheels by itself.
SETUPTOOLS = "setuptools>=70.1,<80"
SETUPTOOLS_PIN = "setuptools==79.0.1"
#: CMake from PyPI, used where the machine has none that is new enough.
CMAKE_PIN = "cmake>=3.24,<4"
CMAKE_MINIMUM = (3, 13)
#: gcc 10 is the first with the C++20 that PyTorch's headers ask for.
GCC_MINIMUM = 10

#: What Horovod imports at run time (its own list, without cffi, which no file of it imports).
RUNTIME_REQUIREMENTS = ("cloudpickle", "psutil", "pyyaml", "packaging")


_FIND_PYTORCH = """\
# Find PyTorch with one run of Python: the original takes eight, each of which imports torch.
# Sets the variables that the original sets.
execute_process(COMMAND ${PY_EXE} -c "
import sys
out, sys.stdout, sys.stderr = sys.stdout, open('/dev/null', 'w'), open('/dev/null', 'w')
import torch
from torch.utils import cpp_extension as cpp
cuda = '$ENV{HOROVOD_WITHOUT_CUDA}' != '1' and torch.version.cuda is not None and cpp.CUDA_HOME is not None
e = (cpp.CUDAExtension if cuda else cpp.CppExtension)('', [])
for line in (torch.__version__, str(cuda).upper(), str(torch.compiled_with_cxx11_abi()).upper(),
             ';'.join(e.include_dirs), ';'.join(e.library_dirs), ';'.join(e.libraries)):
    print(line or ';', file=out)
" OUTPUT_VARIABLE _Pytorch_OUTPUT OUTPUT_STRIP_TRAILING_WHITESPACE)
string(REPLACE ";" "|" _Pytorch_OUTPUT "${_Pytorch_OUTPUT}")
string(REPLACE "\\n" ";" _Pytorch_OUTPUT "${_Pytorch_OUTPUT}")
list(LENGTH _Pytorch_OUTPUT _LEN)
if(_LEN EQUAL 6)
    list(GET _Pytorch_OUTPUT 0 Pytorch_VERSION)
    list(GET _Pytorch_OUTPUT 1 Pytorch_CUDA)
    list(GET _Pytorch_OUTPUT 2 Pytorch_CXX11)
    list(GET _Pytorch_OUTPUT 3 Pytorch_INCLUDE_DIRS)
    list(GET _Pytorch_OUTPUT 4 Pytorch_LIBRARY_DIRS)
    list(GET _Pytorch_OUTPUT 5 _Pytorch_LIBRARIES)
    foreach(_VAR Pytorch_INCLUDE_DIRS Pytorch_LIBRARY_DIRS _Pytorch_LIBRARIES)
        string(REPLACE "|" ";" ${_VAR} "${${_VAR}}")
    endforeach()
endif()
set(Pytorch_ROCM FALSE)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(Pytorch REQUIRED_VARS Pytorch_VERSION VERSION_VAR Pytorch_VERSION)
if(NOT PYTORCH_FOUND)
    return()
endif()

foreach(_LIB IN LISTS _Pytorch_LIBRARIES)
    find_library(FOUND_LIB_${_LIB} NAMES ${_LIB} HINTS ${Pytorch_LIBRARY_DIRS})
    list(APPEND Pytorch_LIBRARIES ${FOUND_LIB_${_LIB}})
endforeach()

if(Pytorch_CXX11)
    set(Pytorch_COMPILE_FLAGS "-D_GLIBCXX_USE_CXX11_ABI=1")
else()
    set(Pytorch_COMPILE_FLAGS "-D_GLIBCXX_USE_CXX11_ABI=0")
endif()
"""


def _asks_record(operation: str) -> Edit:
    """An edit that lets horovodrun read how it was built instead of importing frameworks."""
    head = f"def {operation}_built(verbose=False):\n"
    record = (
        f"    if '{operation}' in _BUILT:  # recorded when the wheel was built\n"
        f"        return _BUILT['{operation}']\n"
    )
    return Edit(
        "horovod/common/util.py",
        head,
        head + record,
        "horovodrun starts without importing the frameworks just to see what was built",
    )


EDITS: tuple[Edit, ...] = (
    # The C++ standard: torch's and TensorFlow's headers are C++20, and with one standard for
    # everything Gloo is compiled once instead of once per framework.
    Edit(
        "CMakeLists.txt",
        "set(CMAKE_CXX_STANDARD 14)",
        "set(CMAKE_CXX_STANDARD 20)",
        "current frameworks' headers are C++20",
    ),
    Edit(
        "horovod/torch/CMakeLists.txt",
        "    set(CMAKE_CXX_STANDARD 14)",
        "    set(CMAKE_CXX_STANDARD 20)",
        "PyTorch's headers are C++20",
    ),
    Edit(
        "horovod/tensorflow/CMakeLists.txt",
        "    set(CMAKE_CXX_STANDARD 17)\n    set(Tensorflow_CXX17 TRUE)",
        "    set(CMAKE_CXX_STANDARD 20)\n    set(Tensorflow_CXX17 FALSE)",
        "TensorFlow's headers are C++20; no second copy of Gloo",
    ),
    # Neither debug information nor -O3: a twentieth of the size, half of the time.
    Edit(
        "CMakeLists.txt",
        'string(REPLACE "-O2" "-O3" CMAKE_CXX_FLAGS_RELWITHDEBINFO "${CMAKE_CXX_FLAGS_RELWITHDEBINFO}")',
        'set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O2 -DNDEBUG")\n'
        'set(CMAKE_C_FLAGS_RELWITHDEBINFO "-O2 -DNDEBUG")',
        "no debug information",
    ),
    # TensorFlow moved its headers.
    Edit(
        "horovod/tensorflow/CMakeLists.txt",
        "include_directories(SYSTEM ${Tensorflow_INCLUDE_DIRS})",
        "include_directories(SYSTEM ${Tensorflow_INCLUDE_DIRS}\n"
        "    ${Tensorflow_INCLUDE_DIRS}/external/highwayhash\n"
        "    ${Tensorflow_INCLUDE_DIRS}/external/farmhash_archive/src)",
        "TensorFlow's headers include bundled ones that are not on its own include path",
    ),
    Edit(
        "horovod/tensorflow/CMakeLists.txt",
        'list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc")',
        "# xla_mpi_ops.cc is left out: it holds code for GPU builds alone",
        "its headers moved, and without a GPU its body is empty",
    ),
    # Python 3.12 has no distutils.
    Edit(
        "horovod/torch/CMakeLists.txt",
        "from distutils.sysconfig import get_python_inc; print(get_python_inc())",
        "import sysconfig; print(sysconfig.get_paths()['include'])",
        "distutils left Python in 3.12",
    ),
    Edit(
        "horovod/runner/js_run.py",
        "from distutils.spawn import find_executable",
        "from shutil import which as find_executable",
        "distutils left Python in 3.12, and horovodrun imports this",
    ),
    # CUDA: only where it was asked for, in a standard that CUDA 13 still knows.
    Edit(
        "CMakeLists.txt",
        "include(CheckLanguage)\ncheck_language(CUDA)\nif(NOT CMAKE_CUDA_COMPILER)",
        'include(CheckLanguage)\nif(NOT "$ENV{HOROVOD_WITHOUT_CUDA}" STREQUAL "1")\n'
        "check_language(CUDA)\nendif()\n"
        'if(NOT CMAKE_CUDA_COMPILER AND NOT "$ENV{HOROVOD_WITHOUT_CUDA}" STREQUAL "1")',
        "a CUDA compiler that happens to be there is no business of a CPU build",
    ),
    Edit(
        "horovod/common/ops/cuda/CMakeLists.txt",
        "set(CMAKE_CUDA_STANDARD 11)",
        "set(CMAKE_CUDA_STANDARD 17)",
        "CUDA 13 knows no C++11",
    ),
    Edit(
        "horovod/common/ops/cuda/CMakeLists.txt",
        "add_library(compatible_horovod_cuda_kernels cuda_kernels.cu)",
        "add_library(compatible_horovod_cuda_kernels EXCLUDE_FROM_ALL cuda_kernels.cu)",
        "kernels for the old C++ ABI are built only if a framework still has it",
    ),
    Edit(
        "cmake/Modules/FindNCCL.cmake",
        '    set(NCCL_LIBNAME "nccl")',
        '    set(NCCL_LIBNAME "nccl" "libnccl.so.2")',
        "the nvidia-nccl package has the library under this name alone",
    ),
    Edit(
        "cmake/Modules/FindPytorch.cmake",
        "# Try to find Pytorch",
        _FIND_PYTORCH,
        "one import of torch instead of eight",
        count=0,
    ),
    # Packaging.
    Edit(
        "setup.py",
        "      setup_requires=require_list if is_build_action() else [],\n",
        "",
        "needed to run Horovod, not to build it: nothing is fetched during the build",
    ),
    Edit(
        "setup.py",
        "if not os.environ.get('HOROVOD_WITHOUT_PYTORCH'):\n    require_list.append('cffi>=1.4.0')\n",
        "",
        "nothing in Horovod imports cffi any more",
    ),
    # A record of the build, in the wheel, for horovodrun and for `hvdloss doctor`.
    Edit(
        "horovod/common/util.py",
        "EXTENSIONS = ['tensorflow', 'torch', 'mxnet']\n",
        "try:\n    from horovod.hvdloss_build import OPERATIONS as _BUILT\n"
        "except ImportError:\n    _BUILT = {}\n\n"
        "EXTENSIONS = ['torch', 'tensorflow', 'mxnet']  # the quickest to import first\n",
        "horovodrun starts in one second instead of ten",
    ),
    _asks_record("mpi"),
    _asks_record("gloo"),
    _asks_record("nccl"),
    Edit(
        "third_party/gloo/gloo/transport/tcp/pair.cc",
        """\
  // Try to size the send buffer such that the write below completes
  // synchronously and we don't need to finish the write later.
  size_t size = std::min(op.preamble.nbytes, kMaxSendBufferSize);
  if (sendBufferSize_ < size) {
    int rv;
    size_t optval = size;
    socklen_t optlen = sizeof(optval);
    rv = setsockopt(fd_, SOL_SOCKET, SO_SNDBUF, &optval, optlen);
    GLOO_ENFORCE_NE(rv, -1);
    rv = getsockopt(fd_, SOL_SOCKET, SO_SNDBUF, &optval, &optlen);
    GLOO_ENFORCE_NE(rv, -1);
    sendBufferSize_ = optval;
  }

""",
        "",
        "a small reduce-scatter does not shrink the connection's send buffer, for good, to its own size",
    ),
    # What keeps strangers out of a job.
    *HARDENING,
    # What lets ranks get over the loss of another.
    *RECOVERY,
)


def apply_edits(tree: Path, edits: tuple[Edit, ...] = EDITS) -> list[Path]:
    """Apply `edits` to the source in `tree`; return the files changed, in order.

    All edits are worked out before the first file is written.

    Raises:
        InstallError: an edit does not find its text as often as it expects to, or no file.
    """
    texts: dict[Path, str] = {}
    for edit in edits:
        path = tree / edit.path
        try:
            text = texts[path] if path in texts else path.read_text(encoding="utf-8")
        except OSError as error:
            raise _cannot_edit(edit, f"it cannot be read ({error.strerror})") from error
        found = text.count(edit.find)
        if edit.count == 0 and found:
            texts[path] = edit.replace
        elif found == edit.count and found:
            texts[path] = text.replace(edit.find, edit.replace)
        else:
            wanted = edit.count or "at least 1"
            raise _cannot_edit(edit, f"its text was found {found} times, not {wanted}")
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return list(texts)


def _cannot_edit(edit: Edit, reason: str) -> InstallError:
    return InstallError(
        f"Horovod's source is not as the recipe knows it: {edit.path}: {reason} (the edit: {edit.why}).",
        "use the pinned source (leave --source out), or report this with the file's name",
        status=Exit.BUILD,
    )


def write_record(tree: Path, operations: Mapping[str, bool], built: Mapping[str, object]) -> None:
    """Write ``horovod/hvdloss_build.py``: what this build holds, readable without frameworks."""
    lines = [
        '"""How this Horovod was built; written by `hvdloss install`."""',
        "",
        f"RECIPE = {RECIPE!r}",
        f"OPERATIONS = {dict(operations)!r}",
        f"BUILT = {dict(built)!r}",
        "",
    ]
    (tree / "horovod" / "hvdloss_build.py").write_text("\n".join(lines), encoding="utf-8")
