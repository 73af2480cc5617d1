"""What is built: Horovod's newest release, with the patches that it needs today.

Horovod 0.28.1 (2023) is source only and compiles against neither a current PyTorch nor a
current TensorFlow. The patches (docs/howto/install.md lists them) make it, and make it fast to build
and to start, keep strangers out, and let ranks get over the loss of another. A change of a
patch changes `RECIPE`: wheels built by another recipe are not reused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hvdloss.cli.install.series import read_series, version_of

VERSION = "0.28.1"
SDIST = f"horovod-{VERSION}.tar.gz"
SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
PATCHES = read_series()
RECIPE = version_of(PATCHES)

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


def write_record(tree: Path, operations: Mapping[str, bool], built: Mapping[str, object]) -> None:
    """Write ``horovod/hvdloss_build.py``: what this build holds, readable without frameworks."""
    lines = [
        '"""How this Horovod was built; written by `hvdloss install`."""',
        "",
        f"RECIPE = {RECIPE!r}",
        f"PATCHES = {[patch.name for patch in PATCHES]!r}",
        f"OPERATIONS = {dict(operations)!r}",
        f"BUILT = {dict(built)!r}",
        "",
    ]
    (tree / "horovod" / "hvdloss_build.py").write_text("\n".join(lines), encoding="utf-8")
