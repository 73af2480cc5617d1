"""The image, built and run for real: locked up, with ranks, and as two hosts. Run by `make test-docker`.

See engine.py for how, and for what can be set.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.docker import compose
from tests.docker import engine as engine_module
from tests.docker.engine import IMAGE, Engine

#: What the image may have, uncompressed: a dependency that doubles it should be noticed.
LIMIT_BYTES = 2.9e9
UID = 10001  # the Dockerfile's
HOME = f"--tmpfs=/work:mode=1777,{engine_module.AS_DOCKER}"
ROOT = engine_module.ROOT
PARTS = ["/opt/venv", "/usr", "/var", "/opt/hvdloss"]

SKIPPED = "the image is NOT BUILT, these tests are SKIPPED: {}"
reason = engine_module.unavailable()
pytestmark = [
    pytest.mark.docker,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(reason is not None, reason=SKIPPED.format(reason)),
]


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """The engine, with the image built."""
    if problem := engine_module.unreachable():
        pytest.skip(SKIPPED.format(problem))
    with Engine() as made:
        log = made.folder / "build.log"
        if os.environ.get("HVDLOSS_DOCKER_BUILD") == "no":
            say(request, f"NOT BUILT: {IMAGE} as it was kept")
            yield made
            return
        began = time.monotonic()
        base = made.base()
        based = time.monotonic() - began
        seconds = made.build(base, log)
        say(request, f"base {based:.0f} s, image built in {seconds:.0f} s ({made.driver}; log: {log})")
        yield made


def say(request: pytest.FixtureRequest, text: str) -> None:
    """Print a line that pytest doesn't swallow."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n  {text}", flush=True)


def test_the_size_is_told_and_limited(engine: Engine, request: pytest.FixtureRequest) -> None:
    inspected = json.loads(engine.podman("image", "inspect", IMAGE))[0]
    base = json.loads(engine.podman("image", "inspect", engine.base()))[0]["Size"]
    lines = engine.run("sh", "-c", f"du -sm {' '.join(PARTS)} 2>/dev/null; :").splitlines()
    site = engine.run("sh", "-c", "du -sm /opt/venv/lib/python3*/site-packages/* | sort -rn | head -n 12")
    parts = [line.replace("/opt/venv/lib/", "") for line in (*lines, *site.splitlines())]
    whole = f"image: {inspected['Size'] / 1e6:.0f} MB, of which the base {base / 1e6:.0f} MB; in MiB:"
    say(request, "\n    ".join([whole, *parts]))
    assert inspected["Size"] < LIMIT_BYTES


def test_nothing_secret_and_no_way_up_is_in_the_image(engine: Engine) -> None:
    found = "find / -xdev ( -name ssh_host_*key* -o -name id_* -path */ssh* -o -perm /6000 -type f ) -print"
    see_all = ["--user=0", "--cap-add=DAC_READ_SEARCH"]
    assert engine.run(*found.split(), options=see_all) == ""
    # Packages' own tests may have some: they are no secret.
    grep = "grep -rlI --exclude-dir=site-packages -e 'PRIVATE KEY-----' /etc /home /opt /root /ssh /work || :"
    assert engine.run("sh", "-c", grep, options=see_all) == ""
    history = engine.podman("history", "--no-trunc", IMAGE)
    assert "TOKEN" not in history
    assert "PASSWORD" not in history


def test_the_user_is_nobody_special_and_the_root_file_system_cannot_be_written(engine: Engine) -> None:
    inspected = json.loads(engine.podman("image", "inspect", IMAGE))[0]
    assert inspected["Config"]["User"] == str(UID)
    script = """
        id -u; grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/self/status
        for path in /x /usr/x /etc/x /opt/venv/x /work/x /ssh/x /home/x /var/tmp/x; do
            touch $path 2>&1 && echo "WRITTEN: $path"
        done
        touch /tmp/x /run/x && echo fine
    """
    for user in (UID, 0):
        said = engine.run("sh", "-c", script, options=[f"--user={user}"])
        assert said.startswith(f"{user}\n"), said
        # Root, without its rights, may not even look into /ssh.
        assert said.count("Read-only file system") + said.count("/ssh/x': Permission denied") == 8, said
        assert "WRITTEN" not in said, said
        assert said.rstrip().endswith("fine"), said
        assert said.count("\t0000000000000000\n") == 2, said
        assert "NoNewPrivs:\t1" in said, said


def test_doctor_finds_everything(engine: Engine) -> None:
    report = json.loads(engine.run("hvdloss", "doctor", "--json", options=[HOME, "--shm-size=1g"]))
    assert report["ok"], report
    assert not [one for one in report["findings"] if one["level"] == "problem"]
    text = json.dumps(report)
    for word in ("torch", "tensorflow", "gloo", "mpi"):
        assert word in text.lower(), word


@pytest.mark.parametrize("controller", ["gloo", "mpi"])
def test_the_demo_trains_on_several_ranks(engine: Engine, controller: str, request: Any) -> None:
    demo = ["python", "/opt/hvdloss/examples/demo.py", "--only", "torch_digits", "tensorflow_linear"]
    demo += ["--np", "3" if controller == "gloo" else "2"]
    began = time.monotonic()
    # A cache of interpreter's bytecode, a log, a result: all of it must have found a place.
    said = engine.run(
        *demo, *(["--mpi"] if controller == "mpi" else []), options=[HOME, "--shm-size=1g"], timeout=1800
    )
    say(request, f"demo over {controller}: {time.monotonic() - began:.0f} s")
    scripts = ("torch_digits ", "tensorflow_linear ")
    rows = [line for line in said.splitlines() if line.strip().startswith(scripts)]
    assert len(rows) == 2, said
    assert all(" yes " in row for row in rows), said


def test_a_container_that_is_no_host_is_healthy(engine: Engine) -> None:
    name = f"hvdloss-test-{os.getpid()}"
    options = ["--detach", f"--name={name}", HOME]
    try:
        engine.run("sleep", "300", options=options)
        engine.podman("healthcheck", "run", name)
    finally:
        engine.podman("rm", "--force", "--time=0", name, check=False)
    name += "-b"
    try:  # and one that cannot write is not
        engine.run("sleep", "300", options=["--detach", f"--name={name}"])
        with pytest.raises(AssertionError, match="status 1"):
            engine.podman("healthcheck", "run", name)
    finally:
        engine.podman("rm", "--force", "--time=0", name, check=False)


def test_a_host_without_keys_says_what_is_missing(engine: Engine) -> None:
    with pytest.raises(AssertionError, match=r"status 78(.|\n)*hvdloss-ssh-keys"):
        engine.run("sshd")


# compose.yaml


class Project:
    """compose.yaml's services, run by podman."""

    def __init__(self, engine: Engine, **env: str) -> None:
        self.engine = engine
        self.file = compose.load(ROOT / "compose.yaml", env)
        self.name = f"hvdloss-test-{os.getpid()}"

    def __enter__(self) -> Project:
        for network, said in self.file["networks"].items():
            options = ["--internal"] if (said or {}).get("internal") else []
            self.engine.podman("network", "create", *options, f"{self.name}_{network}")
        for volume in self.file["volumes"]:
            self.engine.podman("volume", "create", f"{self.name}_{volume}")
        return self

    def __exit__(self, *_: object) -> None:
        for service in self.file["services"]:
            self.engine.podman("rm", "--force", "--time=0", self.container(service), check=False)
        for volume in self.file["volumes"]:
            self.engine.podman("volume", "rm", "--force", f"{self.name}_{volume}", check=False)
        for network in self.file["networks"]:
            self.engine.podman("network", "rm", "--force", f"{self.name}_{network}", check=False)

    def container(self, service: str) -> str:
        return f"{self.name}-{service}"

    def start(self, service: str, *command: str) -> None:
        said = self.file["services"][service]
        options = compose.podman_options(self.name, said)
        options += ["--detach", f"--name={self.container(service)}", f"--network-alias={service}"]
        words = command or compose.command(said)
        self.engine.podman("run", *self.engine.limits(), *options, f"localhost/{said['image']}", *words)

    def wait(self, service: str, timeout: float = 900.0) -> tuple[int, str]:
        """Wait for the end of a service's command, and return its status and what it printed."""
        status = int(self.engine.podman("wait", self.container(service), timeout=timeout))
        done = subprocess.run(
            self.engine.podman_command("logs", self.container(service)),
            env=self.engine.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
        return status, done.stdout

    def until_healthy(self, service: str, timeout: float = 60.0) -> float:
        """Run the image's health check until it passes, and return the seconds that the last one took."""
        until = time.monotonic() + timeout
        while True:
            began = time.monotonic()
            try:
                self.engine.podman("healthcheck", "run", self.container(service))
                return time.monotonic() - began
            except AssertionError:
                if time.monotonic() > until:
                    raise
                time.sleep(1.0)

    def up(self) -> tuple[int, str]:
        """Start everything in the order of `depends_on`, and return how the last of it ended."""
        for service, waits in compose.order(self.file["services"]):
            for other, condition in waits.items():
                if condition == "service_completed_successfully":
                    status, said = self.wait(other)
                    assert status == 0, said
                elif condition == "service_healthy":
                    self.until_healthy(other)
            self.start(service)
        return self.wait(service)


@pytest.mark.parametrize("controller", ["gloo", "mpi"])
def test_two_containers_train_as_two_hosts(engine: Engine, controller: str, request: Any) -> None:
    began = time.monotonic()
    with Project(engine, CONTROLLER=controller) as project:
        status, said = project.up()
        assert status == 0, said
        say(request, f"two containers over {controller}: {time.monotonic() - began:.0f} s")
        # As exact as in one process, and results where compose.yaml says that they stay.
        assert "exact" in said or "hvdloss" in said, said
        # What both hosts know of each other; nothing can be written where nothing should.
        volume = f"{project.name}_work"
        shown = engine.run("find", "/work", "-type", "f", options=[f"--volume={volume}:/work:ro"])
        assert "numbers.json" in shown, shown
        keys = engine.run("ls", "-l", "/ssh", options=[f"--volume={project.name}_keys:/ssh:ro"])
        assert "host_host1" in keys
        assert "host_host2" in keys


def test_ranks_are_on_both_hosts_and_hosts_take_only_their_own_keys(engine: Engine) -> None:
    with Project(engine) as project:
        for service in ("keys", "host2"):
            if service == "host2":
                assert project.wait("keys")[0] == 0
            project.start(service)
        project.until_healthy("host2")
        words = compose.command(project.file["services"]["host1"])
        program = words.index("python")
        probe = "import os, hvdloss.torch as hvd; hvd.init(); print('AT', hvd.rank(), os.uname().nodename)"
        project.start("host1", *words[:program], "python", "-c", probe)
        status, said = project.wait("host1")
        assert status == 0, said
        places = sorted(line.split("AT ", 1)[1] for line in said.splitlines() if "AT " in line)
        assert places == ["0 host1", "1 host1", "2 host2", "3 host2"], said

        # Another key, or none, does not get in; nor does another host pass for host2.
        network = [f"--network={project.name}_ranks"]
        other = (
            "ssh-keygen -q -t ed25519 -N '' -f /tmp/k && ssh -F none -i /tmp/k -o StrictHostKeyChecking=no "
            "-o UserKnownHostsFile=/dev/null -o BatchMode=yes -p 2222 hvdloss@host2 id 2>&1; echo status $?"
        )
        said = engine.podman("run", "--rm", *engine.limits(), *network, IMAGE, "sh", "-c", other)
        assert "Permission denied (publickey)" in said, said
        assert said.rstrip().endswith("status 255"), said
        known = [*network, f"--volume={project.name}_keys:/ssh:ro"]
        ask = (
            "ssh host2 uname -n && cd /run/hvdloss && ssh-keygen -q -t ed25519 -N '' -f other && "
            'echo "[host2]:2222 $(cat other.pub)" >known_hosts && ssh host2 uname -n; echo status $?'
        )
        said = engine.podman("run", "--rm", *engine.limits(), *known, IMAGE, "sh", "-c", ask)
        assert said.split() == ["host2", "status", "255"]
