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


def _text(guide: str) -> str:
    return (DOCS / guide).read_text()
