"""The recipes of docs/howto/launching.md: what each starts on a cluster is started here, on one machine."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "examples" / "launch"
BIN = Path(sys.executable).parent

pytestmark = pytest.mark.timeout(1000)
needs_horovod = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None, reason="Horovod is not installed: hvdloss install"
)


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "2", **more}


def mpijob() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: pip install 'hvdloss[horovod]'")
    return yaml.safe_load((LAUNCH / "mpijob.yaml").read_text())


def container(job: dict[str, Any], replica: str) -> dict[str, Any]:
    (one,) = job["spec"]["mpiReplicaSpecs"][replica]["template"]["spec"]["containers"]
    return one


def trains_on_two_ranks(command, env, folder):
    """Run what launches an example, which writes its numbers into ``folder/run``."""
    done = subprocess.run(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert '"size": 2' in (folder / "run" / "numbers.json").read_text()


def test_the_scripts_are_sound():
    subprocess.run(["bash", "-n", LAUNCH / "slurm.sbatch"], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", LAUNCH / "slurm.sbatch"], check=True)


@pytest.mark.more
@needs_horovod
def test_slurm(tmp_path):
    """With Slurm's variables, and a `scontrol` that tells of this machine alone."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames here" ] && echo localhost\n')
    scontrol.chmod(0o755)
    arguments = [ROOT / "examples" / "torch_tokens.py", "--epochs", "1", "--output", tmp_path / "run"]
    trains_on_two_ranks(
        ["bash", LAUNCH / "slurm.sbatch", *map(str, arguments)],
        {
            **environment(),
            "PATH": os.pathsep.join([str(tmp_path), environment()["PATH"]]),
            "SLURM_JOB_NODELIST": "here",
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "2",
            "SLURM_CPUS_PER_TASK": "1",
        },
        tmp_path,
    )


def test_an_mpijob_has_the_operators_fields():
    """By hand: it was held against the operator's own schema (v0.8), too large to keep here."""
    job = mpijob()
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    assert job["spec"].keys() <= {
        "slotsPerWorker",
        "runLauncherAsWorker",
        "runPolicy",
        "sshAuthMountPath",
        "launcherCreationPolicy",
        "mpiImplementation",
        "mpiReplicaSpecs",
    }
    assert job["spec"]["mpiReplicaSpecs"].keys() == {"Launcher", "Worker"}
    ranks = job["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"] * job["spec"]["slotsPerWorker"]
    arguments = container(job, "Launcher")["args"]
    assert arguments[arguments.index("-np") + 1] == str(ranks)
    for replica in job["spec"]["mpiReplicaSpecs"].values():
        assert replica["template"]["spec"]["securityContext"]["runAsNonRoot"] is True


@pytest.mark.more
@needs_horovod
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed (Debian: openmpi-bin)")
def test_what_an_mpijobs_launcher_runs(tmp_path):
    """As in the pod, but for the places of files and hosts."""
    one = container(mpijob(), "Launcher")
    moved = {"/opt/hvdloss/examples": str(ROOT / "examples"), "/tmp/run": str(tmp_path / "run")}
    command = [*one["command"], *one["args"], "--epochs", "1"]
    for place, here in moved.items():
        command = [word.replace(place, here) for word in command]
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    trains_on_two_ranks(
        command,
        environment(
            OMPI_MCA_orte_default_hostfile=str(tmp_path / "hosts"),
            OMPI_ALLOW_RUN_AS_ROOT="1",
            OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
            OMPI_MCA_mpi_yield_when_idle="1",
        ),
        tmp_path,
    )


@pytest.mark.more
@pytest.mark.skipif(
    shutil.which("ssh-keygen") is None, reason="ssh is not installed (Debian: openssh-client)"
)
def test_what_an_mpijobs_worker_runs_lets_the_launcher_in(tmp_path):
    """The worker's sshd, as it is written, on a port of its own; the launcher's way to call ssh."""
    if not os.access("/usr/sbin/sshd", os.X_OK):
        pytest.skip("sshd is not installed (Debian: openssh-server)")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # root's sshd needs it; Debian's service makes it
    job = mpijob()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    keys = tmp_path / "keys"
    keys.mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-N", "", "-f", keys / "id_rsa"], check=True)
    shutil.copy(keys / "id_rsa.pub", keys / "authorized_keys")

    def moved(text: str) -> str:
        return (
            text.replace("2222", port)
            .replace("/keys", str(keys))
            .replace("/tmp/host_key", f"{keys}/host_key")
        )

    worker = container(job, "Worker")
    command = [*worker["command"], moved(worker["args"][0]) + " -o ListenAddress=127.0.0.1"]
    (setting,) = (e for e in container(job, "Launcher")["env"] if e["name"] == "OMPI_MCA_plm_rsh_args")
    call = shlex.split(moved(setting["value"]).replace("/tmp/known_hosts", f"{keys}/known_hosts"))
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for _ in range(100):
            with socket.socket() as test:
                if test.connect_ex(("127.0.0.1", int(port))) == 0:
                    break
            time.sleep(0.2)
        told = subprocess.run(
            ["ssh", "-F", "/dev/null", *call, "127.0.0.1", "echo in"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert told.stdout == "in\n", told.stderr
        refused = subprocess.run(
            ["ssh", "-F", "/dev/null", "-p", port, "-o", "BatchMode=yes", "-o", "IdentityFile=none",
             "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=none",
             "127.0.0.1", "echo in"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )  # fmt: skip
        assert refused.returncode != 0
        assert refused.stdout == ""
    finally:
        server.terminate()
        server.communicate(timeout=30)
