"""The audit's own reading of advisories, where no service can be reached."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "audit.py"


@pytest.fixture(scope="module")
def audit():
    spec = importlib.util.spec_from_file_location("audit_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["audit_script"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def advisory(folder, package, text):
    path = folder / "vulns" / package / "PYSEC-1.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text)


TEXT = """
id: PYSEC-1
details: runs what it is told
affected:
- package: {name: Some_Package, ecosystem: PyPI}
  ranges:
  - type: GIT
    events: [{introduced: "0"}]
  - type: ECOSYSTEM
    events: [{introduced: "1.2"}, {fixed: "1.10"}, {introduced: "2.0"}, {last_affected: "2.1"}]
  versions: ["0.9"]
aliases: [CVE-1]
modified: "2023-05-04T03:49:48Z"
"""


@pytest.mark.parametrize(
    ("version", "bad"),
    [("0.9", 1), ("1.1", 0), ("1.2", 1), ("1.9.9", 1), ("1.10", 0), ("2.0", 1), ("2.1", 1), ("2.1.1", 0)],
)
def test_versions_are_compared_as_versions(audit, tmp_path, version, bad):
    advisory(tmp_path, "some-package", TEXT)
    found = audit.in_copy(tmp_path, {"some-package": version, "other": "1"})
    assert len(found) == bad
    assert all("PYSEC-1/CVE-1; fixed in 1.10" in str(one) for one in found)
    assert audit.age_of(tmp_path) == "2023-05-04"


def test_what_was_withdrawn_does_not_count(audit, tmp_path):
    advisory(tmp_path, "some-package", TEXT + 'withdrawn: "2024-01-01T00:00:00Z"\n')
    assert audit.in_copy(tmp_path, {"some-package": "1.5"}) == []


def test_without_advisories_it_says_that_nothing_was_looked_at(audit, monkeypatch, capsys):
    monkeypatch.delenv("HVDLOSS_ADVISORIES", raising=False)
    monkeypatch.setattr(audit, "asked", lambda *_: None)
    assert audit.audit() == 0
    assert "NOTHING was looked at" in capsys.readouterr().err


def test_a_mirror_that_knows_nothing_is_no_answer(audit, monkeypatch, capsys):
    monkeypatch.delenv("HVDLOSS_ADVISORIES", raising=False)
    monkeypatch.setattr(audit, "asked", lambda *_: ([], 3))  # of some eighty
    audit.audit()
    assert "NOTHING was looked at" in capsys.readouterr().err


def test_the_tools_are_those_of_the_extra(audit):
    assert [one.partition(">")[0] for one in audit._extra("audit")] == ["pip-audit", "cyclonedx-bom"]


def test_everything_installed_is_looked_at_but_ourselves(audit):
    packages = audit.installed()
    assert {"numpy", "pytest"} <= set(packages)
    assert "hvdloss" not in packages
    assert not any("+" in version for version in packages.values())
