"""The examples run as a user runs them, say what is true, and fail when it is not."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
BIN = Path(sys.executable).parent
HOROVODRUN = shutil.which("horovodrun", path=str(BIN)) or shutil.which("horovodrun")

SCRIPTS = {  # by name: framework, ranks, options that make it short
    "torch_digits": ("torch", 2, ["--epochs", 2, "--seeds", 1]),
    "tensorflow_linear": ("tensorflow", 2, ["--epochs", 3, "--seeds", 2]),
    "keras_digits": ("tensorflow", 2, ["--epochs", 1, "--seeds", 2]),
    "torch_split_classifier": ("torch", 4, ["--epochs", 2, "--seeds", 1]),
    "tf_split_classifier": ("tensorflow", 4, ["--epochs", 2, "--seeds", 1]),
}
MORE = ("tensorflow_linear", "torch_split_classifier", "tf_split_classifier")  # `make demo` runs them too


def present(name: str, framework: str) -> bool:
    return (EXAMPLES / f"{name}.py").exists() and importlib.util.find_spec(framework) is not None


PRESENT = [name for name, (framework, _, _) in SCRIPTS.items() if present(name, framework)]
LAUNCHED = [pytest.param(name, marks=pytest.mark.more if name in MORE else ()) for name in PRESENT]

launched = pytest.mark.skipif(HOROVODRUN is None, reason="Horovod is not installed: hvdloss install")


def run(command: list[Any], expect: int | None = 0, folder: Path = ROOT) -> str:
    """Run a command, check its status, and return all that it printed."""
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(BIN), os.environ["PATH"]]),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [str(part) for part in command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
        cwd=folder,
    )
    if expect is not None:
        assert done.returncode == expect, done.stdout
    return done.stdout


def without_horovod(script: str, *arguments: Any) -> list[Any]:
    """Return a command that runs an example where Horovod cannot be found."""
    program = (
        "import runpy, sys; sys.modules['horovod'] = None; sys.argv = sys.argv[1:]; "
        f"sys.path.insert(0, {str(EXAMPLES)!r}); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return [sys.executable, "-c", program, EXAMPLES / f"{script}.py", *arguments]


def check_picture(path: Path) -> None:
    from matplotlib import image

    pixels = image.imread(path)
    assert min(pixels.shape[:2]) >= 200
    assert pixels.std() > 0.02, "the picture is blank"


def check(folder: Path, size: int) -> dict[str, Any]:
    """Check what a demo on several ranks left: hvdloss was one process, plain averaging was not."""
    data = json.loads((folder / "numbers.json").read_text())
    one, exact, plain = (data["outcomes"][name] for name in ("one process", "hvdloss", "plain averaging"))
    assert (data["exact"], data["size"]) == (True, size)
    for errors in ([exact["loss_error"], exact["parameter_error"]], exact["gradient_errors"]):
        assert all(0 <= error <= 1e-12 for error in errors)
    assert max(plain["gradient_errors"]) > 1e-2
    assert plain["parameter_error"] > 1e-4
    for name, values in exact["test"].items():
        assert values == pytest.approx(one["test"][name], rel=1e-9)
    assert len(one["curve"]) == data["seeds"]
    check_picture(folder / "loss.png")
    return data


@launched
@pytest.mark.parametrize("script", LAUNCHED)
def test_under_horovodrun_hvdloss_is_one_process_and_plain_averaging_is_not(script, tmp_path):
    _, size, short = SCRIPTS[script]
    arguments = [*short, "--output", tmp_path]
    out = run([HOROVODRUN, "--gloo", "-np", size, sys.executable, EXAMPLES / f"{script}.py", *arguments])
    data = check(tmp_path, size)
    assert data["verdict"] in out.replace("[0]<stdout>:", "")
    for name in data["outcomes"]:
        assert name in out
    if script == "torch_split_classifier":
        import torch

        saved = torch.load(tmp_path / "model.pt", weights_only=True)
        assert {name: tuple(t.shape) for name, t in saved.items()} == {
            "0.weight": (16, 16), "0.bias": (16,), "2.weight": (10, 16), "2.bias": (10,)
        }  # fmt: skip
    if script == "tf_split_classifier":
        assert (tmp_path / "model.keras").stat().st_size > 0


@pytest.mark.skipif(not present("torch_tokens", "torch"), reason="torch is not installed")
def test_the_first_demo_needs_no_horovod(tmp_path):
    arguments = [
        "--epochs",
        2,
        "--seeds",
        1,
        "--lines",
        64,
        "--batch",
        16,
        "--micro",
        4,
        "--output",
        tmp_path,
    ]
    run([BIN / "torchrun", "--nproc-per-node", 2, EXAMPLES / "torch_tokens.py", *arguments])
    check(tmp_path, 2)


@pytest.mark.more
@launched
@pytest.mark.skipif(not present("torch_explain", "torch"), reason="torch is not installed")
def test_a_trained_model_is_explained_on_ranks(tmp_path):
    import numpy as np

    arguments = ["--rows", 6, "--output", tmp_path / "shap.npz"]
    out = run([HOROVODRUN, "--gloo", "-np", 2, sys.executable, EXAMPLES / "torch_explain.py", *arguments])
    assert "of 569 elements" in out  # of both ranks
    assert "Hardest samples" in out
    found = np.load(tmp_path / "shap.npz")
    assert found["values"].shape == (6, 30, 2)
    assert np.abs((found["values"].sum(axis=1) + found["base"]).sum(axis=1) - 1).max() < 1e-6  # probabilities


@launched
@pytest.mark.skipif(not present("torch_split_transformer", "torch"), reason="torch is not installed")
@pytest.mark.parametrize(
    ("size", "grid"),
    [
        (2, []),
        pytest.param(4, [], marks=pytest.mark.more),
        pytest.param(4, ["--model", 2, "--schedule", "gpipe"], marks=pytest.mark.more),
    ],
)
def test_a_transformer_in_stages_is_one_process(size, grid, tmp_path):
    short = ["--epochs", 1, "--batch", 400, "--micro", 60, "--output", tmp_path, *grid]
    script = EXAMPLES / "torch_split_transformer.py"
    out = run([HOROVODRUN, "--gloo", "-np", size, sys.executable, script, *short])
    found = json.loads((tmp_path / "numbers.json").read_text())
    assert found["replicas"] * found["model"] * found["stages"] == size
    assert max(found["loss_error"], found["parameter_error"]) <= 1e-11
    assert {one["stage"] for one in found["ranks"]} == {0, 1}
    assert sum(one["parameters"] for one in found["ranks"]) < 1.2 * found["parameters"] * found["replicas"]
    assert "held-out lines" in out


@pytest.mark.skipif("torch_digits" not in PRESENT, reason="torch is not installed")
def test_one_rank_without_horovod_is_one_process_and_says_so(tmp_path):
    out = run(without_horovod("torch_digits", "--epochs", 1, "--seeds", 1, "--output", tmp_path))
    assert "One rank holds all samples" in out
    outcomes = json.loads((tmp_path / "numbers.json").read_text())["outcomes"]
    assert all(max(outcomes[name]["gradient_errors"]) <= 1e-12 for name in ("hvdloss", "plain averaging"))


HELP = """
import contextlib, io, json, runpy, sys
sys.modules["horovod"] = None
sys.path.insert(0, sys.argv[1])
found = {}
for name in sys.argv[2:]:
    sys.argv = [f"{sys.path[0]}/{name}.py", "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            found[name] = [end.code, out.getvalue()]
print("found", json.dumps(found))
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, Any]:
    """Return the status and the words of each example's --help: of one process, as frameworks load slowly."""
    out = run([sys.executable, "-c", HELP, EXAMPLES, *PRESENT, "demo"])
    return json.loads(out.rpartition("found ")[2])


@pytest.mark.parametrize("script", [*PRESENT, "demo"])
def test_help_needs_no_horovod(helps, script):
    status, out = helps[script]
    assert status == 0
    assert "usage:" in out
    assert "--only" in out if script == "demo" else "--shares" in out


# -- the shared part, without ranks -------------------------------------------------------------------


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import _common

    return _common


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: 0 is below 1"),
        (["--batch", "many"], "argument --batch: invalid integer value: 'many'"),
        (["--shares", "0.5,half"], "is not a list of numbers like"),
        (["--shares", "0.5,-0.5"], "shares are numbers of at least 0"),
        (["--shares", "0,0"], "not all 0"),
        (["--shares", "nan,1"], "shares are numbers of at least 0"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(common, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        common.options("some", "text", epochs=1, batch=1, seeds=1).parse_args(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_shares_must_be_as_many_as_ranks(common):
    with pytest.raises(SystemExit, match="--shares has 2 numbers, but there are 3 ranks"):
        common.Shards(range(30), [0.5, 0.5], 3, batch=10, seed=0)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("shares", [None, [0.7, 0.2, 0.1], [1.0, 0.0, 0.0], [0.02, 0.02, 0.96]])
def test_shards_bring_every_sample_once_an_epoch(common, shares, ragged):
    shards = common.Shards(range(100, 153), shares, 3, batch=10, seed=4, ragged=ragged)
    for epoch in range(2):
        seen = [i for step in range(shards.steps) for i in shards.union(epoch, step)]
        assert sorted(seen) == list(range(100, 153))
    assert list(shards.union(0, 0)) != list(shards.union(1, 0))


def conclude(common: Any, folder: Path, dtype: str = "float64", **errors: Any) -> int:
    """Report a demo of two ranks in which hvdloss was off by `errors`."""
    args = argparse.Namespace(name="x", output=folder, dtype=dtype, seeds=2)
    shown = {"test": {"loss": [1.0, 2.0]}, "curve": [[3.0, 1.0], [4.0, 2.0]]}
    exact = {"loss_error": 0.0, "gradient_errors": [0.0, 0.0], "parameter_error": 0.0, **errors}
    plain = {"test": {"loss": [1.1, 1.9]}, "gradient_errors": [0.5, 0.5], "parameter_error": 0.5}
    found = {common.ONE: shown, common.EXACT: {**shown, **exact}, common.PLAIN: {**shown, **plain}}
    return common.conclude(args, found, size=2, seconds=1.0, title="title", remark="remark")


@pytest.mark.parametrize(
    ("what", "dtype", "error", "status"),
    [("gradient", "float64", 9e-13, 0), ("gradient", "float64", 2e-12, 1), ("gradient", "float32", 2e-5, 1),
     ("gradient", "float64", float("nan"), 1), ("loss", "float64", 2e-12, 1),
     ("trained model", "float64", 2e-9, 1)],
)  # fmt: skip
def test_the_exit_status_follows_the_differences(common, tmp_path, capsys, what, dtype, error, status):
    errors = {"gradient": {"gradient_errors": [0.0, error]}, "loss": {"loss_error": error}}
    assert conclude(common, tmp_path, dtype, **errors.get(what, {"parameter_error": error})) == status
    assert (f"error: the {what} of hvdloss differs" in capsys.readouterr().err) == bool(status)
    assert json.loads((tmp_path / "numbers.json").read_text())["exact"] is not bool(status)


def test_the_verdict_counts_seeds_and_says_when_plain_averaging_is_better(common, tmp_path, capsys):
    conclude(common, tmp_path)
    assert "held-out loss higher in 1 of 2 seeds (-5.0% to +10.0%)." in capsys.readouterr().out


@pytest.fixture
def demo(common, monkeypatch, tmp_path):
    import demo

    monkeypatch.setattr(sys, "argv", ["demo.py", "--only", "torch_digits", "--output", str(tmp_path)])
    return demo


def test_the_demo_names_the_way_out_where_horovodrun_is_missing(demo, monkeypatch, capsys):
    monkeypatch.setattr(demo.shutil, "which", lambda *_, **__: None)
    assert demo.main() == 1
    assert "`hvdloss install`" in capsys.readouterr().err


def test_the_demo_shows_why_an_installation_failed(demo, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--setup", "sh -c 'echo no compiler; exit 3'"])
    assert demo.main() == 1
    assert "no compiler" in capsys.readouterr().err
