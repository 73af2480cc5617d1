"""The patches: each applies to the pinned source exactly, or is refused by name and changes nothing."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import tarfile
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from unidiff import PatchSet

from hvdloss.cli.errors import Exit, InstallError
from hvdloss.cli.install import recipe
from hvdloss.cli.install.cache import cache_folder, check_source
from hvdloss.cli.install.series import FOLDER, Patch, apply_series, read_series, version_of
from tests.cli.conftest import ROOT

SERIES = read_series()
each_patch = pytest.mark.parametrize("patch", SERIES, ids=lambda patch: patch.name)


def paths_of(patch: Patch) -> list[str]:
    return [file.path for file in PatchSet.from_string(patch.diff)]


def contents(tree: Path) -> dict[str, bytes]:
    return {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pinned(tmp_path_factory):
    """Those files of the pinned source that patches change."""
    source = cache_folder() / "source" / recipe.SDIST
    if not source.exists():
        pytest.skip(f"no {source}: this user has not built Horovod here (hvdloss install --force)")
    check_source(source, recipe.SHA256)
    tree = tmp_path_factory.mktemp("pinned")
    with tarfile.open(source) as archive:
        for name in {name for patch in SERIES for name in paths_of(patch)}:
            file = archive.extractfile(f"horovod-{recipe.VERSION}/{name}")
            assert file is not None
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(file.read())
    return tree


@pytest.fixture
def tree(pinned, tmp_path):
    """A copy of them that a test may change."""
    return Path(shutil.copytree(pinned, tmp_path / "tree"))


# -- on the pinned source ---------------------------------------------------------------------------


def test_the_series_applies_to_the_pinned_source(tree):
    before = contents(tree)
    changed = apply_series(tree, SERIES)
    after = contents(tree)
    assert {str(path.relative_to(tree)) for path in changed} == {n for n in after if after[n] != before[n]}
    assert set(after) == set(before)
    for name in after:
        if name.endswith(".py"):
            compile(after[name], name, "exec")
    with pytest.raises(InstallError, match=re.escape(SERIES[0].name)):
        apply_series(tree, SERIES)  # not a second time
    assert contents(tree) == after


def test_patch_reads_the_series_as_this_does(tree, tmp_path):
    """Whoever sends a patch to Horovod applies it by `patch` or git."""
    if shutil.which("patch") is None:
        pytest.skip("no `patch` here")
    theirs = Path(shutil.copytree(tree, tmp_path / "theirs"))
    for patch in SERIES:
        done = subprocess.run(
            ["patch", "--strip=1", "--fuzz=0", "--forward", "--no-backup-if-mismatch"],
            cwd=theirs,
            input=(FOLDER / patch.name).read_bytes(),
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, (patch.name, done.stdout)
        assert b"offset" not in done.stdout, (patch.name, done.stdout)
    apply_series(tree, SERIES)
    assert contents(theirs) == contents(tree)


@each_patch
def test_a_patch_that_does_not_apply_is_refused_by_name_and_nothing_is_changed(tree, patch):
    at = SERIES.index(patch)
    apply_series(tree, SERIES[:at])
    file = PatchSet.from_string(patch.diff)[-1]
    target = tree / file.path
    lines = target.read_bytes().split(b"\n")
    lines[file[-1].source_start - 1] += b" "  # one byte, in the last of its hunks
    target.write_bytes(b"\n".join(lines))
    before = contents(tree)
    with pytest.raises(InstallError, match=re.escape(patch.name)) as caught:
        apply_series(tree, SERIES[at:])
    assert file.path in caught.value.problem
    assert caught.value.status == Exit.BUILD
    assert contents(tree) == before


def test_order_matters(tree):
    before = contents(tree)
    names = [patch.name for patch in SERIES]
    early = next(i for i, name in enumerate(names) if "kvstore-outlives-silent" in name)
    late = next(i for i, name in enumerate(names) if "rendezvous-asks-for-token" in name)
    order = list(SERIES)
    order.insert(early, order.pop(late))
    with pytest.raises(InstallError, match=re.escape(names[late])):
        apply_series(tree, order)
    assert contents(tree) == before


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InstallError, match=rf"{SERIES[0].name}.*CMakeLists\.txt cannot be read"):
        apply_series(tmp_path, SERIES)


# -- of hunks ---------------------------------------------------------------------------------------

OLD = "one\ntwo\nthree\nfour\n"


def a_patch(*hunks: str) -> Patch:
    return Patch("0001-a.patch", "Description: a", "--- a/f\n+++ b/f\n" + "".join(hunks))


@pytest.mark.parametrize(
    ("hunks", "new"),
    [
        (["@@ -2 +2 @@\n-two\n+2\n"], "one\n2\nthree\nfour\n"),
        (["@@ -0,0 +1 @@\n+zero\n"], "zero\none\ntwo\nthree\nfour\n"),
        (["@@ -4,0 +5 @@\n+five\n"], "one\ntwo\nthree\nfour\nfive\n"),
        (["@@ -1,4 +0,0 @@\n-one\n-two\n-three\n-four\n"], ""),
        (["@@ -1 +1,2 @@\n one\n+1.5\n", "@@ -3,2 +4 @@\n-three\n four\n"], "one\n1.5\ntwo\nfour\n"),
        (["@@ -1 +1 @@\n-one\n+o\x0cn\u2028e\n"], "o\x0cn\u2028e\ntwo\nthree\nfour\n"),
    ],
    ids=["change", "before the first", "after the last", "all of it", "two hunks", "odd characters"],
)
def test_hunks(tmp_path, hunks, new):
    (tmp_path / "f").write_text(OLD)
    assert apply_series(tmp_path, [a_patch(*hunks)]) == [tmp_path / "f"]
    assert (tmp_path / "f").read_text() == new


@pytest.mark.parametrize(
    "diff",
    [
        "@@ -1 +1 @@\n-two\n+2\n",  # two lines later it would fit
        "@@ -9 +9 @@\n-two\n+2\n",
        "@@ -1,2 +1 @@\n-one\n",  # cut off
        "@@ -3 +3 @@\n-three\n+3\n@@ -1 +1 @@\n-one\n+1\n",  # in the wrong order
        "not a hunk\n",
        "@@ -3 +3 @@\n-three\n+3\n@ -4 +4 @@\n-four\n+4\n",
        "",
    ],
)
def test_a_hunk_that_does_not_fit_exactly_is_refused(tmp_path, diff):
    (tmp_path / "f").write_text(OLD)
    sound = a_patch("@@ -4 +4 @@\n-four\n+4\n")
    bad = replace(a_patch(diff), name="0002-b.patch")
    with pytest.raises(InstallError, match=r"0002-b\.patch"):
        apply_series(tmp_path, [sound, bad])
    assert (tmp_path / "f").read_text() == OLD


# -- of the series ----------------------------------------------------------------------------------


def test_the_series_names_every_patch_and_numbers_them():
    names = [patch.name for patch in SERIES]
    assert sorted(path.name for path in FOLDER.iterdir()) == [*names, "series"]
    assert [int(name[:4]) for name in names] == list(range(1, len(names) + 1))


@each_patch
def test_a_patch_says_what_it_is_for(patch):
    """The fields of DEP-3, https://dep-team.pages.debian.net/deps/dep3/."""
    header = email.message_from_string(patch.header)
    assert not header.defects
    assert not header.get_payload()
    assert set(header) == {"Description", "Origin", "Forwarded", "Last-Update"}
    assert len(header["Description"].splitlines()) > 1  # what is wrong as released
    assert header["Description"].splitlines()[0] == patch.synopsis
    assert re.match(r"no$|not-needed$|https://", header["Forwarded"])
    date.fromisoformat(header["Last-Update"])


def test_the_version_is_of_what_is_changed_and_not_of_what_is_said_about_it():
    assert re.fullmatch("[0-9a-f]{12}", recipe.RECIPE)
    assert version_of(SERIES) == recipe.RECIPE
    assert version_of(reversed(SERIES)) != recipe.RECIPE
    assert version_of(SERIES[:-1]) != recipe.RECIPE
    first = SERIES[0]
    assert version_of([replace(first, header="Description: of others"), *SERIES[1:]]) == recipe.RECIPE
    assert version_of([replace(first, diff=first.diff + "\n"), *SERIES[1:]]) != recipe.RECIPE


def test_the_guide_lists_the_series():
    """In order, each with its first line."""
    rows = re.findall(
        r"^\| `(\d{4}-[\w-]+)` \| (.*) \|$", (ROOT / "docs" / "howto" / "install.md").read_text(), re.M
    )
    assert rows == [(patch.name.removesuffix(".patch"), patch.synopsis) for patch in SERIES]
