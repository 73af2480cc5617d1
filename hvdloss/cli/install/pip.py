"""pip, as this command uses it: never asked questions, never outside what is named here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path

from packaging.requirements import Requirement

from hvdloss.cli.errors import Exit, InstallError
from hvdloss.cli.install import recipe
from hvdloss.cli.install.cache import Cache, check_source
from hvdloss.cli.process import Ended, Log

_QUIET = ("--disable-pip-version-check", "--no-input", "--retries", "1", "--timeout", "20")
#: What pip says when it cannot reach an index.
_NO_NETWORK = (
    "Failed to establish a new connection",
    "Temporary failure in name resolution",
    "Name or service not known",
    "Network is unreachable",
    "Connection refused",
    "Could not connect",
    "ConnectTimeoutError",
    "NewConnectionError",
    "Read timed out",
    "ProxyError",
    "Cannot connect to proxy",
    "SSLError",
    "ConnectionResetError",
    "Connection reset by peer",
)


def pip_command() -> tuple[list[str], dict[str, str]]:
    """How to run pip for this Python, and what its environment needs on top.

    An environment without pip (uv makes such) runs the copy that Python itself brings.

    Raises:
        InstallError: there is none at all.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"], {}
    places = [Path(sysconfig.get_path("stdlib")) / "ensurepip" / "_bundled"]
    places.append(Path("/usr/share/python-wheels"))
    for place in places:
        for wheel in sorted(place.glob("pip-*.whl"), reverse=True):
            return [sys.executable, "-m", "pip"], {"PYTHONPATH": str(wheel)}
    raise InstallError(f"{sys.executable} has no pip.", "python -m ensurepip, or uv pip install pip")


def satisfied(requirement: str) -> bool:
    """Whether this environment already has what `requirement` asks for."""
    wanted = Requirement(requirement)
    try:
        return wanted.specifier.contains(importlib.metadata.version(wanted.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


def provide_tools(cache: Cache, log: Log, *, cmake: bool) -> Path | None:
    """A folder with the packages the build needs and this environment lacks, or None.

    They go to a folder of the cache that only the build's search path names: nothing in the
    user's environment is up- or downgraded for the build.

    Raises:
        InstallError: they cannot be fetched.
    """
    wanted = [] if satisfied(recipe.SETUPTOOLS) else [recipe.SETUPTOOLS_PIN]
    wanted += [] if satisfied("packaging>=20") else ["packaging"]
    wanted += [recipe.CMAKE_PIN] if cmake else []
    if not wanted:
        return None
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    name = "-".join([tag, *(Requirement(item).name for item in wanted)])
    folder = cache.tools / name
    if (folder / ".complete").exists():
        return folder
    part = cache.tools / f"{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    ended = _pip(log, "install", "--target", str(part), "--no-compile", *wanted)
    if ended.status != 0:
        shutil.rmtree(part, ignore_errors=True)
        raise _pip_failed(f"The build's tools ({', '.join(wanted)}) could not be fetched", ended, log)
    (part / ".complete").touch()
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    return folder


def with_tools(env: Mapping[str, str], tools: Path | None) -> dict[str, str]:
    """`env` with the tools' folder first on the search paths."""
    extended = dict(env)
    if tools is not None:
        inherited = env.get("PYTHONPATH")
        extended["PYTHONPATH"] = str(tools) + (os.pathsep + inherited if inherited else "")
        extended["PATH"] = f"{tools / 'bin'}{os.pathsep}{env.get('PATH', os.defpath)}"
    return extended


def fetch_source(cache: Cache, log: Log, tools: Path | None) -> Path:
    """Horovod's source archive, from the cache or the package index; its hash is checked.

    Raises:
        InstallError: no network, or the archive is not the pinned one.
    """
    kept = cache.source / recipe.SDIST
    if kept.exists():
        try:
            check_source(kept, recipe.SHA256)
            return kept
        except InstallError:
            log.write(f"{kept} is damaged; downloading it again")
            kept.unlink(missing_ok=True)
    part = cache.source / f"part-{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        pinned = part / "requirement.txt"
        pinned.write_text(f"horovod=={recipe.VERSION} --hash=sha256:{recipe.SHA256}\n")
        # Without isolation pip needs nothing else from the index to read the archive's name.
        ended = _pip(
            log,
            "download",
            "--no-deps",
            "--no-build-isolation",
            "--require-hashes",
            "--no-binary",
            "horovod",
            "--dest",
            str(part),
            "--requirement",
            str(pinned),
            env=with_tools(os.environ, tools),
        )
        archive = part / recipe.SDIST
        if any("DO NOT MATCH THE HASHES" in line for line in ended.tail):
            got = [line.split()[-1] for line in ended.tail if line.strip().startswith("Got ")]
            raise InstallError(
                f"The package index sent a {recipe.SDIST} that is not the pinned one: its SHA-256"
                f" is {got[0] if got else 'another'}, not {recipe.SHA256}. It was not used.",
                "try again on another network or index; if it differs again, something between"
                " you and the index changes files",
                status=Exit.SOURCE,
                log=str(log.path),
            )
        if ended.status != 0 or not archive.exists():
            raise _pip_failed(
                f"Horovod's source ({recipe.SDIST}) could not be downloaded",
                ended,
                log,
                f"; or fetch {recipe.SDIST} elsewhere and pass it with --source",
            )
        check_source(archive, recipe.SHA256)
        os.replace(archive, kept)
        return kept
    finally:
        shutil.rmtree(part, ignore_errors=True)


def require_runtime(log: Log) -> None:
    """Install what Horovod imports at run time, as far as it is not there yet.

    Raises:
        InstallError: pip could not.
    """
    missing = [name for name in recipe.RUNTIME_REQUIREMENTS if not satisfied(name)]
    if not missing:
        return
    ended = _pip(log, "install", *missing)
    if ended.status != 0:
        raise _pip_failed(f"What Horovod imports ({', '.join(missing)}) could not be installed", ended, log)


def install_wheel(wheel: Path, log: Log, listener: Callable[[str], None] | None = None) -> None:
    """Install the finished wheel over whatever Horovod is there; pip rolls back if it fails.

    Raises:
        InstallError: pip could not.
    """
    ended = _pip(
        log, "install", "--no-deps", "--force-reinstall", "--no-index", str(wheel), listener=listener
    )
    if ended.status != 0:
        raise InstallError(
            f"pip could not install {wheel.name}.",
            "see the log",
            status=Exit.INSTALL,
            detail="\n".join(_errors(ended)),
            log=str(log.path),
        )


def _pip(
    log: Log,
    action: str,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    listener: Callable[[str], None] | None = None,
) -> Ended:
    command, extra = pip_command()
    full = {**(os.environ if env is None else env)}
    for name, value in extra.items():
        inherited = full.get(name)
        full[name] = value + (os.pathsep + inherited if inherited else "")
    return log.run([*command, action, *_QUIET, *arguments], env=full, listener=listener)


def _errors(ended: Ended) -> list[str]:
    lines = [line.strip() for line in ended.tail if line.lstrip().startswith("ERROR")]
    return lines[:3] or [line for line in ended.tail if line.strip()][-3:]


def _pip_failed(problem: str, ended: Ended, log: Log, more: str = "") -> InstallError:
    text = "\n".join(ended.tail)
    if any(mark in text for mark in _NO_NETWORK):
        return InstallError(
            f"{problem}: the package index cannot be reached.",
            "check the network (or the proxy, or pip's index settings) and run this again" + more,
            status=Exit.SOURCE,
            log=str(log.path),
        )
    return InstallError(
        f"{problem}.",
        "see what pip said below" + more,
        status=Exit.SOURCE,
        detail="\n".join(_errors(ended)),
        log=str(log.path),
    )
