"""Which slow suites CI runs: `scripts/suites.py`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

spec = importlib.util.spec_from_file_location("suites", ROOT / "scripts" / "suites.py")
suites = sys.modules["suites"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(suites)


def run_for(*changed: str) -> set[str]:
    return {suite.name for suite, runs, _ in suites.decide(changed) if runs}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("docs/reference/terms.md", {"pages"}),
        ("CHANGELOG.md", set()),
        ("hvdloss/losses/reduction.py", {"more-torch", "more-tensorflow"}),
        ("adapters/torch/optimizer.py", {"more-torch"}),
        ("adapters/keras/optimizer.py", {"more-tensorflow"}),
        ("tests/parallel/tf_tape.py", {"more-tensorflow"}),
        ("hvdloss/watch/hub.py", {"more-torch", "more-tensorflow", "elastic", "hosts", "reliability"}),
        ("hvdloss/report/page.py", {"integrations"}),
        ("adapters/torch/integrations/lightning.py", {"more-torch", "integrations"}),
        ("Dockerfile", {"docker"}),
        ("tests/hosts/test_hosts.py", {"hosts"}),
    ],
)
def test_a_change_runs_what_is_there_for_it(changed, expected):
    assert run_for(changed) == expected


def test_a_reason_names_what_changed():
    (why,) = [
        why for suite, _, why in suites.decide(["Dockerfile", "compose.yaml"]) if suite.name == "docker"
    ]
    assert why == "Dockerfile and 1 more changed"


def test_without_history_all_run():
    assert all(runs for _, runs, _ in suites.decide(None))


def test_every_pattern_is_of_a_file():
    """Code that has moved is code whose suite would no longer run."""
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no clone")
    files = [name for name in done.stdout.splitlines() if (ROOT / name).exists()]
    for suite in suites.SUITES:
        for pattern in (*suite.paths, *suite.but):
            assert any(fnmatchcase(name, pattern) for name in files), (suite.name, pattern)


def test_every_suite_has_a_target():
    text = (ROOT / "Makefile").read_text()
    for suite in suites.SUITES:
        assert f"\ntest-{suite.name}:" in text
    together = text[text.index("\ntest-all:") :].splitlines()[1].split("##")[0].split(":")[1].split()
    assert set(together) == {"test", *(f"test-{suite.name}" for suite in suites.SUITES)}


@pytest.fixture
def clone(tmp_path):
    """A repository with a file of each age in days, of which each commit is named."""

    def commit(days: float, name: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{days}")
        when = f"{1_800_000_000 - round(days * 86400)} +0000"
        who = {
            f"GIT_{w}_{k}": v
            for w in ("AUTHOR", "COMMITTER")
            for k, v in {"NAME": "x", "EMAIL": "x", "DATE": when}.items()
        }
        for words in (["add", "."], ["commit", "-q", "-m", name]):
            subprocess.run(["git", "-C", str(tmp_path), *words], check=True, env={**os.environ, **who})

    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path, commit


def test_what_changed_is_what_the_last_days_touched(clone):
    root, commit = clone
    commit(5, "old")
    commit(3, "older than two days")
    commit(1, "young")
    commit(0, "newest")
    (root / "not committed").write_text("")
    assert suites.changed_files(2, root) == ["newest", "not committed", "young"]


def test_a_history_that_is_too_short_is_none(clone):
    root, commit = clone
    commit(1, "young")
    assert suites.changed_files(2, root) is None
    assert suites.changed_files(0.5, root) is None


def test_no_clone_is_no_history(tmp_path):
    assert suites.changed_files(2, tmp_path) is None
