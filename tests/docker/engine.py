"""Builds and runs the image without Docker: buildah and podman, with a storage of their own.

The base image is made by debootstrap, once, since a registry may be out of reach; what pip is set up with on
this machine (indexes, folders of wheels, certificates) is lent to the build, and to nothing else.

    HVDLOSS_DOCKER_FOLDER   where storage, base and caches are; default: docker/ in `hvdloss install`'s cache
    HVDLOSS_DOCKER_KEEP=1   keep images and layers: the next run builds only what has changed (10 GB)
    HVDLOSS_DOCKER_OPTIONS  more options of `podman run`
    HVDLOSS_DOCKER_BUILD=no take the image that such a run has kept
    HVDLOSS_DOCKER_BASE     an image of a registry to build on, instead of debootstrap's
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdloss.cli.install.cache import cache_folder

ROOT = Path(__file__).parents[2]
IMAGE = "localhost/hvdloss:cpu"
SUITE = "bookworm"  # of debian:12-slim
MIRROR = "http://deb.debian.org/debian"
SECURITY = "http://deb.debian.org/debian-security"
#: What debian:12-slim leaves out of every package.
SLIM = """\
path-exclude /usr/share/doc/*
path-include /usr/share/doc/*/copyright
path-exclude /usr/share/groff/*
path-exclude /usr/share/info/*
path-exclude /usr/share/linda/*
path-exclude /usr/share/lintian/*
path-exclude /usr/share/locale/*
path-exclude /usr/share/man/*
"""
#: How Docker mounts a tmpfs; podman would copy into it what the image has there.
AS_DOCKER = "noexec,nosuid,nodev,notmpcopyup"
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def unavailable() -> str | None:
    """Return why the image can't be built and run here, or None if it can."""
    if os.geteuid() != 0:
        return "root builds and runs it here, and this is not root"
    for program in ("buildah", "podman", "runc", "debootstrap", "ip"):
        if shutil.which(program, path=_PATH) is None:
            return f"`{program}` is not installed (scripts/docker_tools.sh)"
    trial = ["unshare", "--mount", "--pid", "--fork", "--net", "--uts", "--ipc", "true"]
    done = subprocess.run(trial, capture_output=True, text=True)
    if done.returncode:
        return f"the kernel refuses namespaces: {done.stderr.strip()}"
    free = shutil.disk_usage(_existing(folder())).free
    if free < 15e9:
        return f"{folder()} has {free / 1e9:.0f} GB free, and 15 are needed"
    return None


def unreachable() -> str | None:
    """Return why there can be no base image, or None; asks the network unless there is one."""
    if os.environ.get("HVDLOSS_DOCKER_BASE") or _archive().exists():
        return None
    try:
        urllib.request.urlopen(f"{MIRROR}/dists/{SUITE}/Release", timeout=30).close()
    except OSError as error:
        return f"debootstrap cannot reach {MIRROR}: {error}"
    return None


def _archive() -> Path:
    return folder() / f"debian-{SUITE}-slim.tar"


def folder() -> Path:
    """Where all of it is."""
    named = os.environ.get("HVDLOSS_DOCKER_FOLDER")
    return Path(named).resolve() if named else cache_folder() / "docker"


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _overlay_works(where: Path) -> bool:
    """Whether layers can be stacked there by the kernel; vfs copies each whole."""
    with tempfile.TemporaryDirectory(dir=where) as made:
        for name in ("lower", "upper", "work", "merged"):
            Path(made, name).mkdir()
        options = f"lowerdir={made}/lower,upperdir={made}/upper,workdir={made}/work"
        mount = ["mount", "-t", "overlay", "overlay", "-o", options, f"{made}/merged"]
        done = subprocess.run(["unshare", "--mount", *mount], capture_output=True)
        return done.returncode == 0


class Engine:
    """buildah and podman on one storage. A context manager: what it made is gone afterwards, unless kept."""

    def __init__(self) -> None:
        self.folder = folder()
        self.keep = bool(os.environ.get("HVDLOSS_DOCKER_KEEP"))
        for name in ("tmp", "libpod"):
            (self.folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        self.driver = "overlay" if _overlay_works(self.folder) else "vfs"
        self.storage = [f"--root={self.folder}/root", f"--runroot={self.folder}/run"]
        self.storage.append(f"--storage-driver={self.driver}")
        self.env = {
            **os.environ,
            "PATH": _PATH,
            "TMPDIR": str(self.folder / "tmp"),  # where buildah keeps what RUN --mount=type=cache names, too
            "BUILDAH_ISOLATION": "chroot",
            "DISABLE_HC_SYSTEMD": "true",  # no timers for health checks, which need systemd: tests run them
        }
        self._lent: list[str] | None = None

    def __enter__(self) -> Engine:
        """Begin with nothing left of a run before, unless it is to be kept."""
        self.clear()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove containers, networks, volumes, and images if they are not kept."""
        self.clear()

    def clear(self) -> None:
        """Remove what there is."""
        for command in (["rm", "--all", "--force", "--time=0"], ["volume", "prune", "--force"]):
            self.podman(*command, check=False)
        self.podman("network", "prune", "--force", check=False)
        self.buildah("rm", "--all", check=False)
        if not self.keep:
            self.buildah("rmi", "--all", "--force", check=False)
            for name in ("root", "run", "libpod"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / "libpod").mkdir(mode=0o700)

    # Programs

    def buildah(self, *command: str, **options: Any) -> str:
        """Run buildah and return what it prints."""
        return self._call(["buildah", *self.storage, *command], **options)

    def podman_command(self, *command: str) -> list[str]:
        """Return the command line of podman with this storage."""
        # runc, unlike Debian 12's crun, also runs where control groups of both versions are mounted.
        own = ["--runtime=runc", "--cgroup-manager=cgroupfs", "--events-backend=file"]
        return ["podman", *own, f"--tmpdir={self.folder}/libpod", *self.storage, *command]

    def podman(self, *command: str, **options: Any) -> str:
        """Run podman and return what it prints."""
        return self._call(self.podman_command(*command), **options)

    def _call(
        self, command: Sequence[str], *, check: bool = True, timeout: float = 900.0, log: Any = None
    ) -> str:
        kept = subprocess.PIPE if log is None else log
        done = subprocess.run(
            command, env=self.env, stdout=kept, stderr=kept, text=True, timeout=timeout, errors="replace"
        )
        if check and done.returncode:
            said = "" if log is not None else f"\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            raise AssertionError(f"`{shlex.join(command)}` ended with status {done.returncode}{said}")
        return done.stdout or ""

    # The image

    def base(self) -> str:
        """Return the name of a base like debian:12-slim, made by debootstrap if it isn't in the cache."""
        if named := os.environ.get("HVDLOSS_DOCKER_BASE"):
            return named
        name = "localhost/debian:12-slim"
        if self.keep and name in self.buildah("images", "--format", "{{.Name}}:{{.Tag}}", check=False):
            return name
        archive = _archive()
        if not archive.exists():
            self._bootstrap(archive)
        container = self.buildah("from", "scratch").strip()
        self.buildah("add", "--quiet", container, str(archive), "/")
        self.buildah("config", "--cmd", "bash", container)
        self.buildah("commit", "--quiet", "--rm", container, name)
        return name

    def _bootstrap(self, archive: Path) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder / "tmp") as made:
            self._call(["debootstrap", "--variant=minbase", SUITE, made, MIRROR], timeout=3600)
            lines = [f"deb {MIRROR} {SUITE} main", f"deb {MIRROR} {SUITE}-updates main"]
            lines += [f"deb {SECURITY} {SUITE}-security main", ""]
            Path(made, "etc/apt/sources.list").write_text("\n".join(lines))
            Path(made, "etc/dpkg/dpkg.cfg.d/docker").write_text(SLIM)
            for pattern in ("usr/share/doc/*/*", "usr/share/man/*", "usr/share/locale/*", "usr/share/info/*"):
                for path in Path(made).glob(pattern):
                    if path.name != "copyright":
                        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            for pattern in ("var/cache/apt/*", "var/lib/apt/lists/*", "var/log/*"):
                for path in Path(made).glob(pattern):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            part = archive.with_suffix(".part")
            self._call(["tar", "--numeric-owner", "-C", made, "-cf", str(part), "."])
            part.replace(archive)

    def build(self, base: str, log: Path) -> float:
        """Build the Dockerfile on a base and return the seconds it took; what it printed is in `log`."""
        began = time.monotonic()
        options = ["--format=docker", "--layers", f"--build-arg=BASE={base}", f"--tag={IMAGE}"]
        if self.lent():  # pip's own settings say where torch is
            options.append("--build-arg=TORCH_INDEX=")
        with log.open("w") as out:
            try:
                self.buildah("build", *options, *self.lent(), str(ROOT), log=out, timeout=7200)
            except AssertionError as error:
                said = log.read_text(errors="replace")[-6000:]
                raise AssertionError(f"{error}\n{said}") from None
        return time.monotonic() - began

    def lent(self) -> list[str]:
        """Return the options of buildah by which the build gets what pip is set up with here."""
        if self._lent is None:
            self._lent = list(_pip_volumes(self.folder / "pip.conf"))
        return self._lent

    # Containers

    def run(
        self,
        *command: str,
        options: Sequence[str] = (),
        image: str = IMAGE,
        check: bool = True,
        timeout: float = 600.0,
    ) -> str:
        """Run a command in a new container, as locked up as compose.yaml's, and return what it prints."""
        locked = ["--rm", "--read-only", "--read-only-tmpfs=false", "--cap-drop=all"]
        locked += ["--security-opt=no-new-privileges", "--network=none"]
        locked += [f"--tmpfs={place}:mode=1777,{AS_DOCKER}" for place in ("/tmp", "/run")]
        return self.podman(
            "run", *self.limits(), *locked, *options, image, *command, check=check, timeout=timeout
        )

    @staticmethod
    def limits() -> list[str]:
        """Return options by which podman asks for no more than this process may have, nor for a journal."""
        files = resource.getrlimit(resource.RLIMIT_NOFILE)
        processes = resource.getrlimit(resource.RLIMIT_NPROC)
        asked = ["--pull=never", "--log-driver=k8s-file", f"--ulimit=nofile={min(1024, files[1])}:{files[1]}"]
        most = min(processes[1], 32768) if processes[1] != resource.RLIM_INFINITY else 32768
        asked.append(f"--ulimit=nproc={most}:{most}")
        return [*asked, *shlex.split(os.environ.get("HVDLOSS_DOCKER_OPTIONS", ""))]


def _pip_volumes(target: Path) -> Sequence[str]:
    """Write pip's settings for the build, and return the options that lend them and what they name.

    Empty where pip is set up with nothing but defaults.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings: dict[str, str] = {}
    # A variable of the environment wins, as it does in pip.
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        if name in ("index-url", "extra-index-url", "find-links", "cert", "constraint", "trusted-host"):
            settings[name] = value.strip("'\"")
    if not settings:
        return []
    volumes: dict[str, str] = {}
    for name, value in settings.items():
        words = []
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                if name == "cert":  # its folder is the build's own
                    volumes[str(path)] = word = "/run/build/ca.crt"
                else:
                    # An index names files beside it.
                    lent = path.parent if word.startswith("file://") else path
                    volumes[str(lent)] = str(lent)
            words.append(word)
        settings[name] = " ".join(words)
    text = "\n".join(["[global]", *(f"{name} = {value}" for name, value in settings.items()), ""])
    target.write_text(text)
    volumes[str(target)] = "/etc/pip.conf"
    return [f"--volume={source}:{place}:ro" for source, place in volumes.items()]


def labels(inspected: str) -> Mapping[str, Any]:
    """Return what `podman image inspect` says of one image."""
    return json.loads(inspected)[0]
