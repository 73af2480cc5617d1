"""`make package`: builds wheel and sdist into dist/, looks into both, tries the wheel in clean environments.

    python scripts/package.py
    python scripts/package.py --python /opt/python3.12/bin/python

The sdist is built from what git knows, the wheel from the sdist, so that each proves the one before. Then:
`twine check`; the files in both against those in the tree; CITATION.cff by cffconvert; and for Python 3.10,
3.11 and 3.12, as far as they are found, a fresh environment without any framework in which the core is
imported, all code compiled and the command line used. With this interpreter's PyTorch (if it has one) a step
is trained as well. The tools (build, twine, cffconvert) get an environment of their own, build/package. Exit
status: 0 all well, 1 not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "build" / "package"
DIST = ROOT / "dist"
WANTED = ["build>=1.2", "twine>=6", "cffconvert>=2"]
PYTHONS = ("3.10", "3.11", "3.12")
PACKAGES = {"hvdloss": "hvdloss", "adapters": "hvdloss", "benchmarks": "hvdloss/benchmarks"}  # folder: place
GRAFTED = ("docs/", "examples/", "scripts/", "tests/")

# Run in a clean environment. It has no framework, and is not in the tree.
SMOKE = """
import importlib, json, pathlib, sys
import hvdloss, hvdloss.losses, hvdloss.data, hvdloss.terms, hvdloss.terms.policies, hvdloss.metrics
import hvdloss.train, hvdloss.explain, hvdloss.simulation.model
home = pathlib.Path(hvdloss.__file__).parent
assert sys.prefix in str(home), home
assert (home / "py.typed").exists()
for name in hvdloss.__all__:
    getattr(hvdloss, name)
frameworks = {"torch", "tensorflow", "keras", "horovod"} & set(sys.modules)
assert not frameworks, frameworks
try:
    import hvdloss.torch
except ModuleNotFoundError as missing:
    assert missing.name == "torch", missing
else:
    raise AssertionError("hvdloss.torch was imported without torch")
print(json.dumps({"version": hvdloss.__version__, "python": sys.version.split()[0]}))
"""

TRAIN = """
import pathlib, sys
import torch
import hvdloss.torch as hvd
assert sys.prefix in hvd.__file__, hvd.__file__
hvd.init()
model = torch.nn.Linear(3, 1).double()
objective = hvd.Objective("mse")
sgd = torch.optim.SGD(model.parameters(), lr=1.0)
optimizer = hvd.DistributedOptimizer(sgd, model.named_parameters(), objective)
x, y, w = torch.randn(8, 3).double(), torch.randn(8, 1).double(), torch.rand(8, 1).double()
before = model.weight.detach().clone()
((w * (model(x) - y) ** 2).sum() / w.sum()).backward()
right = model.weight.grad.clone()
optimizer.zero_grad()
objective(model(x), y, w).backward()
optimizer.step()
torch.testing.assert_close(before - model.weight.detach(), right, rtol=1e-12, atol=1e-14)
print("trained")
"""


class Wrong(Exception):
    """Something about the package is not as it should be."""


def say(text: str) -> None:
    """Print a line at once: what follows may take minutes."""
    print(f"package: {text}", flush=True)


def run(command: Sequence[str | Path], *, cwd: Path = ROOT, status: int = 0, **environment: str) -> str:
    """Run a command, check its status, and return what it printed."""
    # A tree on PYTHONPATH, or the user's own packages, would be taken for what was installed.
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**inherited, "PYTHONNOUSERSITE": "1", **environment},
        check=False,
    )
    if done.returncode != status:
        shown = " ".join(str(part) for part in command)
        raise Wrong(f"`{shown}` ended with {done.returncode}, not {status}:\n{done.stdout[-3000:]}")
    return done.stdout


def known() -> list[str]:
    """Return the files that git knows, or all where this is no clone (an unpacked sdist)."""
    if (ROOT / ".git").exists():
        listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"]).splitlines()
    else:
        listed = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]
    return sorted(name for name in listed if (ROOT / name).exists())


def tool(name: str) -> Path:
    """Return a tool, after installing all of them if need be."""
    path = TOOLS / "bin" / name
    if not path.exists():
        say("installing build, twine and cffconvert into build/package")
        venv.create(TOOLS, with_pip=True, clear=True)
        run([TOOLS / "bin" / "python", "-m", "pip", "install", "-q", *WANTED])
    return path


def build() -> tuple[Path, Path]:
    """Build from a copy of the tree without what git ignores; return sdist and wheel."""
    python = tool("python")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        for name in known():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
        shutil.rmtree(DIST, ignore_errors=True)
        say("building sdist and wheel")
        run([python, "-m", "build", "--outdir", DIST, copy])
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    return sdist, wheel


def _sources() -> set[str]:
    """Return where the modules of the tree, and what they read, should lie in the wheel."""
    placed = set()
    for name in known():
        folder, _, rest = name.partition("/")
        if folder in PACKAGES and rest.endswith((".py", "py.typed", ".j2", ".css", ".patch", "/series")):
            placed.add(f"{PACKAGES[folder]}/{rest}")
    return placed


def check_contents(sdist: Path, wheel: Path) -> None:
    """Compare what is in both files with what is in the tree."""
    with zipfile.ZipFile(wheel) as file:
        names = {n for n in file.namelist() if ".dist-info/" not in n}
        licences = [n for n in file.namelist() if n.endswith("licenses/LICENSE")]
    if names != (wanted := _sources()):
        raise Wrong(f"the wheel lacks {sorted(wanted - names)} and has too much {sorted(names - wanted)}")
    if not licences:
        raise Wrong("the wheel has no licence")
    with tarfile.open(sdist) as archive:
        held = {n.partition("/")[2] for n in archive.getnames()}
    needed = {n for n in known() if n.startswith(GRAFTED) or n.split("/")[0] in PACKAGES}
    needed |= {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "constraints.txt", "pyproject.toml"}
    if missing := needed - held:
        raise Wrong(f"the sdist lacks {sorted(missing)}")
    ours = set(known())
    made = {n for n in held if n and n not in ours and not any(k.startswith(n + "/") for k in ours)}
    strange = {n for n in made if not n.startswith("hvdloss.egg-info") and n not in ("PKG-INFO", "setup.cfg")}
    if strange:
        raise Wrong(f"the sdist has what git does not know: {sorted(strange)}")
    say(f"wheel: {len(names)} files, {wheel.stat().st_size / 1024:.0f} KiB; "
        f"sdist: {len(held)} names, {sdist.stat().st_size / 1024:.0f} KiB")  # fmt: skip


def interpreters(named: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Find Pythons: those named, else each of PYTHONS on PATH or among pyenv's."""
    if named:
        for one in named:
            text = run([one, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"])
            yield text.strip(), Path(one)
        return
    for version in PYTHONS:
        places = [shutil.which(f"python{version}"), sys.executable]
        root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
        places += [str(p / "bin" / "python") for p in sorted(root.glob(f"{version}.*"))]
        for place in filter(None, places):
            asked = subprocess.run(  # pyenv's shims exist for versions that do not
                [place, "-c", "import sys, ensurepip; print('%d.%d' % sys.version_info[:2])"],
                capture_output=True,
                text=True,
                check=False,
            )
            if asked.stdout.strip() == version:
                yield version, Path(place)
                break
        else:
            say(f"Python {version} was not found; NOT TRIED (name one with --python)")


def smoke(wheel: Path, python: Path) -> dict[str, str]:
    """Install the wheel alone, import, compile, and use the command line."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        run([python, "-m", "venv", place / "venv"])
        mine = place / "venv" / "bin"
        run([mine / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", wheel])
        said = json.loads(run([mine / "python", "-c", SMOKE], cwd=place))
        (home,) = (place / "venv" / "lib").glob("python*/site-packages/hvdloss")
        run([mine / "python", "-W", "error", "-m", "compileall", "-q", "-f", home])
        run([mine / "python", "-m", "pip", "check"])
        if said["version"] not in run([mine / "hvdloss", "--version"], cwd=place):
            raise Wrong("`hvdloss --version` says another version")
        listed = run([mine / "hvdloss", "--help"], cwd=place).partition("Commands:")[2].splitlines()
        commands = [line.split()[0] for line in listed if line[:2] == "  " and line[2:3].strip()]
        if not {"install", "doctor"} <= {*commands}:
            raise Wrong(f"`hvdloss --help` lists {commands}")
        for command in commands:
            run([mine / "hvdloss", command, "--help"], cwd=place)
        run([mine / "hvdloss", "simulate", "-np", "4", "--seconds-per-sample", "10ms", "--parameters", "25M",
             "--bandwidth", "10Gbit"], cwd=place)  # fmt: skip
        doctor = run([mine / "hvdloss", "doctor"], cwd=place, status=1)  # nothing to train with
        if "Traceback" in doctor:
            raise Wrong(f"`hvdloss doctor` without frameworks:\n{doctor}")
        return said


def smoke_torch(wheel: Path) -> None:
    """Train a step by the installed wheel, with the PyTorch of this interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        run([sys.executable, "-m", "venv", "--without-pip", place / "venv"])
        (site,) = (place / "venv" / "lib").glob("python*/site-packages")
        with zipfile.ZipFile(wheel) as file:
            file.extractall(site)
        shared = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
        (site / "shared.pth").write_text("".join(f"{p}\n" for p in shared))  # an editable hvdloss is not seen
        run([place / "venv" / "bin" / "python", "-c", TRAIN], cwd=place, HOROVOD_CONTROLLER="gloo",
            HOROVOD_CPU_OPERATIONS="gloo", OMP_NUM_THREADS="1")  # fmt: skip


def check_citation() -> None:
    """Have CITATION.cff read by the tool for it."""
    run([tool("cffconvert"), "--validate", "-i", ROOT / "CITATION.cff"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Do all of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", action="append", default=[], help="an interpreter to try the wheel with")
    args = parser.parse_args(arguments)
    try:
        sdist, wheel = build()
        run([tool("twine"), "check", "--strict", sdist, wheel])
        check_contents(sdist, wheel)
        check_citation()
        for version, python in interpreters(args.python):
            said = smoke(wheel, python)
            say(f"Python {version} ({said['python']}): hvdloss {said['version']} without frameworks is well")
        try:
            import torch  # noqa: F401
        except ImportError:
            say("PyTorch is not here; the adapter was NOT TRIED")
        else:
            smoke_torch(wheel)
            say("a step was trained with the wheel and this interpreter's PyTorch")
    except Wrong as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    say(f"{sdist.relative_to(ROOT)} and {wheel.relative_to(ROOT)} are well")
    return 0


if __name__ == "__main__":
    sys.exit(main())
