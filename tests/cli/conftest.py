"""Broken machines to order, and a small stand-in for Horovod's source."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FAKE_SETUP = """
import os, sys, time
from setuptools import setup
print("-- Configuring done", flush=True)
print("[ 10%] Building CXX object a.cc.o", flush=True)
{body}
print("[100%] Linking CXX shared library", flush=True)
setup(name="horovod", version="0.28.1", packages=["horovod"])
"""


@pytest.fixture
def fake_sdist(tmp_path: Path) -> Callable[[str], Path]:
    """Make a source archive of Horovod's name whose setup.py runs `body` where it would compile."""

    def make(body: str = "") -> Path:
        path = tmp_path / "horovod-0.28.1.tar.gz"
        files = {
            "setup.py": FAKE_SETUP.format(body=body),
            "horovod/__init__.py": "__version__ = '0.28.1'\n",
        }
        with tarfile.open(path, "w:gz") as archive:
            for name, text in files.items():
                info = tarfile.TarInfo("horovod-0.28.1/" + name)
                info.size = len(text.encode())
                archive.addfile(info, io.BytesIO(text.encode()))
        return path

    return make


#: The command with the pinned hash and the patches replaced, so that a stand-in source is taken.
DRIVER = """
import sys
from hvdloss.cli.install import recipe
recipe.SHA256 = sys.argv.pop(1)
recipe.PATCHES = ()
from hvdloss.cli import main
main()
"""


def command(*arguments: str, source_hash: str | None = None) -> list[str]:
    """The command line of `hvdloss ARGUMENTS`; with `source_hash`, taking a stand-in source."""
    if source_hash is None:
        return [sys.executable, "-m", "hvdloss.cli", *arguments]
    return [sys.executable, "-c", DRIVER, source_hash, *arguments]


def run_cli(
    *arguments: str,
    env: Mapping[str, str] | None = None,
    source_hash: str | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        command(*arguments, source_hash=source_hash),
        env={**os.environ, "COLUMNS": "200", **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=ROOT,
    )


@pytest.fixture
def path_without(tmp_path: Path) -> Callable[..., str]:
    """A PATH with everything on it but the programs named (whole or by prefix with ``*``)."""

    def make(*names: str) -> str:
        folder = tmp_path / "bin"
        folder.mkdir()
        for entry in os.environ["PATH"].split(os.pathsep):
            for program in Path(entry).iterdir() if Path(entry).is_dir() else ():
                hidden = any(
                    program.name.startswith(name[:-1]) if name.endswith("*") else program.name == name
                    for name in names
                )
                if not hidden and not (folder / program.name).exists():
                    (folder / program.name).symlink_to(program)
        for name in names:
            assert name.endswith("*") or shutil.which(name, path=str(folder)) is None
        return str(folder)

    return make
