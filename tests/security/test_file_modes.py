"""Files that hvdloss writes are their owner's alone, whatever the umask."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import hvdloss
from hvdloss._util.private import make_folder, open_private
from hvdloss.cli import cli
from hvdloss.cli.install.cache import Cache
from hvdloss.cli.process import Log
from hvdloss.terms.controller import Controller
from hvdloss.terms.policies.log import record
from hvdloss.train import BestCheckpoint
from hvdloss.train.files import replace_durably, write_atomically


@pytest.fixture(autouse=True)
def careless():
    """A umask that lets everybody read and write."""
    former = os.umask(0)
    yield
    os.umask(former)


def modes(folder: Path) -> dict[str, str]:
    """The modes of everything in a folder that others could do something with."""
    return {
        path.relative_to(folder).as_posix(): oct(mode)
        for path in folder.rglob("*")
        if (mode := stat.S_IMODE(path.lstat().st_mode)) & 0o077
    }


def test_the_check_itself_sees_what_others_can_read(tmp_path):
    (tmp_path / "open").write_text("x")
    assert modes(tmp_path) == {"open": "0o666"}


def test_folders_and_files(tmp_path):
    make_folder(tmp_path / "a" / "b")
    with open_private(tmp_path / "a" / "b" / "c") as file:
        file.write("x")
    assert modes(tmp_path) == {}
    make_folder(tmp_path / "a")  # fine if it is there
    (tmp_path / "mine").mkdir(mode=0o755)
    make_folder(tmp_path / "mine")
    assert modes(tmp_path) == {"mine": "0o755"}  # what exists keeps its mode


def test_checkpoints(tmp_path):
    write_atomically(tmp_path / "new" / "state", lambda file: file.write(b"x"))
    (tmp_path / "by-keras").write_bytes(b"x")
    replace_durably(tmp_path / "by-keras", tmp_path / "model.keras")
    best = BestCheckpoint(tmp_path / "best" / "state")
    best.step(1.0, b"x")
    assert best.read() == b"x"
    assert modes(tmp_path) == {}


def test_a_keras_checkpoint(tmp_path):
    keras = pytest.importorskip("keras")
    hvd = pytest.importorskip("hvdloss.keras")
    hvd.init()
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    path = make_folder(tmp_path / "models") / "best.keras"
    keep = hvd.callbacks.BestModelCheckpoint(filepath=str(path), monitor="loss", mode="min")
    model.fit(np.ones((4, 2)), np.ones((4, 1)), epochs=1, verbose=0, callbacks=[keep])
    assert path.exists()
    assert modes(tmp_path) == {}
    hvd.load_model(path)


def test_control_logs(tmp_path):
    term = hvdloss.CommunicationCost(calibrate=False)
    record(Controller((term,)), tmp_path / "control.log")
    assert modes(tmp_path) == {}


def test_the_cache_and_the_log_of_an_installation(tmp_path):
    cache = Cache(tmp_path / "cache")
    cache.create()
    with cache.locked(1.0, lambda _: None):
        pass
    Log(cache.new_log()).close()
    assert modes(tmp_path) == {}


def test_results_of_commands(tmp_path):
    out = tmp_path / "new" / "result.json"
    options = ["--ranks", "2", "--steps", "3", "--json", str(out)]
    done = CliRunner().invoke(cli, ["simulate", *options])
    assert done.exit_code == 0, done.output
    assert out.exists()
    assert modes(tmp_path) == {}
    assert os.umask(0) == 0  # a command leaves the umask as it was


def test_a_damaged_checkpoint_is_a_clear_error(tmp_path):
    torch = pytest.importorskip("torch")
    hvd = pytest.importorskip("hvdloss.torch")
    best = hvd.BestCheckpoint(tmp_path / "best.pt")
    best.step(1.0, {"w": torch.ones(3)})
    assert best.load()["w"].tolist() == [1.0, 1.0, 1.0]
    whole = (tmp_path / "best.pt").read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"PK" + bytes(100), b"cposix\nsystem\n(S'true'\ntR."):
        (tmp_path / "best.pt").write_bytes(damaged)
        with pytest.raises(hvdloss.errors.ConfigError, match=r"best\.pt.*damaged"):
            best.load()
