"""`hvdloss explain`, alone and on real ranks: tables, numbers, pictures, and what is said when it cannot."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest

from hvdloss.cli.errors import Exit
from tests.cli.conftest import run_cli

pytest.importorskip("torch")
ranks = pytest.mark.skipif(importlib.util.find_spec("horovod") is None, reason="Horovod: hvdloss install")

SUBJECT = """
import numpy as np
import torch
import hvdloss.torch as hvd
from sklearn.datasets import load_diabetes

def subject():
    x, y = load_diabetes(return_X_y=True)
    x, y = x / x.std(0), (y - y.mean()) / y.std()
    ids = np.arange(len(x))[hvd.rank() :: hvd.size()]
    torch.manual_seed(0)
    model = torch.nn.Linear(10, 1).double()
    with torch.no_grad():
        model.weight[:] = torch.from_numpy(np.linalg.lstsq(x, y, rcond=None)[0])
        model.bias.zero_()
    return {"model": model, "x": x[ids], "y": y[ids], "loss": "mse", "ids": ids, "mode": "regression",
            "output": lambda y: y[:, 0], "groups": np.where(x[ids, 1] > 0, "m", "f")}

def broken():
    given = subject()
    def model(x):
        if hvd.rank() == hvd.size() - 1:
            raise OSError("no such model")
        return np.zeros(len(x))
    return {**given, "model": model}

"""


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    path = tmp_path / "subject_of_tests.py"
    path.write_text(SUBJECT)
    (tmp_path / "light.py").write_text("def subject():\n    return {'model': print}\n")
    return path


@ranks
def test_on_ranks_it_finds_what_one_process_finds(entry: Path, tmp_path: Path) -> None:
    options = ["--what", "loss,permutation,shap,lime", "--explainer", "kernel", "--evaluations", "100"]
    options += ["--rows", "12", "--background", "20", "--repeats", "2", f"{entry}:subject"]
    alone = run_cli("explain", *options, "--out", str(tmp_path / "one"))
    assert alone.returncode == 0, alone.stderr
    assert "By rank" in alone.stdout
    several = run_cli("explain", *options, "-np", "2", "--out", str(tmp_path / "two"), "--json")
    assert several.returncode == 0, several.stderr
    one, two = (json.loads((tmp_path / n / "explain.json").read_text()) for n in ("one", "two"))
    printed = json.loads(several.stdout)
    assert printed["ranks"] == two["ranks"] == 2
    assert math.isclose(one["loss"]["loss"], two["loss"]["loss"], rel_tol=1e-12)
    assert [s["id"] for s in one["loss"]["hardest"]] == [s["id"] for s in two["loss"]["hardest"]]
    assert {part["label"] for part in two["loss"]["groups"]["group"]} == {"m", "f"}
    for kind, what in (("permutation", "importances"), ("shap", "values"), ("lime", "values")):
        a, b = np.array(one[kind][what]), np.array(two[kind][what])
        assert np.abs(a - b).max() < 1e-12 * np.abs(a).max(), kind
    assert one["shap"]["ids"] == two["shap"]["ids"]
    for kind in ("loss", "permutation", "shap", "lime"):
        assert (tmp_path / "two" / f"{kind}.png").stat().st_size > 5000
    assert (tmp_path / "two" / "explain.log").exists()


@ranks
def test_what_fails_on_a_rank_is_said(entry: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_cli("explain", f"{entry}:broken", "-np", "2", "--what", "loss", "--out", str(out))
    assert done.returncode == Exit.RANKS
    assert "rank 1, loss attribution: batch 1: OSError: no such model" in done.stderr
    assert not (out / "explain.json").exists()


@pytest.mark.parametrize(
    ("where", "status", "words"),
    [
        ("light.py:subject", Exit.RANKS, "lacks 'x': this rank's rows"),
        ("light.py:nothing", Exit.USAGE, "has no function nothing"),
        ("light.py:subject()", Exit.USAGE, 'write "file.py:function"'),
    ],
)
def test_a_wrong_entry_is_told(entry: Path, tmp_path: Path, where: str, status: Exit, words: str) -> None:
    done = run_cli("explain", f"{entry.parent}/{where}", "--out", str(tmp_path / "out"))
    assert done.returncode == status, done.stderr
    assert words in done.stderr


def test_wrong_options_are_told_before_anything_is_loaded(tmp_path: Path) -> None:
    done = run_cli("explain", f"{tmp_path}/none.py:subject", "--what", "loss,tea")
    assert done.returncode == Exit.USAGE
    assert "choose from loss, permutation, shap, lime" in done.stderr
    done = run_cli("explain", f"{tmp_path}/none.py:subject", "-np", "2")
    assert done.returncode == Exit.USAGE
    assert "there is no file" in done.stderr
