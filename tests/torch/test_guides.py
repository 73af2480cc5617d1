"""The code of the guides, in PyTorch, runs in one process; the numbers in them are what it gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hvdloss.torch as hvd

DOCS = Path(__file__).resolve().parents[2] / "docs"


def run(guide: str) -> dict[str, object]:
    """Run a guide's Python blocks, one after the other, and return their names."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / guide).read_text(), re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{guide}, block {number + 1}", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def _initialised():
    hvd.init()


def test_losses():
    names = run("losses.md")
    rows = dict(
        re.findall(r"^\| ([A-Z][^|]*?) \| (-?\d\.\d{3} \| -?\d\.\d{3}) \|$", _text("losses.md"), re.M)
    )
    numbers = names["numbers"]
    assert rows == {name: f"{whole:.3f} | {mean:.3f}" for name, (whole, mean) in numbers.items()}


def test_terms():
    names = run("terms.md")
    assert names["optimizer"].last_step.step == 10
    assert names["shares"].sizes.tolist() == [64]
    assert names["objective"].terms[0].name == "padding"


def test_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("report.md")
    assert (names["record"].status, len(names["record"].steps)) == ("finished", 10)
    again = names["hvdloss"].report.read("runs/by-class.jsonl")
    assert again.epochs[0]["metrics"]["recall"] == names["values"]["recall"].tolist()


def test_watch():
    assert run("watch.md")["optimizer"].last_step.step == 4


def test_collectives():
    assert run("collectives.md")


def test_data():
    names = run("data.md")
    assert names["rest"] == 1000 - 4 * 32
    assert sorted(i for shard in names["shards"] for i in shard.tolist()) == list(range(1000))


def test_explain():
    names = run("explain.md")
    report, importance, shap = names["report"], names["importance"], names["shap"]
    assert report.elements == importance.rows == 569
    assert report.loss == pytest.approx(importance.baseline, rel=1e-12)
    assert report.hardest[0].share > 0.1
    assert importance.importances_mean.max() > 0.01
    assert names["together"].features == ["size", "texture"]
    predict = hvd.predict_function(names["model"], output=names["probability"])
    assert abs(shap.values.sum(axis=1) + shap.base_values - predict(shap.data)).max() < 1e-6


def test_metrics():
    names = run("metrics.md")
    assert set(names["values"]) == {"accuracy", "f1", "auc", "loss"}
    assert 0 < names["estimate"].error < 0.01


def test_training():
    names = run("training.md")
    best, stopping = names["best"], names["stopping"]
    assert best.best == stopping.best
    assert best.steps == stopping.steps >= 4
    assert names["position"]["loader"]["epoch"] == 0


def test_elastic():
    names = run("elastic.md")
    state, before = names["state"], names["checkpoint"].load()
    assert state.step == 26  # what was left of three epochs of 13 steps
    assert before.step == 10
    assert before.values == {"note": "any values: numbers, strings, arrays"}


def _text(guide: str) -> str:
    return (DOCS / guide).read_text()


def test_what_guides_show_in_passing(tmp_path):
    """Snippets that take names as given."""
    names: dict[str, object] = {}
    exec(
        "import torch, hvdloss, hvdloss.torch as hvd\n"
        "from hvdloss.control import BatchShares, ImportanceWeights\n"
        "from hvdloss.losses import InfoNCE\n"
        "from hvdloss.data import Parquet\n"
        "import pyarrow as pa, pyarrow.parquet as pq\n"
        "features = torch.nn.Linear(8, 32)\n"
        "batches = [(torch.ones(2, 8), torch.tensor([1, 2]), torch.ones(2))]\n",
        names,
    )
    readme = (DOCS.parent / "README.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        exec(block.replace("100_000", "1_000"), names)
    (loop,) = re.findall(r"```python\n(.*?)```", _text("torch.md"), re.DOTALL)
    exec(loop, names)
    (simulated,) = re.findall(r"```python\n(.*?)```", _text("simulate.md"), re.DOTALL)
    exec(simulated.replace("ranks=64", "ranks=4").replace("{3: 2.0}", "{1: 2.0}"), names)
    (split,) = re.findall(r"```py\n(.*?)```", _text("losses.md"), re.DOTALL)
    # One process has no ranks to split a model over: its grid is 1 x 1.
    exec(split.replace("model=2", "model=1").replace('process_sets="dynamic"', ""), names)
    assert names["optimizer"].last_step.step == 1

    elastic = re.findall(r"```py\n(.*?)```", _text("data.md"), re.DOTALL)[1]
    names["pq"].write_table(names["pa"].table({"x": [1.0] * 7, "y": [2.0] * 7}), tmp_path / "a.parquet")
    exec("model = torch.nn.Linear(1, 1)\nobjective = hvd.Objective('mse')\n"
         "optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), None, objective)",
         names)  # fmt: skip
    names["files"] = names["Parquet"](tmp_path)
    steps = (
        "optimizer.zero_grad(); objective(model(torch.ones(len(batch['x']), 1)), "
        "batch['y'].float()[:, None]).backward(); optimizer.step()"
    )
    exec(elastic.replace("for x, y in", "for batch in").replace("...", steps), names)
    exec("train(state)", names)
    assert names["state"].step == 1
