"""`hvdloss doctor`: the truth about this environment, and about broken ones."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest
from rich.console import Console

from hvdloss.cli import doctor as doctor_module
from hvdloss.cli import machine
from hvdloss.cli.doctor import Report, examine, show
from hvdloss.cli.errors import Exit
from hvdloss.cli.install import recipe
from tests.cli.conftest import run_cli

pytest.importorskip("torch")
pytest.importorskip("horovod")


def test_this_environment_can_train():
    result = run_cli("doctor", "--json")
    assert result.returncode == Exit.OK, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert report["ok"] is True
    assert report["horovod"]["recipe"] == recipe.RECIPE
    assert report["horovod"]["built"]["gloo"] or report["horovod"]["built"]["mpi"]
    assert report["horovod"]["built_against"]["torch"] == report["frameworks"]["torch"]
    assert report["python"]["executable"] == sys.executable
    assert report["machine"]["cores"] >= 1
    assert report["engines"] == ["horovod", "torch.distributed"]
    assert any(f["name"] == "two ranks" and f["level"] == "ok" for f in report["findings"])


def test_the_table_ends_in_a_verdict():
    result = run_cli("doctor", "--no-run")
    assert result.returncode == Exit.OK
    assert "Training can start." in result.stdout


def test_another_framework_version_than_built_against(monkeypatch):
    monkeypatch.setattr(doctor_module, "_built_against", lambda folder: {"torch": "1.0.0"})
    report = examine()
    assert not report.ok
    finding = next(f for f in report.findings if f.name == "Horovod for torch")
    assert "built against torch 1.0.0" in finding.found
    assert finding.way_out == "hvdloss install"


@pytest.mark.parametrize(("built_by", "level"), [(6, "warning"), ("0" * 12, "warning"), (None, "info")])
def test_horovod_with_other_patches_is_told(built_by, level):
    report = Report()
    doctor_module._patches(report, built_by)
    (finding,) = report.findings
    assert (finding.name, finding.level) == ("patches", level)
    assert finding.way_out == ("hvdloss install" if level == "warning" else "")
    assert report.ok


def test_horovod_that_does_not_load(monkeypatch):
    def broken(script, *names, **options):
        if script == "inquire_horovod.py":
            return machine.Answer(None, "ImportError: undefined symbol: _ZN3c10")
        return machine.Answer({"version": "9.9"})

    monkeypatch.setattr(machine, "inquire", broken)
    report = examine()
    assert not report.ok
    problems = [f for f in report.findings if f.level == "problem"]
    assert problems
    assert all(f.way_out for f in problems)


def test_without_horovod_pytorch_trains_under_torchrun(monkeypatch):
    find_spec = doctor_module.importlib.util.find_spec
    monkeypatch.setattr(
        doctor_module.importlib.util, "find_spec", lambda name: None if name == "horovod" else find_spec(name)
    )
    report = examine()
    assert report.ok
    assert report.facts["engines"] == ["torch.distributed"]
    finding = next(f for f in report.findings if f.name == "Horovod")
    assert finding.level == "warning"
    assert "torchrun" in finding.way_out


def test_mpi_built_but_no_mpirun(monkeypatch):
    real = doctor_module.shutil.which
    monkeypatch.setattr(
        doctor_module.shutil, "which", lambda name, **kw: None if name == "mpirun" else real(name, **kw)
    )
    for built, level in (({"gloo": True}, "warning"), ({"gloo": False}, "problem")):
        report = Report(facts={"horovod": {"version": "0.28.1"}})
        doctor_module._launchers(report, {"mpi": True, "nccl": False, **built})
        finding = next(f for f in report.findings if f.name == "mpirun")
        assert finding.level == level
        assert "openmpi-bin" in finding.way_out


def test_a_horovodrun_of_another_python(monkeypatch, tmp_path):
    script = tmp_path / "horovodrun"
    script.write_text("#!/opt/other/bin/python3\n")
    monkeypatch.setattr(machine, "script_path", lambda name: str(script))
    report = Report(facts={"horovod": {"version": "0.28.1"}})
    doctor_module._launchers(report, {"gloo": True, "mpi": False, "nccl": False})
    finding = next(f for f in report.findings if f.name == "horovodrun")
    assert finding.level == "problem"
    assert "another Python" in finding.found


def test_a_gpu_without_nccl_is_a_warning_with_the_way_out(monkeypatch):
    monkeypatch.setattr(machine, "gpus", lambda: ["Some GPU, 80 GB"])
    report = Report(facts={"horovod": {"version": "0.28.1", "built": {"nccl": False}}})
    doctor_module._hardware(report)
    finding = next(f for f in report.findings if f.name == "NCCL")
    assert (finding.level, "--nccl" in finding.way_out) == ("warning", True)
    assert report.ok


def test_how_long_ranks_would_wait_is_told(monkeypatch):
    def found(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        report = Report(facts={})
        doctor_module._watch(report)
        (finding,) = report.findings
        return report, finding

    report, finding = found()
    assert finding.level == "info"
    assert report.facts["watch"]["stall"] == 0
    assert "600 s" in found(HVDLOSS_WATCH_STALL="600")[1].found
    report, finding = found(HVDLOSS_WATCH_STALL="soon")
    assert not report.ok
    assert "HVDLOSS_WATCH_STALL='soon'" in finding.found
    report, finding = found(HVDLOSS_WATCH="0")
    assert report.facts["watch"] is None
    assert "off" in finding.found


def test_problems_are_printed_with_their_way_out(capsys):
    report = Report()
    report.add("Horovod", "problem", "not installed", "hvdloss install")
    show(report, Console(width=80))
    out = capsys.readouterr().out
    assert "Training cannot start." in out
    assert "way out: hvdloss install" in out


@pytest.mark.parametrize(
    ("text", "flavour"),
    [
        ("mpirun (Open MPI) 4.1.4\n\nReport bugs", "Open MPI 4.1.4"),
        ("mpirun (Open MPI) 5.0.0rc12", "Open MPI 5.0.0"),
        ("HYDRA build details:\n    Version:  4.0.2", "MPICH 4.0.2"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.9", "Intel MPI 2021.9"),
        ("something else 1.0", None),
    ],
)
def test_mpi_flavours(text, flavour):
    assert machine.mpi_flavour(text) == flavour


def test_scripts_stand_alone():
    """They run by path: nothing in them may import hvdloss."""
    for path in Path(machine.SCRIPTS).glob("*.py"):
        assert "import hvdloss" not in path.read_text()


def test_a_host_name_that_does_not_resolve_is_a_problem_with_its_way_out(monkeypatch):
    def fail(*args):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(doctor_module.socket, "getaddrinfo", fail)
    report = Report()
    doctor_module._name(report)
    assert not report.ok
    assert f"127.0.1.1 {socket.gethostname()}" in report.findings[0].way_out


def test_a_home_that_cannot_be_written_is_a_problem_with_its_way_out(monkeypatch, tmp_path):
    for home in (tmp_path, tmp_path / "made" / "by horovodrun"):
        monkeypatch.setenv("HOME", str(home))
        report = Report()
        doctor_module._home(report)
        assert report.findings == []
    monkeypatch.setenv("HOME", "/dev/null")  # not even root can
    doctor_module._home(report)
    assert not report.ok
    assert "/dev/null/.horovod" in report.findings[0].found
    assert "set HOME" in report.findings[0].way_out
