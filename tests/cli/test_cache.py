"""The cache: keys, damage, the lock, space."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from hvdloss.cli.errors import Exit, InstallError
from hvdloss.cli.install import cache as cache_module
from hvdloss.cli.install.cache import Cache, cache_folder, check_source, require_space, sha256_of
from hvdloss.cli.install.plan import make_plan
from hvdloss.cli.install.probe import Cuda, Framework, Mpi, Nccl, Probe
from tests.cli.conftest import run_cli


@pytest.fixture
def cache(tmp_path):
    made = Cache(tmp_path / "cache")
    made.create()
    return made


def stored(cache: Cache, tmp_path: Path, key: str = "key") -> Path:
    wheel = tmp_path / "horovod-0.28.1-py3-none-any.whl"
    wheel.write_bytes(b"a wheel")
    return cache.store(key, wheel, {"what": "ever"}).path


def test_a_stored_wheel_is_found_with_its_hash(cache, tmp_path):
    path = stored(cache, tmp_path)
    found, damage = cache.find("key")
    assert found is not None
    assert (found.path, found.sha256, damage) == (path, sha256_of(path), "")
    assert found.record["facts"] == {"what": "ever"}


@pytest.mark.parametrize("harm", ["flip", "cut", "no wheel", "no record", "half a record"])
def test_a_damaged_wheel_is_never_used(cache, tmp_path, harm):
    path = stored(cache, tmp_path)
    record = path.parent / "build.json"
    if harm == "flip":
        path.write_bytes(b"A wheel")
    elif harm == "cut":
        path.write_bytes(b"a w")
    elif harm == "no wheel":
        path.unlink()
    elif harm == "no record":
        record.unlink()
    else:
        record.write_text(record.read_text()[:20])
    found, damage = cache.find("key")
    assert found is None
    assert "damaged" in damage
    assert not path.parent.exists()
    assert cache.find("key") == (None, "")


def test_storing_again_replaces(cache, tmp_path):
    stored(cache, tmp_path)
    wheel = tmp_path / "other.whl"
    wheel.write_bytes(b"another")
    cache.store("key", wheel, {})
    found, _ = cache.find("key")
    assert found is not None
    assert found.path.name == "other.whl"
    assert sorted(p.name for p in found.path.parent.iterdir()) == ["build.json", "other.whl"]


def probe(**changes: object) -> Probe:
    made = Probe(python="p", platform="l", cores=2, mpi=Mpi("c", "l", "Open MPI 4.1.4"))
    made.frameworks = {
        "torch": Framework("torch", "2.13.0+cu130", True, "13.0", None, ("90",)),
        "tensorflow": Framework("tensorflow", "2.21.0", True),
    }
    made.cuda = Cuda("/cuda", "13.0")
    made.nccl = Nccl("/i", "/l", "2.30.7", "here")
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_the_key_differs_whenever_the_wheel_would():
    torch, tensorflow = probe().frameworks["torch"], probe().frameworks["tensorflow"]
    plans = [
        make_plan(probe()),
        make_plan(probe(), frameworks=["torch"]),
        make_plan(probe(), mpi=False),
        make_plan(probe(), gloo=False),
        make_plan(probe(mpi=Mpi("c", "l", "Open MPI 5.0.1"))),
        make_plan(probe(), nccl=True),
        make_plan(probe(nccl=Nccl("/i", "/l", "2.31.0", "here")), nccl=True),
        make_plan(probe(cuda=Cuda("/cuda", "13.1")), nccl=True),
        make_plan(
            probe(frameworks={"torch": Framework("torch", "2.13.0+cpu", True), "tensorflow": tensorflow})
        ),
        make_plan(
            probe(
                frameworks={
                    "torch": Framework("torch", torch.version, False, "13.0"),
                    "tensorflow": tensorflow,
                }
            )
        ),
    ]
    keys = [plan.key for plan in plans]
    assert len(set(keys)) == len(keys)
    assert make_plan(probe()).key == keys[0]
    assert make_plan(probe(), jobs=7).key == keys[0]  # how fast it was built is not in it
    for key in keys:
        assert key == Path(key).name


def test_the_recipe_is_part_of_the_key(monkeypatch):
    before = make_plan(probe()).key
    monkeypatch.setattr("hvdloss.cli.install.recipe.RECIPE", "0" * 12)
    assert make_plan(probe()).key != before


HOLDER = """
import sys, time
from pathlib import Path
from hvdloss.cli.install.cache import Cache
with Cache(Path(sys.argv[1])).locked(0, print):
    print("held", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def held(cache):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(cache.folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_install_waits_and_then_says_who_holds_the_lock(cache, held):
    told: list[str] = []
    with pytest.raises(InstallError, match=f"process {held.pid}"), cache.locked(0.5, told.append):
        pytest.fail("two at a time")
    assert told == [f"waiting for another install (process {held.pid})"]


def test_a_killed_holder_does_not_block(cache, held):
    held.kill()
    held.wait()
    with cache.locked(5.0, print):
        pass


def test_contention_on_the_command_line(cache, held):
    result = run_cli(
        *("install", "--cache-dir", str(cache.folder), "--wait", "1", "--frameworks", "torch", "--force")
    )
    assert result.returncode == Exit.MISSING
    assert f"process {held.pid}" in result.stderr


Disk = namedtuple("Disk", "f_bavail f_frsize")


def test_a_full_disk_is_refused_with_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module.os, "statvfs", lambda path: Disk(100, 2**20))
    with pytest.raises(InstallError, match=r"100 MB free at .*, 600 MB needed"):
        require_space(tmp_path / "not" / "yet" / "there", 600 * 2**20, "to build")
    require_space(tmp_path, 99 * 2**20, "to build")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("HVDLOSS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "hvdloss"
    monkeypatch.setenv("HVDLOSS_CACHE", str(tmp_path / "y"))
    assert cache_folder() == tmp_path / "y"
    assert cache_folder(str(tmp_path / "z")) == tmp_path / "z"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InstallError, match="cannot be used"):
        Cache(tmp_path / "c").create()


def test_a_cache_whose_place_is_taken_by_a_file(tmp_path):
    (tmp_path / "c").write_text("")
    with pytest.raises(InstallError, match="cannot be used"):
        Cache(tmp_path / "c").create()


def test_another_source_is_refused_with_both_hashes(tmp_path):
    path = tmp_path / "horovod-0.28.1.tar.gz"
    path.write_bytes(b"not it")
    with pytest.raises(InstallError, match=sha256_of(path)) as caught:
        check_source(path, "0" * 64)
    assert "0" * 64 in str(caught.value)
    assert caught.value.status == Exit.SOURCE


def test_only_the_newest_logs_are_kept(cache):
    for n in range(30):
        (cache.logs / f"install-20200101-0000{n:02}-1.log").write_text("")
    assert not cache.new_log().exists()
    assert len(list(cache.logs.iterdir())) == 19


def test_the_cached_wheel_of_this_environment_installs_elsewhere(tmp_path):
    """Take this environment's own wheel from the user's cache into a scratch folder."""
    dry = run_cli("install", "--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    plan = json.loads(dry.stdout)
    if not plan["cached"]:
        pytest.skip(f"no wheel {plan['key']} in {cache_folder()}: run hvdloss install first")
    found, _ = Cache(cache_folder()).find(plan["key"])
    assert found is not None
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(found.path)], check=True, capture_output=True)
    program = (
        "import horovod, horovod.torch as hvd; from horovod.hvdloss_build import OPERATIONS;"
        "print(horovod.__file__, hvd.gloo_built() == OPERATIONS['gloo'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(target / "horovod" / "__init__.py"), "True"]
