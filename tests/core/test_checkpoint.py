"""Checkpoints: whole or not there, verified when loaded, and no bytes whatever do worse than an error."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdloss import CheckpointError, ConfigError, simulate
from hvdloss.train import Checkpoint, CheckpointWarning
from hvdloss.train.checkpoint import parse_manifest, read_checkpoint, state_from_bytes, state_to_bytes
from hvdloss.train.tree import unflatten_tree, unpack_arrays


class Holder:
    """A part that holds a value."""

    def __init__(self, value=None):
        self.value = value

    def state(self):
        return self.value

    def load(self, state):
        self.value = state


scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(max_size=8)
arrays = st.builds(
    lambda shape, dtype: np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.sampled_from(["f4", "f8", "i8", "u1", "?"]),
)
keys = st.text("abcdefg", min_size=1, max_size=4) | st.integers(0, 9)
trees = st.recursive(
    scalars | arrays,
    lambda t: (
        st.lists(t, max_size=3) | st.lists(t, max_size=3).map(tuple) | st.dictionaries(keys, t, max_size=3)
    ),
    max_leaves=12,
)


def same(a, b):
    if isinstance(a, np.ndarray):
        return (
            isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b) and a.shape == b.shape
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


@given(trees)
def test_what_is_saved_is_what_is_loaded(tree):
    try:
        data = state_to_bytes(tree)
    except ConfigError as error:
        if "two arrays have this place" in str(error):  # of the keys 1 and "1"
            return
        raise
    assert same(state_from_bytes(data), tree)


@given(st.binary(max_size=300))
def test_no_bytes_do_worse_than_an_error(data):
    for read in (unpack_arrays, state_from_bytes, lambda b: parse_manifest(b, 1)):
        with contextlib.suppress(CheckpointError):
            read(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda t: (
        st.lists(t, max_size=3)
        | st.dictionaries(st.sampled_from(["array", "kind", "dict", "tuple", "float", "x"]), t, max_size=3)
    ),
    max_leaves=15,
)


@given(json_values)
def test_no_json_does_worse_than_an_error(told):
    with contextlib.suppress(CheckpointError):
        unflatten_tree(told, {"x": np.ones(2)})


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    Checkpoint(folder, {"model": Holder({"w": np.arange(20.0)})}).save(4, epoch=2)
    return (
        folder,
        (folder / "00000001.json").read_bytes(),
        (folder / "00000001.model.safetensors").read_bytes(),
    )


@settings(max_examples=300)
@given(data=st.data())
def test_any_damage_is_found(one, data):
    folder, manifest, tensors = one
    for name, whole in (("00000001.json", manifest), ("00000001.model.safetensors", tensors)):
        kind = data.draw(st.sampled_from(["cut", "flip", "longer", "other"]))
        at = data.draw(st.integers(0, len(whole) - 1))
        changed = {
            "cut": whole[:at],
            "flip": whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :],
            "longer": whole + b"\0",
            "other": data.draw(st.binary(max_size=100)),
        }[kind]
        try:
            (folder / name).write_bytes(changed)
            try:
                read_checkpoint(folder, 1)
            except CheckpointError:
                pass
            else:  # white space of JSON, say, is no damage
                assert json.loads(changed) == json.loads(whole)
        finally:
            (folder / name).write_bytes(whole)
    read_checkpoint(folder, 1)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text",
    [
        b"[" * 1_000_000,
        b'{"a":' * 200_000,
        b"9" * 5_000_000,
        b'{"format": "hvdloss checkpoint", "version": ' + b"9" * 4000 + b"}",
        b'{"format": "hvdloss checkpoint", "version": 1, "x": NaN}',
        b'{"format": "hvdloss checkpoint", "version": 1, "x": 1e999}',
        b'{"format": "hvdloss checkpoint", "version": 1, "x": "\\ud800"}',
    ],
)
def test_hostile_manifests(text):
    with pytest.raises(CheckpointError):
        parse_manifest(text, 1)


def test_a_claimed_size_takes_no_memory(tmp_path):
    """A file that says that it holds a terabyte."""
    header = json.dumps({"x": {"dtype": "F64", "shape": [2**37], "data_offsets": [0, 2**40]}}).encode()
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        unpack_arrays(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError):
        unpack_arrays((2**62).to_bytes(8, "little") + header)
    big = tmp_path / "00000001.json"
    with open(big, "wb") as file:
        file.truncate(2**40)  # a sparse one
    with pytest.raises(CheckpointError, match="more than any manifest"):
        read_checkpoint(tmp_path, 1)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_newest_are_kept_and_nobody_else_can_read_them(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    checkpoint = Checkpoint(folder, {"model": Holder({"w": np.ones(3)})}, keep=2)
    assert checkpoint.load() is None
    old = os.umask(0)
    try:
        paths = [checkpoint.save(step) for step in range(5)]
    finally:
        os.umask(old)
    assert sorted(p.name for p in folder.iterdir() if p.suffix == ".json") == [
        "00000004.json",
        "00000005.json",
    ]
    assert {p.name.split(".")[0] for p in folder.iterdir()} == {"00000004", "00000005"}
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in folder.iterdir())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert paths[-1] == folder / "00000005.json"
    assert checkpoint.load().step == 4
    assert checkpoint.load(4).step == 3
    with pytest.raises(CheckpointError, match=r"no checkpoint 1; there are \[4, 5\]"):
        checkpoint.load(1)


def test_a_damaged_one_is_passed_over_by_name_and_never_counts_as_kept(tmp_path):
    holder = Holder({"w": np.zeros(2)})
    checkpoint = Checkpoint(tmp_path, {"model": holder}, keep=2)
    for step in (1, 2, 3):
        holder.value = {"w": np.full(2, float(step))}
        checkpoint.save(step)
    file = tmp_path / "00000003.model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"rank 0 could not load .*03.model.safetensors has \d+ bytes"):
        checkpoint.load(fallback=False)
    assert holder.value["w"][0] == 3
    with pytest.warns(CheckpointWarning, match=r"checkpoint 2 \(step 2\).*00000003.json"):
        loaded = checkpoint.load()
    assert (loaded.step, list(loaded.skipped), holder.value["w"][0]) == (2, ["00000003.json"], 2)
    checkpoint.save(9)
    assert {p.name for p in tmp_path.glob("*.json")} == {"00000002.json", "00000004.json"}
    for manifest in tmp_path.glob("*.json"):
        manifest.write_text("{}")
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged: 00000004.json: .*; 00000002"):
        checkpoint.load()


def test_what_does_not_fit_or_cannot_be_saved_is_named(tmp_path):
    checkpoint = Checkpoint(tmp_path, {"model": Holder({"a": [1, object()]})})
    with pytest.raises(ConfigError, match=r"model\.a\.1 is a object, which is neither"):
        checkpoint.save(1)
    assert checkpoint.load() is None
    with pytest.raises(ConfigError, match="step=-1"):
        Checkpoint(tmp_path, {}).save(-1)
    Checkpoint(tmp_path, {"model": Holder(1)}).save(1)
    with pytest.raises(CheckpointError, match="has no part 'optimizer'; it has model"):
        Checkpoint(tmp_path, {"optimizer": Holder()}).load()
    for bad in ({"keep": 0}, {"keep": True}, {"parts": {"a/b": Holder()}}, {"parts": {"x_": Holder()}}):
        with pytest.raises(ConfigError):
            Checkpoint(tmp_path, **{"parts": {}, **bad})


def test_random_numbers_go_on(tmp_path):
    checkpoint = Checkpoint(tmp_path, {})
    checkpoint.save(1)
    first = random.random(), np.random.rand()
    checkpoint.load()
    assert (random.random(), np.random.rand()) == first


def test_ranks_save_and_load_together(tmp_path):
    """Also where only the root has the folder; what fails on one rank is raised on all."""

    def work(communicator):
        holder = Holder({"w": np.arange(3.0), "n": 7})
        folder = tmp_path / ("root" if communicator.rank == 1 else f"nowhere-{communicator.rank}")
        checkpoint = Checkpoint(folder, {"model": holder}, root=1, random_numbers=False,
                                communicator=lambda: communicator)  # fmt: skip
        checkpoint.save(3, epoch=1)
        holder.value = None
        loaded = checkpoint.load()
        assert not (tmp_path / "nowhere-0").exists()
        assert same(holder.value, {"w": np.arange(3.0), "n": 7})
        told = []
        if communicator.rank == 2:
            holder.value = {"w": open}
        try:
            checkpoint.save(4)
        except ConfigError as error:
            told.append(str(error))
        if communicator.rank == 1:
            for file in folder.glob("*.json"):
                file.write_bytes(b"")
        try:
            checkpoint.load()
        except CheckpointError as error:
            told.append(str(error))
        return loaded.step, loaded.values, told

    results = simulate(3, work)
    assert all(result[:2] == (3, {"epoch": 1}) for result in results)
    # Only the rank that writes looks into states.
    assert len({str(result[2]) for result in results}) == 1
    assert "rank 1 could not load" in results[0][2][-1]


WRITER = """
import sys, numpy as np
from hvdloss.train import Checkpoint
class Holder:
    def state(self):
        return {"w": np.full(1_000_000, float(step)), "step": step}
    def load(self, state):
        pass
checkpoint = Checkpoint(sys.argv[1], {"model": Holder()}, keep=2)
before = checkpoint.load()
step = before.step if before else 0
print(step, flush=True)
while True:
    step += 1
    checkpoint.save(step)
    print(step, flush=True)
"""


@pytest.mark.timeout(120)
def test_a_killed_writer_never_destroys_what_was_written(tmp_path):
    """SIGKILL at 20 random moments: the newest one is whole, and at least as new as what was told."""
    rng = random.Random(0)
    holder = Holder()
    halfway = 0
    for _ in range(20):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        started = int(writer.stdout.readline())
        time.sleep(rng.uniform(0.0, 0.25))
        writer.send_signal(signal.SIGKILL)
        told = [started, *map(int, writer.stdout.read().split())]
        writer.wait()
        if not (told[-1] or list(tmp_path.glob("*.json"))):
            continue  # before the first one was done
        left = list(tmp_path.glob(".unfinished-*"))
        numbers = {path.name[:8] for path in tmp_path.glob("*.safetensors")}
        halfway += bool(left) or len(numbers) > len(list(tmp_path.glob("*.json")))
        with_warning = Checkpoint(tmp_path, {"model": holder}).load(fallback=False)
        assert with_warning is not None
        assert with_warning.step in (told[-1], told[-1] + 1)
        assert holder.value["step"] == with_warning.step
        assert (holder.value["w"] == with_warning.step).all()
    assert halfway  # some were killed in the middle
    Checkpoint(tmp_path, {"model": holder}, keep=1).save(0)
    assert {path.name.split(".")[0] for path in tmp_path.iterdir()} == {
        f"{max(int(p.stem) for p in tmp_path.glob('*.json')):08d}"
    }
