"""What is shipped: metadata, and (with `make test-tools`) the built package in clean places."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hvdloss

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_version_stands_once():
    version = hvdloss.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", version)
    assert "version" in PROJECT["project"]["dynamic"]
    asked = subprocess.run(["git", "grep", "-lF", f'"{version}"', "--", "*.py", "*.toml", "*.cff"], cwd=ROOT,
                           capture_output=True, text=True, check=False)  # fmt: skip
    if asked.returncode == 0:  # in a clone
        assert asked.stdout.split() == ["hvdloss/_version.py"]


def test_changelog_keeps_its_form():
    """https://keepachangelog.com: versions, newest first, and kinds of change that it knows."""
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (.*)$", text, re.M)
    assert versions[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", v) for v in versions[1:])
    kinds = set(re.findall(r"^### (.*)$", text, re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_citation_agrees():
    text = (ROOT / "CITATION.cff").read_text()
    assert "cff-version: 1.2.0" in text
    assert f"license: {PROJECT['project']['license']}" in text
    assert PROJECT["project"]["authors"][0]["name"] in text


def test_every_package_is_listed():
    """A folder with code that setuptools is not told of would be missing in the wheel only."""
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    found = set()
    for folder, name in (
        ("hvdloss", "hvdloss"),
        ("adapters", "hvdloss"),
        ("benchmarks", "hvdloss.benchmarks"),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.parent.relative_to(ROOT / folder).parts
            found.add(".".join([name, *parts]))
    assert listed == found
    assert (ROOT / "hvdloss" / "py.typed").exists()


def test_code_is_of_the_oldest_python():
    """Syntax and imports from the standard library that Python 3.10 has."""
    assert PROJECT["project"]["requires-python"] == ">=3.10"
    assert PROJECT["tool"]["ruff"]["target-version"] == "py310"
    late = (
        r"^\s*(?:import tomllib|from tomllib|from enum import .*StrEnum|from datetime import .*\bUTC\b|"
        r"from typing import .*\b(?:Self|override|Never|assert_never|Unpack)\b)"
    )
    for folder in ("hvdloss", "adapters", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not re.search(late, path.read_text(), re.M), path


@pytest.mark.more
@pytest.mark.timeout(1800)
def test_package_is_built_and_works_in_clean_places():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "package.py"], capture_output=True, text=True, check=False
    )
    if "No matching distribution" in done.stderr or "Failed to establish" in done.stderr:
        pytest.skip("no package index here")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "are well" in done.stdout
    if importlib.util.find_spec("torch"):
        assert "a step was trained" in done.stdout


def test_a_lack_is_found(tmp_path, monkeypatch):
    """The comparison of a built wheel with the tree can fail."""
    import zipfile

    spec = importlib.util.spec_from_file_location("package", ROOT / "scripts" / "package.py")
    package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    names = sorted(package._sources())
    assert {"hvdloss/torch/optimizer.py", "hvdloss/py.typed"} <= set(names)
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for name in names[1:]:
            file.writestr(name, "")
        file.writestr("hvdloss-0.dist-info/licenses/LICENSE", "")
    with pytest.raises(package.Wrong, match=re.escape(names[0])):
        package.check_contents(tmp_path / "none.tar.gz", wheel)
