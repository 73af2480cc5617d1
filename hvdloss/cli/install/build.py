"""Compile the wheel: unpack, patch, run, and say what went wrong in three lines."""

from __future__ import annotations

import re
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hvdloss.cli.errors import Exit, InstallError
from hvdloss.cli.install import recipe
from hvdloss.cli.install.cache import Cache, CachedWheel
from hvdloss.cli.install.pip import with_tools
from hvdloss.cli.install.plan import Plan, build_environment
from hvdloss.cli.install.probe import Probe
from hvdloss.cli.install.progress import Reporter
from hvdloss.cli.install.series import apply_series
from hvdloss.cli.process import Log

_PERCENT = re.compile(r"^\[\s*(\d+)%\]")
#: ``file:line:column: error: message`` of gcc and clang, ``file(line): error: ...`` of nvcc.
_COMPILER_ERROR = re.compile(
    r"^(?P<file>[^\s:()][^:()]*)(?::(?P<line>\d+)(?::\d+)?:|\((?P<nline>\d+)\):)"
    r"\s*(?:fatal )?error\s*(?:#\d+)?:\s*(?P<text>.*)$"
)
#: ``c++: fatal error: ...``, ``cc1plus: error: ...``: errors without a place.
_OTHER_ERROR = re.compile(r"^[^\s:]+: (?:fatal )?error: ")
_CMAKE_ERROR = re.compile(r"^CMake Error(?: at (?P<file>[^:]+):(?P<line>\d+))?")
#: Failures with a cause other than the source, and what to do about each.
_CAUSES = (
    (
        re.compile(r"No space left on device"),
        "The disk filled up during the build.",
        "free some space, or name another disk with --cache-dir",
    ),
    (
        re.compile(
            r"Killed signal terminated program|virtual memory exhausted|out of memory allocating"
            r"|internal compiler error: Killed"
        ),
        "The compiler ran out of memory.",
        "run again with --jobs 1, or on a machine with more memory",
    ),
    (
        re.compile(r"undefined reference to|cannot find -l|ld returned \d exit status"),
        "The linker failed.",
        "see the lines below; --force builds again",
    ),
)


def build_wheel(
    plan: Plan,
    probe: Probe,
    cache: Cache,
    source: Path,
    tools: Path | None,
    log: Log,
    reporter: Reporter,
) -> CachedWheel:
    """Build the plan's wheel and put it in the cache; the caller holds the cache's lock.

    Raises:
        InstallError: it did not compile. Nothing was installed, and nothing of it is kept.
    """
    work = cache.fresh_build_folder()
    try:
        reporter.stage("configure")
        tree = unpack(source, work)
        changed = apply_series(tree, recipe.PATCHES)
        log.write(f"patched {len(changed)} files: " + ", ".join(str(p) for p in changed))
        recipe.write_record(tree, plan.operations, plan.facts)
        env = with_tools(build_environment(plan, probe), tools)
        env["TMPDIR"] = str(work)  # the compilers' own files go to the disk that was checked
        if plan.cuda:
            log.write("CUDA architectures: " + (",".join(plan.gpu_arches) or "all of nvcc's"))
        for name in sorted(env):
            if name.startswith(("HOROVOD_", "CUDA", "CMAKE_", "MAKEFLAGS", "CXX", "CC", "LDFLAGS")):
                log.write(f"{name}={env[name]}")
        wheels = work / "wheels"
        ended = log.run(
            [sys.executable, "setup.py", "bdist_wheel", "--dist-dir", str(wheels)],
            env=env,
            cwd=tree,
            listener=_watch(reporter),
        )
        if ended.status != 0:
            raise _failed(log)
        reporter.stage("wheel")
        built = list(wheels.glob("horovod-*.whl"))
        if len(built) != 1:
            raise InstallError(
                f"The build ended well but left {len(built)} wheels.",
                "see the log",
                status=Exit.BUILD,
                log=str(log.path),
            )
        return cache.store(plan.key, built[0], plan.facts)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def unpack(source: Path, folder: Path) -> Path:
    """Unpack the source archive into `folder`; return its top folder.

    Raises:
        InstallError: it is no archive of Horovod.
    """
    safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    try:
        with tarfile.open(source) as archive:
            archive.extractall(folder, **safe)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InstallError(f"{source} cannot be unpacked: {error}.", status=Exit.SOURCE) from error
    return folder / f"horovod-{recipe.VERSION}"


def first_errors(lines: Iterable[str], most: int = 3) -> list[str]:
    """The first real errors in a build's output, as ``file:line: message``.

    What compilers and CMake repeat, the sources they quote and make's own "Error 1" are left
    out. Falls back to the linker's complaint, then to Python's last line.
    """
    errors: list[str] = []
    linker: list[str] = []
    python = ""
    pending: str | None = None
    for line in lines:
        if pending is not None:
            # CMake puts its message, indented, on the lines after the place.
            if not line.strip():
                continue
            errors.append(f"{pending}: {line.strip()}")
            pending = None
        elif found := _COMPILER_ERROR.match(line):
            number = found["line"] or found["nline"]
            errors.append(f"{_short(found['file'])}:{number}: {found['text'].strip()}")
        elif found := _CMAKE_ERROR.match(line):
            pending = f"{_short(found['file'])}:{found['line']}" if found["file"] else "CMake"
        elif _OTHER_ERROR.match(line):
            errors.append(line.strip())
        elif re.search(r"undefined reference to|cannot find -l|nvcc fatal", line):
            linker.append(_short(line.strip()))
        elif re.match(r"^(\w+\.)*\w*(Error|Exception): ", line):
            python = line.strip()
        if len(dict.fromkeys(errors)) >= most:
            break
    chosen = list(dict.fromkeys(errors)) or list(dict.fromkeys(linker)) or ([python] if python else [])
    return chosen[:most]


def _short(text: str) -> str:
    """Paths inside the unpacked source, from its top."""
    return re.sub(rf"\S*/horovod-{re.escape(recipe.VERSION)}/", "", text)


def _watch(reporter: Reporter) -> Callable[[str], None]:
    """Tells the reporter of make's percentages in the build's output."""
    compiling = False
    best = -1

    def hear(line: str) -> None:
        nonlocal compiling, best
        found = _PERCENT.match(line)
        if not found:
            return
        if not compiling:
            reporter.stage("compile")
            compiling = True
        # make's own percentages can step back a little when several run at a time.
        if int(found[1]) > best:
            best = int(found[1])
            reporter.percent(best)

    return hear


def _failed(log: Log) -> InstallError:
    lines = log.path.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = first_errors(lines)
    for pattern, problem, way_out in _CAUSES:
        hit = next((line for line in lines if pattern.search(line)), None)
        if hit is not None:
            detail = "\n".join(errors or [_short(hit.strip())])
            return InstallError(problem, way_out, status=Exit.BUILD, detail=detail, log=str(log.path))
    return InstallError(
        "Horovod did not compile. Nothing was installed.",
        "look at the first error below; the log has everything around it",
        status=Exit.BUILD,
        detail="\n".join(errors) or "no compiler error was recognised: see the end of the log",
        log=str(log.path),
    )
