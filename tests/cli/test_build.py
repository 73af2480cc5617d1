"""What a failed, interrupted or successful build leaves and says."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from rich.console import Console

from hvdloss.cli.errors import Exit, InstallError, Interrupted
from hvdloss.cli.install import build, recipe
from hvdloss.cli.install.build import build_wheel, first_errors
from hvdloss.cli.install.cache import Cache, sha256_of
from hvdloss.cli.install.plan import make_plan
from hvdloss.cli.install.probe import Framework, Mpi, Probe, Tool
from hvdloss.cli.install.progress import Reporter
from hvdloss.cli.process import Log, interruptible, uninterrupted
from tests.cli.conftest import ROOT, command, run_cli

GCC = """\
[ 42%] Building CXX object horovod/torch/CMakeFiles/pytorch.dir/mpi_ops_v2.cc.o
cd /c/build/horovod-0.28.1/build && /usr/bin/c++ -DX -o mpi_ops_v2.cc.o -c x.cc
In file included from /c/build/horovod-0.28.1/horovod/torch/mpi_ops_v2.cc:17:
/venv/include/c10/util/C++17.h:27:2: error: #error You need C++20 to compile PyTorch
   27 | #error You need C++20 to compile PyTorch
      |  ^~~~~
/c/build/horovod-0.28.1/horovod/torch/adapter.cc:9:10: fatal error: thing.h: No such file or directory
/venv/include/a.h:3:1: warning: the error: is not here [-Wall]
compilation terminated.
make[2]: *** [CMakeFiles/pytorch.dir/build.make:76: mpi_ops_v2.cc.o] Error 1
make: *** [Makefile:136: all] Error 2
Traceback (most recent call last):
  File "setup.py", line 129, in build_extensions
subprocess.CalledProcessError: Command '['cmake']' returned non-zero exit status 2.
"""


def test_the_first_real_compiler_errors_are_found():
    assert first_errors(GCC.splitlines()) == [
        "/venv/include/c10/util/C++17.h:27: #error You need C++20 to compile PyTorch",
        "horovod/torch/adapter.cc:9: thing.h: No such file or directory",
    ]


def test_repeated_errors_are_told_once_and_three_at_most():
    lines = [f"a.cc:{n // 2}:1: error: no" for n in range(500)]
    assert first_errors(lines) == ["a.cc:0: no", "a.cc:1: no", "a.cc:2: no"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "CMake Error at CMakeLists.txt:164 (find_package):\n\n  No MPI was found.\n",
            "CMakeLists.txt:164: No MPI was found.",
        ),
        ("CMake Error: Cannot find source\nCMake Error: x\n  y", "CMake: CMake Error: x"),
        ("k.cu(12): error: identifier is undefined\n", "k.cu:12: identifier is undefined"),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_50'", "nvcc fatal"),
        ("a.o: in function `f':\nx.cc:(.text+0x5): undefined reference to `g()'", "undefined reference"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "Killed signal"),
        ("ModuleNotFoundError: No module named 'setuptools'", "ModuleNotFoundError"),
    ],
)
def test_errors_of_other_tools(text, told):
    assert told in first_errors(text.splitlines())[0]


def test_nothing_to_tell_is_no_error():
    assert first_errors(["all is well", "a.cc:1:2: warning: w"]) == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("x.s: fatal error: error writing to x.o: No space left on device", "disk filled up"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "out of memory"),
        ("/usr/bin/ld: cannot find -lmpi", "linker failed"),
        ("a.cc:1:1: error: no", "did not compile"),
    ],
)
def test_the_cause_is_named_and_the_way_out_given(tmp_path, line, problem):
    log = Log(tmp_path / "log")
    log.write(line)
    log.close()
    error = build._failed(log)
    assert problem in error.problem
    assert error.way_out
    assert error.log == str(tmp_path / "log")
    assert len(error.detail.splitlines()) <= 3


def a_probe() -> Probe:
    return Probe(
        python="CPython",
        platform="Linux",
        cores=1,
        frameworks={"torch": Framework("torch", "2.13.0", True)},
        compiler=Tool("/usr/bin/c++", "gcc 12"),
        mpi=Mpi("mpicxx", "mpirun", "Open MPI 4"),
    )


@pytest.fixture
def taking_stand_ins(monkeypatch):
    """Build stand-in sources: no patches."""
    monkeypatch.setattr(recipe, "PATCHES", ())


@pytest.fixture
def parts(tmp_path):
    cache = Cache(tmp_path / "cache")
    cache.create()
    log = Log(tmp_path / "log")
    yield cache, log, Reporter(Console(file=open(os.devnull, "w")))  # noqa: SIM115
    log.close()


def test_a_wheel_is_built_stored_with_its_hash_and_found_again(parts, fake_sdist, taking_stand_ins):
    cache, log, reporter = parts
    probe = a_probe()
    plan = make_plan(probe)
    wheel = build_wheel(plan, probe, cache, fake_sdist(), None, log, reporter)
    assert wheel.sha256 == sha256_of(wheel.path)
    again, damage = cache.find(plan.key)
    assert again is not None
    assert again.path == wheel.path
    assert damage == ""
    assert list(cache.build.iterdir()) == []
    assert set(reporter.seconds) == {"configure", "compile"}  # "wheel" is still the current one


def test_what_the_build_reads_is_set_and_nothing_is_inherited(
    parts, fake_sdist, taking_stand_ins, monkeypatch
):
    cache, log, reporter = parts
    monkeypatch.setenv("HOROVOD_GPU_OPERATIONS", "MPI")
    source = fake_sdist(
        "assert not os.environ.get('HOROVOD_GPU_OPERATIONS'), 'inherited'\n"
        "assert os.environ['HOROVOD_WITHOUT_TENSORFLOW'] == '1'\n"
        "assert os.environ['HOROVOD_WITH_PYTORCH'] == os.environ['HOROVOD_WITH_GLOO'] == '1'\n"
        "assert os.environ['HOROVOD_WITHOUT_MPI'] == os.environ['HOROVOD_WITHOUT_CUDA'] == '1'\n"
        "assert os.environ['MAKEFLAGS'] == '-j3'\n"
    )
    probe = a_probe()
    build_wheel(make_plan(probe, mpi=False, jobs=3), probe, cache, source, None, log, reporter)


def test_a_compile_error_is_told_in_a_few_lines_and_leaves_nothing(parts, fake_sdist, taking_stand_ins):
    cache, log, reporter = parts
    noise = "for n in range(500): print('note: nothing', n)\n"
    source = fake_sdist(noise + "print('a.cc:7:3: error: no such thing')\n" + noise + "sys.exit(1)")
    probe = a_probe()
    plan = make_plan(probe)
    with pytest.raises(InstallError) as caught:
        build_wheel(plan, probe, cache, source, None, log, reporter)
    assert caught.value.status == Exit.BUILD
    assert caught.value.detail == "a.cc:7: no such thing"
    assert caught.value.log == str(log.path)
    assert cache.find(plan.key) == (None, "")
    assert list(cache.build.iterdir()) == []


def gone(pid: int) -> bool:
    """Whether a process has ended (one that nobody has waited for yet has ended, too)."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.05)
    return False


def test_a_program_cut_off_in_time_takes_its_children_along(tmp_path):
    log = Log(tmp_path / "log")
    # Of a second, so that a busy machine has time to start it; without the limit it would take a day.
    ended = log.run(["sh", "-c", "sleep 86400 & echo $!; wait"], timeout=1.0)
    assert ended.timed_out
    assert gone(int(ended.tail[0]))


def test_a_signal_waits_for_the_end_of_what_must_not_be_cut(tmp_path):
    """pip swaps one Horovod for another; a Ctrl-C in the middle must not leave neither."""
    done = []

    def swap() -> None:
        with interruptible(), uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            done.append(True)

    with pytest.raises(Interrupted) as caught:
        swap()
    assert done
    assert caught.value.status == 143


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_build_ends_its_compilers_and_keeps_no_wheel(tmp_path, fake_sdist, number):
    marker = tmp_path / "pid"
    source = fake_sdist(f"open({str(marker)!r}, 'w').write(str(os.getpid()))\ntime.sleep(300)\nsys.exit(1)")
    cache = tmp_path / "cache"
    arguments = ["install", "--source", str(source), "--cache-dir", str(cache), "--frameworks", "torch"]
    process = subprocess.Popen(
        command(*arguments, source_hash=sha256_of(source)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (marker.exists() and marker.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "[" in output  # it had said what it was doing
    assert "Stopped by" in errors
    assert "Traceback" not in errors
    assert gone(int(marker.read_text()))
    assert list((cache / "wheels").iterdir()) == []
    assert list((cache / "build").iterdir()) == []


def test_a_build_killed_outright_leaves_nothing_that_is_taken_for_a_wheel(
    tmp_path, parts, fake_sdist, taking_stand_ins
):
    """What SIGKILL leaves is swept away by the next build, and never found as a wheel."""
    cache, log, reporter = parts
    left = cache.build / "horovod-99999" / "wheels"
    left.mkdir(parents=True)
    (left / "horovod-0.28.1-cp311-cp311-linux_x86_64.whl").write_text("half a wheel")
    probe = a_probe()
    plan = make_plan(probe)
    assert cache.find(plan.key) == (None, "")
    build_wheel(plan, probe, cache, fake_sdist(), None, log, reporter)
    assert list(cache.build.iterdir()) == []


def test_a_compile_error_on_the_command_line(tmp_path, fake_sdist):
    source = fake_sdist("print('src/a.cc:7:3: error: no such thing')\nsys.exit(1)")
    result = run_cli(
        "install",
        *("--source", str(source), "--cache-dir", str(tmp_path / "c"), "--frameworks", "torch"),
        source_hash=sha256_of(source),
    )
    assert result.returncode == Exit.BUILD, result.stderr
    assert "src/a.cc:7: no such thing" in result.stderr
    assert len(result.stderr.splitlines()) < 10
    log = Path(result.stderr.split("full log: ")[1].strip())
    assert "src/a.cc:7:3: error" in log.read_text()
