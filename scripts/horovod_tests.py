"""Run Horovod's own tests on real ranks, with Horovod and with hvdloss in its place, and compare them.

    python scripts/horovod_tests.py FOLDER [FILE ...] [-np 2] [--out runs/horovod-tests] [--only hvdloss]

FOLDER holds the source of Horovod's release from its repository (``git clone --branch v0.28.1``; the package
on PyPI has no tests); nothing is fetched. Every FILE of its ``test/parallel`` is copied, with its imports of
Horovod's modules changed into ours for the second run, and each test that all ranks pass with Horovod must
pass with hvdloss: those that do not are listed, and make the exit status 1. A test that ends a launch, or in
which ranks hang, counts as failed, and the launch begins again after it.

Keras's tests need the package parameterized.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import unittest.mock
from pathlib import Path

FILES = (
    "test_torch.py",
    "test_tensorflow.py",
    "test_tensorflow_process_sets.py",
    "test_tensorflow2_keras.py",
    "test_tensorflow2_keras_process_sets.py",
    "test_process_sets_static.py",
    "test_adasum_pytorch.py",
    "test_adasum_tensorflow.py",
    "test_common.py",
)
#: Modules that scripts import, and what stands in for them.
OURS = {
    "horovod.torch": "hvdloss.torch",
    "horovod.tensorflow.keras": "hvdloss.keras",
    "horovod.keras": "hvdloss.keras",
    "horovod.tensorflow": "hvdloss.tensorflow",
}
TEST_SECONDS = 120
LAUNCHES = 40
NOT_RUN = "not run"


def replaced(source: str) -> str:
    """Return a program with ``import horovod.torch as hvd`` and the like changed into ours."""
    for theirs, ours in OURS.items():
        source = re.sub(rf"^(\s*)import {re.escape(theirs)} as ", rf"\1import {ours} as ", source, flags=re.M)
    return source


# -- inside a rank ------------------------------------------------------------------------------------


def _name(nodeid: str) -> str:
    """Return a test's name with its class, by which it is known in both copies of a file."""
    return nodeid.split("::", 1)[-1]


class _Recorder:
    """A plugin of pytest that writes what becomes of each test, as it does."""

    def __init__(self, out: Path, done: set[str]) -> None:
        self.out, self.done = out, done

    def pytest_collection_modifyitems(self, items: list) -> None:
        items[:] = [item for item in items if _name(item.nodeid) not in self.done]

    def _write(self, name: str, outcome: str, text: str = "") -> None:
        with self.out.open("a") as opened:
            opened.write(json.dumps([name, outcome, text[-1500:]]) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(_name(nodeid), "begun")

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._write(_name(report.nodeid), report.outcome, report.longreprtext)


def rank(file: Path, out: Path) -> int:
    """Run a file's tests that are not done yet, on this rank."""
    import pytest

    sys.modules["mock"] = unittest.mock  # which that package became
    number = os.environ.get("HOROVOD_RANK") or os.environ["OMPI_COMM_WORLD_RANK"]
    done, chosen = json.loads((out / "todo.json").read_text())
    recorder = _Recorder(out / f"{number}.jsonl", set(done))
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "--rootdir", str(file.parent.parent)]
    options += ["-c", os.devnull, "-k", chosen, "--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]
    return int(pytest.main([*options, str(file)], plugins=[recorder]))


# -- outside ------------------------------------------------------------------------------------------


def copied(source: Path, target: Path, ours: bool) -> Path:
    """Copy Horovod's tests, for hvdloss if `ours`; return where the parallel ones are."""
    for file in (source / "test").rglob("*.py"):
        text = file.read_text()
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(replaced(text) if ours and "parallel" in file.parts else text)
    return target / "test" / "parallel"


def read(out: Path, np: int) -> list[list[tuple[str, str, str]]]:
    """Return what each rank wrote."""
    ranks = []
    for number in range(np):
        file = out / f"{number}.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        ranks.append([tuple(json.loads(line)) for line in lines])
    return ranks


def launch(file: Path, out: Path, done: set[str], args: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """Start ranks once; return the outcome of each test that began: that of the worst rank."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.jsonl"):
        old.unlink()
    (out / "todo.json").write_text(json.dumps([sorted(done), args.k]))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"), "1")
    env = {**os.environ, **threads, "TF_CPP_MIN_LOG_LEVEL": "2", "HOROVOD_DYNAMIC_PROCESS_SETS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(file.parent.parent / "utils"), str(file.parent)])
    launcher = [str(Path(sys.executable).parent / "horovodrun"), "--mpi" if args.mpi else "--gloo"]
    launcher += ["-np", str(args.np), "--start-timeout", "180"]
    command = [*launcher, sys.executable, __file__, "--rank", str(file), str(out)]
    with (out / "output.txt").open("ab") as sink:
        subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, check=False)
    outcomes: dict[str, tuple[str, str]] = {}
    ranks = read(out, args.np)
    for name in dict.fromkeys(name for lines in ranks for name, _, _ in lines):
        ends = [[(what, text) for n, what, text in lines if n == name and what != "begun"] for lines in ranks]
        if not all(ends):
            outcomes[name] = ("failed", "a rank ended, or hung, in it")
            continue
        worst = [one for end in ends for one in end if one[0] == "failed"]
        outcomes[name] = worst[0] if worst else ends[0][-1]
    return outcomes


def run(file: Path, out: Path, args: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """Run a file's tests, in as many launches as it takes."""
    outcomes: dict[str, tuple[str, str]] = {}
    for _ in range(LAUNCHES):
        new = launch(file, out, set(outcomes), args)
        outcomes |= new
        if not any(text == "a rank ended, or hung, in it" for _, text in new.values()):
            break
    return outcomes


def main() -> int:
    """Compare."""
    if sys.argv[1:2] == ["--rank"]:
        file, out = Path(sys.argv[2]), Path(sys.argv[3])
        return rank(file, out)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="Horovod's source, from its repository")
    parser.add_argument("files", nargs="*", default=FILES, help="of its test/parallel")
    parser.add_argument("-np", type=int, default=2, help="ranks")
    parser.add_argument("--mpi", action="store_true", help="launch over MPI, not Gloo")
    parser.add_argument("-k", default="", help="tests to run, as pytest takes it")
    parser.add_argument("--out", type=Path, default=Path("runs/horovod-tests"))
    parser.add_argument(
        "--only", choices=("horovod", "hvdloss"), help="run that one; compare with what is in --out"
    )
    args = parser.parse_args()
    if not (args.folder / "test" / "parallel").is_dir():
        parser.error(f"{args.folder} has no test/parallel; it must be Horovod's repository, at v0.28.1")
    out = args.out.resolve()
    worse = 0
    for name in args.files:
        found = {}
        for which in ("horovod", "hvdloss"):
            results = out / which / f"{name}.json"
            if args.only in (None, which):
                folder = copied(args.folder.resolve(), out / which / "source", which == "hvdloss")
                got = run(folder / name, out / which / name.removesuffix(".py"), args)
                results.write_text(json.dumps(got, indent=1))
            found[which] = json.loads(results.read_text()) if results.exists() else {}
        counts = {
            which: ", ".join(
                f"{sum(one[0] == what for one in got.values())} {what}"
                for what in ("passed", "failed", "skipped")
            )
            for which, got in found.items()
        }
        print(f"{name}: Horovod {counts['horovod']}; hvdloss {counts['hvdloss']}", flush=True)
        for test, (what, _) in found["horovod"].items():
            got, text = found["hvdloss"].get(test, (NOT_RUN, ""))
            if what == "passed" and got != "passed":
                worse += 1
                print(f"  {test}: {got}: {text.strip().splitlines()[-1] if text.strip() else ''}", flush=True)
    print(f"{worse} tests that pass with Horovod do not with hvdloss")
    return int(worse > 0)


if __name__ == "__main__":
    sys.exit(main())
