"""The edits: each one must change something, exactly as often as it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvdloss.cli.errors import Exit, InstallError
from hvdloss.cli.install import recipe
from hvdloss.cli.install.build import unpack
from hvdloss.cli.install.cache import cache_folder, check_source


def tree_for(folder: Path) -> Path:
    """A tree in which every edit finds its text and nothing else."""
    texts: dict[str, str] = {}
    for edit in recipe.EDITS:
        texts[edit.path] = texts.get(edit.path, "") + (edit.find + "\n") * max(edit.count, 1)
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_all_edits_apply_and_leave_nothing_to_edit(tmp_path):
    tree = tree_for(tmp_path)
    changed = recipe.apply_edits(tree)
    assert {path.relative_to(tree).as_posix() for path in changed} == {e.path for e in recipe.EDITS}
    with pytest.raises(InstallError):
        recipe.apply_edits(tree)


@pytest.mark.parametrize("edit", recipe.EDITS, ids=lambda edit: f"{edit.path}: {edit.why[:40]}")
def test_an_edit_that_finds_nothing_names_its_file_and_writes_nothing(tmp_path, edit):
    tree = tree_for(tmp_path)
    target = tree / edit.path
    target.write_text(target.read_text().replace(edit.find, "something else"))
    before = {path: path.read_text() for path in tree.rglob("*") if path.is_file()}
    with pytest.raises(InstallError, match=edit.path) as caught:
        recipe.apply_edits(tree)
    assert caught.value.status == Exit.BUILD
    assert before == {path: path.read_text() for path in tree.rglob("*") if path.is_file()}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InstallError, match=r"CMakeLists\.txt: it cannot be read"):
        recipe.apply_edits(tmp_path)


def test_text_found_twice_is_refused(tmp_path):
    (tmp_path / "f").write_text("a a")
    with pytest.raises(InstallError, match="found 2 times, not 1"):
        recipe.apply_edits(tmp_path, (recipe.Edit("f", "a", "b", "why"),))


def test_the_record_is_python_that_horovodrun_can_read(tmp_path):
    (tmp_path / "horovod").mkdir()
    recipe.write_record(tmp_path, {"gloo": True, "mpi": False}, {"mpi": None, "quote'd": 'a"b'})
    scope: dict[str, object] = {}
    exec((tmp_path / "horovod" / "hvdloss_build.py").read_text(), scope)
    assert scope["OPERATIONS"] == {"gloo": True, "mpi": False}
    assert scope["BUILT"] == {"mpi": None, "quote'd": 'a"b'}


def test_the_edits_fit_the_pinned_source(tmp_path):
    source = cache_folder() / "source" / recipe.SDIST
    if not source.exists():
        pytest.skip(f"no {source}: this user has not built Horovod here (hvdloss install --force)")
    check_source(source, recipe.SHA256)
    tree = unpack(source, tmp_path)
    recipe.apply_edits(tree)
    for name in ("setup.py", "horovod/common/util.py", "horovod/runner/js_run.py"):
        compile((tree / name).read_text(), name, "exec")
