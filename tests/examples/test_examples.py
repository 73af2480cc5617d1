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
    "torch_regression": ("torch", 3, ["--epochs", "2"]),
    "torch_digits": ("torch", 2, ["--epochs", "1"]),
    "tensorflow_linear": ("tensorflow", 2, ["--epochs", "2"]),
    "keras_digits": ("tensorflow", 2, ["--epochs", "1"]),
}
SPLIT = {"torch_split_classifier": "torch", "tf_split_classifier": "tensorflow"}


def present(name: str, framework: str) -> bool:
    return (EXAMPLES / f"{name}.py").exists() and importlib.util.find_spec(framework) is not None


def some_more(names: list[str]) -> list[Any]:
    """Have `make test` leave out examples that are much like another one; `make demo` runs them too."""
    slow = ("torch_regression", "tensorflow_linear", "torch_split_classifier")
    return [pytest.param(name, marks=pytest.mark.more if name in slow else ()) for name in names]


PRESENT = [name for name, (framework, _, _) in SCRIPTS.items() if present(name, framework)]
SPLIT_PRESENT = [name for name, framework in SPLIT.items() if present(name, framework)]

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
    assert min(pixels.shape[:2]) >= 300
    assert pixels.std() > 0.02, "the picture is blank"


@launched
@pytest.mark.parametrize("script", some_more(PRESENT))
def test_under_horovodrun_hvdloss_is_one_process_and_plain_averaging_is_not(script, tmp_path):
    _, size, short = SCRIPTS[script]
    arguments = [*short, "--output", tmp_path]
    out = run([HOROVODRUN, "--gloo", "-np", size, sys.executable, EXAMPLES / f"{script}.py", *arguments])
    data = json.loads((tmp_path / "numbers.json").read_text())
    by_name = {one["name"]: one for one in data["outcomes"]}
    exact, plain = by_name["hvdloss"], by_name["plain averaging"]
    assert data["exact"] is True
    assert data["size"] == size
    # `fit` shows no gradient of a step; there the trained parameters tell.
    measure = "parameter_error" if exact["gradient_error"] is None else "gradient_error"
    assert 0 <= exact[measure] <= 1e-12
    assert plain[measure] > 1e-3
    assert exact["curve"] == pytest.approx(by_name["one process"]["curve"], rel=1e-9)
    samples = [one["samples"] for one in data["ranks"]]
    assert len(set(samples)) == size, "the shards are meant to be uneven"
    for name in ("one process", "hvdloss", "plain averaging"):
        assert name in out
    check_picture(tmp_path / "loss.png")


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
@pytest.mark.parametrize("size", [pytest.param(4, marks=pytest.mark.more), 2])
@pytest.mark.parametrize("script", some_more(SPLIT_PRESENT))
def test_a_split_model_is_one_process(script, size, tmp_path):
    arguments = ["--epochs", 1, "--output", tmp_path]
    out = run([HOROVODRUN, "--gloo", "-np", size, sys.executable, EXAMPLES / f"{script}.py", *arguments])
    data = json.loads((tmp_path / "numbers.json").read_text())
    by_name = {one["name"]: one for one in data["outcomes"]}
    exact, plain = by_name["hvdloss"], by_name["plain averaging"]
    assert data["exact"] is True
    for error in ("loss_error", "gradient_error", "parameter_error"):
        assert 0 <= exact[error] <= 1e-12
    assert (plain["gradient_error"] > 1e-3) == (size == 4), (
        "two ranks share one model, with nobody to average"
    )
    assert len({one["samples"] for one in data["ranks"]}) == size // 2
    assert "ordinary checkpoint" in out
    check_picture(tmp_path / "loss.png")


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


@pytest.mark.parametrize("script", SPLIT_PRESENT)
def test_a_split_model_on_one_rank_without_horovod(script, tmp_path):
    run(without_horovod(script, "--epochs", 1, "--output", tmp_path))
    assert json.loads((tmp_path / "numbers.json").read_text())["exact"] is True


@pytest.mark.skipif("torch_digits" not in PRESENT, reason="torch is not installed")
def test_one_rank_without_horovod_is_one_process_and_says_so(tmp_path):
    out = run(without_horovod("torch_digits", "--epochs", 1, "--output", tmp_path))
    assert "One rank holds all samples" in out
    outcomes = json.loads((tmp_path / "numbers.json").read_text())["outcomes"]
    assert all((one["gradient_error"] or 0) <= 1e-12 for one in outcomes)
    check_picture(tmp_path / "loss.png")


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
    out = run([sys.executable, "-c", HELP, EXAMPLES, *PRESENT, *SPLIT_PRESENT, "demo"])
    return json.loads(out.rpartition("found ")[2])


@pytest.mark.parametrize("script", [*PRESENT, *SPLIT_PRESENT, "demo"])
def test_help_needs_no_horovod(helps, script):
    status, out = helps[script]
    assert status == 0
    assert "usage:" in out
    assert "--only" in out if script == "demo" else "--shares" in out


@launched
@pytest.mark.skipif("torch_regression" not in PRESENT, reason="torch is not installed")
def test_a_wrong_gradient_makes_an_example_fail(tmp_path):
    # Plain averaging passed off as hvdloss.
    program = tmp_path / "wrong.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\n"
        "import hvdloss.torch as hvd, torch_regression as example, _torch\n"
        "args = example.options('wrong', '', epochs=1, batch=120).parse_args()\n"
        "hvd.init()\n"
        "sys.exit(_torch.compare(example.make_job(args), _torch.train_plainly, title='wrong'))\n"
    )
    out = run(
        [HOROVODRUN, "--gloo", "-np", 2, sys.executable, program, "--quiet", "--output", tmp_path],
        expect=None,
    )
    assert "error: the gradient of hvdloss differs from one process's by" in out
    assert json.loads((tmp_path / "numbers.json").read_text())["exact"] is False
    assert "exit code" in out.lower() or "non-zero" in out.lower(), out


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
        common.options("some", "text", epochs=1, batch=1).parse_args(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_shares_must_be_as_many_as_ranks(common):
    with pytest.raises(SystemExit, match="--shares has 2 numbers, but there are 3 ranks"):
        common.Shards(range(30), [0.5, 0.5], 3, batch=10, seed=0)


@pytest.mark.parametrize("shares", [None, [0.7, 0.2, 0.1], [1.0, 0.0, 0.0], [0.02, 0.02, 0.96]])
def test_shards_bring_every_sample_once_an_epoch(common, shares):
    shards = common.Shards(range(100, 153), shares, 3, batch=10, seed=4)
    for epoch in range(2):
        seen = [i for step in range(shards.steps) for i in shards.union(epoch, step)]
        assert sorted(seen) == list(range(100, 153))
    assert list(shards.union(0, 0)) != list(shards.union(1, 0))


@pytest.mark.parametrize(
    ("dtype", "error", "status"),
    [("float64", 9e-13, 0), ("float64", 2e-12, 1), ("float32", 9e-6, 0), ("float32", 2e-5, 1),
     ("float64", float("nan"), 1)],
)  # fmt: skip
def test_the_exit_status_follows_the_gradient(common, tmp_path, capsys, dtype, error, status):
    args = argparse.Namespace(name="x", output=tmp_path, dtype=dtype, json=False, quiet=True, epochs=1)
    outcomes = [
        common.Outcome(common.ONE, [1.0, 0.5]),
        common.Outcome(common.EXACT, [1.0, 0.5], [error], loss_error=0.0, gradient_error=error),
    ]
    assert common.conclude(args, "title", outcomes, [common.RankRow(0, 3, 3.0, 1.0)]) == status
    assert ("the gradient of hvdloss differs" in capsys.readouterr().err) == bool(status)


def test_the_demo_names_the_way_out_where_horovodrun_is_missing(common, monkeypatch, capsys):
    import demo

    monkeypatch.setattr(demo.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    assert demo.main() == 1
    assert "`hvdloss install`" in capsys.readouterr().err
