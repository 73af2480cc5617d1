"""What a build is made of, and what it leaves in the wheel."""

from __future__ import annotations

from hvdloss.cli.install import recipe


def test_the_record_is_python_that_horovodrun_can_read(tmp_path):
    (tmp_path / "horovod").mkdir()
    recipe.write_record(tmp_path, {"gloo": True, "mpi": False}, {"mpi": None, "quote'd": 'a"b'})
    scope: dict[str, object] = {}
    exec((tmp_path / "horovod" / "hvdloss_build.py").read_text(), scope)
    assert scope["OPERATIONS"] == {"gloo": True, "mpi": False}
    assert scope["BUILT"] == {"mpi": None, "quote'd": 'a"b'}
    assert scope["RECIPE"] == recipe.RECIPE
    assert scope["PATCHES"] == [patch.name for patch in recipe.PATCHES]
