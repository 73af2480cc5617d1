"""compose.yaml as podman runs it: each service becomes one `podman run`, word for word.

Podman needs no daemon, `docker compose` does. Whatever a service says is either handed to podman or an error
here, so that nothing in the file is passed over.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.docker.engine import AS_DOCKER

#: Keys that say how the services of a file hang together, and where an image comes from.
_ELSEWHERE = {"build", "command", "depends_on", "image", "networks", "volumes"}
_CONDITIONS = {"service_completed_successfully", "service_healthy", "service_started"}


def load(path: Path, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return a compose file's content, its ``${NAME:-default}`` filled in from `env`."""
    env = env or {}

    def fill(found: re.Match[str]) -> str:
        name, _, default = found[1].partition(":-")
        return env.get(name) or default

    return yaml.safe_load(re.sub(r"\$\{([^}]+)\}", fill, path.read_text()))


def command(service: Mapping[str, Any]) -> list[str]:
    """Return a service's command; empty for the image's own."""
    value = service.get("command") or []
    return shlex.split(value) if isinstance(value, str) else list(value)


def podman_options(project: str, service: Mapping[str, Any]) -> list[str]:
    """Return the options of `podman run` that say what a service says.

    Raises:
        ValueError: it says something that has no translation here.
    """
    out = []
    for key, value in service.items():
        if key == "read_only":
            # Podman would put a tmpfs at /run, /tmp and /var/tmp by itself; Docker doesn't.
            out += ["--read-only", "--read-only-tmpfs=false"] if value else []
        elif key in ("tmpfs", "cap_drop", "security_opt"):
            names = {"tmpfs": "--tmpfs", "cap_drop": "--cap-drop", "security_opt": "--security-opt"}
            words = [value] if isinstance(value, str) else value
            # Docker's spelling; podman knows the bare word.
            words = ["no-new-privileges" if word == "no-new-privileges:true" else word for word in words]
            if key == "tmpfs":
                words = [f"{word}{',' if ':' in word else ':'}{AS_DOCKER}" for word in words]
            out += [f"{names[key]}={word}" for word in words]
        elif key == "environment":
            out += [f"--env={name}={said}" for name, said in value.items()]
        elif key == "hostname":
            out.append(f"--hostname={value}")
        elif key == "shm_size":
            out.append(f"--shm-size={str(value).removesuffix('b')}")
        elif key not in _ELSEWHERE:
            raise ValueError(f"compose.yaml: {key}={value!r} has no translation into podman's options")
    for volume in service.get("volumes", []):
        out.append(f"--volume={project}_{volume}")
    for network in service.get("networks", []):
        out.append(f"--network={project}_{network}")
    return out


def order(services: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, dict[str, str]]]:
    """Return the services in an order in which they can start, each with what it waits for, by service.

    Raises:
        ValueError: they wait for each other, or for something unknown.
    """
    left = {name: _waits(service) for name, service in services.items()}
    out: list[tuple[str, dict[str, str]]] = []
    while left:
        ready = [name for name, waits in left.items() if not set(waits) & set(left)]
        if not ready:
            raise ValueError(f"compose.yaml: {sorted(left)} wait for each other")
        for name in ready:
            out.append((name, left.pop(name)))
    return out


def _waits(service: Mapping[str, Any]) -> dict[str, str]:
    waits = {name: said["condition"] for name, said in service.get("depends_on", {}).items()}
    if unknown := set(waits.values()) - _CONDITIONS:
        raise ValueError(f"compose.yaml: no such conditions: {sorted(unknown)}")
    return waits
