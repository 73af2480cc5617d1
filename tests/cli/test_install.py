"""`hvdloss install` on machines that lack something: it says so, and changes nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from hvdloss.cli.errors import Exit, InstallError
from hvdloss.cli.install import pip as pip_module
from hvdloss.cli.install import probe as probe_module
from hvdloss.cli.install.cache import Cache
from hvdloss.cli.install.plan import make_plan
from hvdloss.cli.install.probe import Cuda, Framework, Mpi, Nccl, Probe, Tool, require_python, require_tools
from hvdloss.cli.install.prove import check, jobs
from hvdloss.cli.process import Log
from tests.cli.conftest import ROOT, run_cli

pytest.importorskip("torch")


def refused(result: subprocess.CompletedProcess[str], status: Exit, *words: str) -> None:
    """The command ended with `status`, said `words`, and left no traceback."""
    assert result.returncode == status, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


def test_a_dry_run_says_what_it_found_and_touches_nothing(tmp_path):
    result = run_cli("install", "--dry-run", "--frameworks", "torch", "--cache-dir", str(tmp_path / "c"))
    assert result.returncode == 0, result.stderr
    for word in ("torch", "C++ compiler", "CMake", "MPI", "Gloo", "not cached"):
        assert word in result.stdout
    assert not (tmp_path / "c").exists()


def test_a_dry_run_as_json(tmp_path):
    result = run_cli(
        *("install", "--dry-run", "--frameworks", "torch", "--no-mpi", "--json"),
        *("--cache-dir", str(tmp_path / "c")),
    )
    answer = json.loads(result.stdout)
    assert answer["ok"] is True
    assert answer["cached"] is False
    assert list(answer["facts"]["frameworks"]) == ["torch"]
    assert answer["facts"]["mpi"] is None


def test_no_compiler(tmp_path, path_without):
    path = path_without("c++*", "g++*", "gcc*", "clang*", "cc", "x86_64*", "CC")
    result = run_cli(
        "install", "--frameworks", "torch", "--cache-dir", str(tmp_path / "c"), env={"PATH": path}
    )
    refused(result, Exit.MISSING, "No C++ compiler", "apt-get install g++ make")
    assert not (tmp_path / "c").exists()


def test_no_make(tmp_path, path_without):
    path = path_without("make", "gmake")
    result = run_cli(
        "install", "--frameworks", "torch", "--cache-dir", str(tmp_path / "c"), env={"PATH": path}
    )
    refused(result, Exit.MISSING, "No make was found")


def test_mpi_asked_for_but_not_there(tmp_path, path_without):
    path = path_without("mpi*", "orterun")
    arguments = ["install", "--frameworks", "torch", "--cache-dir", str(tmp_path / "c"), "--dry-run"]
    refused(
        run_cli(*arguments, "--mpi", env={"PATH": path}), Exit.MISSING, "no mpirun and no mpicxx", "apt-get"
    )
    plain = run_cli(*arguments, "--json", env={"PATH": path})
    assert json.loads(plain.stdout)["facts"]["mpi"] is None


def test_no_cmake_means_a_private_one(tmp_path, path_without):
    path = path_without("cmake")
    arguments = ["install", "--frameworks", "torch", "--cache-dir", str(tmp_path / "c"), "--dry-run"]
    result = run_cli(*arguments, env={"PATH": path})
    assert result.returncode == 0
    assert "a private copy from PyPI" in result.stdout


def test_the_wrong_source_file(tmp_path):
    source = tmp_path / "horovod-0.28.1.tar.gz"
    source.write_bytes(b"not Horovod")
    arguments = [
        "install",
        "--source",
        str(source),
        "--cache-dir",
        str(tmp_path / "c"),
        "--frameworks",
        "torch",
    ]
    refused(run_cli(*arguments), Exit.SOURCE, "not the pinned one", "SHA-256")
    assert not (tmp_path / "c").exists()


ALONE = {"PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PIP_RETRIES": "0"}


def test_no_network(tmp_path):
    # Nothing listens on the discard port: a connection is refused, as without a network.
    env = {**ALONE, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "no_proxy": "*"}
    arguments = ["install", "--frameworks", "torch", "--cache-dir", str(tmp_path / "c")]
    result = run_cli(*arguments, env=env)
    # Without the build's own setuptools that is what is missed first, and no --source would help.
    hints = ["--source"] if pip_module.satisfied("setuptools>=70.1,<80") else []
    refused(result, Exit.SOURCE, "the package index cannot be reached", *hints)
    assert len(result.stderr.splitlines()) < 8
    assert list((tmp_path / "c" / "wheels").iterdir()) == []


def test_an_index_that_sends_something_else(tmp_path, fake_sdist):
    source = fake_sdist()
    env = {**ALONE, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(source.parent)}
    if not pip_module.satisfied("setuptools>=70.1,<80"):
        pytest.skip("this environment's setuptools is too new, and the stand-in index has none")
    arguments = ["install", "--frameworks", "torch", "--cache-dir", str(tmp_path / "c")]
    result = run_cli(*arguments, env=env)
    refused(result, Exit.SOURCE, "not the pinned one")
    assert not (tmp_path / "c" / "source" / source.name).exists()


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """A virtual environment with neither pip nor a framework, and what the command line imports."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    for name in (
        "click",
        "rich",
        "packaging",
        "unidiff",
        "numpy",
        "pygments",
        "markdown_it",
        "mdurl",
        "numpy.libs",
    ):
        spec = importlib.util.find_spec(name.partition(".")[0])
        assert spec is not None
        assert spec.origin is not None
        place = Path(spec.origin).parent
        place = place.parent / name
        if place.exists():
            (borrowed / name).symlink_to(place)
    return folder / "venv" / "bin" / "python", f"{borrowed}{os.pathsep}{ROOT}"


def run_bare(bare_python, *arguments: str) -> subprocess.CompletedProcess[str]:
    python, path = bare_python
    return subprocess.run(
        [str(python), "-m", "hvdloss.cli", *arguments],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        cwd=python.parent,
    )


def test_no_framework(bare_python, tmp_path):
    result = run_bare(bare_python, "install", "--cache-dir", str(tmp_path / "c"))
    refused(result, Exit.MISSING, "Neither PyTorch nor TensorFlow", "pip install torch")
    assert not (tmp_path / "c").exists()


def test_a_framework_asked_for_that_is_not_there(bare_python):
    result = run_bare(bare_python, "install", "--frameworks", "tensorflow")
    assert result.returncode == Exit.MISSING


def test_doctor_without_anything(bare_python):
    result = run_bare(bare_python, "doctor", "--json")
    report = json.loads(result.stdout)
    assert result.returncode == Exit.NOT_READY
    assert report["ok"] is False
    troubles = {f["name"]: f["way_out"] for f in report["findings"] if f["level"] == "problem"}
    assert "pip install torch" in troubles["framework"]
    assert "hvdloss install" in troubles["Horovod"]


# What cannot be had on one machine is played to the functions that look.


def test_no_python_headers(monkeypatch, tmp_path):
    real = sysconfig.get_path
    monkeypatch.setattr(
        probe_module.sysconfig, "get_path", lambda n: str(tmp_path) if n == "include" else real(n)
    )
    found = Probe(python="p", platform="l", cores=1, frameworks={"torch": Framework("torch", "2", True)})
    found.compiler, found.make = probe_module._compiler(found), "/usr/bin/make"
    with pytest.raises(InstallError, match="headers are missing") as caught:
        require_tools(found)
    assert "-dev" in caught.value.way_out


def test_an_old_compiler(monkeypatch, tmp_path):
    old = tmp_path / "g++"
    old.write_text("#!/bin/sh\n[ $1 = -dumpfullversion ] && echo 8.5.0 || echo 'g++ (GCC) 8.5.0'\n")
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    found = Probe(python="p", platform="l", cores=1)
    assert probe_module._compiler(found) is None
    assert "too old" in found.trouble["compiler"]


@pytest.mark.parametrize(
    ("module", "name", "value", "words"),
    [
        (platform, "python_implementation", "PyPy", "CPython"),
        (platform, "system", "Windows", "WSL 2"),
        (platform, "system", "Darwin", "container"),
        (platform, "machine", "riscv64", "x86_64 or aarch64"),
    ],
)
def test_pythons_and_platforms_without_a_recipe(monkeypatch, module, name, value, words):
    monkeypatch.setattr(module, name, lambda: value)
    with pytest.raises(InstallError, match=words):
        require_python()


def test_the_systems_own_python_is_left_alone(monkeypatch, tmp_path):
    (tmp_path / "EXTERNALLY-MANAGED").write_text("")
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.delenv("PIP_BREAK_SYSTEM_PACKAGES", raising=False)
    monkeypatch.setattr(probe_module.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InstallError, match="belongs to the system"):
        require_python()


def test_a_framework_that_does_not_import(tmp_path, monkeypatch):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise ImportError('libfoo.so.1: no such file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    found = probe_module.look(["tensorflow"])
    assert "libfoo.so.1" in found.trouble["tensorflow"]
    found.frameworks = {}
    with pytest.raises(InstallError) as caught:
        require_tools(found)
    assert "libfoo.so.1" in caught.value.detail


def gpu_probe(**changes: object) -> Probe:
    found = Probe(python="p", platform="l", cores=2, compiler=Tool("c++", "gcc 12"), make="make")
    found.frameworks = {
        "torch": Framework("torch", "2.13.0+cu130", True, "13.0", None, ("90",)),
        "tensorflow": Framework("tensorflow", "2.21.0", True),
    }
    found.cuda, found.nccl = Cuda("/cuda", "13.0"), Nccl("/nccl/include", "/nccl/lib/libnccl.so.2", "2", "x")
    found.mpi = Mpi("mpicxx", "mpirun", "Open MPI 4")
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def test_nccl_builds_torch_alone_and_says_so():
    plan = make_plan(gpu_probe(), nccl=True)
    assert plan.framework_names == ("torch",)
    assert any("tensorflow is left out" in note for note in plan.notes)
    assert plan.operations == {"gloo": True, "mpi": True, "nccl": True}


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"cuda": None}, {}, "CUDA toolkit"),
        ({"nccl": None}, {}, "needs NCCL"),
        ({"cuda": Cuda("/cuda", "12.4")}, {}, "toolkit at /cuda is 12.4"),
        ({"frameworks": {"torch": Framework("torch", "2.13.0+cpu", True)}}, {}, "CPU build"),
        ({"frameworks": {"tensorflow": Framework("tensorflow", "2", True)}}, {}, "needs PyTorch"),
        ({}, {"frameworks": ["torch", "tensorflow"]}, "no recipe"),
    ],
)
def test_nccl_without_what_it_needs(changes, options, words):
    with pytest.raises(InstallError, match=words) as caught:
        make_plan(gpu_probe(**changes), nccl=True, **options)
    assert caught.value.way_out


def test_neither_controller_is_refused():
    with pytest.raises(InstallError, match="Neither Gloo nor MPI"):
        make_plan(gpu_probe(), gloo=False, mpi=False)


def test_rocm_is_refused():
    torch = Framework("torch", "2.13.0+rocm6", True, None, "6.0")
    with pytest.raises(InstallError, match="ROCm"):
        make_plan(gpu_probe(frameworks={"torch": torch}))


def test_jobs_follow_cores_and_memory(monkeypatch):
    from hvdloss.cli import machine
    from hvdloss.cli.install.plan import default_jobs

    monkeypatch.setattr(machine, "available_memory", lambda: 4 * 10**9)
    assert default_jobs(16) == 2
    assert default_jobs(1) == 1
    monkeypatch.setattr(machine, "available_memory", lambda: 10**8)
    assert default_jobs(16) == 1
    monkeypatch.setattr(machine, "available_memory", lambda: None)
    assert default_jobs(16) == 16


def test_an_environment_without_pip_uses_the_one_python_brings(monkeypatch):
    monkeypatch.setattr(pip_module.importlib.util, "find_spec", lambda name: None)
    bundled = Path(sysconfig.get_path("stdlib")) / "ensurepip" / "_bundled"
    if not list(bundled.glob("pip-*.whl")) and not list(Path("/usr/share/python-wheels").glob("pip-*.whl")):
        with pytest.raises(InstallError, match="has no pip"):
            pip_module.pip_command()
        return
    command, env = pip_module.pip_command()
    done = subprocess.run(
        [*command, "--version"], env={**os.environ, **env}, capture_output=True, check=False
    )
    assert done.returncode == 0


def test_tools_that_cannot_be_fetched_leave_no_half_folder(tmp_path, monkeypatch):
    for name, value in {**ALONE, "PIP_NO_INDEX": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pip_module, "satisfied", lambda requirement: False)
    cache = Cache(tmp_path / "c")
    cache.create()
    log = Log(tmp_path / "log")
    with pytest.raises(InstallError, match="could not be fetched") as caught:
        pip_module.provide_tools(cache, log, cmake=True)
    log.close()
    assert caught.value.status == Exit.SOURCE
    assert list(cache.tools.iterdir()) == []


# The proof.


def test_the_fewest_jobs_use_everything_once():
    both, two = ("torch", "tensorflow"), ("gloo", "mpi")
    assert jobs(both, two, every=False) == [("torch", "gloo"), ("tensorflow", "mpi")]
    assert jobs(both, ("gloo",), every=False) == [("torch", "gloo"), ("tensorflow", "gloo")]
    assert jobs(("torch",), two, every=False) == [("torch", "gloo"), ("torch", "mpi")]
    assert len(jobs(both, two, every=True)) == 4


def results(**changes: object) -> list[dict[str, object]]:
    good = [
        {"rank": r, "size": 2, "gloo": True, "sums": {"float32": [3.0] * 5}, "average": [0.375] * 5}
        for r in range(2)
    ]
    good[1].update(changes)
    return good


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 1}, "saw 1 ranks"),
        ({"rank": 0}, "2 of 2 ranks wrote"),
        ({"gloo": False}, "did not use gloo"),
        ({"sums": {"float32": [2.0] * 5}}, "rank 1: the sum in float32"),
        ({"average": [1.0] * 5}, "the average"),
    ],
)
def test_wrong_results_are_seen(changes, words):
    assert check(results(), 2, "gloo") == ""
    assert words in check(results(**changes), 2, "gloo")


def test_a_missing_rank_is_seen():
    assert "1 of 2 ranks" in check(results()[:1], 2, "gloo")
