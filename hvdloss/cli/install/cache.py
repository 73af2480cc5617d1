"""The per-user cache: built wheels, the source, logs; one writer at a time.

::

    <cache>/lock                     held while an install works
    <cache>/wheels/<key>/*.whl       a finished wheel ...
    <cache>/wheels/<key>/build.json  ... and its SHA-256 and everything it was built for
    <cache>/source/                  Horovod's source as downloaded
    <cache>/tools/<what>/            packages the build needs, kept out of the user's environment
    <cache>/build/                   work under way; never installed from, emptied at each start
    <cache>/logs/                    one log per install, the last 20 kept

A wheel's folder appears by one rename when it is complete, so that an interrupted build leaves
nothing that could be taken for a wheel.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hvdloss._util.private import make_folder, open_private
from hvdloss.cli.errors import Exit, InstallError
from hvdloss.comm.messages import parse_json

#: A build with both frameworks took 60 MB, its tools 20 MB; the rest is the compilers' own.
BUILD_BYTES = 600 * 2**20
INSTALL_BYTES = 50 * 2**20
_KEPT_LOGS = 20


def cache_folder(named: str | None = None) -> Path:
    """Where the cache is: `named`, else HVDLOSS_CACHE, else the user's cache folder."""
    if named or os.environ.get("HVDLOSS_CACHE"):
        return Path(named or os.environ["HVDLOSS_CACHE"]).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "hvdloss"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def require_space(path: Path, needed: int, what: str) -> None:
    """Refuse when the disk that holds `path` (or will) has less than `needed` bytes left.

    Raises:
        InstallError: with what is there and what is needed.
    """
    existing = path
    while not existing.exists():
        existing = existing.parent
    stat = os.statvfs(existing)
    free = stat.f_bavail * stat.f_frsize
    if free < needed:
        raise InstallError(
            f"The disk is too full {what}: {free // 2**20} MB free at {existing},"
            f" {needed // 2**20} MB needed.",
            "free some space, or name another disk with --cache-dir (or HVDLOSS_CACHE)",
        )


@dataclass(frozen=True)
class CachedWheel:
    """A finished wheel whose hash was checked against its record just now."""

    path: Path
    sha256: str
    record: dict[str, object]


class Cache:
    """The cache in `folder`; created on first use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wheels = folder / "wheels"
        self.source = folder / "source"
        self.tools = folder / "tools"
        self.build = folder / "build"
        self.logs = folder / "logs"

    def create(self) -> None:
        """Make the folders.

        Raises:
            InstallError: the place cannot be written to.
        """
        try:
            for folder in (self.wheels, self.source, self.tools, self.build, self.logs):
                make_folder(folder)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError(13, "may not be written to", str(self.folder))
        except OSError as error:
            raise InstallError(
                f"The cache folder {self.folder} cannot be used: {error.strerror}.",
                "name another with --cache-dir (or HVDLOSS_CACHE)",
            ) from error

    @contextmanager
    def locked(self, wait: float, waiting: Callable[[str], None]) -> Iterator[None]:
        """Hold the cache's lock during the block; `waiting` hears who holds it meanwhile.

        The lock is the system's (flock): it goes with its process, however that ends.

        Raises:
            InstallError: another install still held it after `wait` seconds.
        """
        path = self.folder / "lock"
        with open_private(path, "a+") as file:
            deadline = time.monotonic() + wait
            logged = False
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    holder = path.read_text().strip() or "another process"
                    if time.monotonic() >= deadline:
                        raise InstallError(
                            f"Another install is at work ({holder}), for longer than"
                            f" {wait:.0f} s of waiting.",
                            "wait for it, or use a cache of your own (--cache-dir)",
                        ) from None
                    if not logged:
                        waiting(f"waiting for another install ({holder})")
                        logged = True
                    time.sleep(0.2)
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()}")
            file.flush()
            try:
                yield
            finally:
                file.seek(0)
                file.truncate()

    def find(self, key: str) -> tuple[CachedWheel | None, str]:
        """The wheel for `key` if there is a sound one; else None, and why one was thrown out.

        A folder whose wheel differs from its record (a flipped bit, a half copy) is removed.
        """
        folder = self.wheels / key
        if not folder.exists():
            return None, ""
        try:
            record = parse_json((folder / "build.json").read_text())
            if Path(record["wheel"]).name != record["wheel"]:
                raise ValueError(f"its record names {record['wheel']!r}")  # somewhere else
            path = folder / record["wheel"]
            actual = sha256_of(path)
            if actual != record["sha256"]:
                raise ValueError("its hash differs from the one recorded when it was built")
            return CachedWheel(path, actual, record), ""
        except (OSError, ValueError, KeyError, TypeError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            return None, f"the cached wheel was damaged and is built again ({error})"

    def store(self, key: str, wheel: Path, facts: dict[str, object]) -> CachedWheel:
        """Put a finished wheel under `key`, in one rename."""
        parcel = self.build / f"parcel-{os.getpid()}"
        shutil.rmtree(parcel, ignore_errors=True)
        parcel.mkdir(parents=True)
        target = parcel / wheel.name
        shutil.copyfile(wheel, target)
        record: dict[str, object] = {
            "wheel": wheel.name,
            "sha256": sha256_of(target),
            "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "facts": facts,
        }
        (parcel / "build.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
        final = self.wheels / key
        if final.exists():
            shutil.rmtree(final)
        os.replace(parcel, final)
        return CachedWheel(final / wheel.name, str(record["sha256"]), record)

    def fresh_build_folder(self) -> Path:
        """An empty folder to build in; what interrupted builds left is removed first."""
        for left in self.build.iterdir():
            shutil.rmtree(left, ignore_errors=True)
        folder = self.build / f"horovod-{os.getpid()}"
        folder.mkdir()
        return folder

    def new_log(self) -> Path:
        """A path for this install's log; the oldest logs beyond 20 are removed."""
        old = sorted(self.logs.glob("install-*.log"))
        for path in old[: max(0, len(old) - _KEPT_LOGS + 1)]:
            path.unlink(missing_ok=True)
        return self.logs / time.strftime(f"install-%Y%m%d-%H%M%S-{os.getpid()}.log")


def check_source(path: Path, expected: str) -> None:
    """Refuse a source archive that is not the pinned one.

    Raises:
        InstallError: it cannot be read, or its SHA-256 differs.
    """
    try:
        actual = sha256_of(path)
    except OSError as error:
        raise InstallError(
            f"The source archive {path} cannot be read: {error.strerror}.", status=Exit.SOURCE
        ) from error
    if actual != expected:
        raise InstallError(
            f"The source archive {path.name} is not the pinned one: its SHA-256 is {actual},"
            f" not {expected}. It was not used.",
            "download it again; if it differs again, something between you and the package"
            " index changes files",
            status=Exit.SOURCE,
        )
